"""Generated Triton for neurons: interpreted, the eager step's bits; compiled without a GPU, no spilled register."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import SnnCompileError, neuron
from snncompile.codegen import (
    TRITON_OPERATIONS,
    StepFunction,
    Still,
    as_on_cuda,
    cpp,
    emit_triton_scan,
    trace_step_function,
)
from snncompile.codegen.step_function import Instruction, Literal
from snncompile.neuron import StatefulModule
from snncompile.runtime import NoTarget, find_target, scan_kernels, targets, triton_build, triton_launch, triton_scan
from snncompile.runtime.states import StateSlot

from .spikingjelly_neurons import exact_neurons, transcendental_neurons

pytestmark = pytest.mark.skipif(not triton_build.version(), reason="Triton is not installed")

LENGTHS = (1, 7, 8, 9, 13)  # below, at and beyond the 8 steps that a kernel reads ahead
ARCHS = (80, 90)


class Mixed(StatefulModule):
    """Two states that change places, two inputs, two outputs, and every operation that neurons above do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.register_state("i", 0.5)
        self.scale = nn.Parameter(torch.linspace(-1.5, 1.5, 3).view(3, 1, 1))
        self.norm = nn.BatchNorm2d(3).eval()
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.1, -0.3, 0.7]))
            self.norm.running_var.copy_(torch.tensor([0.9, 1.7, 0.3]))

    def step(self, inputs: Any, states: Any) -> Any:
        x, gate = inputs
        v, i = states
        i = 0.75 * i + torch.where((gate > 0.3) | (gate == 0.125), self.norm(x), -x * self.scale)
        v = (0.9 * v + i).clamp(-2.0, 2.5)
        spike = ((v >= 1.0) & ~(gate >= 0.9)).to(v)
        rounded = torch.round(3.0 * v) + torch.floor(2.0 * v) - torch.ceil(i)
        return (spike, torch.minimum(v.abs(), torch.relu(rounded))), (i, 3.0 - v - spike)


NATIVE: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "soft IF": lambda: neuron.IFNode(v_threshold=0.7, v_reset=None),
    "LIF": lambda: neuron.LIFNode(3.0),
    "LIF, raw input": lambda: neuron.LIFNode(3.0, decay_input=False, v_reset=-0.1),
    "parametric LIF": lambda: neuron.ParametricLIFNode(1.5),
    "non-spiking LIF": lambda: neuron.NonSpikingLIFNode(2.0, v_reset=0.1),
}


def sequence(steps: int, *shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.rand((steps, *shape), generator=torch.Generator().manual_seed(seed)) - 0.5


def channels_last(chunk: Tensor) -> Tensor:
    """The same values `[T, N, C, H, W]`, each step channels-last."""
    return chunk.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def run(module: nn.Module, target: triton_scan.TritonTarget | None, *chunks: Any, steps: int) -> tuple[Any, Any]:
    """Outputs and states of one chunk from the state that the module holds."""
    slot = StateSlot(module, None if target is None else scan_kernels.ScanKernels(target, reassociates=True))
    with torch.no_grad():
        outputs = slot.scan(steps, *chunks)
    if target is not None:
        assert slot.bound is not None, "the eager step ran"
    return outputs, slot.states


def bits(value: Any) -> list[tuple[Tensor, Any]]:
    """Every bit: a zero's sign counts."""
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [(tensor.contiguous().view(torch.int32), tensor.stride()) for tensor in tensors]


def check(module: nn.Module, target: triton_scan.TritonTarget, *chunks: Any, steps: int) -> None:
    got, expected = (run(module, each, *chunks, steps=steps) for each in (target, None))
    for values, others in zip(got, expected, strict=True):
        for (a, stride), (b, expected_stride) in zip(bits(values), bits(others), strict=True):
            assert torch.equal(a, b)
            assert stride == expected_stride


@pytest.mark.parametrize("kind", NATIVE)
def test_outputs_and_states_have_the_bits_of_the_eager_step(kind: str, interpreted: Any) -> None:
    module = NATIVE[kind]()
    for steps in LENGTHS:
        check(module, interpreted, sequence(steps, 5, 7), steps=steps)
    with torch.no_grad():
        module(sequence(1, 5, 7, seed=1)[0])  # and from a state that an earlier step left
    check(module, interpreted, sequence(13, 5, 7), steps=13)


def test_every_pointwise_neuron_of_spikingjelly(interpreted: Any) -> None:
    for make in exact_neurons().values():
        check(make(), interpreted, sequence(11, 4, 6), steps=11)
    for make in transcendental_neurons().values():
        pairs = zip(*(run(make(), each, sequence(11, 4, 6), steps=11) for each in (interpreted, None)), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", LENGTHS)
def test_tables_broadcast_operands_and_layouts(steps: int, interpreted: Any) -> None:
    x = sequence(steps, 2, 3, 4, 5)
    gates = (
        sequence(steps, 2, 3, 4, 5, seed=1),
        sequence(steps, 1, 3, 1, 1, seed=1),
        Still(sequence(1, 2, 3, 4, 5, seed=1)[0]),
        channels_last(sequence(steps, 2, 3, 4, 5, seed=1)),
    )
    for gate in gates:
        check(Mixed(), interpreted, x, gate, steps=steps)
    check(Mixed(), interpreted, channels_last(x), gates[0], steps=steps)


def test_many_neurons_and_steps_that_lie_apart(interpreted: Any) -> None:
    check(neuron.LIFNode(), interpreted, sequence(18, 5, 211)[::2], steps=9)
    check(neuron.LIFNode(), interpreted, Still(sequence(1, 5, 211)[0]), steps=9)
    check(neuron.LIFNode(), interpreted, sequence(9, 1), steps=9)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 0.5, 2.5, 8388609.0])
