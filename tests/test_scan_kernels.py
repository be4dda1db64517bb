"""Generated C++ for neurons: the bits of the eager step, at every length and layout, or a stated refusal."""

from __future__ import annotations

import copy
import ctypes
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import SnnCompileError, measure_peak, neuron, surrogate
from snncompile.codegen import NotPointwise, Still, cpp, emit_scan, trace_step_function
from snncompile.ir import Node, OpKind, TensorType
from snncompile.neuron import StatefulModule
from snncompile.runtime import cpp_build, cpp_scan, scan_kernels, step_traces
from snncompile.runtime.states import StateSlot

from .spikingjelly_neurons import exact_neurons, transcendental_neurons

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

CHUNK = 4
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 13)


class CurrentLIF(StatefulModule):
    """Two states, two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.register_state("i", 0.5)

    def step(self, inputs: Any, states: Any) -> Any:
        x, gate = inputs
        i = 0.75 * states[1] + torch.where(gate > 0.3, x, -x)
        v = (0.9 * states[0] + i).clamp(-2.0, 2.5)
        spike = ((v >= 1.0) & (gate < 0.9)).to(v)
        return (spike, torch.minimum(v.abs(), i)), (v - spike, i)


NATIVE: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "soft IF": lambda: neuron.IFNode(v_threshold=0.7, v_reset=None),
    "LIF": neuron.LIFNode,
    "LIF, raw input": lambda: neuron.LIFNode(3.0, decay_input=False, v_reset=-0.1),
    "parametric LIF": lambda: neuron.ParametricLIFNode(1.5),
    "non-spiking LIF": lambda: neuron.NonSpikingLIFNode(2.0, v_reset=0.1),
}


def sequence(steps: int, *shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.rand((steps, *shape), generator=torch.Generator().manual_seed(seed)) - 0.5


def run(module: nn.Module, kernels: scan_kernels.ScanKernels | None, *chunks: Any, steps: int) -> tuple[Any, Any]:
    """Outputs and states of one chunk from the state that the module holds."""
    slot = StateSlot(module, kernels)
    with torch.no_grad():
        outputs = slot.scan(steps, *chunks)
    if kernels is not None:
        assert slot.bound is not None, "the eager step ran"
    return outputs, slot.states


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(*([v] if isinstance(v, Tensor) else list(v) for v in (got, expected)), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def check(module: nn.Module, *chunks: Any, steps: int, kernels: scan_kernels.ScanKernels | None = None) -> None:
    kernels = kernels or scan_kernels.ScanKernels()
    got, states = run(module, kernels, *chunks, steps=steps)
    expected, after = run(module, None, *chunks, steps=steps)
    assert_same(got, expected)
    assert_same(states, after)


def check_closely(module: nn.Module, x: Tensor, *, steps: int) -> Any:
    """Equal up to the rounding of transcendental functions; what comes out."""
    got = run(module, scan_kernels.ScanKernels(reassociates=True), x, steps=steps)
    expected = run(module, None, x, steps=steps)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    return expected[0]


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("steps", LENGTHS)
def test_outputs_and_states_have_the_bits_of_the_eager_step(kind: str, steps: int) -> None:
    module = NATIVE[kind]()
    check(module, sequence(steps, 5, 7), steps=steps)
    with torch.no_grad():
        module(sequence(1, 5, 7, seed=1)[0])  # and from a state that an earlier step left
    check(module, sequence(steps, 5, 7), steps=steps)


@pytest.mark.parametrize("steps", LENGTHS)
def test_every_pointwise_neuron_of_spikingjelly(steps: int) -> None:
    for make in exact_neurons().values():
        check(make(), sequence(steps, 4, 6), steps=steps)
    for make in transcendental_neurons().values():
        check_closely(make(), sequence(steps, 4, 6), steps=steps)


class OneStepInTime(StatefulModule):
    """A decay for each feature, which is multiplied along a time axis of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.decay = nn.Parameter(torch.full((1, 1, 6), 0.5))

    def step(self, inputs: Any, states: Any) -> Any:
        v = (self.decay * states[0].unsqueeze(0)).squeeze(0) + inputs[0]
        return (v,), (v,)


