"""Layers of spikes: driven by what is not zero, or computed by the library where that is too much."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..capture import ChannelsLastConv2d, is_plain_convolution, weight_copy
from ..torch_private import FakeTensor
from .compiled_scan import BuildError
from .event_kernel import MOST_CHANNELS, EventKernel, takes_events

_FORM = "for events"


def event_driven(module: nn.Module, below: float) -> nn.Module:
    """The event-driven form of a linear layer or a 2d convolution."""
    return EventLinear(module, below) if _is_linear(module) else EventConv2d(module, below)


def event_obstacle(module: Any) -> str:
    """Why a linear layer or a 2d convolution has no event-driven form; empty if it has one."""
    if not _is_linear(module):
        if module.groups != 1:
            return "it has groups"
        if not is_plain_convolution(module):
            return "its padding has no place in it"
    if module.weight.dtype is not torch.float32 or module.weight.device.type != "cpu":
        return "its weight is not float32 on the CPU"
    if module.weight.shape[1] > MOST_CHANNELS:
        return f"its input has more than {MOST_CHANNELS} channels"
    try:
        EventKernel(module.weight.shape[0])
    except BuildError as failure:
        return failure.message
    return ""


class EventConv2d(ChannelsLastConv2d):
    """A 2d convolution `[N, C, H, W] -> [N, C', H', W']` of images that lie channels-last and are mostly zeros.

    Made anew for each call of a program, during which weights stay as they are.

    Args:
        convolution: Whose weight and bias it computes with.
        below: The part of an input that is not zero from which on the library's convolution runs.
    """

    def __init__(self, convolution: nn.Module, below: float) -> None:
        super().__init__(convolution)
        self._below = below

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = self.__dict__["convolution"]
        if x.dim() != 4 or not takes_events(x) or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        n, channels, height, width = x.shape
        out_channels, _, kernel_height, kernel_width = convolution.weight.shape
        kernel = EventKernel(out_channels)
        if isinstance(x, FakeTensor):
            room = kernel.room(x, n, channels)  # what it takes while the result is there
            result = super().forward(x)
            del room
            return result
        if not kernel.has_events_below(x, channels, self._below):
            return super().forward(x)
        (sy, sx), (py, px), (dy, dx) = convolution.stride, convolution.padding, convolution.dilation
        out_height = (height + 2 * py - dy * (kernel_height - 1) - 1) // sy + 1
        out_width = (width + 2 * px - dx * (kernel_width - 1) - 1) // sx + 1
        weight = self.weight(_FORM, lambda its: kernel.laid_out(its.weight.detach()))
        room = kernel.room(x, n, channels)
        result = torch.empty(n, out_height, out_width, out_channels)
        sizes = (n, height, width, channels, out_height, out_width, out_channels, kernel_height, kernel_width)
        kernel.convolve(x, weight, _bias_of(convolution), result, room, (*sizes, sy, sx, py, px, dy, dx))
        return result.permute(0, 3, 1, 2)


class EventLinear(nn.Module):
    """A linear layer `[*, C] -> [*, C']` of rows that are mostly zeros: a convolution of images of one pixel.

    Args:
        linear: Whose weight and bias it computes with.
        below: The part of an input that is not zero from which on the library's product runs.
    """

    def __init__(self, linear: nn.Module, below: float) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # no part of this module: it stays the network's
        self._below = below

    def forward(self, x: Tensor) -> Tensor:
        linear: Any = self.__dict__["linear"]
        if not takes_events(x) or not x.is_contiguous():
            return _product(x, linear)
        channels, rows = x.shape[-1], x.numel() // x.shape[-1]
        out_channels = linear.weight.shape[0]
        kernel = EventKernel(out_channels)
        if isinstance(x, FakeTensor):
            room = kernel.room(x, rows, channels)
            result = _product(x, linear)
            del room
            return result
        if not kernel.has_events_below(x, channels, self._below):
            return _product(x, linear)
        weight = weight_copy(linear, _FORM, lambda its: kernel.laid_out(its.weight.detach()[:, :, None, None]))
        room = kernel.room(x, rows, channels)
        result = torch.empty(*x.shape[:-1], out_channels)
        sizes = (rows, 1, 1, channels, 1, 1, out_channels, 1, 1, 1, 1, 0, 0, 1, 1)
        kernel.convolve(x, weight, _bias_of(linear), result, room, sizes)
        return result


def _product(x: Tensor, linear: Any) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _bias_of(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


def _is_linear(module: Any) -> bool:
    return bool(module.weight.dim() == 2)
