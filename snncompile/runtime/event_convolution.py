"""Convolutions of spikes by generated C++: driven by what is not zero, or by the library where that is too much."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import ChannelsLastConv2d, is_plain_convolution
from ..codegen import EVENT_PIXELS, emit_event_convolution, event_block
from ..torch_private import FakeTensor
from .compiled_scan import BuildError
from .cpp_build import build
from .ctypes_arrays import longs

_MOST_CHANNELS = 2**16  # their numbers are kept in 16 bits
_LOOKED_AT = 64  # pixels of the input, to tell how much of it is not zero
_PARALLEL_ELEMENTS = 4096  # of the input; below it, threads cost more than they save


def event_obstacle(convolution: Any) -> str:
    """Why a 2d convolution has no event-driven form; empty if it has one."""
    if convolution.groups != 1:
        return "it has groups"
    if not is_plain_convolution(convolution) or convolution.in_channels > _MOST_CHANNELS:
        return "its padding or its size has no place in it"
    if convolution.weight.dtype is not torch.float32 or convolution.weight.device.type != "cpu":
        return "its weight is not float32 on the CPU"
    try:
        _compiled(event_block(convolution.out_channels))
    except BuildError as failure:
        return failure.message
    return ""


class EventConv2d(ChannelsLastConv2d):
    """A 2d convolution `[N, C, H, W] -> [N, C', H', W']` of images that lie channels-last and are mostly zeros.

    Args:
        convolution: Whose weight and bias it computes with.
        below: The part of an input that is not zero from which on the library's convolution runs.
    """

    def __init__(self, convolution: nn.Module, below: float) -> None:
        super().__init__(convolution)
        self._below = below

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = self.__dict__["convolution"]
        if not _is_fit(x):
            return super().forward(x)
        if isinstance(x, FakeTensor):
            room = _Room(x)  # what it takes while the result is there
            result = super().forward(x)
            del room
            return result
        kernel = _compiled(event_block(convolution.out_channels))
        n, channels, height, width = x.shape
        pixels = n * height * width
        looked_at = min(_LOOKED_AT, pixels)
        found = kernel.count(
            ctypes.c_long(pixels), ctypes.c_long(channels), ctypes.c_void_p(x.data_ptr()), ctypes.c_long(looked_at)
        )
        if found > self._below * looked_at * channels:
            return super().forward(x)
        return self._convolve(kernel, x)

    def _convolve(self, kernel: Any, x: Tensor) -> Tensor:
        convolution: Any = self.__dict__["convolution"]
        (sy, sx), (py, px), (dy, dx) = convolution.stride, convolution.padding, convolution.dilation
        n, channels, height, width = x.shape
        out_channels, _, kernel_height, kernel_width = convolution.weight.shape
        out_height = (height + 2 * py - dy * (kernel_height - 1) - 1) // sy + 1
        out_width = (width + 2 * px - dx * (kernel_width - 1) - 1) // sx + 1
        weight, bias = self.weight("events", _blocked), _blocked_bias(convolution)
        room = _Room(x)
        result = torch.empty(n, out_height, out_width, out_channels)
        sizes = (n, height, width, channels, out_height, out_width, out_channels, kernel_height, kernel_width)
        kernel.convolve(
            longs([*sizes, sy, sx, py, px, dy, dx]),
            *(ctypes.c_void_p(each.data_ptr()) for each in (x, weight, bias, result, *room.tensors)),
            ctypes.c_long(room.group),
            ctypes.c_int(torch.get_num_threads() if x.numel() >= _PARALLEL_ELEMENTS else 1),
        )
        return result.permute(0, 3, 1, 2)


class _Room:
    """For the nonzeros of as many images as are walked through together.

    Args:
        x: The images.

    Attributes:
        group: How many images.
        tensors: For the values and their channels, and for where those of a pixel begin and how many they are.
    """

    def __init__(self, x: Tensor) -> None:
        n, channels, height, width = x.shape
        # Enough that every thread has pixels to use the weights again for.
        threads = torch.get_num_threads()
        self.group = min(n, max(threads, EVENT_PIXELS * threads // (height * width)))
        pixels = self.group * height * width
        # One element more: what is not kept is written behind the last one that is.
        self.tensors = (
            x.new_empty(pixels * channels + 1),
            x.new_empty(pixels * channels + 1, dtype=torch.int16),
            x.new_empty(pixels, dtype=torch.int64),
            x.new_empty(pixels, dtype=torch.int64),
        )


def _is_fit(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def _blocked(convolution: Any) -> Tensor:
    """The weight `[C', C, h, w]` as `[blocks, h, w, C, block]`, zeros behind the last channel."""
    weight = convolution.weight.detach()
    block = event_block(weight.shape[0])
    blocks = -(-weight.shape[0] // block)
    filled = weight.new_zeros(blocks * block, *weight.shape[1:])
    filled[: weight.shape[0]] = weight
    blocked: Tensor = filled.unflatten(0, (blocks, block)).permute(0, 3, 4, 2, 1).contiguous()
    return blocked


def _blocked_bias(convolution: Any) -> Tensor:
    """The bias, zeros where there is none and behind the last channel."""
    channels = convolution.out_channels
    block = event_block(channels)
    filled = torch.zeros(-(-channels // block) * block)
    if convolution.bias is not None:
        filled[:channels] = convolution.bias.detach()
    return filled


@cache
def _compiled(block: int) -> Any:
    library = build(emit_event_convolution(block), contracts=True)
    library.count.restype = ctypes.c_long
    library.convolve.restype = None
    return library
