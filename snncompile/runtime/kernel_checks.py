"""Tries a kernel beside the eager step that it stands for, on a short random sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Adapter
from ..codegen import keeps_float32
from ..ir import TensorType, chunk_like
from .bound_scan import BoundScan, Kernel

_TRIED_STEPS = 3
_TRIED_ELEMENTS = 4096  # of a step whose gradient is tried
_COMPARED_ELEMENTS = 16384  # of a step that is compared bit for bit
_MOST_FLIPPED = 1e-3  # share of elements that rounding may lead over a threshold


def agrees(kernel: Kernel, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> bool:
    """Whether a kernel gives the bits of the eager step for a few random steps.

    One that computes transcendental functions gives them up to rounding, and where that makes a neuron fire or not. One
    that keeps float32 between steps of less is held to the step in float32.
    """
    function, dtype = kernel.function, inputs[0].dtype
    is_exact, is_wider = not function.transcendental, keeps_float32(function)
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return like.copy_(3.0 * torch.rand(like.shape, generator=generator) - 0.5)

    def same(a: Tensor, b: Tensor) -> bool:
        if is_exact and not is_wider:
            return torch.equal(a, b)
        # Parameters may be rounded before the step and in it.
        return _mostly_close(a, b.to(dtype), 4.0 * torch.finfo(dtype).eps if is_wider else 1e-5)

    chunks = [random(chunk_like(value, _TRIED_STEPS)) for value in inputs]
    held = tuple(map(random, states))
    got, after = BoundScan(kernel, inputs).scan(_TRIED_STEPS, chunks, held)
    if is_wider:
        module = copy.deepcopy(module).float()
        chunks, held = [chunk.float() for chunk in chunks], tuple(state.float() for state in held)
    for step in range(_TRIED_STEPS):
        outputs, held = adapter.step(module, tuple(chunk[step] for chunk in chunks), held)
        if len(outputs) != len(got) or not all(same(a[step], b) for a, b in zip(got, outputs, strict=True)):
            return False
    return len(held) == len(after) and all(same(a, b) for a, b in zip(after, held, strict=True))


def _mostly_close(got: Tensor, expected: Tensor, rtol: float) -> bool:
    close = torch.isclose(got, expected, rtol=rtol, atol=0.1 * rtol, equal_nan=True)
    return int((~close).sum()) <= _MOST_FLIPPED * close.numel()


def fewer_elements(types: Sequence[TensorType], tables: Sequence[Sequence[int]]) -> list[TensorType]:
    """The types of a smaller step of the same form: a kernel does the same to each of its elements.

    Args:
        types: Of inputs and states `[N, *]`; the first one is the largest.
        tables: Shapes of what is made of parameters, which keep their size.
    """
    shape = list(types[0].shape)
    fixed = {d - len(table) + len(shape) for table in tables for d, size in enumerate(table) if size != 1}
    for d in (d for d in range(len(shape)) if d not in fixed):
        shape[d] = max(1, min(shape[d], shape[d] * _COMPARED_ELEMENTS // max(1, math.prod(shape))))
    return [_cut(each, shape) for each in types]


def _cut(whole: TensorType, largest: Sequence[int]) -> TensorType:
    """A type with no dimension larger than these, aligned at the last; it lies in memory in the same order."""
    room = largest[len(largest) - len(whole.shape) :]
    shape = tuple(min(size, most) for size, most in zip(whole.shape, room, strict=True))
    if shape == whole.shape:
        return whole
    strides, span = list(whole.stride), 1
    for d in sorted(range(len(shape)), key=lambda d: (whole.stride[d], -d)):
        if whole.stride[d]:
            strides[d] = span
            span *= shape[d]
    return replace(whole, shape=shape, stride=tuple(strides))


def gradients_agree(kernel: Kernel, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> bool:
    """Whether a kernel gives the gradients of the eager step for a few random steps, up to the order of additions."""
    assert kernel.backward is not None
    generator = torch.Generator().manual_seed(1)
    shape, device = _sample_shape(inputs[0].shape), inputs[0].device

    def random(*sizes: int) -> Tensor:
        return (3.0 * torch.rand((*sizes, *shape), generator=generator) - 0.5).to(device)

    with torch.enable_grad():
        chunks = [random(_TRIED_STEPS).requires_grad_() for _ in inputs]
        first = tuple(random().requires_grad_() for _ in states)
        parameters = kernel.backward.parameters_of(module)
        targets = [*chunks, *first, *(p for p in parameters if p.requires_grad)]
        got = BoundScan(kernel, [chunk[0] for chunk in chunks], parameters).scan(_TRIED_STEPS, chunks, first)
        held, steps = first, []
        for step in range(_TRIED_STEPS):
            outputs, held = adapter.step(module, tuple(chunk[step] for chunk in chunks), held)
            steps.append(outputs)
        expected = (tuple(map(torch.stack, zip(*steps, strict=True))), held)
        found = []
        for results in (got, expected):
            recorded = [value for group in results for value in group if value.requires_grad]
            weights = torch.Generator().manual_seed(2)
            given = [torch.rand(value.shape, generator=weights).to(device) for value in recorded]
            found.append(torch.autograd.grad(recorded, targets, given, allow_unused=True) if recorded else ())
    return len(found[0]) == len(found[1]) and all(map(_close, *found))


def _sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of fewer samples: pointwise kernels do the same to each."""
    if not shape:
        return ()
    return (max(1, min(shape[0], _TRIED_ELEMENTS // max(1, math.prod(shape[1:])))), *shape[1:])


def _close(got: Tensor | None, expected: Tensor | None) -> bool:
    if got is None or expected is None:
        return got is expected
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-6 * max(largest, 1e-6), equal_nan=True)
