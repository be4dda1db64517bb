"""Predicts the peak of a training step: forward and backward of a short run without data, drawn out to T steps.

What backward keeps grows by the same bytes with every step, so a few short runs of the emitted program itself fix the
line. A long chunk is shortened as well, with everything that grows with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import FakeNetwork, adapter_of
from ..ir import OpKind, StepGraph, TensorType
from ..options import Options
from ..schedule import Loop, Schedule, Segment
from ..torch_private import tree_leaves
from .memory import MemoryTracker
from .node_program import empty_like_type
from .program import Program

_LONGEST_CHUNK = 8


def training_peak(
    net: nn.Module,
    graph: StepGraph,
    schedule: Schedule,
    inputs: tuple[TensorType, ...],
    options: Options,
    *,
    input_gradients: bool,
) -> int:
    """Peak bytes of one call and its backward, gradients of all parameters included."""

    def peak_at(chunk: int, loops: int) -> int:
        shortened = Schedule(chunk * loops, _with_chunk(schedule.root, chunk), schedule.label)
        return _run(net, graph, shortened, inputs, options, input_gradients=input_gradients)

    steps, chunk = schedule.steps, schedule.root.chunk
    if steps <= 3 * min(chunk, _LONGEST_CHUNK):
        return _run(net, graph, schedule, inputs, options, input_gradients=input_gradients)
    loops = steps / chunk
    if chunk <= _LONGEST_CHUNK:
        return _line(2, peak_at(chunk, 2), 3, peak_at(chunk, 3), loops)
    few = (1, 1) if loops == 1 else (2, 3)
    at_few = [_line(4, peak_at(4, count), 8, peak_at(8, count), chunk) for count in dict.fromkeys(few)]
    return at_few[0] if loops == 1 else _line(2, at_few[0], 3, at_few[1], max(loops, 2.0))


def _line(x0: int, y0: int, x1: int, y1: int, x: float) -> int:
    return math.ceil(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def _with_chunk(loop: Loop, chunk: int) -> Loop:
    """The nest with its outermost chunk changed, and inner ones shortened in proportion."""
    body = tuple(
        item if isinstance(item, Segment) else _with_chunk(item, max(1, round(item.chunk * chunk / loop.chunk)))
        for item in loop.body
    )
    return Loop(chunk, body)


def _run(
    net: nn.Module,
    graph: StepGraph,
    schedule: Schedule,
    inputs: tuple[TensorType, ...],
    options: Options,
    *,
    input_gradients: bool,
) -> int:
    fakes = FakeNetwork(net)
    for node in graph:
        if node.kind is OpKind.STATEFUL:
            module = fakes.module(node.target)
            adapter = adapter_of(module)
            adapter.write(module, adapter.reset_values(module))
    rng = torch.get_rng_state()
    with fakes.mode, torch.enable_grad():
        program = Program(fakes.net, graph, schedule, options.readout, needs_grad=True)
        sequences = [empty_like_type(_of_length(leaf, schedule.steps, options)) for leaf in inputs]
        for sequence in sequences:
            sequence.requires_grad_(input_gradients and sequence.is_floating_point())
        with MemoryTracker() as tracker:
            outputs = [
                leaf for leaf in tree_leaves(program(*sequences)) if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(leaf) for leaf in outputs])
    torch.set_rng_state(rng)
    return int(tracker.peak_bytes)


def backward_from_ones(outputs: Any) -> None:
    """Backward with a gradient of ones from every output tensor that records one."""
    recorded = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if recorded:
        torch.autograd.backward(recorded, [torch.ones_like(leaf) for leaf in recorded])


def _of_length(leaf: TensorType, steps: int, options: Options) -> TensorType:
    if options.static_input:
        return leaf
    return TensorType((steps, *leaf.shape[1:]), leaf.stride, leaf.dtype, leaf.device)