def test_a_parameter_may_have_more_dimensions_than_a_step() -> None:
    module, kernels, x = OneStepInTime(), scan_kernels.ScanKernels(), sequence(5, 4, 6)
    with torch.no_grad():
        # A kernel is proven on the numbers that there are, and used for others.
        for decay in (torch.full((1, 1, 6), 0.5), torch.linspace(0.1, 0.9, 6).view(1, 1, 6)):
            module.decay.copy_(decay)
            slots = [StateSlot(module, each) for each in (kernels, None)]
            for slot in slots:
                slot.states = (torch.zeros(4, 6),)
            assert torch.equal(*(slot.scan(5, x) for slot in slots))
            assert slots[0].bound is not None


@pytest.mark.parametrize("steps", LENGTHS)
def test_several_inputs_states_and_outputs(steps: int) -> None:
    check(CurrentLIF(), sequence(steps, 4, 6), sequence(steps, 4, 6, seed=1).clamp(0.0, 1.0), steps=steps)


LAYOUTS: dict[str, Callable[[], Any]] = {
    "channels last": lambda: torch.stack([s.to(memory_format=torch.channels_last) for s in sequence(5, 2, 3, 4, 4)]),
    "steps apart": lambda: sequence(10, 4, 6)[::2],
    "the same at every step": lambda: Still(sequence(1, 4, 6)[0]),
    "expanded": lambda: sequence(1, 4, 6).expand(5, 4, 6),
    "many elements": lambda: sequence(5, 8, 4099),
    "one element": lambda: sequence(5, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dense_layout(layout: str) -> None:
    chunk = LAYOUTS[layout]()
    if layout == "channels last":
        chunk = torch.empty(5, 2, 4, 4, 3).copy_(chunk.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)
    check(neuron.LIFNode(), chunk, steps=5)


def test_a_step_that_is_not_dense_runs_eagerly() -> None:
    module, kernels = neuron.LIFNode(), scan_kernels.ScanKernels()
    chunk = sequence(5, 4, 12)[:, :, ::2]
    slot = StateSlot(module, kernels)
    with torch.no_grad():
        got = slot.scan(5, chunk)
    assert slot.kernels is None
    assert torch.equal(got, run(module, None, chunk, steps=5)[0])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 1.0])
def test_special_values(special: float) -> None:
    for make in (neuron.LIFNode, CurrentLIF):
        module = make()
        chunk = sequence(4, 3, 5)
        chunk[1, 1] = special
        chunks = (chunk,) if make is neuron.LIFNode else (chunk, sequence(4, 3, 5, seed=1))
        got = run(module, scan_kernels.ScanKernels(), *chunks, steps=4)
        expected = run(module, None, *chunks, steps=4)
        flat = [
            [o for group in pair for o in ([group] if isinstance(group, Tensor) else group)] for pair in (got, expected)
        ]
        for a, b in zip(*flat, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), neuron.LIFNode(), nn.Flatten(), nn.Linear(144, 3), neuron.ParametricLIFNode()
    ).eval()


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
def test_a_network_has_the_step_loops_bits_and_its_promised_peak(schedule: Any) -> None:
    net, x = network(), sequence(7, 4, 2, 6, 6)
    with torch.no_grad():
        for steps in (1, 7):
            opt = snncompile.optimize(net, steps, schedule=schedule, backend="cpp", example_input=x[:steps])
            assert snncompile.verify(net, opt, x[:steps]).exact
            assert measure_peak(lambda opt=opt, n=steps: opt(x[:n])) <= opt.report.predicted_peak_bytes
            opt.reset()
            reasons = [d.reason for d in opt.report.decisions if d.pass_name == "backend" and d.node]
            assert reasons == ["runs as a C++ kernel"] * 2


def test_changed_attributes_and_parameters_are_honoured() -> None:
    net, x = network(), sequence(5, 4, 2, 6, 6)
    opt = snncompile.optimize(net, 5)
    with torch.no_grad():
        opt(x)
        net[1].v_threshold = 0.25
        net[1].tau = 3.0
        net[4].w.add_(0.5)
        opt.reset()
        reference = copy.deepcopy(net)
        assert torch.equal(opt(x), torch.stack([reference(step) for step in x]))
        net[4].w = nn.Parameter(torch.tensor(-1.0))
        net[1].v_reset = None
        opt.reset()
        reference = copy.deepcopy(net)
        assert torch.equal(opt(x), torch.stack([reference(step) for step in x]))


