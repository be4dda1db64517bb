"""snnTorch's neurons with hidden state: kept as they are, step by step, with the layers around them in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import with_states

snntorch = pytest.importorskip("snntorch")

NEURONS: dict[str, dict[str, Any]] = {
    "Leaky": {"beta": 0.9},
    "Synaptic": {"alpha": 0.9, "beta": 0.8},
    "Alpha": {"alpha": 0.9, "beta": 0.8},
    "Lapicque": {"beta": 0.9},
    "RLeaky": {"beta": 0.9, "linear_features": 6},
    "RSynaptic": {"alpha": 0.9, "beta": 0.8, "linear_features": 6},
}


def network(name: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    site = getattr(snntorch, name)(init_hidden=True, **NEURONS[name], **options)
    return nn.Sequential(nn.Linear(6, 6), site, nn.Linear(6, 3))


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
@pytest.mark.parametrize("name", NEURONS)
def test_outputs_states_and_gradients_are_those_of_the_step_loop(name: str, schedule: Any) -> None:
    for steps in (1, 5, 16):
        net, x = network(name), 3.0 * torch.rand(steps, 4, 6)
        parity = snncompile.verify(net, snncompile.optimize(net, steps, schedule=schedule), x)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
def test_every_reset_mechanism_and_learnable_parameters(mechanism: str) -> None:
    net = network("Leaky", reset_mechanism=mechanism, learn_beta=True, learn_threshold=True)
    x = 3.0 * torch.rand(5, 4, 6)
    assert snncompile.verify(net, snncompile.optimize(net, 5, schedule="breadth-first"), x).ok


def test_the_layers_around_are_batched_and_the_report_says_why_the_neuron_is_not() -> None:
    opt = snncompile.optimize(network("Leaky"), 5, schedule="breadth-first", example_input=torch.rand(5, 4, 6))
    assert "batched(net['0']" in opt.code
    assert "batched(net['2']" in opt.code
    reasons = [decision.reason for decision in opt.report.decisions if decision.node == "1"]
    assert any("it branches on the shape" in reason for reason in reasons)


def test_reset_puts_the_hidden_state_back() -> None:
    opt = snncompile.optimize(network("Leaky"), 5)
    x = 3.0 * torch.rand(5, 4, 6)
    with torch.no_grad():
        first = opt(x)
        assert not torch.equal(opt(x), first)
        opt.reset()
        assert torch.equal(opt(x), first)


class ConvNet(nn.Module):
    """The convolutional network of snnTorch's tutorials, with a batch norm; its states start from None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.lif1 = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), snntorch.Leaky(0.8)
        self.fc1, self.lif2 = nn.Linear(12, 4), snntorch.Synaptic(alpha=0.9, beta=torch.rand(4), learn_beta=True)

    def forward(self, x: Tensor, mem1: Any = None, syn2: Any = None, mem2: Any = None) -> Any:
        spk1, mem1 = self.lif1(nn.functional.max_pool2d(self.bn1(self.conv1(x)), 2), mem1)
        spk2, syn2, mem2 = self.lif2(self.fc1(spk1.flatten(1)), syn2, mem2)
        return spk2, mem1, syn2, mem2


def step_loop(net: nn.Module, x_seq: Tensor, *states: Any) -> Any:
    spk_rec = []
    for x in x_seq:
        spk, *states = net(x, *states)
        spk_rec.append(spk)
    return torch.stack(spk_rec), *states


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
def test_a_network_of_the_tutorials_over_several_batches(schedule: Any, training: bool) -> None:
    net, reference = ConvNet().train(training), ConvNet().train(training)
    opt = snncompile.optimize(with_states(net, 3), 5, schedule=schedule)
    with torch.set_grad_enabled(training):
        for batch in (4, 4, 2):
            x = 2.0 * torch.rand(5, batch, 1, 6, 6)
            mem1, (syn2, mem2) = net.lif1.reset_mem(), net.lif2.reset_mem()
            start = reference.lif1.reset_mem(), *reference.lif2.reset_mem()
            got, expected = opt(x, mem1, syn2, mem2), step_loop(reference, x, *start)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(opt(x, *got[1:]), step_loop(reference, x, *expected[1:]), rtol=1e-5, atol=1e-5)
            # Without states it goes on from those that the neurons keep.
            torch.testing.assert_close(opt(x), step_loop(reference, x, None, None, None), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.bn1.running_mean, reference.bn1.running_mean)
    if schedule != "depth-first":
        assert "batched(net['conv1']" in opt.code
        assert "batched(net['fc1']" in opt.code


def test_utils_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    from snntorch import utils

    # `utils.reset` goes over every neuron of the process, those of other tests too, and fails on a DeltaLeaky.
    monkeypatch.setattr(snntorch.SpikingNeuron, "instances", [])
    net, reference, x = network("Leaky"), network("Leaky"), 3.0 * torch.rand(5, 4, 6)
    opt = snncompile.optimize(net, 5)
    with torch.no_grad():
        for _ in range(2):
            utils.reset(net)
            utils.reset(reference)
            assert torch.equal(opt(x), torch.stack([reference(step) for step in x]))


@pytest.mark.parametrize("is_explicit", [False, True])
def test_a_branch_on_a_buffer_keeps_the_neuron_alone_as_it_is(is_explicit: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 3)
            self.lif = snntorch.Leaky(0.9, reset_delay=False, init_hidden=not is_explicit, threshold=0.3)

        def forward(self, x: Tensor, *mem: Any) -> Any:
            out = self.lif(self.fc1(x), *mem)
            return (self.fc2(out[0]), out[1]) if is_explicit else self.fc2(out)

    net = with_states(Net()) if is_explicit else Net()
    opt = snncompile.optimize(net, 5, schedule="breadth-first")
    assert snncompile.verify(net, opt, 3.0 * torch.rand(5, 4, 6)).ok
    opt(3.0 * torch.rand(5, 4, 6))
    assert "batched(net['fc1']" in opt.code


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(x.shape[0], 5),
        lambda x: torch.zeros((x.size(0), 5)),
        lambda x: torch.stack([torch.zeros(5) for _ in range(x.shape[0])]),
    ],
    ids=["zeros", "zeros of a tuple", "range"],
)
def test_a_forward_that_counts_by_the_shape_is_kept_as_it_is(make: Any) -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mem: Any = None

        def forward(self, x: Tensor) -> Any:
            self.mem = 0.9 * (make(x) if self.mem is None else self.mem) + x
            return self.mem

    net = nn.Sequential(nn.Linear(6, 5), Memory(), nn.Linear(5, 3))
    opt = snncompile.optimize(net, 5, schedule="breadth-first")
    assert snncompile.verify(net, opt, torch.randn(5, 4, 6)).ok
    opt(torch.randn(5, 4, 6))
    assert "batched(net['2']" in opt.code
