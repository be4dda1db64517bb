"""Arrays of C for the arguments of compiled functions; of nothing, one element that nobody reads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any


def pointers(addresses: Sequence[int | None]) -> Any:
    """`void *[]`; None: the null pointer."""
    return (ctypes.c_void_p * max(1, len(addresses)))(*addresses)


def longs(values: Sequence[int]) -> Any:
    """`long[]`."""
    return (ctypes.c_long * max(1, len(values)))(*values)


def floats(values: Sequence[float]) -> Any:
    """`float[]`."""
    return (ctypes.c_float * max(1, len(values)))(*values)