def test_another_length_batch_or_threshold_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_scan._compiled.cache_clear()
    built = []
    build = cpp_scan.build
    monkeypatch.setattr(cpp_scan, "build", lambda source: built.append(source) or build(source))
    for steps, batch, threshold in ((5, 4, 1.0), (9, 4, 1.0), (5, 3, 1.0), (5, 4, 0.3)):
        net = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(v_threshold=threshold))
        with torch.no_grad():
            snncompile.optimize(net, steps)(sequence(steps, batch, 6))
    assert len(built) == 1


class Looking(StatefulModule):
    """Branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + (inputs[0] if inputs[0].sum() > 0 else 2.0 * inputs[0])
        return (v,), (v,)


class Buffered(StatefulModule):
    """Has a number in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.register_buffer("gain", torch.full((), 0.5))

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + self.gain * inputs[0]
        return (v,), (v,)


def test_a_buffer_of_inference_mode_stands_in_no_kernels_way() -> None:
    with torch.inference_mode():
        part = Buffered()
    x = sequence(5, 4, 6)
    with torch.no_grad():
        opt = snncompile.optimize(nn.Sequential(part), 5, schedule=2, example_input=x)
        assert snncompile.verify(nn.Sequential(part), opt, x).ok
    (found,) = [d for d in opt.report.decisions if d.pass_name == "backend" and d.node]
    assert found.verdict.value == "done"


class Counting(Looking):
    """Counts its calls."""

    calls = 0

    def step(self, inputs: Any, states: Any) -> Any:
        self.calls += 1
        v = states[0] + inputs[0]
        return (v,), (v,)


class Smooth(Looking):
    def step(self, inputs: Any, states: Any) -> Any:
        v = torch.tanh(states[0] + inputs[0])
        return (v,), (v,)


class Erratic(Looking):
    def step(self, inputs: Any, states: Any) -> Any:
        v = torch.erf(states[0] + inputs[0])
        return (v,), (v,)


class Mixing(Looking):
    """Adds up over features."""

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + inputs[0].sum(-1, keepdim=True)
        return (v,), (v,)


class InDouble(Looking):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(6, dtype=torch.float64))

    def step(self, inputs: Any, states: Any) -> Any:
        v = (self.decay * states[0] + inputs[0]).float()
        return (v,), (v,)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Counting, "its step changes more than its states"),
        (Smooth, "its tanh may round otherwise than torch's; reassociate=True allows that"),
        (Erratic, "aten.erf.default has no place in a pointwise program"),
        (Mixing, "aten.sum.dim_IntList has no place"),
        (InDouble, "it computes in torch.float64"),
    ],
)
def test_what_has_no_kernel_runs_eagerly_and_the_report_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    net, x = nn.Sequential(nn.Linear(6, 6), make()), sequence(5, 4, 6)
    with torch.no_grad():
        opt = snncompile.optimize(net, 5, schedule=2, example_input=x)
        assert snncompile.verify(net, opt, x).ok
    (found,) = [d for d in opt.report.decisions if d.pass_name == "backend" and d.node]
    assert found.verdict.value == "refused"
    assert reason in found.reason


