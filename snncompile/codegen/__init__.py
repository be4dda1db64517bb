"""From a scheduled graph to a program; the eager target."""

from __future__ import annotations

from .emitter import Emitted, emit_program
from .kernels import Buffer, Still, collect_steps, step_of
from .lowering import Lowering
from .names import Namespace, variable_names
from .readout import Collector, make_collector

__all__ = [
    "Buffer",
    "Collector",
    "Emitted",
    "Lowering",
    "Namespace",
    "Still",
    "collect_steps",
    "emit_program",
    "make_collector",
    "step_of",
    "variable_names",
]
