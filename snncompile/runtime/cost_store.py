"""Keeps what was measured of operations: in this process, and on disk by content, one file for each operation.

An entry is a JSON object of the key's whole text and the numbers measured. One that cannot be read, or that belongs to
another key, counts as absent and is replaced. Entries are put in place whole, so a process that is killed leaves none
that is broken; of two processes that write one entry at once the later one wins, and what the other measured is
measured again some day.
"""

from __future__ import annotations

import json
import math
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from ..options import Environment
from .cache_directory import CacheError, cache_directory, write_whole
from .cost_key import CostKey

_KIND = "costs"
_ABANDONED_SECONDS = 3600


class CostStore:
    """Numbers measured of operations, by key and name.

    Args:
        directory: Where entries are kept; None: in this process only.
        obstacle: Why they are not kept on disk.

    Attributes:
        obstacle: As given, or why an entry could not be written.
    """

    def __init__(self, directory: Path | None, obstacle: str = "") -> None:
        self._directory = directory
        self.obstacle = obstacle
        self._lock = threading.Lock()
        self._known: dict[CostKey, dict[str, float]] = {}
        self._unwritten: set[CostKey] = set()
        if directory is not None:
            _remove_abandoned(directory)

    def get(self, key: CostKey, name: str) -> float | None:
        """What was measured under this name, if anything was."""
        with self._lock:
            return self._entry(key).get(name)

    def put(self, key: CostKey, name: str, value: float) -> None:
        """Keep a number; it reaches the disk with the next `flush`."""
        with self._lock:
            self._entry(key)[name] = value
            if key.is_lasting and self._directory is not None:
                self._unwritten.add(key)

    def flush(self) -> None:
        """Write what was put. A disk that is full or not to be written to is no error: costs are measured again."""
        with self._lock:
            for key in self._unwritten:
                # Another process may have written since.
                merged = {**self._read(key), **self._known[key]}
                text = json.dumps({"key": key.text, "measured": merged}, indent=1)
                try:
                    write_whole(self._path(key), text.encode())
                except OSError as error:
                    self.obstacle = f"{self._directory} cannot be written: {error.strerror or error}"
                    break
            self._unwritten.clear()

    def _entry(self, key: CostKey) -> dict[str, float]:
        if key not in self._known:
            self._known[key] = self._read(key)
        return self._known[key]

    def _read(self, key: CostKey) -> dict[str, float]:
        if self._directory is None or not key.is_lasting:
            return {}
        try:
            entry = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return {}
        return _numbers(entry, key)

    def _path(self, key: CostKey) -> Path:
        assert self._directory is not None
        return self._directory / f"{key.digest}.json"


def cost_store() -> CostStore:
    """The store of the cache directory that the environment names now."""
    return _store_at(Environment.read().cache_directory)


@cache
def _store_at(base: Path) -> CostStore:
    try:
        return CostStore(cache_directory(_KIND))
    except CacheError as error:
        return CostStore(None, error.message)


def _numbers(entry: Any, key: CostKey) -> dict[str, float]:
    """The numbers of an entry; none if it is not one of this key's."""
    if not isinstance(entry, dict) or entry.get("key") != key.text or not isinstance(entry.get("measured"), dict):
        return {}
    return {
        name: float(value)
        for name, value in entry["measured"].items()
        if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    }


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes have begun and left."""
    oldest = time.time() - _ABANDONED_SECONDS
    for part in directory.glob("*.part"):
        try:
            if part.stat().st_mtime < oldest:
                part.unlink()
        except OSError:  # another process was faster
            continue
