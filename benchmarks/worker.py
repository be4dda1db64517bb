"""One process, one system, one case: prepares, proves that it computes the right thing, and is timed when asked.

The process waits between the parent's orders, so that the systems of a case can take turns while each stays warm.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import measure
from .case import Case, make_case
from .machine import memory_bytes
from .outcome import compare
from .systems import SYSTEMS, Prepared
from .workloads import Workload

MEMORY_SHARE = (
    0.7  # of the machine's that one process may address: a system that needs more fails instead of the machine
)
ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Request:
    """What a process is started for.

    Attributes:
        workload: For the reference, which makes the case.
        system: Name, or None for the reference.
        case_path: Where the case is written to, or read from.
        device: "cpu" or "cuda".
        threads: Of torch.
        log: File that everything the process prints is added to.
    """

    workload: Workload
    system: str | None
    case_path: Path
    device: str
    threads: int
    log: Path


def serve(connection: Connection, request: Request) -> None:
    """Carry out orders, names of methods and arguments, until the parent hangs up; answer "ok" or "error" and what."""
    os.setsid()  # whatever the system starts, such as compilers, ends with this process
    _redirect(request.log)
    # Nothing that an earlier run compiled is found again: compile times are of a first start.
    with tempfile.TemporaryDirectory() as caches:
        os.environ.update(
            SNNCOMPILE_CACHE=f"{caches}/snncompile",
            TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor",
            TRITON_CACHE_DIR=f"{caches}/triton",
        )
        if request.system is not None:
            os.environ.update(SYSTEMS[request.system].environment)
        _limit_memory(request.device)
        torch.set_num_threads(request.threads)
        # Every system computes in float32 where it says so.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        worker = Worker(request)
        while True:
            try:
                order, arguments = connection.recv()
            except EOFError:
                return
            try:
                answer = ("ok", getattr(worker, order)(*arguments))
            except Exception as error:
                traceback.print_exc()
                answer = ("error", _short(error))
            connection.send(answer)


class Worker:
    """The orders."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._device = torch.device(request.device)
        self._prepared: Prepared | None = None
        self._before: measure.DeviceMemory | None = None

    def make_case(self) -> dict[str, Any]:
        """Build the case, run the reference, write the file; returns what the results say of the case."""
        case = make_case(self._request.workload, self._device)
        case.save(self._request.case_path)
        return {
            "firing_rate": case.firing_rate,
            "neurons": case.neurons,
            "rounding": case.rounding.to_dict(),
        }

    def start(self) -> None:
        """Import what the system needs."""
        assert self._request.system is not None
        for module in SYSTEMS[self._request.system].imports:
            import_module(module)

    def prepare(self) -> dict[str, Any]:
        """Make ready, run once, compare with the reference."""
        assert self._request.system is not None
        system = SYSTEMS[self._request.system]
        case = Case.load(self._request.case_path, self._device)
        if self._device.type == "cuda":
            self._before = measure.DeviceMemory.now()
        started = time.perf_counter()
        prepared = system.prepare(case)
        measure.synchronize(self._device)
        if system.is_yardstick:
            self._prepared = prepared
            return {"is_right": True, "departure": None, "ready_seconds": None, "details": dict(prepared.details)}
        got = prepared.outcome()
        measure.synchronize(self._device)
        ready = time.perf_counter() - started
        departure = compare(case.expected, got)
        self._prepared = prepared
        return {
            "is_right": departure.within(case.rounding),
            "departure": departure.to_dict(),
            "ready_seconds": ready,
            "details": dict(prepared.details),
        }

    def peaks(self) -> measure.Peaks:
        prepared = self._ready()
        if self._before is not None:
            # Parameters that a system keeps in a form of its own are not what is compared.
            own = _unshared_bytes(prepared.network, prepared.case.network)
            return self._before.plus(own).peaks(prepared.clear, prepared.run)
        # What torch.compile generates allocates past the dispatcher, where the tracker looks.
        is_trackable = not (self._request.system or "").startswith("compile-")
        return measure.peaks_on_cpu(prepared.clear, prepared.run, is_trackable)

    def launches(self) -> int | None:
        prepared = self._ready()
        return measure.count_launches(prepared.clear, prepared.run) if self._device.type == "cuda" else None

    def samples(self, budget: float) -> list[float]:
        """Seconds of the calls of one round; leaves nothing on a device that the next system would miss."""
        prepared = self._ready()
        seconds = measure.samples(prepared.clear, prepared.run, self._device, budget)
        prepared.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def _ready(self) -> Prepared:
        assert self._prepared is not None, "prepare() comes first"
        return self._prepared


def _unshared_bytes(network: nn.Module, other: nn.Module) -> int:
    """Of parameters that the other network has not."""
    theirs = {parameter.data_ptr() for parameter in other.parameters()}
    return sum(parameter.nbytes for parameter in network.parameters() if parameter.data_ptr() not in theirs)


def _redirect(log: Path) -> None:
    """Frameworks and compilers talk; their words go to a file, under the standard descriptors."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _limit_memory(device: str) -> None:
    """On the CPU only: a CUDA context reserves more address space than there is memory."""
    if device != "cpu" or memory_bytes() == 0:
        return
    import resource

    limit = int(MEMORY_SHARE * memory_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= ERROR_CHARACTERS else text[: ERROR_CHARACTERS - 1] + "…"
