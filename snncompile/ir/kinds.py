"""What a node is, how it is tied to time, and how it is run over several steps at once."""

from __future__ import annotations

from enum import Enum


class OpKind(Enum):
    """What a node is."""

    INPUT = "input"  # one step of the caller's sequence
    CONSTANT = "constant"  # a parameter, a buffer or a tensor attribute of the network
    MODULE = "module"  # a module without state
    STATEFUL = "stateful"  # a module with a step function: (inputs, states) -> (outputs, states')
    OPAQUE = "opaque"  # a module that keeps its own state; called as it is, step by step
    LOAD = "load"  # what an attribute of the network holds from the last step
    STORE = "store"  # what an attribute of the network holds from this step on
    FUNCTION = "function"  # a Python callable
    METHOD = "method"  # a method of the first argument
    OUTPUT = "output"  # what one step returns


class TimeCoupling(Enum):
    """How the work of one step is tied to the other steps."""

    POINTWISE = "pointwise"  # each step alone
    STATEFUL = "stateful"  # a scan: state is the only carried edge
    STEP_STATISTICS = "step-statistics"  # statistics of one step, running statistics updated in order
    SEQUENCE = "sequence"  # needs all T steps
    RANDOM = "random"  # draws random numbers at each step, in order
    UNKNOWN = "unknown"  # not understood: kept in order

    @property
    def is_ordered(self) -> bool:
        """Whether nodes of this coupling must also keep their order among each other."""
        return self in (TimeCoupling.RANDOM, TimeCoupling.UNKNOWN)


class Batching(Enum):
    """How a node that may be batched over time takes a chunk of steps `[C, N, *]`."""

    FOLD = "fold"  # time joins the batch: [C, N, *] -> [C * N, *]
    ELEMENTWISE = "elementwise"  # time is one more leading dimension, operands aligned from the right
    SHIFT_DIMS = "shift-dims"  # dimension arguments move one to the right
    SELECT = "select"  # takes one item of a tuple, no tensor work
    FOLD_CHANNELS = "fold-channels"  # time joins the channels: [C, N, ch, *] -> [N, C * ch, *], statistics by step
    PER_STEP = "per-step"  # one call a step
    WHOLE = "whole"  # one call for all T steps
    SCAN = "scan"  # the step function, its state carried from step to step
