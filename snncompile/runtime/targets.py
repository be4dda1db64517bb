"""Which target generates the kernels of a plan: by the wish of the user, the device, and what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import SnnCompileError
from ..options import Backend
from .compiled_scan import KernelTarget
from .cpp_build import compiler
from .cpp_scan import CppTarget
from .triton_build import interprets, version
from .triton_scan import TritonTarget


@dataclass(frozen=True)
class NoTarget:
    """Eager steps run.

    Attributes:
        reason: Why; empty if they were asked for.
    """

    reason: str


def find_target(backend: Backend, devices: Sequence[torch.device] = (torch.device("cpu"),)) -> KernelTarget | NoTarget:
    """The target for a plan.

    Args:
        backend: What the user asked for.
        devices: Where the inputs are.

    Raises:
        SnnCompileError: Kernels by Triton were asked for by name, for a device for which there are none.
    """
    if backend == "eager":
        return NoTarget("")
    types = sorted({device.type for device in devices})
    if backend == "triton":
        target = _triton(devices)
        if isinstance(target, NoTarget):
            raise SnnCompileError(f"backend 'triton' is not available: {target.reason}", where="backend")
        return target
    if types == ["cuda"] and backend == "auto":
        return _triton(devices)
    if types == ["cpu"]:
        return NoTarget("no C++ compiler was found") if compiler() is None else CppTarget()
    if backend == "cpp":
        return NoTarget("C++ kernels are for the CPU only")
    return NoTarget(f"there are kernels for the CPU or for CUDA, and the inputs are on {', '.join(types)}")


def _triton(devices: Sequence[torch.device]) -> KernelTarget | NoTarget:
    """Triton for these devices."""
    if not version():
        return NoTarget("Triton is not installed")
    types = {device.type for device in devices}
    if types == {"cpu"} and interprets():
        return TritonTarget(None)
    if types != {"cuda"}:
        return NoTarget(f"Triton kernels are for CUDA, and the inputs are on {', '.join(sorted(types))}")
    archs = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)}
    if len(archs) > 1:
        return NoTarget("the inputs are on GPUs of different kinds")
    return TritonTarget(archs.pop())


def prospect(backend: Backend) -> str:
    """What will become of the wish for a backend, as far as it can be said before the inputs are known."""
    if backend == "eager":
        return ""
    if backend == "triton":
        found = ["Triton kernels"]
    else:
        found = [] if compiler() is None else ["C++ kernels on the CPU"]
        if backend == "auto" and version() and torch.cuda.is_available():
            found.append("Triton kernels on CUDA")
    if not found:
        return "eager: no C++ compiler was found"
    return f"for neurons: {', '.join(found)}; otherwise eager"


def check_backend(backend: Backend) -> None:
    """Refuse a backend that was asked for by name and is not available.

    Raises:
        SnnCompileError: It is not.
    """
    if backend == "triton" and not version():
        raise SnnCompileError("backend 'triton' needs Triton; install it by pip install triton", where="backend")
    if backend == "triton" and not torch.cuda.is_available() and not interprets():
        raise SnnCompileError(
            "backend 'triton' needs a CUDA device, and none was found; use 'auto', or set TRITON_INTERPRET=1 to "
            "interpret its kernels on the CPU",
            where="backend",
        )
    if backend == "cpp" and compiler() is None:
        raise SnnCompileError("backend 'cpp' needs a C++ compiler, and none was found; install g++", where="backend")
