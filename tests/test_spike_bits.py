"""Training keeps spikes as bits: the same gradients, less memory, a prediction that holds, or a stated refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import snncompile
from snncompile import neuron, surrogate
from snncompile.codegen import trace_step_function
from snncompile.neuron import StatefulModule
from snncompile.runtime import cpp_build, spike_bits
from snncompile.runtime.spike_bits import KeepsBits, Packed

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

STEPS = 6


def spikes(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 63, 64, 2047, 2048, 2049, 70_001])
def test_bits_are_unpacked_to_the_same_floats(size: int, planes: int) -> None:
    x = torch.randint(2**planes, (size,), generator=torch.Generator().manual_seed(0)).float()
    packed = Packed.of(x, planes)
    assert packed is not None
    assert torch.equal(packed.unpack(), x)
    assert packed.bits.nbytes <= planes * (x.nbytes / 32 + 256)


def test_the_layout_is_that_of_what_was_packed() -> None:
    x = spikes(3, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    packed = Packed.of(x)
    assert packed is not None
    assert packed.unpack().stride() == x.stride()
    assert torch.equal(packed.unpack(), x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("other", [0.5, 2.0, -1.0, -0.0, 1.0000001, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5000, 99_999])
def test_what_holds_anything_else_is_not_packed(other: float, place: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x = spikes(100_000)
    x[place] = other
    assert Packed.of(x) is None


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_numbers_of_more_bits_are_not_packed(planes: int) -> None:
    for other in (2.0**planes, 2.0**31, -1.0, 0.5, -0.0, float("nan")):
        assert Packed.of(torch.tensor([0.0, 2.0**planes - 1, other]), planes) is None


def test_what_cannot_be_read_in_order_is_not_packed() -> None:
    assert Packed.of(spikes(8, 64)[:, ::2]) is None
    assert Packed.of(spikes(8, 1).expand(8, 64)) is None
    assert Packed.of(spikes(64).double()) is None


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 8), lambda: nn.Conv2d(1, 3, 3, padding=1), lambda: nn.AvgPool2d(2)]
)
@pytest.mark.parametrize("fires", [True, False])
def test_a_layer_has_the_same_gradients_whatever_comes_in(make: Callable[[], nn.Module], fires: bool) -> None:
    layer = make()
    x = spikes(100, 64) if fires else torch.randn(100, 64)
    x = x if isinstance(layer, nn.Linear) else x.view(100, 1, 8, 8)
    found = []
    for called in (layer, KeepsBits(layer)):
        given = x.clone().requires_grad_()
        y = called(given)
        targets = (given, *layer.parameters())
        first = torch.autograd.grad(y.square().sum(), targets, create_graph=True)
        again = torch.autograd.grad(sum(gradient.sum() for gradient in first), targets, allow_unused=True)
        found.append([y, *first, *again])
    for a, b in zip(*found, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_where_hooks_are_forbidden_a_layer_is_called_as_it_is() -> None:
    layer, x = nn.Linear(64, 8), spikes(100, 64)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        y = KeepsBits(layer)(x)
    y.sum().backward()
    assert layer.weight.grad is not None
    layer.weight.grad = None

    def loss(x: Tensor) -> Tensor:
        return KeepsBits(layer)(x).sum()

    assert torch.equal(torch.func.grad(loss)(x), layer.weight.sum(0).expand(100, 64))


FIRE = surrogate.ATan()


@pytest.mark.parametrize(
    ("output", "largest"),
    [
        (lambda v: FIRE(v - 1.0), 1),
        (lambda v: (v > 1.0).float(), 1),
        (lambda v: 1.0 - FIRE(v - 1.0), 1),
        (lambda v: torch.where(v > 1.0, FIRE(v - 2.0), FIRE(-v)), 1),
        (lambda v: FIRE(v - 1.0) * FIRE(v - 0.5), 1),
        (lambda v: torch.maximum(FIRE(v - 1.0), FIRE(-v)), 1),
        (lambda v: FIRE(v - 1.0) + FIRE(v - 0.5), 2),
        (lambda v: 3.0 * FIRE(v - 1.0) + FIRE(v), 4),
        (lambda v: FIRE(v - 1.0) - 1.0, None),
        (lambda v: 2.0 - FIRE(v - 1.0), None),
        (lambda v: 0.5 * FIRE(v - 1.0), None),
        (lambda v: v * FIRE(v - 1.0), None),
        (lambda v: torch.where(v > 1.0, FIRE(v - 2.0), v), None),
    ],
)
def test_what_a_step_says_of_its_output_is_so(output: Callable[[Tensor], Tensor], largest: int | None) -> None:
    x = torch.linspace(-3.0, 3.0, 100)

    def step(inputs: Any, states: Any) -> Any:
        v = 0.5 * states[0] + inputs[0]
        return (output(v),), (v,)

    with torch.no_grad():
        function = trace_step_function(step, (x,), (torch.zeros(100),))
        values = set(step((x,), (torch.zeros(100),))[0][0].tolist())
    assert function.largest() == (largest,)
    if largest is not None:
        assert max(values) == largest
        assert values.issubset(range(largest + 1))


def test_a_step_that_adds_to_spikes_says_how_large_the_sum_is() -> None:
    def step(inputs: Any, states: Any) -> Any:
        v = 0.5 * states[0] + inputs[0]
        return (FIRE(v - 1.0) + inputs[1], FIRE(v - 1.0)), (v,)

    with torch.no_grad():
        function = trace_step_function(step, (torch.zeros(100), torch.zeros(100)), (torch.zeros(100),))
    assert function.largest() == (None, 1)
    assert function.largest((None, 3)) == (4, 1)
    assert function.largest((3, None)) == (None, 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(surrogate_function=surrogate.ATan())]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1), neuron.ParametricLIFNode(v_threshold=0.3)]
    return nn.Sequential(
        *(*layers, nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.3), nn.AvgPool2d(2)),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 10)),
    ).train()


def images(steps: int = STEPS, size: int = 32) -> Tensor:
    return 3.0 * torch.rand(steps, 4, 2, size, size, generator=torch.Generator().manual_seed(1))


def said_of_bits(opt: Any) -> dict[str, str]:
    return {d.node: d.reason for d in opt.report.decisions if d.pass_name == "keep-spikes-as-bits"}


@pytest.mark.parametrize("schedule", ["breadth-first", 4, "auto", "depth-first"])
def test_a_network_trains_to_the_same_bits_in_less_memory(schedule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, peaks, x = [], [], images()
    for least in (spike_bits._LEAST_ELEMENTS, 10**9):
        monkeypatch.setattr(spike_bits, "_LEAST_ELEMENTS", least)
        net = network()
        opt = snncompile.optimize(net, STEPS, schedule=schedule, example_input=x)
        assert set(said_of_bits(opt).values()) == {"backward keeps its input, spikes, as bits"}
        assert set(said_of_bits(opt)) == {"2", "4", "6", "8", "9", "11"}
        opt(x).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        opt.reset()
        peaks.append(snncompile.measure_peak(lambda opt=opt: opt(x).sum().backward()))
        assert peaks[-1] <= opt.report.predicted_peak_bytes <= 1.05 * peaks[-1]
    assert all(map(torch.equal, *gradients))
    if schedule != "depth-first":
        assert peaks[0] < 0.85 * peaks[1]


def test_the_promised_peak_holds_for_long_runs() -> None:
    x = images(24, 16)
    opt = snncompile.optimize(network(), 24, schedule=4, example_input=x)
    opt(x).sum().backward()
    opt.reset()
    peak = snncompile.measure_peak(lambda: opt(x).sum().backward())
    assert peak <= opt.report.predicted_peak_bytes <= 1.05 * peak


class Gated(nn.Module):
    """Spikes that a product keeps beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron, self.layer = neuron.LIFNode(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(x)
        gated: Tensor = self.layer(y) * y
        return gated


class Residual(Gated):
    """Spikes that an addition reads beside a layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(x)
        added: Tensor = self.layer(y) + y
        return added


class Summed(Gated):
    """Layers of sums of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.wide = neuron.LIFNode(v_threshold=0.3), nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Any:
        a, b = self.neuron(x), self.second(x)
        both = a + b
        return self.layer(both), self.wide(torch.cat([both, a], dim=1))


class Returned(Gated):
    def forward(self, x: Tensor) -> Any:
        y = self.neuron(x)
        return self.layer(y), y.view(-1, 8, 8)


class Twice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(self.neuron(x)))
        return y


