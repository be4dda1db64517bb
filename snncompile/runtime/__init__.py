"""Runs plans: the optimised module, states, memory and measurements."""

from __future__ import annotations

from .batch_tiles import TiledProgram, Tiles, joined_bytes, tilings
from .compiled_scan import KernelTarget
from .costs import NodeCosts
from .fingerprint import Visited
from .first_step import FirstStep, run_first_step
from .locks import planning
from .measure import NodeMeasurements
from .memory import MemoryTracker, measure_peak
from .module import OptimizedModule, Plan, Request
from .program import Program
from .replay_trials import replay_bytes, replay_chunks
from .scan_kernels import ScanKernels
from .states import StateSlot
from .targets import NoTarget, check_backend, find_target, prospect
from .training import backward_from_ones

__all__ = [
    "FirstStep",
    "KernelTarget",
    "MemoryTracker",
    "NoTarget",
    "NodeCosts",
    "NodeMeasurements",
    "OptimizedModule",
    "Plan",
    "Program",
    "Request",
    "ScanKernels",
    "StateSlot",
    "TiledProgram",
    "Tiles",
    "Visited",
    "backward_from_ones",
    "check_backend",
    "find_target",
    "joined_bytes",
    "measure_peak",
    "planning",
    "prospect",
    "replay_bytes",
    "replay_chunks",
    "run_first_step",
    "tilings",
]
