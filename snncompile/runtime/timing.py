"""Clocks for what takes microseconds and for what takes seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..codegen import Buffer
from ..ir import TensorType
from ..schedule import SPIKING
from .node_program import empty_like_type

_ENOUGH_SECONDS = 0.02
_LONG_SECONDS = 0.5
_MOST_REPETITIONS = 50
_RANDOM_ELEMENTS = 2**18 - 5  # a prime, so that no two steps or rows are likely to be alike


def best_seconds(run: Callable[[], Any], start: Callable[[], Any] = lambda: None, *, on_cuda: bool) -> float:
    """The shortest of a few runs: of many where one is short, of one where that takes long.

    Args:
        run: What is timed.
        start: Goes before each run and is not timed.
        on_cuda: Wait for the device after each run.
    """

    def once() -> float:
        start()
        started = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first = once()  # warms up
    if first >= _LONG_SECONDS:
        return first
    best = spent = once()
    for _ in range(_MOST_REPETITIONS - 1):
        if spent >= _ENOUGH_SECONDS:
            break
        took = once()
        best, spent = min(best, took), spent + took
    return best


def put_seconds(device: torch.device, size: int) -> float:
    """Seconds to copy `size` bytes into the middle of a buffer."""
    piece = torch.zeros(1, size, dtype=torch.uint8, device=device)
    buffer = Buffer(3)
    buffer.put(0, piece)
    return best_seconds(lambda: buffer.put(1, piece), on_cuda=device.type == "cuda")


def spike_operand(leaf: TensorType) -> Tensor:
    """A real tensor of a type of which the part `SPIKING` is not zero."""
    tensor = random_operand(leaf)
    if not leaf.dtype.is_floating_point:
        return tensor
    threshold = NormalDist().inv_cdf(1.0 - SPIKING)
    return tensor.sub_(threshold).relu_()


def random_operand(leaf: TensorType) -> Tensor:
    """A real tensor of a type, from a generator of its own, so that the user's random numbers stay theirs."""
    tensor = empty_like_type(leaf)
    if not leaf.dtype.is_floating_point:
        return tensor.zero_()
    generator = torch.Generator(device=leaf.device)
    generator.manual_seed(0)
    drawn = torch.randn(
        min(tensor.numel(), _RANDOM_ELEMENTS), generator=generator, device=leaf.device, dtype=leaf.dtype
    )
    # Drawing numbers takes longer than most operations on them.
    copies = -(-tensor.numel() // max(1, drawn.numel()))
    return tensor.copy_((drawn if copies <= 1 else drawn.repeat(copies)[: tensor.numel()]).view(leaf.shape))