class ExponentialIF(StatefulModule):
    """Exponential integrate-and-fire neurons, gated: every transcendental function that kernels know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)

    def step(self, inputs: Any, states: Any) -> Any:
        (x,), (v,) = inputs, states
        v = v + (torch.sigmoid(3.0 * x) * x - v + torch.exp((v - 0.8) / 1.5)) / 2.0
        spike = (v >= 1.0).to(v)
        return (spike, torch.tanh(v)), ((1.0 - spike) * v,)


@pytest.mark.parametrize("steps", LENGTHS)
def test_transcendental_functions_are_within_rounding_where_that_is_allowed(steps: int) -> None:
    spikes, _ = check_closely(ExponentialIF(), sequence(steps, 5, 7), steps=steps)
    assert 0.1 < float(spikes.mean()) < 0.9


def test_exponential_neurons_of_spikingjelly_run_by_a_kernel_where_that_is_allowed() -> None:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    net, x = nn.Sequential(nn.Linear(6, 6), neurons.EIFNode()), sequence(7, 4, 6)
    with torch.no_grad():
        opt = snncompile.optimize(net, 7, schedule=3, reassociate=True, example_input=x)
        assert snncompile.verify(net, opt, x).ok
        assert any("runs as a C++ kernel" in decision.reason for decision in opt.report.decisions)


def test_states_are_thought_of_as_a_call_lays_them_out() -> None:
    contiguous = torch.empty(2, 3, 4, 4)
    given = TensorType.of(contiguous.to(memory_format=torch.channels_last))
    node = Node("lif", OpKind.STATEFUL, "0", state=(TensorType.of(contiguous),))
    assert scan_kernels.ScanKernels().obstacle(nn.Sequential(neuron.LIFNode()), node, [given]) == ""


def test_a_kernel_that_is_wrong_beyond_rounding_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpp._EXPRESSIONS, "tanh", "0.999f * hyperbolic_tangent({0})")
    slot = StateSlot(ExponentialIF(), scan_kernels.ScanKernels(reassociates=True))
    with torch.no_grad():
        slot.scan(4, sequence(4, 5, 7))
    assert slot.bound is None


def test_half_precision_and_autocast_run_eagerly() -> None:
    net, x = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode()), sequence(5, 4, 6)
    with torch.no_grad():
        assert snncompile.verify(net.double(), snncompile.optimize(net, 5), x.double()).exact
        net.float()
        with torch.autocast("cpu", torch.bfloat16):
            opt = snncompile.optimize(net, 5)
            assert snncompile.verify(net, opt, x).ok


def test_a_surrogate_that_does_not_spike_is_followed() -> None:
    class Soft(StatefulModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_state("v", 0.0)
            self.fire = surrogate.ATan()

        def step(self, inputs: Any, states: Any) -> Any:
            v = 0.5 * states[0] + inputs[0]
            spike = self.fire(v - 1.0)
            return (spike,), (v * (1.0 - spike),)

    check(Soft(), sequence(5, 4, 6), steps=5)


# The program and its source


def traced(module: StatefulModule) -> Any:
    x = torch.zeros(2, 3)
    states = module.materialize_states((x,), module.reset_values)
    return trace_step_function(module.step, (x,), states)


def test_the_program_and_its_source(golden: Callable[[str], None]) -> None:
    function = traced(neuron.LIFNode())
    golden(f"{function}\n\n{emit_scan(function)}")


def test_dead_instructions_are_left_out() -> None:
    class Wasteful(Looking):
        def step(self, inputs: Any, states: Any) -> Any:
            v = states[0] + inputs[0]
            v.abs().sqrt()
            return (v,), (v,)

    assert [i.operation for i in traced(Wasteful()).program] == ["add"]


def test_a_step_that_looks_at_values_has_no_program() -> None:
    with pytest.raises(NotPointwise, match="it cannot be traced without data"):
        traced(Looking())


def test_another_dtype_has_no_program() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(NotPointwise, match="float64"):
        trace_step_function(lambda inputs, states: (inputs, states), (x,), (x,))


# Building


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


SOURCE = 'extern "C" int answer() { return 42; }\n'


def test_a_library_is_built_once_and_only_the_user_can_write_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_build.build(SOURCE).answer() == 42
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (library,) = cache.iterdir()
    monkeypatch.setattr(cpp_build, "_run", lambda command: pytest.fail("compiled again"))
    assert cpp_build.build(SOURCE).answer() == 42
    assert [*cache.iterdir()] == [library]


def test_a_build_that_is_cut_off_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(command: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp_build, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        cpp_build.build(SOURCE)
    monkeypatch.undo()
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(cache.parent))
    assert [*cache.iterdir()] == []
    assert cpp_build.build(SOURCE).answer() == 42


def test_a_directory_that_others_can_write_is_not_trusted(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(cpp_build.BuildError, match="can be written by others"):
        cpp_build.build(SOURCE)


def test_what_the_compiler_says_is_told(cache: Path) -> None:
    with pytest.raises(cpp_build.BuildError, match=r"failed: .*error"):
        cpp_build.build("this is no C++")


def test_kernels_share_the_threads_of_torch() -> None:
    path = cpp_build.openmp_runtime()
    if path is None:
        pytest.skip("torch has no OpenMP runtime that can be found")
    before = cpp_build.loaded_openmp_runtimes()
    assert path in before
    cpp_build.build(emit_scan(traced(neuron.IFNode())))
    assert cpp_build.loaded_openmp_runtimes() == before
    assert ctypes.CDLL(path).omp_get_max_threads() == torch.get_num_threads()


def test_the_runtime_of_another_package_is_not_taken_for_that_of_torch() -> None:
    pytest.importorskip("sklearn")
    script = (
        "import sklearn.cluster, torch; from snncompile.runtime import cpp_build; "
        "print(cpp_build.openmp_runtime(), *cpp_build.loaded_openmp_runtimes(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    path, *loaded = done.stdout.split()
    home = str(Path(torch.__file__).parent)
    assert path.startswith(home) or not any(other.startswith(home) for other in loaded)


def test_without_a_compiler_the_eager_step_runs_unless_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snncompile.runtime.targets.compiler", lambda: None)
    net, x = network(), sequence(5, 4, 2, 6, 6)
    opt = snncompile.optimize(net, 5)
    assert snncompile.verify(net, opt, x).ok
    with torch.no_grad():
        opt.plan(x)
    assert any(d.reason == "eager: no C++ compiler was found" for d in opt.report.decisions)
    with pytest.raises(SnnCompileError, match=r"needs a C\+\+ compiler"):
        snncompile.optimize(net, 5, backend="cpp")


# modules of one structure share a trace


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was traced, from now on."""
    found: list[Any] = []
    trace = step_traces.trace_pointwise_step
    monkeypatch.setattr(step_traces, "trace_pointwise_step", lambda *given: found.append(given) or trace(*given))
    return found


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (lambda: neuron.LIFNode(tau=2.0), lambda: neuron.LIFNode(tau=2.0), True),
        (lambda: neuron.LIFNode(tau=2.0), lambda: neuron.LIFNode(tau=3.0), False),
        (lambda: neuron.IFNode(v_reset=0.0), lambda: neuron.IFNode(v_reset=-0.0), False),
        (lambda: neuron.ParametricLIFNode(2.0), lambda: neuron.ParametricLIFNode(5.0), True),
        (neuron.LIFNode, neuron.ParametricLIFNode, False),
    ],
)
def test_modules_that_differ_in_their_tensors_alone_are_traced_once(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module], shared: bool, traces: list[Any]
) -> None:
    kernels = scan_kernels.ScanKernels()
    chunk = sequence(5, 2, 300)
    with torch.no_grad():
        for module in (one(), other()):
            check(module, chunk, steps=5, kernels=kernels)
    assert len(traces) == (1 if shared else 2)


