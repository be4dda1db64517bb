"""Kernels for neurons and neuron chains, found as they are needed: a chunk of steps in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import (
    STATE_STORES,
    Adapter,
    NeuronChain,
    RandomState,
    adapter_of,
    copy_network,
    copy_sharing_tensors,
    module_of,
)
from ..codegen import NotPointwise, StepFunction, Still, Table, trace_step_function
from ..ir import Node, TensorType, chunk_like, lie_alike
from ..torch_private import FakeTensor, no_modes
from .compiled_scan import BuildError, CompiledScan, KernelTarget, Layout
from .cpp_scan import CppTarget
from .fingerprint import Same, value_key

_MOST_KERNELS = 256  # step functions kept for one plan; attributes that change at every call would pile them up
_TRIED_STEPS = 3
_CPP = CppTarget()


@dataclass(frozen=True)
class _Kernel:
    """A step function and its compiled scan.

    Attributes:
        function: The step.
        gathered: The inputs that it lays out anew.
        scan: The step over a chunk of steps.
    """

    function: StepFunction
    gathered: frozenset[int]
    scan: CompiledScan


@dataclass(frozen=True)
class _Refusal:
    reason: str


class BoundScan:
    """A kernel with a neuron's numbers as they are in one call, for steps of one type.

    Args:
        kernel: The kernel.
        inputs: A step `[N, *]` of each input; the first one is laid out as the states and the outputs are.
    """

    def __init__(self, kernel: _Kernel, inputs: Sequence[Tensor]) -> None:
        self._function = function = kernel.function
        self._types = tuple((value.shape, value.stride()) for value in inputs)
        self._is_fake = isinstance(inputs[0], FakeTensor)
        # Computed here, where the outputs are not there yet: what they take for a moment is no part of the peak.
        if self._is_fake:
            self._held = kernel.scan.reserve(inputs[0])
            return
        layouts = [
            _layout(value.shape, value.stride(), inputs[0]) if n in kernel.gathered else None
            for n, value in enumerate(inputs)
        ]
        layouts += [_layout(table.shape, _strides_of(table), inputs[0]) for table in function.tables]
        self._call = kernel.scan.bind(inputs[0].numel(), layouts, [number() for number in function.numbers])

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether values are steps of these types."""
        return all(
            step.shape == shape and step.stride() == stride and step.dtype is torch.float32
            for step, (shape, stride) in zip(inputs, self._types, strict=True)
        )

    def step(self, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: outputs and new states `[N, *]`."""
        outputs = tuple(torch.empty_like(inputs[0]) for _ in self._function.outputs)
        return outputs, self._run(1, inputs, [0] * len(inputs), states, outputs)

    def scan(
        self, steps: int, inputs: Sequence[Any], states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A chunk of steps: `[C, N, *]`, or `Still` for what is the same at every step; outputs `[C, N, *]`."""
        chunks = [value.value if isinstance(value, Still) else value for value in inputs]
        strides = [0 if isinstance(value, Still) or steps == 1 else value.stride(0) for value in inputs]
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
        if not self._is_fake:
            self._call.run(steps, inputs, strides, states, outputs, after)
        return after


class ScanKernels:
    """The kernels of one network's neurons and neuron chains, found as they are needed.

    A kernel is used where it gives the bits of the eager step on a short random sequence; elsewhere, and wherever
    gradients are recorded, the eager step runs.

    Args:
        target: What compiles and runs them.

    Attributes:
        target: As given.
    """

    def __init__(self, target: KernelTarget = _CPP) -> None:
        self.target = target
        self._found: dict[Any, _Kernel | _Refusal] = {}

    def bind(
        self, module: nn.Module, adapter: Adapter, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> BoundScan | None:
        """The kernel of a neuron or a chain for one call; None where the eager step must run.

        Args:
            module: The neuron or chain.
            adapter: Knows its step function.
            inputs: One step `[N, *]` of each input.
            states: As tensors fit for these inputs.
        """
        kernel = self._kernel(module, adapter, inputs, states)
        return None if isinstance(kernel, _Refusal) else BoundScan(kernel, inputs)

    def obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why a stateful node has no kernel for inputs of these types `[N, *]`; empty if it has one."""
        module = module_of(net, node)
        adapter = adapter_of(module)
        examples = _examples(inputs)
        states = adapter.materialize(module, examples, adapter.reset_values(module))
        kernel = self._kernel(module, adapter, examples, states)
        return kernel.reason if isinstance(kernel, _Refusal) else ""

    def pointwise_obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why what a chain's node does cannot be part of a kernel; empty if it can. It need not hold a neuron."""
        chain = NeuronChain.of(net, node)
        adapter = adapter_of(chain)
        examples = _examples(inputs)
        states = adapter.materialize(chain, examples, adapter.reset_values(chain))
        if obstacle := self.target.operand_obstacle((*examples, *states)):
            return obstacle
        with no_modes():
            function = _traced(chain, adapter, examples, states)
        return function.reason if isinstance(function, _Refusal) else self.target.obstacle(function)

    def _kernel(self, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> _Kernel | _Refusal:
        values = (*inputs, *states)
        if obstacle := self.target.operand_obstacle(values):
            return _Refusal(obstacle)
        if not all(_fits(value, inputs[0]) for value in (inputs[0], *states)):
            return _Refusal("its states are not laid out as its input")
        gathered = frozenset(n for n, value in enumerate(inputs) if not _fits(value, inputs[0]))
        if gathered and inputs[0].dim() > self.target.max_dims:
            return _Refusal(f"its inputs have more than {self.target.max_dims} dimensions")
        types = tuple(TensorType.of(value) for value in values)
        key = (_attributes(module, adapter), types)
        if key not in self._found:
            if len(self._found) >= _MOST_KERNELS:
                self._found.clear()
            with no_modes():
                self._found[key] = _make(self.target, module, adapter, types, len(inputs), gathered)
        return self._found[key]


def _fits(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is dense and laid out as another, so that both can be walked as one row of elements."""
    if value.shape != like.shape or not lie_alike(value.shape, value.stride(), like.stride()):
        return False
    return value.numel() > 0 and _extent(value.shape, value.stride()) == value.numel()


def _layout(shape: Sequence[int], strides: Sequence[int], like: Tensor) -> Layout:
    """How to walk a tensor in the order in which another one lies in memory.

    Args:
        shape, strides: Of the tensor, which broadcasts to the other.
        like: The other.
    """
    absent = like.dim() - len(shape)
    steps = [0] * absent + [step if size != 1 else 0 for size, step in zip(shape, strides, strict=True)]
    dims = sorted((d for d in range(like.dim()) if like.shape[d] != 1), key=like.stride, reverse=True)
    walked: list[tuple[int, int]] = []
    for size, stride in ((like.shape[d], steps[d]) for d in dims):
        if walked and walked[-1][1] == size * stride:  # steps on where the inner dimension ends
            walked[-1] = (walked[-1][0] * size, stride)
        else:
            walked.append((size, stride))
    walked = walked or [(1, 0)]
    return Layout(tuple(size for size, _ in walked), tuple(stride for _, stride in walked))


def _strides_of(table: Table) -> tuple[int, ...]:
    """Of a table's numbers as a scan holds them: what is computed is dense."""
    if not table.is_computed:
        return table.value().stride()
    return tuple(math.prod(table.shape[d + 1 :]) for d in range(len(table.shape)))


def _examples(types: Sequence[TensorType]) -> tuple[Tensor, ...]:
    """Zeros of these types, also where elements share their place in memory."""
    return tuple(
        torch.zeros(_extent(x.shape, x.stride), dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride)
        for x in types
    )


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a tensor in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _traced(module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> StepFunction | _Refusal:
    """The step of a neuron or a chain as a pointwise program."""
    sharing = copy_sharing_tensors(module)  # traced in the module's place: its parameters, and none of its changes
    random = RandomState()
    try:
        with torch.no_grad():
            return trace_step_function(lambda x, s: adapter.step(sharing, x, s), inputs, states)
    except NotPointwise as refusal:
        return _Refusal(str(refusal))
    finally:
        random.restore()


def _make(
    target: KernelTarget,
    module: nn.Module,
    adapter: Adapter,
    types: Sequence[TensorType],
    inputs: int,
    gathered: frozenset[int],
) -> _Kernel | _Refusal:
    twin = copy_network(module, {})
    examples = _examples(types)
    given, states = examples[:inputs], examples[inputs:]
    function = _traced(module, adapter, given, states)
    if isinstance(function, _Refusal):
        return function
    if obstacle := target.obstacle(function):
        return _Refusal(obstacle)
    random = RandomState()
    try:
        with torch.no_grad():
            kernel = _Kernel(function, gathered, target.build(function, gathered))
            before = _held_by(twin, adapter)
            if not _agrees(kernel, twin, adapter, given, states):
                return _Refusal("its compiled form rounds differently")
            if not _same(before, _held_by(twin, adapter)):
                return _Refusal("its step changes more than its states")
    except BuildError as failure:
        return _Refusal(failure.message)
    finally:
        random.restore()
    return kernel


def _attributes(module: nn.Module, adapter: Adapter) -> tuple[Any, ...]:
    """Equal as long as a module holds the same beside its states."""
    if not isinstance(module, NeuronChain):
        return value_key(module, frozenset({*adapter.state_keys(module), *STATE_STORES}))
    neurons = module.neurons
    others = [part for part in module.parts if all(part is not neuron for neuron in neurons)]
    own = [_attributes(neuron, adapter_of(neuron)) for neuron in neurons]
    return (Same(module.chain), *own, *(value_key(part, frozenset()) for part in others))


def _held_by(module: nn.Module, adapter: Adapter) -> tuple[Any, list[Tensor]]:
    """What a module keeps beside its states: its attributes, and a copy of its buffers."""
    return _attributes(module, adapter), [buffer.clone() for buffer in module.buffers()]


def _same(before: tuple[Any, list[Tensor]], after: tuple[Any, list[Tensor]]) -> bool:
    return before[0] == after[0] and all(map(torch.equal, before[1], after[1]))


def _agrees(kernel: _Kernel, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> bool:
    """Whether a kernel gives the bits of the eager step for a few random steps."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return like.copy_(3.0 * torch.rand(like.shape, generator=generator) - 0.5)

    chunks = [random(chunk_like(value, _TRIED_STEPS)) for value in inputs]
    held = tuple(map(random, states))
    got, after = BoundScan(kernel, inputs).scan(_TRIED_STEPS, chunks, held)
    for step in range(_TRIED_STEPS):
        outputs, held = adapter.step(module, tuple(chunk[step] for chunk in chunks), held)
        if len(outputs) != len(got) or not all(torch.equal(a[step], b) for a, b in zip(got, outputs, strict=True)):
            return False
    return len(held) == len(after) and all(torch.equal(a, b) for a, b in zip(after, held, strict=True))
