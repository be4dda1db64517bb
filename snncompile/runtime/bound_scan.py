"""A kernel made ready for one call: a chunk of steps in one pass over memory, recorded where gradients are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen import StepFunction, Still, Table
from ..ir import chunk_like, is_dense, lie_alike, on_huge_pages
from ..torch_private import FakeTensor
from .compiled_scan import CompiledScan, Layout
from .scan_gradients import Backward, RecordedScan


@dataclass(frozen=True)
class Kernel:
    """A step function and its compiled scan.

    Attributes:
        function: The step.
        gathered: The inputs that it lays out anew.
        scan: The step over a chunk of steps.
        backward: How gradients go through it; None if none are recorded.
    """

    function: StepFunction
    gathered: frozenset[int]
    scan: CompiledScan
    backward: Backward | None = None


StepTypes = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


class ScanCalls(ABC):
    """A kernel for steps of one type, over one step or a chunk of them.

    Args:
        inputs: A step `[N, *]` of each input; the first one is laid out as the states and the outputs are.

    Attributes:
        types: Their shapes, strides and dtypes.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.types = step_types(inputs)

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether values are steps of these types."""
        return step_types(inputs) == self.types

    def step(
        self, inputs: Sequence[Tensor], states: Sequence[Tensor], into: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: outputs and new states `[N, *]`.

        Args:
            inputs, states: `[N, *]`.
            into: Memory for the output, if there is one only, laid out as the first input.
        """
        return self._run(1, inputs, states, (False,) * len(inputs), is_chunk=False, into=into)

    def scan(
        self, steps: int, inputs: Sequence[Any], states: Sequence[Tensor], into: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A chunk of steps: `[C, N, *]`, or `Still` for what is the same at every step; outputs `[C, N, *]`."""
        still = tuple(isinstance(value, Still) for value in inputs)
        chunks = [value.value if isinstance(value, Still) else value for value in inputs]
        return self._run(steps, chunks, states, still, is_chunk=True, into=into)

    @abstractmethod
    def _run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        still: tuple[bool, ...],
        *,
        is_chunk: bool,
        into: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run steps; see `step` and `scan`."""


class BoundScan(ScanCalls):
    """A kernel with a neuron's numbers as they are in one call, for steps of one type.

    Args:
        kernel: The kernel.
        inputs: A step `[N, *]` of each input; the first one is laid out as the states and the outputs are.
        parameters: Those that its backward knows of.
    """

    def __init__(self, kernel: Kernel, inputs: Sequence[Tensor], parameters: tuple[Tensor, ...] = ()) -> None:
        self._function = function = kernel.function
        self._backward = kernel.backward
        self._parameters = parameters
        super().__init__(inputs)
        self._is_fake = isinstance(inputs[0], FakeTensor)
        self._kept = _kept_tables(() if self._backward is None else self._backward.tables, inputs[0])
        self._numbers: tuple[list[float], list[float]] = ([], [])
        # Computed here, where the outputs are not there yet: what they take for a moment is no part of the peak.
        if self._is_fake:
            self._held = kernel.scan.reserve(inputs[0])
            return
        layouts = [
            _layout(value.shape, value.stride(), inputs[0]) if n in kernel.gathered else None
            for n, value in enumerate(inputs)
        ]
        layouts += [_layout(table.shape, _strides_of(table), inputs[0]) for table in function.tables]
        with torch.no_grad():
            backward = () if self._backward is None else self._backward.gradient.numbers
            self._numbers = [number() for number in function.numbers], [number() for number in backward]
        self._call = kernel.scan.bind(inputs[0].numel(), layouts, self._numbers[0])

    def _run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        still: tuple[bool, ...],
        *,
        is_chunk: bool,
        into: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        forward = partial(self._forward, steps, still, is_chunk, into)
        if self._backward is None or not torch.is_grad_enabled():
            return forward(inputs, states)
        layouts = [layout for _, layout in self._kept]
        recorded = RecordedScan(self._backward, forward, self._numbers, layouts, steps, still, is_chunk)
        return recorded.run(inputs, states, self._parameters, [table for table, _ in self._kept])

    def _forward(
        self,
        steps: int,
        still: tuple[bool, ...],
        is_chunk: bool,
        into: Tensor | None,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        moving = [is_chunk and not same for same in still]
        strides = [value.stride(0) if moves and steps > 1 else 0 for value, moves in zip(inputs, moving, strict=True)]
        like = inputs[0][0] if moving[0] else inputs[0]
        if into is None:
            outputs = tuple(
                chunk_like(like, steps) if is_chunk else on_huge_pages(torch.empty_like(like))
                for _ in self._function.outputs
            )
        else:
            outputs = (into,)
        after = tuple(torch.empty_like(state) for state in states)
        if not self._is_fake:
            self._call.run(steps, inputs, strides, states, outputs, after)
        return outputs, after


def step_types(inputs: Sequence[Tensor]) -> StepTypes:
    """Shapes, strides and dtypes of steps."""
    return tuple((value.shape, value.stride(), value.dtype) for value in inputs)


def is_walked_as(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is dense and laid out as another, so that both can be walked as one row of elements."""
    if value.shape != like.shape or not lie_alike(value.shape, value.stride(), like.stride()):
        return False
    return is_dense(value.shape, value.stride())


def laid_out_as(step: Tensor, state: Any) -> Any:
    """A state as a kernel walks it; one that comes from elsewhere may have other strides."""
    if not isinstance(state, Tensor) or state.shape != step.shape:
        return state
    if not is_dense(step.shape, step.stride()):
        return state  # no kernel walks such a step, and a state with its gaps would take more memory
    if lie_alike(state.shape, state.stride(), step.stride()):
        return state
    return chunk_like(step, 1)[0].to(state.dtype).copy_(state)


def _layout(shape: Sequence[int], strides: Sequence[int], like: Tensor) -> Layout:
    """How to walk a tensor in the order in which another one lies in memory.

    Args:
        shape, strides: Of the tensor, which broadcasts to the other; it may have more dimensions of size 1 before.
        like: The other.
    """
    excess = max(0, len(shape) - like.dim())
    shape, strides = shape[excess:], strides[excess:]
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


def _kept_tables(tables: Sequence[Table], like: Tensor) -> list[tuple[Tensor, Layout]]:
    """Tables as backward will need them, and how each is broadcast to a step.

    One that is looked up is kept itself, so that autograd sees who changes it.
    """
    if isinstance(like, FakeTensor):
        return [(like.new_empty(table.shape if table.is_computed else 0), Layout((1,), (0,))) for table in tables]
    kept = []
    with torch.no_grad():
        for table in tables:
            value = table.value().detach()
            value = value.contiguous() if table.is_computed else value
            kept.append((value, _layout(value.shape, value.stride(), like)))
    return kept


def _strides_of(table: Table) -> tuple[int, ...]:
    """Of a table's numbers as a scan holds them: what is computed is dense."""
    if not table.is_computed:
        return table.value().stride()
    return tuple(math.prod(table.shape[d + 1 :]) for d in range(len(table.shape)))
