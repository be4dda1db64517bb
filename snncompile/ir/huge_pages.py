"""Fresh large tensors on huge pages.

A kernel writes a large fresh tensor faster than the system hands out its pages one by one; pages of 2 MiB instead of
4 KiB make that a small part of the time. Where the system has none to give, or is no Linux, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

_LEAST_BYTES = 8 * 2**20  # what is smaller mostly comes from memory that is there already
_PAGE_BYTES = 2 * 2**20


def on_huge_pages(fresh: Tensor) -> Tensor:
    """Ask for huge pages behind a tensor that nobody has written to yet; the tensor itself is returned."""
    # What is no plain tensor may have no memory at all, where torch follows shapes only.
    if type(fresh) is not Tensor or fresh.device.type != "cpu" or fresh.nbytes < _LEAST_BYTES:
        return fresh
    if (advise := _advise()) is not None:
        begin = -(-fresh.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        end = (fresh.data_ptr() + fresh.nbytes) // _PAGE_BYTES * _PAGE_BYTES
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return fresh


@cache
def _advise() -> Any:
    """The system's `madvise`, if it knows of huge pages."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
