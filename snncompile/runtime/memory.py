"""Counts the bytes that live at once, by the definition of `memory_budget`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_private import TorchDispatchMode, storage_key, tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Follows every storage that operations create inside it, until it is freed.

    Attributes:
        current_bytes: What is alive now of the storages created inside.
        peak_bytes: The most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        older: set[int] | None = None
        for leaf in tree_leaves(result):
            if not _has_storage(leaf):
                continue
            storage = leaf.untyped_storage()
            key = storage_key(leaf)
            if key in self._sizes:
                continue
            if older is None:
                older = {storage_key(t) for t in tree_leaves((args, kwargs)) if _has_storage(t)}
            if key not in older:
                self._add(key, storage)
        return result

    def _add(self, key: int, storage: Any) -> None:
        self._sizes[key] = size = storage.nbytes()
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current_bytes -= self._sizes.pop(key, 0)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def measure_peak(fn: Callable[[], Any]) -> int:
    """Call `fn()` once and return the peak bytes it held beyond what was there before.

    On CPU every tensor storage that an operation of the call creates is counted from its creation until it is freed,
    the call's result included. On CUDA the allocator's peak counter is read, which also sees library workspaces;
    where the call allocates on CUDA, that figure is returned.

    Args:
        fn: Takes nothing; what it returns is released when the call ends.

    Raises:
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"measure_peak expects a callable without arguments, got {type(fn).__name__}")
    gc.collect()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with MemoryTracker() as tracker:
        result = fn()
    peak: int = tracker.peak_bytes
    if cuda:
        torch.cuda.synchronize()
        peak = int(torch.cuda.max_memory_allocated() - before) or peak
    del result
    return peak
