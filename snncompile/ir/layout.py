"""How the steps of a chunk lie in memory.

Library kernels round by the layout of their operands, so a value that is gathered step by step keeps the strides that
each step had, gaps included: a slice of channels is gathered with the gaps of the channels left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .huge_pages import on_huge_pages


def chunk_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides (elements) of a chunk `[C, *shape]` whose steps are laid out by `stride`.

    Where elements of a step overlap, as in an expanded tensor, its steps are contiguous in the chunk.
    """
    span, chunk = 1, 1  # of the dimensions seen so far, the innermost first: up to their last element, and as a whole
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if size == 0 or step < span:
            return torch.empty((1, *shape), device="meta").stride()
        span, chunk = span + step * (size - 1), step * size
    return (chunk, *stride)


def lie_alike(shape: Sequence[int], stride: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two strides of one shape lead to the same places: those of dimensions of size 1 lead nowhere."""
    return all(size == 1 or one == two for size, one, two in zip(shape, stride, other, strict=True))


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a tensor in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor has elements, and no gaps between them."""
    return 0 < extent(shape, stride) == math.prod(shape)


def chunk_like(step: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised `[length, *]` whose steps have the strides of `step`."""
    strides = chunk_strides(step.shape, step.stride())
    return on_huge_pages(torch.empty_strided((length, *step.shape), strides, dtype=step.dtype, device=step.device))


def contiguous_chunk(step: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised, contiguous `[length, *]`."""
    return on_huge_pages(step.new_empty((length, *step.shape)))


class KeepsStrides:
    """A function whose result is laid out as its first argument, as if it were written into that.

    Args:
        function: Takes a tensor first and returns one of its shape and dtype.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "function")

    def __call__(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return chunk_like(first, 1)[0].copy_(self.function(first, *args, **kwargs))