def test_special_values(special: float, interpreted: Any) -> None:
    class Each(neuron.IFNode):
        def step(self, inputs: Any, states: Any) -> Any:
            (x,) = inputs
            (v,) = states
            low, high = torch.minimum(x, v), torch.maximum(x, v)
            return (torch.round(x), torch.relu(x), -x, low, high, x.abs(), x / v, x.clamp(-1.0, 1.0)), (x,)

    chunk = sequence(5, 4, 6)
    chunk[1, 1] = special
    chunk[2, :2] = special
    got, expected = (run(Each(), each, chunk, steps=5)[0] for each in (interpreted, None))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        same = a.view(torch.int32) == b.view(torch.int32)
        assert (same | a.isnan()).all()


def test_square_roots_are_rounded_correctly(interpreted: Any) -> None:
    x, y = torch.rand(1000) * 100.0, torch.empty(1000)
    function = StepFunction(1, 0, (Instruction("r0", "sqrt", ("x0",)),), ("r0",), (), ())
    interpreted.build(function, frozenset()).bind(1000, [None], []).run(1, [x], [0], [], [y], [])
    assert torch.equal(y, x.double().sqrt().float())


def of_one_function(name: str) -> StepFunction:
    return StepFunction(1, 0, (Instruction("r0", name, ("x0",)),), ("r0",), (), ())


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_functions_are_within_two_units_in_the_last_place(name: str, interpreted: Any) -> None:
    bits_of_x = torch.arange(0, 2**31 - 1, 2**31 // 4001, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([bits_of_x, -bits_of_x, torch.linspace(-90.0, 90.0, 4001)])
    got = torch.empty_like(x)
    interpreted.build(of_one_function(name), frozenset()).bind(x.numel(), [None], []).run(1, [x], [0], [], [got], [])
    expected = getattr(torch, name)(x.double()).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[expected.isinf()], expected[expected.isinf()])
    normal = expected.isfinite() & (expected.abs() >= torch.finfo(torch.float32).tiny)
    distance = (got.view(torch.int32).long() - expected.view(torch.int32).long()).abs()
    assert int(distance[normal].max()) <= 2


def test_a_network_runs_by_triton_kernels(interpreted: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        neuron.LIFNode(),
        nn.Flatten(),
        nn.Linear(108, 3),
        neuron.IFNode(),
    ).eval()
    x = sequence(7, 4, 2, 6, 6)
    with torch.no_grad():
        opt = snncompile.optimize(net, 7, schedule=3, backend="triton", example_input=x)
        assert snncompile.verify(net, opt, x).exact
    said = [str(decision) for decision in opt.report.decisions]
    assert sum("runs as a Triton kernel" in line for line in said) == 2
    assert any("in one pass over memory" in line for line in said)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-7), (torch.float16, 0.0)])
