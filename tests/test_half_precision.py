"""Networks in float16 and bfloat16 by Triton kernels, interpreted: the eager bits, or float32 states by choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.codegen import as_on_cuda, emit_triton_scan, keeps_float32, rounded_as_stored, trace_step_function
from snncompile.neuron import StatefulModule
from snncompile.runtime import scan_kernels, triton_build, triton_launch
from snncompile.runtime.states import StateSlot

from .spikingjelly_neurons import exact_neurons
from .test_triton_kernels import ARCHS, LENGTHS, NATIVE, sequence, spilled_bytes

pytestmark = pytest.mark.skipif(not triton_build.version(), reason="Triton is not installed")

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def rounding(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter cuts bfloat16 off where a GPU rounds it: to the nearest, of two such to the even one."""
    import triton.language as tl
    from triton.runtime import interpreter

    def convert(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(value, source, target, mode)
        stored = torch.from_numpy(value.astype("float32").reshape(-1)).bfloat16().view(torch.int16)
        return stored.numpy().view("uint16").reshape(value.shape)

    cut_off = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    return interpreted


class Compared(StatefulModule):
    """Numbers that meet tensors in every way: none of them is a float16 or bfloat16 number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.1)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def step(self, inputs: Any, states: Any) -> Any:
        (x,) = inputs
        v = 0.3 * states[0] + (x - 0.1) * self.gain
        v = torch.where(v > 0.3, v.clamp(-0.3, 1.1), torch.full_like(v, 0.7) * v)
        return ((x >= 0.3).to(x) - v / 3.0,), (v,)


class Accumulated(StatefulModule):
    """Small steps: half precision stops where float32 goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 64.0)

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + 0.01 * inputs[0]
        return (v,), (v,)


def bits(value: Any) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [tensor.view(torch.int16) for tensor in tensors]


