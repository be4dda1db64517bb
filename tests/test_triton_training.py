"""Generated Triton that goes backward: the eager steps' gradients, interpreted; compiled without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.codegen import StepGradient, as_on_cuda, emit_triton_reverse, kept_steps, trace_step_gradient
from snncompile.neuron import StatefulModule
from snncompile.runtime import triton_build, triton_launch, triton_reverse, triton_scan
from snncompile.runtime.compiled_scan import Layout, ReverseOperands, ReverseResults
from snncompile.runtime.scan_kernels import ScanKernels
from snncompile.runtime.states import StateSlot
from snncompile.runtime.training import backward_from_ones

from .graphs import Calls
from .spikingjelly_neurons import exact_neurons, transcendental_neurons
from .test_scan_gradients import check, variants_of_spikingjelly
from .test_triton_kernels import ARCHS, sequence, spilled_bytes, traced

pytestmark = pytest.mark.skipif(not triton_build.version(), reason="Triton is not installed")

LENGTHS = (1, 7, 8, 9, 13, 27)  # tiles of every length, and several of the longest


def gradient_of(module: Any, x: Tensor) -> StepGradient:
    """Of one step of a neuron of one input and one state, which are like `x`."""
    names = [name for name, _ in module.named_parameters()]

    def step(inputs: Any, states: Any, own: Any) -> Any:
        replaced = {f"module.{name}": value for name, value in zip(names, own, strict=True)}
        return torch.func.functional_call(Stepper(module), replaced, (inputs, states))

    return trace_step_gradient(step, (x,), (torch.zeros_like(x),), 1, tuple(module.parameters()))


def gradients(
    module: Any, target: triton_scan.TritonTarget | None, x: Tensor, given: Sequence[Tensor | None], *, still: bool
) -> list[Tensor]:
    """Gradients of the input, the state before the first step and the parameters; without a target, by autograd."""
    parameters, v = tuple(module.parameters()), torch.full_like(x[0], 0.2)
    of_output, of_state = given
    if target is None:
        value, held = (x[:1] if still else x).clone().requires_grad_(), v.clone().requires_grad_()
        states: tuple[Tensor, ...] = (held,)
        outputs = []
        for step in range(len(x)):
            (output,), states = module.step((value[0 if still else step],), states)
            outputs.append(output)
        pairs = zip((torch.stack(outputs), *states), given, strict=True)
        loss = sum((result * gradient).sum() for result, gradient in pairs if gradient is not None)
        return list(torch.autograd.grad(loss, (value, held, *parameters)))  # type: ignore[arg-type]

    function, gradient = traced(module, *x.shape[1:]), gradient_of(module, x[0])
    reverse = target.build_reverse(function, gradient)
    of_input, of_first = torch.empty_like(x[:1] if still else x), torch.empty_like(v)
    numbers = [number() for number in function.numbers], [number() for number in gradient.numbers]
    size = v.numel()
    stride = 0 if still else size
    # A number for each neuron of a sample.
    broadcast = Layout(tuple(v.shape), (0, 1))
    tables = [(table.value().detach().contiguous(), broadcast) for table in (*function.tables, *gradient.tables)]
    operands = ReverseOperands(v, [x], [stride], [v], tables, numbers, [of_output], [size], [of_state])
    totals = reverse.run(len(x), operands, ReverseResults([of_input], [stride], [of_first]))
    own = [of(totals).float() for of in gradient.parameter_gradients if of is not None]
    return [of_input, of_first, *own]


class PerNeuron(StatefulModule):
    """A decay for each of 70 neurons, and a gain for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.decay = nn.Parameter(torch.linspace(-0.5, 1.5, 70))
        self.gain = nn.Parameter(torch.tensor(1.2))

    def step(self, inputs: Any, states: Any) -> Any:
        v = self.decay.clamp(0.0, 1.0) * states[0] + self.gain * inputs[0]
        return (self.decay * v,), (v,)


class Stepper(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Any, states: Any) -> Any:
        return self.module.step(inputs, states)


