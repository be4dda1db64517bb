"""How the steps of a chunk lie in memory.

Library kernels round by the layout of their operands, so a value that is gathered step by step keeps the strides that
each step had, gaps included: a slice of channels is gathered with the gaps of the channels left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chunk_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides (elements) of a chunk `[C, *shape]` whose steps are laid out by `stride`.

    Where elements of a step overlap, as in an expanded tensor, its steps are contiguous in the chunk.
    """
    end = 1  # elements that the dimensions seen so far span, the innermost first
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if size == 0 or step < end:
            return torch.empty((1, *shape), device="meta").stride()
        end = step * size
    return (end, *stride)


def chunk_like(step: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised `[length, *]` whose steps have the strides of `step`."""
    if step.is_contiguous():
        return contiguous_chunk(step, length)
    strides = chunk_strides(step.shape, step.stride())
    return torch.empty_strided((length, *step.shape), strides, dtype=step.dtype, device=step.device)


def contiguous_chunk(step: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised, contiguous `[length, *]`."""
    return step.new_empty((length, *step.shape))
