"""Neurons on the CPU by generated C++: a whole chunk of steps in one pass over memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import STATE_STORES, Adapter, RandomState, adapter_of, copy_network, copy_sharing_tensors
from ..codegen import NotPointwise, StepFunction, Still, emit_scan, trace_step_function
from ..ir import TensorType, chunk_like
from ..torch_private import FakeTensor, no_modes
from .cpp_build import BuildError, build, compiler
from .fingerprint import value_key

_MOST_KERNELS = 256  # step functions kept for one plan; attributes that change at every call would pile them up
_TRIED_STEPS = 3
_PARALLEL_ELEMENTS = 32 * 1024  # below it, threads cost more than they save


@dataclass(frozen=True)
class _Kernel:
    """A step function and its compiled scan."""

    function: StepFunction
    scan: Any


@dataclass(frozen=True)
class _Refusal:
    reason: str


class BoundScan:
    """A kernel with a neuron's numbers as they are in one call, for steps of one type.

    Args:
        kernel: The kernel.
        like: A step `[N, *]` of the input.
    """

    def __init__(self, kernel: _Kernel, like: Tensor) -> None:
        self._function = kernel.function
        self._scan = kernel.scan
        self._shape, self._stride = like.shape, like.stride()
        self._size = like.numel()
        # Computed here, where the outputs are not there yet: what they take for a moment is no part of the peak.
        numbers = [] if isinstance(like, FakeTensor) else [number() for number in kernel.function.numbers]
        self._numbers = (ctypes.c_float * max(1, len(numbers)))(*numbers)

    def takes(self, step: Any) -> bool:
        """Whether a value is a step of this type."""
        return bool(step.shape == self._shape and step.stride() == self._stride and step.dtype is torch.float32)

    def step(self, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: outputs and new states `[N, *]`."""
        outputs = tuple(torch.empty_like(inputs[0]) for _ in self._function.outputs)
        return outputs, self._run(1, inputs, [0] * len(inputs), states, outputs)

    def scan(
        self, steps: int, inputs: Sequence[Any], states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A chunk of steps: `[C, N, *]`, or `Still` for what is the same at every step; outputs `[C, N, *]`."""
        chunks = [value.value if isinstance(value, Still) else value for value in inputs]
        strides = [0 if isinstance(value, Still) else value.stride(0) for value in inputs]
        like = chunks[0] if isinstance(inputs[0], Still) else chunks[0][0]
        outputs = tuple(chunk_like(like, steps) for _ in self._function.outputs)
        return outputs, self._run(steps, chunks, strides, states, outputs)

    def _run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        after = tuple(torch.empty_like(state) for state in states)
        if isinstance(inputs[0], FakeTensor):
            return after
        self._scan(
            ctypes.c_long(steps),
            ctypes.c_long(self._size),
            _pointers(inputs),
            (ctypes.c_long * len(strides))(*strides),
            _pointers(states),
            _pointers(outputs),
            _pointers(after),
            self._numbers,
            ctypes.c_int(torch.get_num_threads() if steps * self._size >= _PARALLEL_ELEMENTS else 1),
        )
        return after


class ScanKernels:
    """The kernels of one network's neurons, found as they are needed.

    A kernel is used where it gives the bits of the eager step on a short random sequence; elsewhere, and wherever
    gradients are recorded, the eager step runs.
    """

    def __init__(self) -> None:
        self._found: dict[Any, _Kernel | _Refusal] = {}

    def bind(
        self, module: nn.Module, adapter: Adapter, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> BoundScan | None:
        """The kernel of a neuron for one call; None where the eager step must run.

        Args:
            module: The neuron.
            adapter: Knows its step function.
            inputs: One step `[N, *]` of each input.
            states: As tensors fit for these inputs.
        """
        kernel = self._kernel(module, adapter, inputs, states)
        return None if isinstance(kernel, _Refusal) else BoundScan(kernel, inputs[0])

    def reason(self, module: nn.Module, inputs: tuple[TensorType, ...]) -> str:
        """Why a neuron has no kernel for inputs of these types `[N, *]`; empty if it has one."""
        adapter = adapter_of(module)
        examples = tuple(torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device) for x in inputs)
        states = adapter.materialize(module, examples, adapter.reset_values(module))
        kernel = self._kernel(module, adapter, examples, states)
        return kernel.reason if isinstance(kernel, _Refusal) else ""

    def _kernel(self, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> _Kernel | _Refusal:
        values = (*inputs, *states)
        if not _is_eligible(values):
            return _Refusal("its inputs and states are not all float32 on the CPU")
        if not all(_fits(value, inputs[0]) for value in values):
            return _Refusal("its inputs and states are not laid out alike")
        types = tuple((value.dtype, value.shape) for value in values)
        key = (_attributes(module, adapter), types)
        if key not in self._found:
            if len(self._found) >= _MOST_KERNELS:
                self._found.clear()
            with no_modes():
                self._found[key] = _make(module, adapter, types, len(inputs))
        return self._found[key]


def _is_eligible(values: Sequence[Any]) -> bool:
    """Whether nothing asks for more than numbers: no gradients, no other device or dtype, no autocast."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return all(
        isinstance(value, Tensor)
        and value.dtype is torch.float32
        and value.device.type == "cpu"
        and not (torch.is_grad_enabled() and value.requires_grad)
        for value in values
    )


