"""Measures workloads: one process for each system, parity first, then rounds in which the systems take turns."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import machine
from .measure import Peaks
from .process import WorkerError, WorkerProcess
from .records import CaseResult, Row
from .systems import SYSTEMS, System
from .worker import Request
from .workloads import Workload

LONG_SECONDS = 10.0  # longer calls are not repeated more often than spread needs
LONG_ROUNDS = 3
ENOUGH_SECONDS = 30.0  # of long calls: what disturbs them is within them
START_SECONDS = 120.0  # importing torch and a framework on a busy machine


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: "cpu" or "cuda".
        threads: Of torch, in every process.
        rounds: In each, every system is timed.
        round_seconds: Of timed calls of one system in one round; a call that is longer is made once.
        setup_limit: Seconds that a system may take from the network to its first result.
        call_limit: Seconds that one call may take.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    round_seconds: float = 1.0
    setup_limit: float = 300.0
    call_limit: float = 300.0


Say = Callable[[str], None]


def measure_case(workload: Workload, systems: Sequence[System], settings: Settings, log: Path, say: Say) -> CaseResult:
    """Every system's row; what goes wrong with one is in its row."""
    result = described(workload)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"

        def request(system: str | None) -> Request:
            return Request(workload, system, path, settings.device, settings.threads, log)

        try:
            result = replace(result, **_make_case(request(None), settings))
        except WorkerError as error:
            return replace(result, error=f"the reference failed: {error}")
        rows = _measure_systems(systems, request, settings, say)
    return replace(result, rows=tuple(rows[system.name] for system in systems))


def described(workload: Workload) -> CaseResult:
    return CaseResult(
        name=workload.name,
        suite=workload.suite,
        curve=workload.curve,
        description=workload.description,
        steps=workload.steps,
        batch=workload.batch,
        trains=workload.trains,
        moved_bytes=workload.moved_bytes(),
        load=machine.load(),
    )


def _make_case(request: Request, settings: Settings) -> dict[str, Any]:
    process = WorkerProcess(request)
    try:
        found: dict[str, Any] = process.order(
            "make_case", limit=START_SECONDS + settings.setup_limit + 3 * settings.call_limit
        )
        return found
    finally:
        process.stop()


def _measure_systems(
    systems: Sequence[System], request: Callable[[str | None], Request], settings: Settings, say: Say
) -> dict[str, Row]:
    rows = {system.name: Row(system.name, system.label, "ok", is_ours=system.is_ours) for system in systems}
    with _processes() as processes:
        # All start at once, and no clock runs before the last of them has.
        processes.update({system.name: WorkerProcess(request(system.name)) for system in systems})
        for system in systems:
            process = processes[system.name]
            try:
                process.order("start", limit=START_SECONDS)
            except WorkerError as error:
                rows[system.name] = rows[system.name].without_numbers("error", str(error))
                processes.pop(system.name).stop()
        for system in systems:
            if system.name not in processes:
                continue
            process = processes[system.name]
            try:
                rows[system.name] = _prepare(process, rows[system.name], settings)
            except WorkerError as error:
                rows[system.name] = rows[system.name].without_numbers("error", str(error))
            row = rows[system.name]
            say(f"  {row.label}: {'ready' if row.status in ('ok', 'yardstick') else row.error}")
            if row.status not in ("ok", "yardstick"):
                processes.pop(system.name).stop()
        ready = {name: row.setup_seconds for name, row in rows.items()}
        for number in range(settings.rounds):
            for name, process in list(processes.items()):
                row = rows[name]
                if row.seconds and number >= _rounds(row.median, settings):
                    continue
                try:
                    limit = settings.call_limit + settings.round_seconds
                    more = process.order("samples", settings.round_seconds, limit=limit)
                    rows[name] = replace(row, seconds=(*row.seconds, *more))
                except WorkerError as error:
                    rows[name] = row.without_numbers("error", str(error))
                    processes.pop(name).stop()
        for name, row in rows.items():
            seconds = ready[name]
            if row.seconds and seconds is not None:
                rows[name] = replace(row, setup_seconds=max(0.0, seconds - statistics.median(row.seconds)))
    return rows


def _rounds(seconds: float, settings: Settings) -> int:
    """How often a system takes its turn whose calls take this long."""
    if seconds <= LONG_SECONDS:
        return settings.rounds
    return min(settings.rounds, LONG_ROUNDS, math.ceil(ENOUGH_SECONDS / seconds))


def _prepare(process: WorkerProcess, row: Row, settings: Settings) -> Row:
    """The row with everything but times; one that must not have any if parity is red."""
    found = process.order("prepare", limit=settings.setup_limit + settings.call_limit)
    row = replace(row, departure=found["departure"], details=found["details"], setup_seconds=found["ready_seconds"])
    if not found["is_right"]:
        return row.without_numbers("parity", "departs from the step loop by more than rounding")
    peaks: Peaks = process.order("peaks", limit=3 * settings.call_limit)
    return replace(
        row,
        status="yardstick" if SYSTEMS[row.system].is_yardstick else "ok",
        peak_bytes=peaks.peak_bytes,
        reserved_bytes=peaks.reserved_bytes,
        resident_bytes=peaks.resident_bytes,
        launches=process.order("launches", limit=3 * settings.call_limit),
    )


@contextmanager
def _processes() -> Iterator[dict[str, WorkerProcess]]:
    """Processes by name, all of them ended on the way out, however that comes about."""
    processes: dict[str, WorkerProcess] = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.stop()


class Stopwatch:
    """Tells a run that is limited in time when to stop.

    Args:
        limit: Seconds, or None.
    """

    def __init__(self, limit: float | None) -> None:
        self._end = None if limit is None else time.monotonic() + limit

    @property
    def has_run_out(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end
