"""Runs plans: the optimised module, states, memory and measurements."""

from __future__ import annotations

from .measure import NodeMeasurements
from .memory import MemoryTracker, measure_peak
from .module import OptimizedModule, Plan, Request
from .program import Program
from .states import StateSlot
from .training import backward_from_ones

__all__ = [
    "MemoryTracker",
    "NodeMeasurements",
    "OptimizedModule",
    "Plan",
    "Program",
    "Request",
    "StateSlot",
    "backward_from_ones",
    "measure_peak",
]