class Functional(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(x)
        return F.linear(y, self.layer.weight) + self.layer(y)


class Graded(StatefulModule):
    """Spikes of a height."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.fire = surrogate.ATan()

    def step(self, inputs: Any, states: Any) -> Any:
        v = 0.5 * states[0] + inputs[0]
        return (0.5 * self.fire(v - 1.0),), (v,)


class OfHeight(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = Graded()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.neuron(x))
        return y


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Residual, "backward keeps its input, spikes, as bits"),
        (Summed, "backward keeps its input, sums of spikes, as 2 bits each"),
        (Gated, "keeps the same spikes as they are"),
        (Functional, "keeps the same spikes as they are"),
        (Returned, "its input leaves the network"),
        (Twice, "it is called more than once in a step"),
        (OfHeight, None),
    ],
)
def test_where_spikes_are_kept_otherwise_the_report_says_so(make: Callable[[], nn.Module], reason: str | None) -> None:
    net, x = make().train(), 3.0 * torch.rand(STEPS, 100, 64)
    opt = snncompile.optimize(net, STEPS, schedule=3, example_input=x)
    assert snncompile.verify(net, opt, x).ok
    found = said_of_bits(opt).get("layer")
    assert found is None if reason is None else reason in str(found)


class Stages(nn.Module):
    """Residual additions of spikes, one behind the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.3))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.2)) for _ in range(count)
        )
        self.last = nn.Linear(8 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for stage in self.stages:
            y = stage(y) + y
        result: Tensor = self.last(y.flatten(1))
        return result


def test_sums_of_more_and_more_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, peaks, x = [], [], images()
    for least in (spike_bits._LEAST_ELEMENTS, 10**9):
        monkeypatch.setattr(spike_bits, "_LEAST_ELEMENTS", least)
        torch.manual_seed(0)
        net = Stages(16)
        opt = snncompile.optimize(net, STEPS, schedule="breadth-first", example_input=x)
        opt(x).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        opt.reset()
        peaks.append(snncompile.measure_peak(lambda opt=opt: opt(x).sum().backward()))
        assert peaks[-1] <= opt.report.predicted_peak_bytes <= 1.05 * peaks[-1]
        said = said_of_bits(opt)
        assert [f"stages.{n}.0" in said for n in range(16)] == [n < 15 for n in range(16)]
        assert "as 4 bits" in said["stages.14.0"]
        assert "last" not in said
    assert all(map(torch.equal, *gradients))
    assert peaks[0] < 0.75 * peaks[1]


def test_nothing_is_kept_without_gradients() -> None:
    net = network().eval()
    with torch.no_grad():
        opt = snncompile.optimize(net, STEPS, schedule=3, example_input=images())
        opt(images())
    assert said_of_bits(opt) == {}


def test_backward_again_and_hooks_of_the_users() -> None:
    seen = []
    net = network()
    opt = snncompile.optimize(net, STEPS, schedule=3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        y = opt(images()).sum()
    assert seen
    first = torch.autograd.grad(y, list(net.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, list(net.parameters()))))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, list(net.parameters()))


def test_a_checkpointed_network_recomputes_the_same() -> None:
    found = []
    for is_checkpointed in (False, True):
        net = network()
        opt = snncompile.optimize(net, STEPS, schedule=3)
        opt(images())
        opt.reset()
        if is_checkpointed:

            def call(x: Tensor, opt: Any = opt) -> Tensor:
                opt.reset()
                y: Tensor = opt(x)
                return y

            y = torch.utils.checkpoint.checkpoint(call, images(), use_reentrant=False)
        else:
            y = opt(images())
        y.sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *found))
