"""Seconds, bytes and kernel launches of a call."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import snncompile

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
WARM_SECONDS = 2.0  # a call this long has warmed itself up
MAX_SAMPLES = 50


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """From the call to the end of the work it started; what it returns is freed after that."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def samples(clear: Callable[[], None], call: Callable[[], Any], device: torch.device, budget: float) -> list[float]:
    """Seconds of as many calls as fit into a budget, at least one; a short first call only warms up.

    Args:
        clear: Puts everything back to where a call starts; not timed.
        budget: Seconds.
    """
    measured: list[float] = []
    clear()
    first = seconds_of(call, device)
    if first >= WARM_SECONDS:
        measured.append(first)
    while not measured or (sum(measured) < budget and len(measured) < MAX_SAMPLES):
        clear()
        measured.append(seconds_of(call, device))
    return measured


@dataclass(frozen=True)
class Peaks:
    """Bytes that one call holds beyond network, input and what was there before.

    Attributes:
        peak_bytes: On the CPU tracked tensor storage (`snncompile.measure_peak`), None where the allocations of the
            system cannot be tracked; on CUDA what the allocator counts as allocated.
        reserved_bytes: On CUDA what the allocator took from the device.
        resident_bytes: On the CPU the growth of the resident set, which counts whatever allocates; None where the
            operating system has no such counter.
    """

    peak_bytes: int | None
    reserved_bytes: int | None = None
    resident_bytes: int | None = None


def peaks_on_cpu(clear: Callable[[], None], call: Callable[[], Any], is_trackable: bool) -> Peaks:
    """One call, watched by the tracker and from outside; the tracker itself takes next to nothing."""
    tracked: list[int] = []

    def track() -> None:
        tracked.append(snncompile.measure_peak(call))

    clear()
    resident = resident_growth(track if is_trackable else call)
    if is_trackable and not tracked:  # nothing can be seen from outside
        track()
    return Peaks(tracked[0] if tracked else None, None, resident)


def resident_growth(call: Callable[[], Any]) -> int | None:
    """By how many bytes the process was larger at its largest during a call than before; None if Linux does not say."""
    gc.collect()
    _return_free_memory()
    try:
        CLEAR.write_text("5")  # the highest mark starts from here
        before = _status_bytes("VmRSS")
        result = call()
        growth = _status_bytes("VmHWM") - before
    except (OSError, KeyError):
        return None
    del result
    return max(0, growth)


def _return_free_memory() -> None:
    """What C's allocator keeps for later would hide the growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


@dataclass(frozen=True)
class DeviceMemory:
    """What a CUDA device holds before a system is prepared."""

    allocated: int
    reserved: int

    @staticmethod
    def now() -> DeviceMemory:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return DeviceMemory(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())

    def plus(self, count: int) -> DeviceMemory:
        """As if so many bytes more had been there."""
        return DeviceMemory(self.allocated + count, self.reserved + count)

    def peaks(self, clear: Callable[[], None], call: Callable[[], Any]) -> Peaks:
        """Of one call, with whatever the system keeps between calls: a CUDA graph's memory is there all the time."""
        clear()
        DeviceMemory.now()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peaks = Peaks(
            int(torch.cuda.max_memory_allocated()) - self.allocated,
            int(torch.cuda.max_memory_reserved()) - self.reserved,
        )
        del result
        return peaks


def count_launches(clear: Callable[[], None], call: Callable[[], Any]) -> int:
    """Kernels that one call starts on a CUDA device."""
    from torch.profiler import ProfilerActivity, profile

    clear()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