def check(module: nn.Module, dtype: torch.dtype, target: Any, steps: int) -> None:
    x = sequence(steps, 5, 7).to(dtype)
    x[:, 2] = 0.3  # as it is stored
    slot, eager = StateSlot(module.to(dtype), scan_kernels.ScanKernels(target)), StateSlot(module)
    with torch.no_grad():
        pairs = [(slot.scan(steps, x), eager.scan(steps, x)), (slot.states, eager.states)]
    assert slot.bound is not None, "the eager step ran"
    for got, expected in pairs:
        assert all(map(torch.equal, bits(got), bits(expected)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_states_have_the_bits_of_the_eager_step(dtype: torch.dtype, rounding: Any) -> None:
    for make in (*NATIVE.values(), Compared):
        for steps in LENGTHS:
            check(make(), dtype, rounding, steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exact_neuron_of_spikingjelly_has_the_eager_bits(dtype: torch.dtype, rounding: Any) -> None:
    for make in exact_neurons().values():
        net, x = nn.Sequential(make()).to(dtype), sequence(11, 4, 6).to(dtype)
        with torch.no_grad():
            opt = snncompile.optimize(net, 11, backend="triton", schedule=4, example_input=x)
            assert snncompile.verify(net, opt, x).exact
        assert any("runs as a Triton kernel" in str(decision) for decision in opt.report.decisions)


def network(dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), neuron.ParametricLIFNode(1.7, v_threshold=0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 16), neuron.LIFNode(3.0)).to(device, dtype).eval()


def assert_exact(dtype: torch.dtype, device: str, schedule: Any) -> None:
    """With the step loop's bits, by two kernels, the normalisation in the first."""
    net, x = network(dtype, device), sequence(7, 4, 2, 6, 6).to(device, dtype)
    with torch.no_grad():
        opt = snncompile.optimize(net, 7, backend="triton", schedule=schedule, example_input=x)
        assert snncompile.verify(net, opt, x).exact
    said = [str(decision) for decision in opt.report.decisions]
    assert sum(line.endswith("runs as a Triton kernel") for line in said) == 2
    assert sum("in one pass over memory" in line for line in said) == 1


@pytest.mark.parametrize("schedule", ["depth-first", 3, "breadth-first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_has_the_step_loops_bits(schedule: Any, dtype: torch.dtype, rounding: Any) -> None:
    assert_exact(dtype, "cpu", schedule)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["depth-first", 3, "breadth-first", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_a_network_has_the_step_loops_bits(schedule: Any, dtype: torch.dtype) -> None:
    assert_exact(dtype, "cuda", schedule)


# float32 states by choice


@pytest.mark.parametrize("dtype", DTYPES)
def test_reassociated_states_are_float32_from_step_to_step_of_a_chunk(dtype: torch.dtype, rounding: Any) -> None:
    net, x = nn.Sequential(Accumulated()).to(dtype), sequence(40, 4, 6).to(dtype)
    with torch.no_grad():
        expected = torch.stack([net.float()(step.float()) for step in x])
        snncompile.functional.reset_net(net.to(dtype))
        opt = snncompile.optimize(net, 40, backend="triton", schedule=40, reassociate=True, example_input=x)
        got = opt(x)
    assert got.dtype is dtype
    assert torch.equal(got, expected.to(dtype))
    assert torch.equal(net[0].v, expected[-1].to(dtype))
    assert any("float32 from step to step of a chunk" in str(decision) for decision in opt.report.decisions)
    loop = torch.stack([net(step) for step in x])
    assert not torch.equal(loop, expected.to(dtype)), "half precision would do"


def test_a_step_that_rounds_nothing_is_as_wide_as_it_is_stored(rounding: Any) -> None:
    x = torch.zeros(2, 3, dtype=torch.float16)
    exact = trace_step_function(lambda i, s: ((i[0].relu(),), (i[0].neg(),)), (x,), (x.clone(),))
    assert rounded_as_stored(exact) == exact
    assert not keeps_float32(trace_step_function(lambda i, s: (i, i), (x.float(),), (x.float(),)))


# What does not run by kernels


def said_of_neurons(net: nn.Module, x: Tensor) -> set[str]:
    opt = snncompile.optimize(net, len(x), backend="triton", example_input=x)
    assert snncompile.verify(net, opt, x).outputs[0].close
    return {decision.reason for decision in opt.report.decisions if decision.pass_name == "backend" and decision.node}


def test_in_training_the_eager_steps_run(interpreted: Any) -> None:
    net, x = network(torch.bfloat16).train(), sequence(3, 4, 2, 6, 6).bfloat16()
    assert said_of_neurons(net, x) == {"eager step: backward, its values are not float32"}


def test_under_autocast_the_eager_steps_run(interpreted: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reasons = said_of_neurons(network(torch.float32), sequence(3, 4, 2, 6, 6))
    assert reasons == {"eager step: autocast chooses its dtypes"}


def test_a_parameter_of_another_dtype_is_a_refusal(interpreted: Any) -> None:
    class Kept(Compared):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    reasons = said_of_neurons(nn.Sequential(Kept()), sequence(3, 4, 6).half())
    assert len(reasons) == 1
    assert "a parameter is not float16: torch.float32" in reasons.pop()


# Compiled without a GPU


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_and_spills_nothing(dtype: torch.dtype, arch: int, tmp_path: Path) -> None:
    module, x = Compared().to(dtype), torch.zeros(2, 3, dtype=dtype)
    function = rounded_as_stored(trace_step_function(module.step, (x,), (x.clone(),)), on_cuda=True)
    source = emit_triton_scan(as_on_cuda(function))
    kind = triton_launch._TYPES[dtype]
    assert spilled_bytes(triton_launch.compiled(source, (kind,) * source.pointers, arch, 0), tmp_path) == 0


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_program(on_cuda: bool, golden: Any) -> None:
    x = torch.zeros(2, 3, dtype=torch.float16)
    function = rounded_as_stored(trace_step_function(Compared().half().step, (x,), (x.clone(),)), on_cuda=on_cuda)
    numbers = [f"u{n} = {number()}" for n, number in enumerate(function.numbers)]
    golden("\n".join([*numbers, str(function), ""]))
