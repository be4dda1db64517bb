"""A graph compiler and scheduler for spiking neural networks on PyTorch.

`opt = snncompile.optimize(net, T, memory_budget="64MiB")` turns a network of single-step modules into a module that
runs T time steps in the fastest order that fits into the budget, and computes what the step loop computes.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import ann2snn, functional, neuron, surrogate
from .api import measure_peak, optimize, verify
from .capture import register_neuron
from .errors import (
    CaptureError,
    InfeasibleBudgetError,
    ParityError,
    PassError,
    ScheduleError,
    SnnCompileError,
    VerifyError,
)
from .explicit_states import with_states
from .nir import from_nir
from .report import Parity, Report
from .runtime import OptimizedModule
from .schedule import Loop, Schedule, Segment

try:
    __version__ = version("snncompile")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CaptureError",
    "InfeasibleBudgetError",
    "Loop",
    "OptimizedModule",
    "Parity",
    "ParityError",
    "PassError",
    "Report",
    "Schedule",
    "ScheduleError",
    "Segment",
    "SnnCompileError",
    "VerifyError",
    "ann2snn",
    "from_nir",
    "functional",
    "measure_peak",
    "neuron",
    "optimize",
    "register_neuron",
    "surrogate",
    "verify",
    "with_states",
]