def _fits(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is dense and laid out as another, so that both can be walked as one row of elements."""
    if value.shape != like.shape or value.stride() != like.stride():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.numel() > 0 and extent == value.numel()


def _make(module: nn.Module, adapter: Adapter, types: Any, inputs: int) -> _Kernel | _Refusal:
    twin = copy_network(module, {})
    sharing = copy_sharing_tensors(module)  # traced in the module's place: its parameters, and none of its changes
    examples = tuple(torch.zeros(shape, dtype=dtype) for dtype, shape in types)
    given, states = examples[:inputs], examples[inputs:]
    random = RandomState()
    try:
        with torch.no_grad():
            function = trace_step_function(lambda x, s: adapter.step(sharing, x, s), given, states)
            kernel = _Kernel(function, _compiled(emit_scan(function)))
            before = _held_by(twin, adapter)
            if not _agrees(kernel, twin, adapter, given, states):
                return _Refusal("its compiled form rounds differently")
            if not _same(before, _held_by(twin, adapter)):
                return _Refusal("its step changes more than its states")
    except NotPointwise as refusal:
        return _Refusal(str(refusal))
    except BuildError as failure:
        return _Refusal(failure.message)
    finally:
        random.restore()
    return kernel


def _attributes(module: nn.Module, adapter: Adapter) -> tuple[Any, ...]:
    """Equal as long as a module holds the same beside its states."""
    return value_key(module, frozenset({*adapter.state_keys(module), *STATE_STORES}))


def _held_by(module: nn.Module, adapter: Adapter) -> tuple[Any, list[Tensor]]:
    """What a module keeps beside its states: its attributes, and a copy of its buffers."""
    return _attributes(module, adapter), [buffer.clone() for buffer in module.buffers()]


def _same(before: tuple[Any, list[Tensor]], after: tuple[Any, list[Tensor]]) -> bool:
    return before[0] == after[0] and all(map(torch.equal, before[1], after[1]))


@cache
def _compiled(source: str) -> Any:
    scan = build(source).scan
    scan.restype = None
    return scan


def _agrees(kernel: _Kernel, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> bool:
    """Whether a kernel gives the bits of the eager step for a few random steps."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor, *leading: int) -> Tensor:
        return 3.0 * torch.rand((*leading, *like.shape), generator=generator) - 0.5

    chunks = [random(value, _TRIED_STEPS) for value in inputs]
    held = tuple(random(value) for value in states)
    got, after = BoundScan(kernel, inputs[0]).scan(_TRIED_STEPS, chunks, held)
    for step in range(_TRIED_STEPS):
        outputs, held = adapter.step(module, tuple(chunk[step] for chunk in chunks), held)
        if len(outputs) != len(got) or not all(torch.equal(a[step], b) for a, b in zip(got, outputs, strict=True)):
            return False
    return len(held) == len(after) and all(torch.equal(a, b) for a, b in zip(after, held, strict=True))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(1, len(tensors)))(*(tensor.data_ptr() for tensor in tensors))


def has_compiler() -> bool:
    """Whether kernels can be built on this machine."""
    return compiler() is not None
