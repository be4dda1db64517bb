"""Networks in multi-step mode: `opt(x_seq)` is `net(x_seq)`, with what works on each step alone run in any order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, ScheduleError, functional, measure_peak, neuron
from snncompile.ir import Batching
from snncompile.schedule import Loop, Schedule, Segment

N = 4
SCHEDULES: tuple[Any, ...] = ("depth-first", 3, "auto")


def lif(**options: Any) -> nn.Module:
    return neuron.LIFNode(step_mode="m", **options)


def check(net: nn.Module, x: Tensor, schedules: tuple[Any, ...] = SCHEDULES, *, exact: bool = True) -> Any:
    """Compare with the network itself in every schedule; returns the last optimised module, planned."""
    for schedule in schedules:
        opt = snncompile.optimize(net, x.shape[0], schedule=schedule)
        parity = snncompile.verify(net, opt, x)
        assert parity.ok, f"{schedule}: {parity}"
        assert parity.exact or not exact or net.training, f"{schedule}: {parity}"
        with torch.set_grad_enabled(net.training):
            opt.plan(x)
    return opt


def bound(opt: Any) -> list[str]:
    """Why parts of a network run on all steps at once."""
    return [d.reason for d in opt.report.decisions if d.pass_name == "capture" and "steps at once" in d.reason]


class Folded(nn.Module):
    """The usual way with layers that know no time: time joins the batch and leaves it again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fire = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), lif()
        self.pool, self.fc, self.last = nn.AvgPool2d(2), nn.Linear(27, 5), lif()

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, _, height, width = x.shape
        y = self.norm(self.conv(x.flatten(0, 1))).view(steps, batch, 3, height, width).contiguous()
        y = self.pool(self.fire(y).flatten(0, 1)).flatten(1)
        return self.last(self.fc(y).unflatten(0, (steps, batch)))


class Attention(nn.Module):
    """Attention among the tokens of each step, and a read-out over all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.fire, self.head = nn.Linear(6, 6), nn.Linear(6, 6), lif(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected [T, N, tokens, features], got {tuple(x.shape)}")
        attention = torch.softmax(self.q(x) @ self.k(x).transpose(-2, -1), dim=-1)
        y = self.fire(x + 2.0 * (attention @ x)).mean(2)
        return self.head(y.mean(0))


class TimeAttention(nn.Module):
    """Weighs the steps by all of them; the network goes on with a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fire, self.last = nn.Linear(6, 6), lif(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        weights = torch.softmax(y.mean((1, 2)), 0)
        return self.last(self.fire(y * weights.view(-1, 1, 1) * y.shape[0]))


def image(steps: int = 5) -> Tensor:
    return 3.0 * torch.rand(steps, N, 2, 6, 6)


def vector(steps: int = 5) -> Tensor:
    return 3.0 * torch.rand(steps, N, 6)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_a_plain_network_is_freed_altogether(steps: int) -> None:
    net = nn.Sequential(nn.Linear(6, 8), lif(), nn.Linear(8, 8), lif(v_reset=None), nn.Linear(8, 3)).eval()
    opt = check(net, vector(steps))
    assert not bound(opt)
    assert all(module.step_mode == "m" for module in net if hasattr(module, "step_mode"))


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_layers_around_a_folded_batch_are_freed(steps: int) -> None:
    assert not bound(check(Folded().eval(), image(steps)))


def test_gradients_are_those_of_the_network() -> None:
    opt = check(nn.Sequential(nn.Linear(6, 8), lif(), nn.Linear(8, 3), lif()), vector())
    assert not bound(opt)


def test_statistics_of_all_steps_are_taken_of_all_steps() -> None:
    (reason,) = bound(check(Folded().train(), image()))
    assert reason == "runs on all 5 steps at once: norm (BatchNorm2d) normalises by the statistics of all steps"


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("training", [False, True])
def test_a_readout_over_all_steps_has_no_steps(steps: int, training: bool) -> None:
    net, x = Attention().train(training), 3.0 * torch.rand(steps, N, 3, 6)
    opt = check(net, x)
    assert opt(x).shape == (N, 3)
    assert bound(opt) == [f"runs on all {steps} steps at once: mean_1 has no single-step form"]


@pytest.mark.parametrize("training", [False, True])
def test_what_depends_on_all_steps_comes_back_as_a_sequence(training: bool) -> None:
    opt = check(TimeAttention().train(training), vector())
    (reason,) = bound(opt)
    assert "softmax" in reason or "mean" in reason
    wholes = [node.name for node in opt.latest_program.graph if node.batching is Batching.WHOLE]
    assert wholes == ["sequence_0"]
    assert opt.latest_program.graph["first"].batching is Batching.FOLD


def test_states_carry_over_from_sequence_to_sequence() -> None:
    net = Folded().eval()
    reference, x = copy.deepcopy(net), image(8)
    opt = snncompile.optimize(net, 4, schedule=2)
    with torch.no_grad():
        for half in (x[:4], x[4:]):
            assert torch.equal(opt(half), reference(half))
        assert torch.equal(net.fire.v, reference.fire.v)
        opt.reset()
        reference.fire.reset(), reference.last.reset()
        assert torch.equal(opt(x[4:]), reference(x[4:]))


@pytest.mark.parametrize("readout", ["sum", "mean", "last"])
def test_readouts_combine_the_steps_of_a_sequence(readout: str) -> None:
    net, x = Folded().eval(), image()
    opt = snncompile.optimize(net, 5, readout=readout)
    assert snncompile.verify(net, opt, x).ok
    with pytest.raises(ValueError, match="a value that has no steps; use readout='sequence'"):
        snncompile.optimize(Attention(), 5, readout=readout)(3.0 * torch.rand(5, N, 3, 6))


def test_a_static_input_is_a_sequence_of_equal_steps() -> None:
    for net, x in ((Folded().eval(), image()[0]), (TimeAttention().eval(), vector()[0])):
        opt = snncompile.optimize(net, 5, static_input=True, schedule=2)
        assert snncompile.verify(net, opt, x).exact


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.fire, self.drop_too = nn.Linear(6, 6), nn.Dropout(0.4), lif(), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_too(self.fire(self.drop(self.fc(x))))


def test_random_numbers_are_drawn_for_all_steps_in_order() -> None:
    opt = check(Dropped().train(), vector())
    assert [reason.partition(": ")[2] for reason in bound(opt)] == [
        "drop (Dropout) draws its random numbers for all steps",
        "drop_too (Dropout) draws its random numbers for all steps",
    ]
    assert not bound(check(Dropped().eval(), vector()))


class Looping(nn.Module):
    """Loops over the steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fire = nn.Linear(6, 6), lif()

    def forward(self, x: Tensor) -> Tensor:
        y, carried = self.fire(self.fc(x)), torch.zeros_like(x[0])
        found = []
        for step in y:
            carried = 0.5 * carried + step
            found.append(carried)
        return torch.stack(found)


class Deciding(nn.Module):
    """Branches on values: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fire = nn.Linear(6, 6), lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.fc(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("net", [Looping(), Deciding()], ids=lambda net: type(net).__name__)
@pytest.mark.parametrize("training", [False, True])
def test_what_cannot_be_taken_apart_is_called_as_it_is(net: nn.Module, training: bool) -> None:
    assert len(bound(check(net.train(training), vector()))) == 1


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.fire = nn.Linear(6, 6), nn.ReLU(inplace=True), lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x))
        y += x
        return self.fire(y)


