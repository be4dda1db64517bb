"""Batch norm by the statistics of each step, for a whole chunk of steps in one library call.

Time joins the channels, `[C, N, ch, *]` -> `[N, C * ch, *]`, in the memory layout of a step, so that the library takes
the kernel that it takes for a step and computes every channel as it does there: on CPU, outputs have the step loop's
bits. Called with a momentum of 1, the library leaves each step's mean and unbiased variance where running statistics
would stand; from those the module's own are updated, on CPU with the step loop's rounding too.

Not optimal: the chunk is copied into the folded layout and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir import TensorType
from ..ir.step_statistics import BatchNorm, fold_channels_obstacle, is_channels_first
from ..torch_private import addcmul_in_order
from .kernels import per_step


def batch_norm_by_step(norm: BatchNorm, value: Tensor) -> Tensor:
    """What `norm` returns for each step of `[C, N, ch, *]`; its running statistics are updated C times, in order.

    Where one call would not give the bits of single steps, there is one call a step.
    """
    steps = value.shape[0]
    step = TensorType(tuple(value.shape[1:]), tuple(value.stride()[1:]), value.dtype, value.device)
    if steps == 1 or fold_channels_obstacle(norm, step):
        result: Tensor = per_step(steps, norm, value)
        return result
    mean = var = None
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        mean, var = norm.running_mean.new_zeros((2, steps * step.shape[1]))
    weight, bias = (None if tensor is None else tensor.repeat(steps) for tensor in (norm.weight, norm.bias))
    place = 1 if is_channels_first(step) else len(step.shape) - 1
    output = F.batch_norm(_fold(value, place), mean, var, weight, bias, True, 1.0, norm.eps)
    if mean is not None and var is not None:
        _track(norm, torch.stack([mean.view(steps, -1), var.view(steps, -1)], 1), value.dtype)
    return _unfold(output, steps, place)


def _fold(value: Tensor, place: int) -> Tensor:
    """`[C, N, ch, *]` -> `[N, C * ch, *]`, the channels of both in the same place in memory, counted from N."""
    # Without `contiguous` one image or channel would be folded as a view, and the library take another kernel for it.
    folded: Tensor = value.movedim(2, place + 1).movedim(0, place).flatten(place, place + 1).contiguous()
    return folded.movedim(place, 1)


def _unfold(folded: Tensor, steps: int, place: int) -> Tensor:
    """`[N, C * ch, *]` -> `[C, N, ch, *]`, every step laid out as it was before."""
    chunk: Tensor = folded.movedim(1, place).unflatten(place, (steps, -1)).movedim(place, 0).contiguous()
    # A dimension of one has any stride in a contiguous tensor; a view to the same shape gives it that of a step.
    return chunk.view(chunk.shape).movedim(place + 1, 2)


@torch.no_grad()
def _track(norm: BatchNorm, statistics: Tensor, dtype: torch.dtype) -> None:
    """Update running statistics in place by `[C, 2, ch]`: mean and unbiased variance of each step."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running = torch.stack([norm.running_mean, norm.running_var])
    momenta = _momenta(norm, len(statistics))
    if running.device.type == "cpu":
        updated = _updated_in_order(running, statistics, momenta, dtype)
    else:
        updated = _updated_at_once(running, statistics, momenta)
    # Past autograd's count of versions, as the library does it: the call of a single step keeps them for backward.
    norm.running_mean.data.copy_(updated[0])
    norm.running_var.data.copy_(updated[1])
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(len(statistics))


def _momenta(norm: BatchNorm, steps: int) -> list[float]:
    """The share of each step's statistics in the running ones after it; a cumulative average if momentum is None."""
    if norm.momentum is not None:
        return [norm.momentum] * steps
    if norm.num_batches_tracked is None:
        return [0.0] * steps
    counted = int(norm.num_batches_tracked)
    return [1.0 / (counted + step) for step in range(1, steps + 1)]


def _updated_in_order(running: Tensor, statistics: Tensor, momenta: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`running = momentum * statistics + (1 - momentum) * running` once a step, rounded as torch's CPU kernel rounds.

    Args:
        running: `[2, ch]`.
        statistics: `[C, 2, ch]`.
        momenta: C numbers.
        dtype: Of what is normalised: the kernel adds variances in its accumulation type.
    """
    wide = torch.float32 if dtype.itemsize < 4 else torch.float64
    momentum = torch.tensor(momenta, dtype=running.dtype).unsqueeze(1)
    means, variances = statistics.unbind(1)
    new = torch.stack([(momentum * means).to(wide), momentum.to(wide) * variances.to(wide)], 1).unbind()
    one = torch.ones((), dtype=wide)
    # Two additions a step, to zero and then to the result: every product and every sum is rounded by itself.
    after = torch.zeros_like(statistics).unbind()
    before = (running, *after[:-1])
    kept = (1 - momentum).squeeze(1).unbind()
    addcmul_in_order(
        [each for each in after for _ in range(2)],
        [each for pair in zip(before, new, strict=True) for each in pair],
        [each for share in kept for each in (share, one)],
    )
    return after[-1]


def _updated_at_once(running: Tensor, statistics: Tensor, momenta: Sequence[float]) -> Tensor:
    """As `_updated_in_order`, in closed form: equal but for rounding.

    `prod_t (1 - m_t) running + sum_t m_t prod_{s > t} (1 - m_s) statistics_t`.
    """
    *later, whole = accumulate((1.0 - momentum for momentum in reversed(momenta)), mul, initial=1.0)
    shares = [momentum * kept for momentum, kept in zip(momenta, reversed(later), strict=True)]
    wide = torch.float64 if running.dtype is torch.float64 else torch.float32
    share = torch.tensor(shares, dtype=wide, device=running.device).view(-1, 1, 1)
    return whole * running.to(wide) + (share * statistics).sum(0)
