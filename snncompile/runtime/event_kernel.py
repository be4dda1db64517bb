"""The generated C++ that adds up weights for what is not zero in an input, and how it is called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import EVENT_PIXELS, emit_event_convolution, event_block
from .cpp_build import build
from .ctypes_arrays import longs

MOST_CHANNELS = 2**16  # their numbers are kept in 16 bits
_LOOKED_AT = 64  # pixels of the input, to tell how much of it is not zero
_PARALLEL_ELEMENTS = 4096  # of the input; below it, threads cost more than they save


class EventKernel:
    """Convolutions to so many channels, driven by events.

    Args:
        channels: Of the output.

    Raises:
        BuildError: It cannot be compiled here.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._block = event_block(channels)
        self._blocks = -(-channels // self._block)
        self._library = _compiled(self._block)

    def has_events_below(self, x: Tensor, channels: int, part: float) -> bool:
        """Whether less than this part of an input is not zero, as far as some of its pixels tell.

        Args:
            x: Pixels, each with its channels side by side.
            channels: Of a pixel.
            part: The part.
        """
        pixels = x.numel() // channels
        looked_at = min(_LOOKED_AT, pixels)
        found = self._library.count(
            ctypes.c_long(pixels), ctypes.c_long(channels), ctypes.c_void_p(x.data_ptr()), ctypes.c_long(looked_at)
        )
        return bool(found < part * looked_at * channels)

    def laid_out(self, weight: Tensor) -> Tensor:
        """A weight `[C', C, h, w]` as `[blocks, h, w, C, block]`, zeros behind the last channel."""
        filled = weight.new_zeros(self._blocks * self._block, *weight.shape[1:])
        filled[: self._channels] = weight
        blocked: Tensor = filled.unflatten(0, (self._blocks, self._block)).permute(0, 3, 4, 2, 1).contiguous()
        return blocked

    def room(self, x: Tensor, images: int, channels: int) -> Room:
        """What a convolution needs beside its result.

        Args:
            x: The images, of which there is data or not.
            images: How many.
            channels: Of each pixel.
        """
        return Room(x, images, channels, self._blocks * self._block)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, room: Room, sizes: Sequence[int]
    ) -> None:
        """Write a convolution into `result`.

        Args:
            x: Images, channels-last.
            weight: From `laid_out`.
            bias: `[C']`.
            result: Images, channels-last.
            room: For these images; used once.
            sizes: N, H, W, C, H', W', C', then height and width of kernel, stride, padding and dilation.
        """
        if bias is not None:
            room.bias[: self._channels] = bias
        self._library.convolve(
            longs(sizes),
            *(ctypes.c_void_p(each.data_ptr()) for each in (x, weight, room.bias, result, *room.tensors)),
            ctypes.c_long(room.group),
            ctypes.c_int(torch.get_num_threads() if x.numel() >= _PARALLEL_ELEMENTS else 1),
        )


class Room:
    """For the nonzeros of as many images as are walked through together, and for the bias.

    Args:
        x: The images, of which there is data or not.
        images: How many.
        channels: Of each pixel.
        results: Channels of whole blocks of the output.

    Attributes:
        group: How many images are walked through together.
        tensors: For the values and their channels, and for where those of a pixel begin and how many they are.
        bias: Zeros for whole blocks.
    """

    def __init__(self, x: Tensor, images: int, channels: int, results: int) -> None:
        pixels = x.numel() // (images * channels)
        # Enough that every thread has pixels to use the weights again for.
        threads = torch.get_num_threads()
        self.group = min(images, max(threads, EVENT_PIXELS * threads // pixels))
        # One element more: what is not kept is written behind the last one that is.
        self.tensors = (
            x.new_empty(self.group * pixels * channels + 1),
            x.new_empty(self.group * pixels * channels + 1, dtype=torch.int16),
            x.new_empty(self.group * pixels, dtype=torch.int64),
            x.new_empty(self.group * pixels, dtype=torch.int64),
        )
        self.bias = x.new_zeros(results)


def takes_events(x: Tensor) -> bool:
    """Whether an input is of a type that event-driven kernels take."""
    is_plain = x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return is_plain and not torch.is_autocast_enabled("cpu")


@cache
def _compiled(block: int) -> Any:
    library = build(emit_event_convolution(block), contracts=True)
    library.count.restype = ctypes.c_long
    library.convolve.restype = None
    return library
