"""Measures one call: time of each segment, firing rates, and the peak beside the predicted one."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ir import OpKind
from ..runtime import OptimizedModule, Program, backward_from_ones, measure_peak
from ..torch_private import tree_leaves
from .report import Report

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
    clock, rates = _NodeClock(), _FiringRates(program)
    _instrumented(module, program, inputs, kernels=True, before=clock.start, on_node=clock.on_node)
    _instrumented(module, program, inputs, kernels=False, on_node=rates.on_node, on_neuron=rates.count)
    return replace(
        report,
        measured_peak_bytes=peak,
        measured_seconds=statistics.median(seconds),
        segments=tuple(
            replace(row, measured_seconds=clock.of(row.nodes), spikes_per_step=rates.of(row.nodes))
            for row in report.segments
        ),
    )


def _instrumented(
    module: OptimizedModule,
    program: Program,
    inputs: tuple[Tensor, ...],
    *,
    kernels: bool,
    before: Callable[[], None] = lambda: None,
    **watchers: Any,
) -> None:
    """One run on another copy with something that looks on; `before` is called when all is ready for it."""
    twin = copy.deepcopy(module)
    watched = program.watched(twin.__dict__["_net"], program.kernels if kernels else None, **watchers)
    started = twin.start(*inputs)
    with torch.set_grad_enabled(program.needs_grad):
        before()
        watched(*started)


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
    """Sums the time between nodes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        """The first node begins."""
        self._last = time.perf_counter()

    def on_node(self, name: str, value: Any) -> None:
        _synchronize()
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def of(self, names: Sequence[str]) -> float:
        """Seconds of these nodes."""
        return sum(self._seconds.get(name, 0.0) for name in names)


class _FiringRates:
    """Counts what is not zero in the outputs of neurons."""

    def __init__(self, program: Program) -> None:
        self._graph = program.graph
        self._counts: dict[str, list[int]] = {}

    def on_node(self, name: str, value: Any) -> None:
        if self._graph[name].kind is OpKind.STATEFUL and self._graph[name].chain is None:
            self.count(name, value)

    def count(self, name: str, value: Any) -> None:
        counts = self._counts.setdefault(name, [0, 0])
        for leaf in tree_leaves(value):
            counts[0] += int(torch.count_nonzero(leaf.detach()))
            counts[1] += leaf.numel()

    def of(self, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
        """The share of each neuron among these nodes, those of chains included."""
        found = []
        for name in names:
            chain = self._graph[name].chain
            for neuron in [name] if chain is None else [part.name for part in chain.neurons]:
                if neuron in self._counts:
                    active, total = self._counts[neuron]
                    found.append((neuron, active / total if total else 0.0))
        return tuple(found)