class Averaging(Looking):
    """Asks how large its input is."""

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + inputs[0] / inputs[0].shape[-1]
        return (v,), (v,)


class Reshaping(Looking):
    """Has a shape in its code."""

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + inputs[0].reshape(2, -1)
        return (v,), (v,)


@pytest.mark.parametrize(
    ("make", "shared"), [(neuron.LIFNode, True), (CurrentLIF, True), (Averaging, False), (Reshaping, False)]
)
def test_a_step_that_does_not_ask_for_sizes_is_traced_once_for_all(
    make: Callable[[], nn.Module], shared: bool, traces: list[Any]
) -> None:
    kernels = scan_kernels.ScanKernels()
    with torch.no_grad():
        for size in (300, 200, 7):
            chunks = [sequence(5, 2, size) for _ in range(2 if make is CurrentLIF else 1)]
            check(make(), *chunks, steps=5, kernels=kernels)
    assert len(traces) == (1 if shared else 3)


def test_layers_of_other_widths_are_traced_together(traces: list[Any]) -> None:
    def count(widths: list[int]) -> int:
        traces.clear()
        layers: list[nn.Module] = []
        for before, after in zip([6, *widths], widths, strict=False):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), neuron.LIFNode(), neuron.IFNode()]
        net = nn.Sequential(*layers).eval()
        with torch.no_grad():
            assert snncompile.verify(net, snncompile.optimize(net, 5), sequence(5, 4, 6)).ok
        return len(traces)

    assert count([8]) == count([8, 12, 9])
