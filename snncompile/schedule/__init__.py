"""Loop nests over time: records, liveness, the peak simulator and the search."""

from __future__ import annotations

from .build import body_of, check_schedule, schedule_units, uniform_schedule
from .liveness import Liveness, Path, is_invariant_output, output_names
from .measurements import SPIKING, Footprint, Measurements
from .plan import Loop, Schedule, Segment
from .search import MAX_CHUNK, Candidate, chunk_lengths, pareto, search_front
from .simulate import Peak, gathered_bytes, hoisted_deaths, readout_bytes, simulate_peak, state_bytes

__all__ = [
    "MAX_CHUNK",
    "SPIKING",
    "Candidate",
    "Footprint",
    "Liveness",
    "Loop",
    "Measurements",
    "Path",
    "Peak",
    "Schedule",
    "Segment",
    "body_of",
    "check_schedule",
    "chunk_lengths",
    "gathered_bytes",
    "hoisted_deaths",
    "is_invariant_output",
    "output_names",
    "pareto",
    "readout_bytes",
    "schedule_units",
    "search_front",
    "simulate_peak",
    "state_bytes",
    "uniform_schedule",
]