def test_writes_in_place_are_followed() -> None:
    assert not bound(check(InPlace().eval(), vector()))


class Shapes(nn.Module):
    """Dimensions named from both ends, joined, split and moved."""

    def __init__(self) -> None:
        super().__init__()
        self.fire = lif()
        self.scale = nn.Parameter(torch.rand(2, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        steps, batch = x.shape[:2]
        y = self.fire(x * self.scale)
        z = torch.cat([y, x], dim=2).transpose(-1, 3).permute(0, 1, 3, 4, 2)
        first, second = z.chunk(2, dim=-1)
        w = torch.stack([first, second], 2).sum(-1, keepdim=True).squeeze(5)
        u = w.reshape(steps, batch, -1)[:, :, 1:]
        return u.unsqueeze(2), {"mean": y.mean((-1, -2)), "norm": y.flatten(2).amax(dim=-1)}


def test_dimensions_move_with_time() -> None:
    assert not bound(check(Shapes().eval(), image()))


def test_measured_is_at_most_predicted_and_budgets_hold() -> None:
    for net, x in ((Folded().eval(), image(16)), (TimeAttention().eval(), vector(16)), (Attention().eval(), None)):
        x_seq = 3.0 * torch.rand(16, N, 3, 6) if x is None else x
        with torch.no_grad():
            for schedule in ("depth-first", "breadth-first", "auto"):
                opt = snncompile.optimize(net, 16, schedule=schedule, example_input=x_seq)
                functional.reset_net(opt)
                assert measure_peak(lambda opt=opt, x=x_seq: opt(x)) <= opt.report.predicted_peak_bytes
            budget = opt.report.predicted_peak_bytes
            assert snncompile.optimize(net, 16, budget, example_input=x_seq).report.predicted_peak_bytes <= budget


def test_a_schedule_must_give_all_steps_to_what_needs_them() -> None:
    net, x = TimeAttention().eval(), vector()
    opt = snncompile.optimize(net, 5, schedule="breadth-first", example_input=x)
    names = tuple(name for _, segment in opt.report.schedule.segments() for name in segment.nodes)
    with pytest.raises(ScheduleError, match="takes all 5 steps at once"):
        snncompile.optimize(net, 5, schedule=Schedule(5, Loop(2, (Segment(names),))), example_input=x)


def test_mixed_step_modes_are_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 6), lif())
    with pytest.raises(CaptureError, match="1 is in single-step mode, 3 in multi-step mode") as caught:
        snncompile.optimize(net, 5)
    assert caught.value.where == "1"


