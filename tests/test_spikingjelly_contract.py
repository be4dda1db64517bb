"""The semantic contract with SpikingJelly's modules: what a user changes, attaches or copies after compiling."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError

from .contract import step_loop
from .resnet import ResNet18

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import ann2snn, functional, layer, monitor, neuron

T = 5


def net_of(make: Callable[[], nn.Module]) -> nn.Sequential:
    """A neuron layer between linear ones, with a SpikingJelly neuron behind."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), make(), layer.Linear(8, 4), neuron.LIFNode(v_threshold=0.3))
    with torch.no_grad():
        net[0].weight.mul_(3.0)
        net[2].weight.mul_(3.0)
    functional.set_step_mode(net, "s")  # some classes start in multi-step mode
    return net


def dense_input(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.rand(T, batch, 6, generator=torch.Generator().manual_seed(seed)) * 2


NEURONS: dict[str, Callable[[], nn.Module]] = {
    "IF": lambda: neuron.IFNode(0.7),
    "soft LIF": lambda: neuron.LIFNode(v_threshold=0.5, v_reset=None, decay_input=False),
    "parametric LIF": lambda: neuron.ParametricLIFNode(v_threshold=0.4),
    "quadratic": neuron.QIFNode,
    "exponential": neuron.EIFNode,
    "Izhikevich": neuron.IzhikevichNode,
    "KLIF": neuron.KLIFNode,
    "CUBA LIF": neuron.CUBALIFNode,
    "LIAF": lambda: neuron.LIAFNode(act=torch.relu, threshold_related=True),
    "synapse filter": lambda: layer.SynapseFilter(tau=3.0),
    "dropout": lambda: layer.Dropout(0.4),
    "linear recurrent": lambda: layer.LinearRecurrentContainer(neuron.IFNode(), 8, 8),
}


@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 2])
def test_every_kind_of_module_with_memory(kind: str, schedule: str | int) -> None:
    net = net_of(NEURONS[kind]).train()
    opt = snncompile.optimize(net, T, schedule=schedule)
    parity = snncompile.verify(net, opt, dense_input())
    assert parity.ok, str(parity)
    reference = copy.deepcopy(net)
    for seed in range(2):  # states carried over, a held mask included
        torch.manual_seed(seed)
        got = opt(dense_input(seed))
        torch.manual_seed(seed)
        assert torch.equal(got, step_loop(reference, dense_input(seed)))


def test_converted_resnet_fires_and_follows_its_weights() -> None:
    calibration = [(torch.rand(2, 3, 32, 32), torch.zeros(2))]
    recipe = ann2snn.RateCodingRecipe(calibration, mode="max")
    net = ann2snn.FXConverter(recipe).convert(ResNet18(8).eval()).eval()
    x_seq = torch.rand(6, 2, 3, 32, 32)
    opt = snncompile.optimize(net, 6, readout="mean", schedule=2)
    with torch.no_grad():
        rates = [rate for row in opt.profile(x_seq).segments for _, rate in row.spikes_per_step]
        assert len(rates) == 17
        assert sum(rate > 0.01 for rate in rates) >= 6  # within 6 steps spikes do not reach the last layers
        before = opt(x_seq)
        opt.reset()
        next(net.parameters()).mul_(2.0)
        after = opt(x_seq)
        opt.reset()
        functional.reset_net(net)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, step_loop(net, x_seq).mean(0))


def test_a_monitor_attached_after_compiling_records_every_step_and_nothing_else() -> None:
    net = net_of(NEURONS["IF"])
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    expected = opt(dense_input())
    opt.reset()
    spikes = monitor.OutputMonitor(net, neuron.IFNode)
    assert torch.equal(opt(dense_input()), expected)
    assert [tuple(record.shape) for record in spikes.records] == [(4, 8)] * T
    spikes.remove_hooks()
    opt.reset()
    assert torch.equal(opt(dense_input()), expected)
    assert len(spikes.records) == T


def test_storing_the_membrane_sequence_switched_on_after_compiling_is_honoured() -> None:
    net = net_of(NEURONS["IF"])
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    expected = opt(dense_input())
    opt.reset()
    net[1].store_v_seq = True
    reference = copy.deepcopy(net)
    assert torch.equal(opt(dense_input()), expected)
    step_loop(reference, dense_input())
    assert torch.equal(net[1].v_seq, reference[1].v_seq)


def test_a_step_mode_switched_after_compiling_is_honoured() -> None:
    net = net_of(NEURONS["IF"])
    opt = snncompile.optimize(net, T)
    expected = opt(dense_input())
    opt.reset()
    functional.set_step_mode(net, "m")
    reference = copy.deepcopy(net)
    assert torch.equal(opt(dense_input()), reference(dense_input()))
    assert net[1].step_mode == "m"
    functional.set_step_mode(net[1], "s")
    with pytest.raises(CaptureError, match="mixes step modes"):
        opt(dense_input())
    opt.reset()
    functional.set_step_mode(net, "s")
    assert torch.equal(opt(dense_input()), expected)


@pytest.mark.parametrize("change", ["v_threshold", "v_reset", "tau", "surrogate"])
def test_attributes_of_a_neuron_are_read_at_every_call(change: str) -> None:
    net = net_of(lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5)).train()
    opt = snncompile.optimize(net, T, schedule=2)
    opt(dense_input())
    opt.reset()
    if change == "surrogate":
        net[1].surrogate_function = type(net[1].surrogate_function)(alpha=0.5)
    else:
        setattr(net[1], change, {"v_threshold": 0.05, "v_reset": None, "tau": 9.0}[change])
    parity = snncompile.verify(net, opt, dense_input())
    assert parity.ok, str(parity)


def test_another_batch_shape_is_what_the_step_loop_makes_of_it() -> None:
    """SpikingJelly starts a state that does not fit anew, without an error; so does the compiled network."""
    net = net_of(NEURONS["IF"])
    opt = snncompile.optimize(net, T)
    with torch.no_grad():
        opt(dense_input(batch=4))
        reference = copy.deepcopy(net)
        assert torch.equal(opt(dense_input(batch=7)), step_loop(reference, dense_input(batch=7)))
    assert torch.equal(net[1].v, reference[1].v)


def _through_torch_save(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_torch_save], ids=["deepcopy", "torch.save"])
def test_a_copy_has_states_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    net = net_of(NEURONS["parametric LIF"])
    opt = snncompile.optimize(net, T)
    with torch.no_grad():
        opt(dense_input(0))
    other = duplicate(opt)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(other(dense_input(1)), step_loop(reference, dense_input(1)))
    assert not torch.equal(net[1].v, reference[1].v)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_truncated_backpropagation_with_spikingjellys_detach_net(backend: str) -> None:
    net = net_of(NEURONS["parametric LIF"]).train()
    reference = copy.deepcopy(net)
    opt = snncompile.optimize(net, T, schedule="depth-first", backend=backend)
    for seed in range(3):
        opt(dense_input(seed)).mean().backward()
        step_loop(reference, dense_input(seed)).mean().backward()
        functional.detach_net(opt)
        functional.detach_net(reference)
    for (name, p), q in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q[1].grad, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        # Kernels add the gradients of parameters up in another order.
        assert backend != "eager" or torch.equal(p.grad, q[1].grad), name
