"""When one batch norm over a chunk of steps gives the bits that one a step gives.

Time joins the channels, `[C, N, ch, *]` -> `[N, C * ch, *]`: a batch norm treats every channel by itself, so each step
keeps its own statistics. The rules below state facts about torch's CPU kernels: which of them compute a channel alike
wherever it stands and however many others there are. On other devices the planner compares bits and reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .graph import TensorType

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS: frozenset[type[nn.Module]] = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})

_WHOLE = (torch.float32, torch.float64)


def fold_channels_obstacle(norm: BatchNorm, step: TensorType) -> str:
    """Why time may not join the channels of a batch norm; "" where it may.

    Args:
        norm: Normalises by the statistics of its input.
        step: One step of its input, `[N, ch, *]`.
    """
    image = math.prod(step.shape[2:])
    values = step.shape[0] * image
    if values < 2:
        return "it has fewer than two values a channel"
    if not is_channels_first(step) and not _is_channels_last(step):
        return "its input is neither contiguous nor channels-last"
    if step.device.type != "cpu":
        return ""
    # Contiguous images are added up channel by channel, everything else row by row, over all channels at once.
    by_rows = image == 1 or not is_channels_first(step)
    if step.dtype not in _WHOLE and (by_rows or _tracks_in_halves(norm)):
        return f"in {str(step.dtype).removeprefix('torch.')} the library may round by the number of channels"
    if by_rows and values <= torch.get_num_threads():
        return "with no more values a channel than threads the library may add them up by the number of channels"
    if not all(tensor.is_contiguous() for tensor in (norm.weight, norm.bias) if tensor is not None):
        return "its parameters are not contiguous"
    return ""


def is_channels_first(step: TensorType) -> bool:
    """Whether a step is contiguous; channels-last otherwise, if it may be folded at all."""
    return _is_dense(step, range(len(step.shape)))


def _is_channels_last(step: TensorType) -> bool:
    rank = len(step.shape)
    return rank in (4, 5) and _is_dense(step, (0, *range(2, rank), 1))


def _is_dense(step: TensorType, order: Iterable[int]) -> bool:
    """Whether the dimensions, in this order, lie in memory without gaps."""
    expected = 1
    for dim in reversed(tuple(order)):
        if step.shape[dim] != 1:
            if step.stride[dim] != expected:
                return False
            expected *= step.shape[dim]
    return True


def _tracks_in_halves(norm: BatchNorm) -> bool:
    # From statistics in half precision the library updates with more digits than it hands out.
    return norm.running_mean is not None and norm.running_mean.dtype not in _WHOLE
