"""Builds generated C++ and keeps the results on disk, by content, in a directory that only the user can write."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .cache_directory import CacheError, cache_directory
from .compiled_scan import BuildError
from .processor import processor

# Without errno and traps comparisons and square roots can be vectorised, which changes no value.
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_COMPILERS = ("g++", "c++", "clang++")
_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_SECONDS = 120


@cache
def compiler() -> str | None:
    """The path of a C++ compiler, if the machine has one."""
    return next((path for name in _COMPILERS if (path := shutil.which(name)) is not None), None)


def build(source: str, *, contracts: bool = False) -> ctypes.CDLL:
    """The shared library of a C++ source; compiled once on a machine, whichever process asks first.

    Args:
        source: The source.
        contracts: A multiplication and an addition may round once.

    Raises:
        BuildError: There is no compiler, it fails, or the cache cannot be trusted.
    """
    found = compiler()
    if found is None:
        raise BuildError(f"no C++ compiler was found (looked for {', '.join(_COMPILERS)})")
    openmp = ("-fopenmp",) if openmp_runtime() is not None else ()
    flags = (*_FLAGS, f"-ffp-contract={'fast' if contracts else 'off'}", *openmp)
    key = hashlib.sha256("\0".join((source, *flags, *_machine())).encode()).hexdigest()[:32]
    try:
        library = cache_directory("kernels") / f"{key}.so"
    except CacheError as error:
        raise BuildError(error.message) from error
    if not library.exists():
        _compile(found, source, flags, library)
    return ctypes.CDLL(str(library))


def _compile(found: str, source: str, flags: Sequence[str], library: Path) -> None:
    """Compile next to the library's place and move it there whole, so that no one ever finds half of it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text, parts, whole = (Path(folder) / name for name in ("kernel.cpp", "kernel.o", "kernel.so"))
        text.write_text(source, encoding="utf-8")
        _run([found, *flags, "-c", str(text), "-o", str(parts)])
        # Linked without OpenMP: its functions are those of the runtime that torch has loaded, so both share threads.
        _run([found, "-shared", str(parts), "-o", str(whole)])
        os.replace(whole, library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[:500]}")


@cache
def openmp_runtime() -> str | None:
    """The OpenMP runtime that torch has loaded, with its functions made visible to libraries loaded from now on."""
    loaded = loaded_openmp_runtimes()
    if not loaded:
        return None
    # Other packages may bring one of their own; torch's lies with torch, if it is not the system's.
    home = f"{Path(torch.__file__).parent}{os.sep}"
    path = min(loaded, key=lambda path: (not path.startswith(home), path))
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return path


def loaded_openmp_runtimes() -> frozenset[str]:
    """Paths of all OpenMP runtimes in this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return frozenset(path for path in paths if Path(path).name.startswith(_OPENMP_RUNTIMES))


@cache
def version() -> str:
    """What the C++ compiler says of itself; empty without one."""
    found = compiler()
    if found is None:
        return ""
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _machine() -> tuple[str, ...]:
    """What a kernel depends on beside its source: the compiler, and the processor that it was compiled for."""
    return (compiler() or "", version(), *processor())
