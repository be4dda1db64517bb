"""The helpers that emitted programs call, on plain torch tensors: the eager backend's whole vocabulary.

A value of a chunk is a tensor `[C, N, *]`, or a tuple of such. Each helper is the step loop's own call on the steps of
the chunk, or one call on all of them where the operation treats them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir import chunk_like, chunk_strides
from ..torch_private import tree_flatten, tree_map, tree_unflatten


class Still:
    """An argument that is the same at every step of the chunk."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def batched(function: Callable[[Tensor], Any], value: Tensor) -> Any:
    """Call a function of a batch once, with time folded into the batch: `[C, N, *]` -> `[C * N, *]` and back."""
    steps, batch = value.shape[0], value.shape[1]
    result = function(fold_time(value))
    if isinstance(result, Tensor):
        return result.unflatten(0, (steps, batch))
    return tree_map(lambda leaf: leaf.unflatten(0, (steps, batch)), result)


def fold_time(value: Tensor) -> Tensor:
    """`[C, N, *]` as `[C * N, *]`, each step keeping its memory layout."""
    if value.shape[0] == 1:
        return value[0]
    strides = chunk_strides(value.shape[1:], value.stride()[1:])
    if value.stride() != strides and value.stride(0) != value.shape[1] * value.stride(1):
        # The copy that flatten would make is laid out differently, and library kernels round by layout.
        value = chunk_like(value[0], value.shape[0]).copy_(value)
    return value.flatten(0, 1)


def per_step(steps: int, function: Callable[..., Any], *values: Any) -> Any:
    """Call a function once a step, in order, on the steps of its arguments."""
    return collect_steps(steps, lambda step: function(*(step_of(value, step) for value in values)))


def collect_steps(steps: int, produce: Callable[[int], Any]) -> Any:
    """The results of `produce(0)` to `produce(steps - 1)` as one value of a chunk, each step keeping its strides."""
    if steps == 1 or torch.is_grad_enabled():
        return stack_steps([produce(step) for step in range(steps)])
    buffer = Buffer(steps)
    for step in range(steps):
        buffer.put_step(step, produce(step))
    return buffer.take()


def step_of(value: Any, step: int) -> Any:
    """One step of a chunk's value."""
    if isinstance(value, Tensor):
        return value[step]
    if isinstance(value, Still):
        return value.value
    return tree_map(lambda leaf: leaf[step] if isinstance(leaf, Tensor) else leaf, value)


def part_of(value: Any, begin: int, end: int) -> Any:
    """The steps from `begin` to `end` of a chunk's value."""
    return tree_map(lambda leaf: leaf[begin:end] if isinstance(leaf, Tensor) else leaf, value)


def split_steps(sequence: Tensor, first: int, chunk: int) -> Sequence[Tensor]:
    """The chunks `[C, N, *]` of a sequence from a step on; of single steps, these `[N, *]`.

    Backward puts their gradients together once, where each slice of a sequence would fill all of it with zeros.
    """
    left = sequence[first:] if first else sequence
    if chunk >= left.shape[0] > 1:
        return (left,)  # the gradient of a split into one piece would be a copy
    return left.unbind(0) if chunk == 1 else left.split(chunk)


def lift(value: Tensor, rank: int) -> Tensor:
    """`[C, *]` with ones after time, so that a step of fewer dimensions meets one of `rank` aligned from the right."""
    missing = rank + 1 - value.dim()
    return value.reshape(value.shape[0], *([1] * missing), *value.shape[1:]) if missing > 0 else value


def stack_steps(results: Sequence[Any]) -> Any:
    """Values of single steps as one value of a chunk, each step keeping its strides."""
    first = results[0]
    if isinstance(first, Tensor):
        return _stack(results)
    _, structure = tree_flatten(first)
    leaves = zip(*(tree_flatten(result)[0] for result in results), strict=True)
    return tree_unflatten(
        [_stack(column) if isinstance(column[0], Tensor) else column[0] for column in leaves], structure
    )


