"""From a scheduled graph to a program; the eager target."""

from __future__ import annotations

from .cpp import MAX_DIMS, emit_scan
from .cpp_bits import BITS_GROUP, BITS_ROW, MOST_PLANES, emit_bits
from .cpp_events import EVENT_PIXELS, emit_event_convolution, event_block
from .cpp_gradient import REVERSE_BLOCK, emit_reverse
from .cuda_rounding import as_on_cuda
from .emitter import Emitted, emit_program
from .half_precision import HALVES, keeps_float32, rounded_as_stored
from .kernels import Buffer, Still, collect_steps, part_of, stack_steps, step_of
from .lowering import Lowering
from .names import Namespace, variable_names
from .readout import Collector, SequenceReadout, Sequences, SumReadout, make_collector
from .step_function import StepFunction, Table
from .step_gradient import StepGradient, Totals, trace_step_gradient
from .step_reader import NotPointwise, read_step_function, trace_pointwise_step, trace_step_function
from .step_text import parse_step
from .step_trace import StepTrace
from .triton import BLOCK as TRITON_BLOCK
from .triton import GATHERED_DIMS, TritonSource, emit_triton_scan
from .triton import OPERATIONS as TRITON_OPERATIONS
from .triton_gradient import emit_triton_reverse, kept_steps

__all__ = [
    "BITS_GROUP",
    "BITS_ROW",
    "EVENT_PIXELS",
    "GATHERED_DIMS",
    "HALVES",
    "MAX_DIMS",
    "MOST_PLANES",
    "REVERSE_BLOCK",
    "TRITON_BLOCK",
    "TRITON_OPERATIONS",
    "Buffer",
    "Collector",
    "Emitted",
    "Lowering",
    "Namespace",
    "NotPointwise",
    "SequenceReadout",
    "Sequences",
    "StepFunction",
    "StepGradient",
    "StepTrace",
    "Still",
    "SumReadout",
    "Table",
    "Totals",
    "TritonSource",
    "as_on_cuda",
    "collect_steps",
    "emit_bits",
    "emit_event_convolution",
    "emit_program",
    "emit_reverse",
    "emit_scan",
    "emit_triton_reverse",
    "emit_triton_scan",
    "event_block",
    "keeps_float32",
    "kept_steps",
    "make_collector",
    "parse_step",
    "part_of",
    "read_step_function",
    "rounded_as_stored",
    "stack_steps",
    "step_of",
    "trace_pointwise_step",
    "trace_step_function",
    "trace_step_gradient",
    "variable_names",
]