def test_changed_weights_and_modes_are_honoured() -> None:
    net, x = Folded().eval(), image()
    opt = snncompile.optimize(net, 5, schedule=2)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        opt(x)
        for both in (net, reference):
            both.conv.weight.mul_(-0.5)
        functional.reset_net(net)
        assert torch.equal(opt(x), reference(x))
        for both in (net, reference):
            both.train()
            functional.reset_net(both)
        assert torch.allclose(opt(x), reference(x))
        assert torch.equal(net.norm.running_mean, reference.norm.running_mean)


# SpikingJelly


def test_every_layer_and_container_of_spikingjelly() -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional as sj_functional
    from spikingjelly.activation_based import layer
    from spikingjelly.activation_based import neuron as sj_neuron

    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        layer.BatchNorm2d(4),
        sj_neuron.LIFNode(),
        layer.MaxPool2d(2),
        layer.SeqToANNContainer(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        layer.MultiStepContainer(sj_neuron.IFNode(), nn.Flatten(), nn.Linear(36, 8)),
        sj_neuron.ParametricLIFNode(),
        layer.Dropout(0.5),
        layer.Linear(8, 3),
    )
    for part in (net[0], net[1], net[2], net[3], net[6], net[7], net[8]):
        sj_functional.set_step_mode(part, "m")
    assert not bound(check(net.eval(), image()))
    reasons = bound(check(net.train(), image()))
    assert len(reasons) == 2
    assert all("statistics" in reason for reason in reasons)


@pytest.mark.parametrize("training", [False, True])
def test_a_neuron_that_needs_all_steps_gets_them(training: bool) -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer
    from spikingjelly.activation_based import neuron as sj_neuron

    net = nn.Sequential(
        layer.Linear(6, 6, step_mode="m"),
        sj_neuron.PSN(5),
        layer.Linear(6, 6, step_mode="m"),
        sj_neuron.SlidingPSN(2, step_mode="m"),
        sj_neuron.IFNode(step_mode="m"),
        layer.Linear(6, 3, step_mode="m"),
    ).train(training)
    opt = check(net, vector())
    assert [reason.partition(": ")[2] for reason in bound(opt)][:1] == ["1 (PSN): it has no single-step form"]
    chunks = {name: chunk for chunk, segment in opt.report.schedule.segments() for name in segment.nodes}
    assert chunks["sequence_0"] == 5


class Scaled(nn.Module):
    """A scale with a dimension of its own for time and for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fire = nn.Parameter(torch.rand(1, 1, 6)), lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.scale * x + x)


def test_a_parameter_with_a_dimension_for_time_is_one_of_each_step() -> None:
    opt = check(Scaled().eval(), vector())
    assert not bound(opt)
    assert {node.value.shape for node in opt.latest_program.graph.scheduled} == {(N, 6)}


class Encoder(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.before, self.behind = nn.Linear(6, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention, self.wide = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 16)
        self.act, self.narrow, self.head = nn.GELU(), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.before(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return self.head((x + self.narrow(self.act(self.wide(self.behind(x))))).mean(1))


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("recipe", ["rate coding", "local threshold balancing", "equivalent transformer", "STA"])
def test_what_the_recipes_of_spikingjelly_convert(recipe: str, mode: str) -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import ann2snn
    from spikingjelly.activation_based import functional as sj_functional

    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    shape = (N, 5, 6) if recipe in ("equivalent transformer", "STA") else (N, 2, 6, 6)
    data = [(torch.rand(shape), torch.zeros(N)) for _ in range(2)]
    ann: nn.Module = nn.Sequential(*layers, nn.Linear(36, 3)) if len(shape) == 4 else Encoder()
    recipes: dict[str, Any] = {
        "rate coding": lambda: ann2snn.RateCodingRecipe(data, mode="max"),
        "local threshold balancing": lambda: ann2snn.LocalThresholdBalancingRecipe(data),
        "equivalent transformer": lambda: ann2snn.TransformerTDEquivalentRecipe(time_steps=5),
        "STA": lambda: ann2snn.STATransformerRecipe(data, time_steps=5),
    }
    net = ann2snn.FXConverter(recipes[recipe]()).convert(ann.eval())
    sj_functional.set_step_mode(net, mode)
    sj_functional.reset_net(net)
    check(net.eval(), (data[0][0] / 5).expand(5, *shape).clone())


class Scaling(nn.Module):
    """Computes with parameters beside what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return y if y.shape[-1] != 6 else nn.functional.linear(y, self.weight.tanh())


class BetweenSequences(nn.Module):
    """A container by steps between two operations that share a value without steps."""

    def __init__(self, container: nn.Module) -> None:
        super().__init__()
        self.container, self.fire = container, lif()

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x.mean((1, 2)), 0).view(-1, 1, 1)
        y = self.container(x * weights)
        return self.fire(y * weights + y)


@pytest.mark.parametrize("training", [False, True])
def test_parameters_inside_a_container_by_steps_have_no_steps(training: bool) -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer

    freed = nn.Sequential(layer.MultiStepContainer(Scaling()), lif())
    assert not bound(check(freed.train(training), vector()))
    assert bound(check(BetweenSequences(layer.MultiStepContainer(Scaling())).train(training), vector()))
