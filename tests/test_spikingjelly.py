"""Networks of SpikingJelly 2.0: conversions and directly built ones, against the step loop in every order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError

from .resnet import ResNet18

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import ann2snn, functional, layer, neuron, surrogate

SCHEDULES = ("depth-first", "breadth-first", 3, "auto")
STEPS = (1, 2, 7, 64)
BATCH = 4  # linear layers round alike from here on, so the default gives the step loop's bits


def converted_resnet(width: int) -> nn.Module:
    """A random ResNet-18 through SpikingJelly's rate coding."""
    calibration = [(torch.rand(8, 3, 32, 32), torch.zeros(8))]
    net = ResNet18(width).eval()
    converted: nn.Module = ann2snn.FXConverter(ann2snn.RateCodingRecipe(calibration, mode="max")).convert(net)
    return converted.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return converted_resnet(8)


class Direct(nn.Module):
    """Convolution, batch norm and three kinds of neuron, from torch's layers or SpikingJelly's wrappers."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn1 = layers.BatchNorm2d(8)
        self.sn1 = neuron.IFNode(surrogate_function=surrogate.ATan())
        self.conv2 = layers.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = layers.BatchNorm2d(8)
        self.sn2 = neuron.LIFNode(tau=2.0, v_reset=None, detach_reset=True)
        self.pool = layers.MaxPool2d(2)
        self.flatten = layers.Flatten()
        self.fc = layers.Linear(8 * 4 * 4, 10)
        self.sn3 = neuron.ParametricLIFNode(init_tau=1.5, decay_input=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sn1(self.bn1(self.conv1(x)))
        x = self.sn2(self.bn2(self.conv2(x))) + x
        return self.sn3(self.fc(self.flatten(self.pool(x))))


def direct(layers: Any) -> Direct:
    """A `Direct` whose neurons fire, with batch statistics away from their defaults."""
    net = Direct(layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_var, 0.2, 1.0)
    return net.eval()


def inputs(steps: int) -> Tensor:
    return torch.rand(steps, BATCH, 2, 8, 8) * 2


def assert_parity(net: nn.Module, x: Tensor, schedule: Any, *, exact: bool) -> None:
    # In training, kernels add up gradients in another order than the step loop does.
    backend = "eager" if exact and net.training else "auto"
    opt = snncompile.optimize(net, x.shape[0], schedule=schedule, backend=backend)
    parity = snncompile.verify(net, opt, x)
    assert parity.ok, str(parity)
    assert parity.exact or not exact, str(parity)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_converted_resnet_has_the_step_loops_bits(resnet: nn.Module, schedule: Any, steps: int) -> None:
    with torch.no_grad():
        assert_parity(resnet, torch.rand(steps, BATCH, 3, 32, 32), schedule, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_converted_resnet_of_full_width(schedule: Any) -> None:
    with torch.no_grad():
        assert_parity(converted_resnet(64), torch.rand(7, BATCH, 3, 32, 32), schedule, exact=False)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layers", [nn, layer], ids=["torch", "wrappers"])
def test_direct_network_in_eval_mode(layers: Any, schedule: Any, steps: int) -> None:
    with torch.no_grad():
        assert_parity(direct(layers), inputs(steps), schedule, exact=True)


def test_direct_network_fires() -> None:
    """Parity of silent neurons would say little."""
    with torch.no_grad():
        spikes = snncompile.optimize(direct(nn), 7)(inputs(7))
    assert 0.02 < spikes.mean() < 0.98


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layers", [nn, layer], ids=["torch", "wrappers"])
def test_gradients_and_statistics_in_train_mode(layers: Any, schedule: Any) -> None:
    assert_parity(direct(layers).train(), inputs(5), schedule, exact=schedule == "depth-first")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_call_equals_two_of_half_the_steps(schedule: Any) -> None:
    net = direct(nn)
    x = inputs(8)
    whole = snncompile.optimize(net, 8, schedule=schedule)
    half = snncompile.optimize(net, 4, schedule=schedule)
    with torch.no_grad():
        expected = whole(x)
        states = {name: getattr(net, name).v.clone() for name in ("sn1", "sn2", "sn3")}
        functional.reset_net(net)
        got = torch.cat([half(x[:4]), half(x[4:])])
    assert torch.equal(got, expected)
    for name, value in states.items():
        assert torch.equal(getattr(net, name).v, value), name


def test_changed_weight_changes_the_output_as_in_the_loop() -> None:
    net, x = direct(layer), inputs(7)
    opt = snncompile.optimize(net, 7, schedule=3)
    with torch.no_grad():
        before = opt(x)
        opt.reset()
        net.conv1.weight.mul_(3.0)
        net.bn2.weight.neg_()
        after = opt(x)
        opt.reset()
        assert not torch.equal(before, after)
        assert snncompile.verify(net, opt, x).exact


def test_states_are_where_the_loop_leaves_them() -> None:
    net, x = direct(nn), inputs(7)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        snncompile.optimize(net, 7, schedule="breadth-first")(x)
        for step in x:
            twin(step)
    assert torch.equal(net.sn2.v, twin.sn2.v)
    functional.reset_net(net)
    assert net.sn2.v == 0.0


def test_reset_net_of_spikingjelly_resets_the_optimised_module() -> None:
    net, x = direct(nn), inputs(7)
    opt = snncompile.optimize(net, 7)
    with torch.no_grad():
        first = opt(x)
        functional.reset_net(opt)
        assert torch.equal(opt(x), first)


class SlowLeak(neuron.SimpleLIFNode):
    """A neuron as SpikingJelly's users write them: another charge, nothing else."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.9 + x * x


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_subclass_that_overrides_neuronal_charge_runs_step_by_step(schedule: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 8), SlowLeak(tau=2.0, decay_input=True), nn.Linear(8, 4)).eval()
    x = torch.randn(7, BATCH, 6) * 2
    opt = snncompile.optimize(net, 7, schedule=schedule, example_input=x)
    with torch.no_grad():
        assert snncompile.verify(net, opt, x).exact
    assert any("SlowLeak" in decision.reason for decision in opt.report.decisions)


def test_stored_membrane_sequence_is_kept() -> None:
    net = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(store_v_seq=True)).eval()
    twin = copy.deepcopy(net)
    x = torch.randn(7, BATCH, 6)
    with torch.no_grad():
        snncompile.optimize(net, 7, schedule="breadth-first")(x)
        for step in x:
            twin(step)
    assert torch.equal(net[1].v_seq, twin[1].v_seq)


def test_neurons_that_share_a_surrogate_are_not_coupled() -> None:
    net = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(), nn.Linear(8, 8), neuron.IFNode()).eval()
    assert net[1].surrogate_function is net[3].surrogate_function
    opt = snncompile.optimize(net, 7, schedule="breadth-first", example_input=torch.zeros(7, BATCH, 6))
    assert [loop.chunk for loop in opt.report.schedule.loops()] == [7]


def test_a_network_that_mixes_step_modes_is_refused_with_the_remedy() -> None:
    net = direct(layer)
    functional.set_step_mode(net.sn1, "m")
    with pytest.raises(CaptureError, match="set_step_mode"):
        snncompile.optimize(net, 7)
