"""Clocks for what takes microseconds and for what takes seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..codegen import Buffer
from ..ir import TensorType
from ..schedule import SPIKING
from .node_program import empty_like_type

_AVERAGED_SECONDS = 0.006
_ENOUGH_SECONDS = 0.2  # of a round that is not repeated
_LONG_SECONDS = 0.5
_MOST_REPETITIONS = 20
_RANDOM_ELEMENTS = 2**18 - 5  # a prime, so that no two steps or rows are likely to be alike


Timed = tuple[Callable[[], Any], Callable[[], Any]]  # what is timed, and what goes before it and is not


def best_seconds(runs: Sequence[Timed], *, on_cuda: bool) -> list[float]:
    """The shorter of two averages, or one, for each: over many runs where one is short, over one where it is long.

    They take turns, so that a machine that becomes slower or faster meanwhile does so for all of them; and each has
    as many averages as the others, as the shortest of many would be shorter than that of few.

    Args:
        runs: What is timed.
        on_cuda: Wait for the device after each run.
    """

    def once(run: Callable[[], Any], start: Callable[[], Any]) -> float:
        start()
        started = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def average(run: Timed) -> float:
        took = [once(*run)]
        while sum(took) < _AVERAGED_SECONDS and len(took) < _MOST_REPETITIONS:
            took.append(once(*run))
        return sum(took) / len(took)

    found = [once(*run) for run in runs]  # warms up
    repeated = [number for number, seconds in enumerate(found) if seconds < _LONG_SECONDS]
    rounds = 2 if sum(found[number] for number in repeated) < _ENOUGH_SECONDS else 1
    averages = [[average(runs[number]) for number in repeated] for _ in range(rounds)]
    for number, *of_one in zip(repeated, *averages, strict=True):
        found[number] = min(of_one)
    return found


def put_seconds(device: torch.device, size: int) -> float:
    """Seconds to copy `size` bytes into the middle of a buffer."""
    piece = torch.zeros(1, size, dtype=torch.uint8, device=device)
    buffer = Buffer(3)
    buffer.put(0, piece)
    (seconds,) = best_seconds([(lambda: buffer.put(1, piece), lambda: None)], on_cuda=device.type == "cuda")
    return seconds


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
