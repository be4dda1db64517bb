"""Builds generated Triton kernels. Triton is an optional dependency: without it there are none.

Triton reads a kernel's source from its file, so each text is kept as one. What is compiled from it depends on the
types of its arguments only, and not on their values, so that another length or size compiles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .cache_directory import CacheError, cache_directory, write_whole
from .compiled_scan import BuildError

WARPS = 4
# Contraction would round twice as one.
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


@cache
def version() -> str:
    """Of Triton; empty if it is not installed or cannot be loaded."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def interprets() -> bool:
    """Whether kernels are to be interpreted on the CPU, as TRITON_INTERPRET=1 asks of Triton."""
    if not version():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def load(text: str) -> Callable[..., None]:
    """The function `scan` that a Python text defines, from a file of the cache.

    Raises:
        BuildError: There can be no such file.
    """
    name = f"snncompile_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    try:
        path = cache_directory("kernels") / f"{name}.py"
        if not path.exists():
            write_whole(path, text.encode())
    except (CacheError, OSError) as error:
        raise BuildError(f"its source cannot be kept: {error}") from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scan: Callable[..., None] = module.scan
    return scan


def compile_kernel(text: str, signature: Sequence[tuple[str, str]], arch: int) -> Any:
    """A kernel compiled for an NVIDIA GPU, which need not be there.

    Args:
        text: See `load`.
        signature: Name -> type of each parameter, as Triton writes types: `*fp32`, `i32`.
        arch: The GPU's compute capability, such as 90.

    Raises:
        BuildError: It cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    source = ASTSource(JITFunction(load(text)), dict(signature), {})
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(_OPTIONS))
    except Exception as error:  # whatever a stage of the compiler raises
        raise BuildError(f"Triton {version()} failed: {type(error).__name__}: {str(error)[:500]}") from error


def interpreted_kernel(text: str) -> Any:
    """The same kernel, run by Triton's interpreter on tensors of the CPU."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(load(text))
