"""The folders in which something outlives a process: kernels and costs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ..errors import SnnCompileError
from ..options import Environment


class CacheError(SnnCompileError):
    """A cache cannot be used, because it cannot be made or cannot be trusted."""


def cache_directory(kind: str) -> Path:
    """The folder of the cache that holds things of one kind, such as "kernels"; made if it is not there.

    Raises:
        CacheError: It cannot be made, belongs to someone else, or others can write to it.
    """
    directory = Environment.read().cache_directory / kind
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise CacheError(f"{directory} cannot be used: {error.strerror or error}") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"{directory} can be written by others, so what lies there cannot be trusted")
    return directory


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all, whoever else writes it and whenever this process ends.

    Raises:
        OSError: It cannot be written.
    """
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