def _stack(steps: Sequence[Tensor]) -> Tensor:
    return steps[0].unsqueeze(0) if len(steps) == 1 else gather([step.unsqueeze(0) for step in steps])


_Allocate = Callable[[Tensor, int], Tensor]


def gather(pieces: Sequence[Tensor], allocate: _Allocate = chunk_like) -> Tensor:
    """Pieces `[c, N, *]` end to end, in a copy.

    Args:
        pieces: At least one.
        allocate: From one step and their number; as it is, each step keeps its strides.
    """
    if torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces):
        gathered: Tensor = _Gather.apply(allocate, *pieces)  # type: ignore[no-untyped-call]
        return gathered
    return _gathered(allocate, pieces)


def _gathered(allocate: _Allocate, pieces: Sequence[Tensor]) -> Tensor:
    lengths = [piece.shape[0] for piece in pieces]
    chunk = allocate(pieces[0][0], sum(lengths))
    for part, piece in zip(chunk.split(lengths), pieces, strict=True):
        part.copy_(piece)
    return chunk


class _Gather(torch.autograd.Function):
    """`torch.cat` over time into memory of our own choice; its gradient is a view of each piece."""

    @staticmethod
    def forward(allocate: _Allocate, *pieces: Tensor) -> Tensor:
        return _gathered(allocate, pieces)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.lengths = [piece.shape[0] for piece in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, *grad.split(ctx.lengths))


class Buffer:
    """Gathers a value over the chunk of an outer loop, in one allocation that pieces are copied into."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._whole: Any = None

    def put(self, offset: int, chunk: Any) -> None:
        """The next steps `[C, N, *]`, starting at `offset`."""
        if self._whole is None:
            self._whole = tree_map(self._allocate, chunk)
        for whole, piece in zip(tree_flatten(self._whole)[0], tree_flatten(chunk)[0], strict=True):
            if isinstance(piece, Tensor):
                whole[offset : offset + piece.shape[0]].copy_(piece)

    def put_step(self, offset: int, step: Any) -> None:
        """One step `[N, *]`."""
        self.put(offset, tree_map(_with_time, step))

    def part(self, begin: int, end: int) -> Any:
        """Steps that were put already."""
        return part_of(self._whole, begin, end)

    def step(self, offset: int) -> Any:
        """One step that was put already."""
        return step_of(self._whole, offset)

    def take(self) -> Any:
        """The whole value."""
        return self._whole

    def _allocate(self, chunk: Any) -> Any:
        return chunk_like(chunk[0], self._length) if isinstance(chunk, Tensor) else chunk


class GradBuffer:
    """As `Buffer`, for recorded values: pieces are kept and joined at the end, which autograd can follow."""

    def __init__(self, length: int) -> None:
        self._pieces: list[Any] = []

    def put(self, offset: int, chunk: Any) -> None:
        self._pieces.append(chunk)

    def put_step(self, offset: int, step: Any) -> None:
        self._pieces.append(tree_map(_with_time, step))

    def part(self, begin: int, end: int) -> Any:
        """Steps that were put already."""
        found, offset = [], 0
        for piece in self._pieces:
            length = next(leaf.shape[0] for leaf in tree_flatten(piece)[0] if isinstance(leaf, Tensor))
            if begin < offset + length and offset < end:
                found.append(part_of(piece, max(0, begin - offset), end - offset))
            offset += length
        return _join_pieces(found)

    def step(self, offset: int) -> Any:
        """One step that was put already."""
        return step_of(self.part(offset, offset + 1), 0)

    def take(self) -> Any:
        return _join_pieces(self._pieces)


def _join_pieces(pieces: Sequence[Any]) -> Any:
    # A copy even of one piece, so that no output shares memory with what backward needs.
    _, structure = tree_flatten(pieces[0])
    columns = zip(*(tree_flatten(piece)[0] for piece in pieces), strict=True)
    return tree_unflatten(
        [gather(column) if isinstance(column[0], Tensor) else column[0] for column in columns], structure
    )


def _with_time(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf
