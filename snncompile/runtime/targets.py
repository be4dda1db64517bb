"""Which target generates the kernels of a plan: by the wish of the user, the device, and what the machine has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import SnnCompileError
from ..options import Backend
from .compiled_scan import KernelTarget
from .cpp_build import compiler
from .cpp_scan import CppTarget


@dataclass(frozen=True)
class NoTarget:
    """Eager steps run.

    Attributes:
        reason: Why; empty if they were asked for.
    """

    reason: str


def find_target(
    backend: Backend, devices: Iterable[torch.device] = (torch.device("cpu"),), *, needs_grad: bool = False
) -> KernelTarget | NoTarget:
    """The target for a plan.

    Args:
        backend: What the user asked for.
        devices: Where the inputs are.
        needs_grad: Gradients are recorded.
    """
    if backend == "eager":
        return NoTarget("")
    if compiler() is None:
        return NoTarget("no C++ compiler was found")
    if any(device.type != "cpu" for device in devices):
        return NoTarget("there are kernels for the CPU only")
    target = CppTarget()
    if needs_grad and not target.trains:
        return NoTarget("gradients are recorded")
    return target


def check_backend(backend: Backend) -> None:
    """Refuse a backend that was asked for by name and is not available.

    Raises:
        SnnCompileError: It is not.
    """
    if backend == "triton":
        raise SnnCompileError("backend 'triton' is not in this version; use 'auto', 'cpp' or 'eager'", where="backend")
    if backend == "cpp" and compiler() is None:
        raise SnnCompileError("backend 'cpp' needs a C++ compiler, and none was found; install g++", where="backend")