NEURONS: tuple[Any, ...] = (lambda: neuron.LIFNode(3.0), lambda: neuron.ParametricLIFNode(1.5, v_reset=None), PerNeuron)


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("make", NEURONS)
def test_gradients_are_those_of_the_eager_steps(make: Any, still: bool, interpreted: Any) -> None:
    for steps in LENGTHS:
        x, given = sequence(steps, 5, 70), (sequence(steps, 5, 70, seed=1), sequence(1, 5, 70, seed=2)[0])
        for wish in (given, (given[0], None)):
            pair = (gradients(make(), each, x, wish, still=still) for each in (interpreted, None))
            for a, b in zip(*pair, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("make", NEURONS)
def test_a_gradient_compiles_and_spills_nothing(make: Any, arch: int, tmp_path: Path) -> None:
    module = make()
    gradient = gradient_of(module, torch.zeros(2, 70))
    source = emit_triton_reverse(as_on_cuda(traced(module, 2, 70)), as_on_cuda(gradient))
    assert spilled_bytes(triton_launch.compiled(source, ("*fp32",) * source.pointers, arch, 0), tmp_path) == 0


class Many(StatefulModule):
    """So much to compute that a tile is one step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.weights = nn.ParameterList(nn.Parameter(torch.tensor(0.01 * n)) for n in range(40))

    def step(self, inputs: Any, states: Any) -> Any:
        (v,) = states
        for weight in self.weights:
            v = v + weight * (inputs[0] - v)
        return (v,), (v,)


@pytest.mark.parametrize(("make", "longest"), [(neuron.IFNode, 8), (Many, 1)])
def test_states_are_kept_before_each_tile_but_the_last(make: Any, longest: int, interpreted: Any) -> None:
    module = make()
    function, gradient = traced(module), gradient_of(module, torch.zeros(2, 3))
    for steps in range(1, 4 * longest):
        tiles, rest = divmod(steps, longest)
        assert kept_steps(function, gradient, steps) == tiles + f"{rest:b}".count("1") - 1


def test_every_pointwise_neuron_and_surrogate_of_spikingjelly(interpreted: Any) -> None:
    for make in (*exact_neurons().values(), *variants_of_spikingjelly().values()):
        check(make().train(), [sequence(10, 4, 6)], [1, 9], target=interpreted)
    for make in transcendental_neurons().values():
        check(make().train(), [sequence(10, 4, 6)], [1, 9], is_exact=False, target=interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_gradient_compiles_and_spills_nothing(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = triton_scan.TritonTarget(None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for make in (*exact_neurons().values(), *transcendental_neurons().values()):
        slot = StateSlot(make().train(), kernels := ScanKernels(interpreter, trains=True, reassociates=True))
        slot.scan(1, sequence(1, 4, 6).requires_grad_())
        (kernel,) = kernels._found.values()
        source = emit_triton_reverse(as_on_cuda(kernel.function), as_on_cuda(kernel.backward.gradient))
        compiled = triton_launch.compiled(source, ("*fp32",) * source.pointers, arch, 0)
        assert spilled_bytes(compiled, tmp_path) == 0


# In a network


def network() -> nn.Module:
    """Learnable decay, normalisation by running statistics, a residual addition, and a chain of two neurons."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)]
    neurons = [neuron.ParametricLIFNode(v_threshold=0.3), neuron.LIFNode(1.5, v_threshold=0.2), neuron.IFNode()]

    def forward(x: Any, conv: Any, norm: Any, other: Any, first: Any, second: Any, third: Any) -> Any:
        y = first(norm(conv(x)))
        return third(0.7 * second(other(y)) + y)

    net = Calls(forward, *parts, *neurons).train()
    net.parts[1].eval()
    return net


def assert_trains(device: str, schedule: Any) -> None:
    """With the step loop's gradients, by two kernels, within the promised peak."""
    net, x = network().to(device), sequence(7, 4, 2, 6, 6).to(device)
    opt = snncompile.optimize(net, 7, schedule=schedule, backend="triton", example_input=x)
    assert snncompile.verify(net, opt, x).ok
    said = [str(decision) for decision in opt.report.decisions]
    assert any("Triton kernels for neurons, forward and backward" in line for line in said)
    assert sum("runs as a Triton kernel" in line for line in said) == 2
    assert sum("in one pass over memory" in line for line in said) == 2
    opt.reset()
    peak = snncompile.measure_peak(lambda: backward_from_ones(opt(x)))
    assert peak <= opt.report.predicted_peak_bytes


@pytest.mark.parametrize("schedule", [3, "auto"])
def test_a_network_trains_by_triton_kernels_within_its_promised_peak(
    schedule: Any, interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*arguments: Any) -> None:
        run(*arguments)
        gc.collect()  # the interpreter holds on to tensors in cycles

    run = triton_launch.launch
    for module in (triton_scan, triton_reverse):
        monkeypatch.setattr(module, "launch", launch)
    gc.freeze()  # what is there already need not be searched
    try:
        assert_trains("cpu", schedule)
    finally:
        gc.unfreeze()


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
def test_on_cuda_a_network_trains_by_triton_kernels_within_its_promised_peak(schedule: Any) -> None:
    assert_trains("cuda", schedule)
