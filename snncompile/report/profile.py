"""Measures one call: time of each segment, firing rates, and the peak beside the predicted one."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ir import OpKind
from ..runtime import OptimizedModule, Program, backward_from_ones, measure_peak
from ..torch_private import tree_leaves
from .report import Report, SegmentRow

REPETITIONS = 3


def profile_module(module: OptimizedModule, inputs: tuple[Tensor, ...]) -> Report:
    """Run copies of a module and return its report with what was measured.

    Time of the whole call is the median of several uninstrumented runs; time of a segment comes from one run with a
    clock between nodes. The peak is that of the call, of its backward too where gradients are recorded.
    """
    twin = copy.deepcopy(module)

    def call() -> Any:
        outputs = twin(*inputs)
        backward_from_ones(outputs)
        twin.zero_grad(set_to_none=True)
        twin.reset()
        return outputs

    call()
    seconds = [_seconds(call) for _ in range(REPETITIONS)]
    peak = measure_peak(call)
    report: Report = twin.report
    program = twin.latest_program
    assert program is not None
    clock = _NodeClock(program)
    clock.run(module, inputs)
    return replace(
        report,
        measured_peak_bytes=peak,
        measured_seconds=statistics.median(seconds),
        segments=tuple(clock.measured(row) for row in report.segments),
    )


def _seconds(call: Any) -> float:
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _NodeClock:
    """Sums the time between nodes, and counts what is not zero in the outputs of stateful ones."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.schedule = program.schedule
        self.needs_grad = program.needs_grad
        self.seconds: dict[str, float] = {}
        self.active: dict[str, list[int]] = {}
        self._last = 0.0

    def run(self, module: OptimizedModule, inputs: tuple[Tensor, ...]) -> None:
        """One instrumented run on another copy."""
        twin = copy.deepcopy(module)
        program = Program(
            twin.__dict__["_net"],
            self.graph,
            self.schedule,
            module.options.readout,
            needs_grad=self.needs_grad,
            static_input=module.options.static_input,
            on_node=self._on_node,
        )
        self._last = time.perf_counter()
        with torch.set_grad_enabled(self.needs_grad):
            program(*twin.start(*inputs))

    def _on_node(self, name: str, value: Any) -> None:
        _synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        if self.graph[name].kind is OpKind.STATEFUL:
            counts = self.active.setdefault(name, [0, 0])
            for leaf in tree_leaves(value):
                counts[0] += int(torch.count_nonzero(leaf.detach()))
                counts[1] += leaf.numel()
        self._last = time.perf_counter()

    def measured(self, row: SegmentRow) -> SegmentRow:
        rates = ((name, self.active[name]) for name in row.nodes if name in self.active)
        return replace(
            row,
            measured_seconds=sum(self.seconds.get(name, 0.0) for name in row.nodes),
            spikes_per_step=tuple((name, active / total if total else 0.0) for name, (active, total) in rates),
        )
