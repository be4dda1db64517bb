"""A worker's process as its parent sees it: orders with time limits, and an end that leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

from .worker import Request, serve

_CONTEXT = multiprocessing.get_context("spawn")  # a fresh interpreter: nothing of this one is inherited
HANG_UP_SECONDS = 2.0


class WorkerError(Exception):
    """A worker failed, died or took too long; the text is for the row."""


class WorkerProcess:
    """One worker.

    Args:
        request: What it is started for.
    """

    def __init__(self, request: Request) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(theirs, request), daemon=False)
        self._process.start()
        theirs.close()

    def order(self, name: str, *arguments: Any, limit: float) -> Any:
        """The worker's answer.

        Args:
            limit: Seconds after which it is given up.

        Raises:
            WorkerError: It raised, ended or took longer.
        """
        started = time.perf_counter()
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(limit):
                raise WorkerError(f"{name} took longer than {time.perf_counter() - started:.0f} s")
            status, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(HANG_UP_SECONDS)
            raise WorkerError(f"the process ended in {name} with exit code {self._process.exitcode}") from None
        if status == "error":
            raise WorkerError(value)
        return value

    def stop(self) -> None:
        """Hang up; kill the process and all that it started if it does not end by itself."""
        self._connection.close()
        self._process.join(HANG_UP_SECONDS)
        if self._process.is_alive() and self._process.pid is not None:
            self._kill(self._process.pid)
            self._process.join()

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            # A process leads a group of its own from its first line on; before that it has nothing to take along.
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
