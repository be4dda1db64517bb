"""Layers of spikes in training: what backward keeps of their input is bits.

A layer's weight gradient needs its input. Spikes are zeros and ones, so a bit holds each, and a few bits hold sums of
them; the float tensor goes as soon as the layer has computed. Backward gets the same floats back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..codegen import BITS_GROUP, BITS_ROW, emit_bits
from ..ir import is_dense
from ..torch_private import FakeTensor, may_hook_saved_tensors, storage_key
from .compiled_scan import BuildError
from .cpp_build import build

_LEAST_ELEMENTS = 4096  # a smaller tensor is not worth it
_PARALLEL_ELEMENTS = 64 * 1024  # below it, threads cost more than they save


class KeepsBits(nn.Module):
    """A layer, called as it is; where its input is whole numbers of so many bits, its backward keeps these.

    Made anew for each call of a program.

    Args:
        layer: Takes one tensor `[N, *]`.
        planes: How many bits.
    """

    def __init__(self, layer: nn.Module, planes: int = 1) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a part of this module
        self._planes = planes

    def forward(self, x: Tensor) -> Any:
        layer: Callable[[Tensor], Any] = self.__dict__["layer"]
        if not torch.is_grad_enabled() or x.numel() < _LEAST_ELEMENTS or not may_hook_saved_tensors():
            return layer(x)
        size, memory, planes = x.numel(), storage_key(x), self._planes

        def pack(saved: Tensor) -> Tensor | Packed:  # autograd may hold on to it, so it must not hold the input
            is_input = saved.numel() == size and storage_key(saved) == memory
            return Packed.of(saved, planes) or saved if is_input else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
            return layer(x)


@dataclass(frozen=True)
class Packed:
    """A float32 tensor of whole numbers from 0 on, such as zeros and ones.

    Attributes:
        bits: int32; see `emit_bits`.
        planes: How many bits of each number.
        shape, stride: Of the tensor, which is dense.
    """

    bits: Tensor
    planes: int
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(spikes: Tensor, planes: int = 1) -> Packed | None:
        """A tensor as so many bits each; None if it holds what these cannot say, or may not be read in order."""
        shape, stride = spikes.shape, spikes.stride()
        if spikes.dtype is not torch.float32 or spikes.device.type != "cpu" or not is_dense(shape, stride):
            return None
        bits = spikes.new_empty(-(-spikes.numel() // BITS_GROUP) * planes * BITS_ROW, dtype=torch.int32)
        packed = Packed(bits, planes, shape, stride)
        if isinstance(spikes, FakeTensor):
            return packed
        return packed if _library().pack(*packed._arguments(spikes)) else None

    def unpack(self) -> Tensor:
        """The tensor."""
        spikes = self.bits.new_empty_strided(self.shape, self.stride, dtype=torch.float32)
        if not isinstance(spikes, FakeTensor):
            _library().unpack(*self._arguments(spikes))
        return spikes

    def _arguments(self, spikes: Tensor) -> tuple[Any, ...]:
        threads = torch.get_num_threads() if spikes.numel() >= _PARALLEL_ELEMENTS else 1
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (spikes, self.bits))
        return (ctypes.c_long(spikes.numel()), *addresses, ctypes.c_long(self.planes), ctypes.c_int(threads))


def bits_obstacle() -> str:
    """Why this machine packs no bits; empty if it does."""
    try:
        _library()
    except BuildError as failure:
        return failure.message
    return ""


def _unpacked(kept: Tensor | Packed) -> Tensor:
    return kept.unpack() if isinstance(kept, Packed) else kept


@cache
def _library() -> Any:
    library = build(emit_bits())
    library.unpack.restype = None
    return library