def test_half_precision_is_storage_only(dtype: torch.dtype, rounding: float, interpreted: Any) -> None:
    """States between steps are float32. The interpreter cuts bfloat16 off where a GPU rounds it."""
    outputs, expected = stored_in(dtype, interpreted, "cpu")
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=0.0)


def stored_in(dtype: torch.dtype, target: triton_scan.TritonTarget, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and state of a neuron whose operands are of this dtype, and what float32 steps give, rounded."""
    module, x = neuron.NonSpikingLIFNode(3.0), sequence(13, 400).to(device, dtype)
    held: tuple[Tensor, ...] = (torch.full((400,), 0.25, device=device),)
    y, before, after = torch.empty_like(x), held[0].to(dtype), torch.empty_like(x[0])
    function = traced(module)
    call = target.build(function, frozenset()).bind(400, [None], [number() for number in function.numbers])
    call.run(13, [x], [400], [before], [y], [after])
    expected = []
    for step in x:
        (output,), held = module.step((step.float(),), held)
        expected.append(output)
    return [y, after], [torch.stack(expected).to(dtype), held[0].to(dtype)]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NATIVE)
def test_on_cuda_outputs_and_states_have_the_bits_of_the_eager_step(kind: str) -> None:
    target = find_target("triton", [torch.device("cuda", 0)])
    assert isinstance(target, triton_scan.TritonTarget)
    module = NATIVE[kind]().cuda()
    for steps in LENGTHS:
        for size in (35, 40_000):
            check(module, target, sequence(steps, size).cuda(), steps=steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_half_precision_is_storage_only(dtype: torch.dtype) -> None:
    target = find_target("triton", [torch.device("cuda", 0)])
    assert isinstance(target, triton_scan.TritonTarget)
    outputs, expected = stored_in(dtype, target, "cuda")
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
def test_on_cuda_a_network_has_the_step_loops_bits(schedule: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), neuron.LIFNode(3.0), nn.Flatten(), neuron.IFNode()).cuda().eval()
    x = sequence(7, 4, 2, 6, 6).cuda()
    with torch.no_grad():
        opt = snncompile.optimize(net, 7, schedule=schedule, example_input=x)
        assert snncompile.verify(net, opt, x).ok
        said = [str(decision) for decision in opt.report.decisions]
        assert sum("runs as a Triton kernel" in line for line in said) == 2


# Compiled without a GPU


def traced(module: Any, *shape: int, inputs: int = 1) -> StepFunction:
    x = tuple(torch.zeros(shape or (2, 3)) for _ in range(inputs))
    return trace_step_function(module.step, x, module.materialize_states(x, module.reset_values))


def compiled(function: StepFunction, gathered: Sequence[int] = (), arch: int = 90, kind: str = "*fp32") -> Any:
    source = emit_triton_scan(as_on_cuda(function), gathered)
    return triton_launch.compiled(source, (kind,) * source.pointers, arch, 0)


def spilled_bytes(kernel: Any, folder: Path) -> int:
    """Bytes of stack and local memory that a kernel uses, as its binary says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found, said
    return sum(map(int, found.groups()))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_richest_kernel_compiles_and_spills_nothing(arch: int, tmp_path: Path) -> None:
    kernel = compiled(traced(Mixed(), 2, 3, 4, 4, inputs=2), [1], arch)
    assert spilled_bytes(kernel, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_spills_nothing(arch: int, tmp_path: Path) -> None:
    for make in (*NATIVE.values(), *exact_neurons().values(), *transcendental_neurons().values()):
        chunks, kernels = sequence(1, 4, 6), scan_kernels.ScanKernels(triton_scan.TritonTarget(None), reassociates=True)
        slot = StateSlot(make(), kernels)
        with torch.no_grad():
            slot.scan(1, chunks)
        (kernel,) = kernels._found.values()
        assert spilled_bytes(compiled(kernel.function, arch=arch), tmp_path) == 0
        assert spilled_bytes(compiled(kernel.function, arch=arch, kind="*bf16"), tmp_path) == 0


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_functions_compile_and_spill_nothing(name: str, tmp_path: Path) -> None:
    kernel = compiled(of_one_function(name))
    assert spilled_bytes(kernel, tmp_path) == 0
    assert "ex2" not in kernel.asm["ptx"], "the approximate power of two"


def test_nothing_is_contracted() -> None:
    text = compiled(traced(neuron.LIFNode(3.0, decay_input=False))).asm["ptx"]
    assert "mul" in text
    assert "fma" not in text


def test_another_length_size_or_threshold_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call compiles for depends on the types of its arguments."""
    built, launched = [], []

    class Recorded:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments: launched.append((grid, arguments))

    def compile_kernel(*arguments: Any) -> Recorded:
        built.append(arguments)
        return Recorded()

    triton_launch.compiled.cache_clear()
    monkeypatch.setattr(triton_launch, "compile_kernel", compile_kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _nothing())
    for steps, size, threshold in ((4, 10, 1.0), (1, 10, 1.0), (2**20, 16, 1.0), (4, 2**30, 0.3)):
        scan = triton_scan.TritonTarget(90).build(traced(neuron.LIFNode(v_threshold=threshold)), frozenset())
        call = scan.bind(size, [None], [number() for number in scan.function.numbers])
        one = torch.empty(1)
        call.run(steps, [one], [size], [one], [one], [one])
    triton_launch.compiled.cache_clear()
    assert len(built) == 1
    assert len(launched) == 4
    names = [name for name, _ in built[0][1]]
    assert all(len(arguments) == len(names) for _, arguments in launched)
    assert launched[-1][0] == (-(-(2**30) // 256), 1, 1)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> None: ...


# The program and its source


def test_the_source(golden: Callable[[str], None]) -> None:
    golden(emit_triton_scan(traced(neuron.IFNode())).text)


def test_every_operation_has_an_expression() -> None:
    assert set(cpp._EXPRESSIONS) <= TRITON_OPERATIONS


def test_an_operation_without_an_expression_is_a_refusal() -> None:
    function = StepFunction(1, 1, (Instruction("r0", "erf", ("x0",)),), ("r0",), ("r0",), ())
    assert triton_scan.TritonTarget(None).obstacle(function) == "there is no Triton for erf"


def test_cuda_divides_by_a_number_as_aten_does() -> None:
    function = as_on_cuda(traced(neuron.LIFNode(3.0)))
    (product,) = [i for i in function.program if i.operation == "mul" and i.operands[1] == "u6"]
    assert product.name == "r2"
    assert function.numbers[6]() == float(torch.tensor(1.0) / torch.tensor(3.0))
    kept = StepFunction(1, 0, (Instruction("r0", "div", ("x0", "u0")),), ("r0",), (), (lambda: 3.0,))
    assert as_on_cuda(kept) == kept
    assert isinstance(traced(neuron.LIFNode(3.0)).numbers[1], Literal)


# Which target a plan gets


def test_targets_by_device_and_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda, cpu = [torch.device("cuda", 0)], [torch.device("cpu")]
    assert find_target("auto", cuda) == triton_scan.TritonTarget(90)
    assert find_target("triton", cuda) == triton_scan.TritonTarget(90)
    assert find_target("cpp", cuda) == NoTarget("C++ kernels are for the CPU only")
    with pytest.raises(SnnCompileError, match="Triton kernels are for CUDA, and the inputs are on cpu"):
        find_target("triton", cpu)
    monkeypatch.setattr(targets, "version", lambda: "")
    assert find_target("auto", cuda) == NoTarget("Triton is not installed")
    with pytest.raises(SnnCompileError, match="needs Triton; install it"):
        snncompile.optimize(nn.Sequential(neuron.IFNode()), 3, backend="triton")


def test_by_name_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SnnCompileError, match="'triton' needs a CUDA device"):
        snncompile.optimize(nn.Sequential(neuron.IFNode()), 3, backend="triton")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path / "cache"))
    triton_build.load.cache_clear()
    yield tmp_path / "cache" / "kernels"
    triton_build.load.cache_clear()


def test_sources_are_kept_once(cache: Path) -> None:
    text = "def scan():\n    return 42\n"
    assert triton_build.load(text)() == 42  # type: ignore[func-returns-value]
    (file,) = cache.iterdir()
    written = os.stat(file).st_mtime_ns
    triton_build.load.cache_clear()
    assert triton_build.load(text)() == 42  # type: ignore[func-returns-value]
    assert [path for path in cache.iterdir() if path.suffix] == [file]
    assert os.stat(file).st_mtime_ns == written


def test_what_the_compiler_says_is_told(cache: Path) -> None:
    with pytest.raises(triton_build.BuildError, match=r"Triton .* failed"):
        triton_build.compile_kernel("def scan(n):\n    return missing(n)\n", [("n", "i32")], 90)
