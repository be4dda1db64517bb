"""Runs whole schedules beside each other, for as many steps as it takes to tell which is faster.

Never for more steps than the longest chunk has, so that what is found, and with it the choice, is the same for every
longer T.

A node that is timed alone finds its operands in the cache and its output's pages mapped; between its neighbours it may
not. Where a few schedules are estimated to be about as fast, running them tells.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..functional import reset_net
from ..ir import StepGraph
from ..schedule import MAX_CHUNK, Schedule
from .cost_key import CostKey, surroundings
from .costs import NodeCosts
from .program import Program
from .trial_runs import trial_copy, trial_inputs, trial_obstacle

_ENOUGH_SECONDS = 0.3  # of one schedule's runs, but for the one that warms up
_LIMIT_SECONDS = 8.0  # of all runs
_LEAST_SECONDS = 1e-6  # of a step
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 11  # the first one warms up


class ScheduleTrials:
    """Seconds of the schedules of one plan.

    A copy of the network that shares its parameters is run.

    Args:
        costs: Those of the plan's nodes, beside which what is measured is kept.
    """

    def __init__(self, costs: NodeCosts) -> None:
        self._costs = costs
        self._net = costs.net
        self._inputs = costs.inputs
        self._options = costs.options

    def seconds(self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]) -> list[float | None] | None:
        """See `Measurements.trial_seconds`."""
        if not self._is_harmless(graph):
            return None
        lengths = _affordable(estimates)
        if len(lengths) < 2:  # nothing to compare
            return None
        store, keys = self._costs.store, {number: self._key(graph, estimates[number][0]) for number in lengths}
        known = {number: store.get(key, _NAME) for number, key in keys.items()}
        if any(seconds is None for seconds in known.values()):
            started = time.perf_counter()
            try:
                tried = [(estimates[number][0], steps) for number, steps in lengths.items()]
                found = self._by_turns(graph, tried, _rounds(estimates, lengths))
            except Exception:  # whatever an operation raises on values that it does not take
                return None
            self._costs.spent_seconds += time.perf_counter() - started
            known = dict(zip(lengths, found, strict=True))
            for number, seconds in zip(lengths, found, strict=True):
                store.put(keys[number], _NAME, seconds)
        per_step = [known.get(number) for number in range(len(estimates))]
        return [
            None if seconds is None else seconds * schedule.steps
            for seconds, (schedule, _) in zip(per_step, estimates, strict=True)
        ]

    def _is_harmless(self, graph: StepGraph) -> bool:
        """Whether a run leaves nothing behind, and takes as long on random numbers as on the user's."""
        if any(leaf.device.type != "cpu" for leaf in self._inputs) or trial_obstacle(self._net, graph):
            return False
        return not any(node.events_below for node in graph)

    def _by_turns(self, graph: StepGraph, tried: Sequence[tuple[Schedule, int]], rounds: int) -> list[float]:
        """Seconds of one step by each schedule, from those of so many."""
        copied = trial_copy(self._net)
        runs = [self._runner(copied, graph, schedule, steps) for schedule, steps in tried]
        best = [math.inf] * len(runs)
        with torch.no_grad():
            for number in range(rounds):
                for place, run in enumerate(runs):
                    reset_net(copied)
                    started = time.perf_counter()
                    run()
                    if number > 0:
                        best[place] = min(best[place], time.perf_counter() - started)
        return [seconds / steps for seconds, (_, steps) in zip(best, tried, strict=True)]

    def _runner(self, net: nn.Module, graph: StepGraph, schedule: Schedule, steps: int) -> Callable[[], Any]:
        static = self._options.static_input
        program = Program(
            net,
            graph,
            replace(schedule, steps=steps),
            self._options.readout,
            needs_grad=False,
            static_input=static,
            kernels=self._costs.kernels,
            original=self._net,
        )
        inputs = trial_inputs(self._inputs, steps, is_static=static)
        return lambda: program(*inputs)

    def _key(self, graph: StepGraph, schedule: Schedule) -> CostKey:
        nodes = [self._costs.key(graph, node) for node in graph.scheduled]
        digests = [hashlib.sha256(key.text.encode()).hexdigest() for key in nodes]
        names = {node.name: f"node{number}" for number, node in enumerate(graph.scheduled)}
        nest = [(chunk, [names.get(name, name) for name in segment.nodes]) for chunk, segment in schedule.segments()]
        loops = [(loop.chunk, len(loop.body)) for loop in schedule.loops()]
        edges = [[names.get(name, name) for name in node.refs] for node in graph.scheduled]
        form = f"{self._options.readout} {self._inputs} {min(schedule.steps, MAX_CHUNK)} {nest} {loops} {edges}"
        devices = {leaf.device for leaf in self._inputs}
        return CostKey(
            "\n".join([*surroundings(*devices), "schedule", form, *digests]), all(key.is_lasting for key in nodes)
        )


def _affordable(estimates: Sequence[tuple[Schedule, float]]) -> dict[int, int]:
    """For how many steps to run each schedule, of those that there is time for."""
    left, found = _LIMIT_SECONDS, {}
    for number, (schedule, seconds) in enumerate(estimates):
        chunk, each = schedule.root.chunk, _step_seconds(schedule, seconds)
        steps = min(schedule.steps, MAX_CHUNK, chunk * math.ceil(_ENOUGH_SECONDS / (chunk * each)))
        if (cost := _FEWEST_ROUNDS * steps * each) <= left:
            left -= cost
            found[number] = steps
    return found


def _rounds(estimates: Sequence[tuple[Schedule, float]], lengths: dict[int, int]) -> int:
    """The shorter the runs are, the more of them."""
    shortest = min(steps * _step_seconds(*estimates[number]) for number, steps in lengths.items())
    return min(max(_FEWEST_ROUNDS, 1 + math.ceil(_ENOUGH_SECONDS / shortest)), _MOST_ROUNDS)


def _step_seconds(schedule: Schedule, seconds: float) -> float:
    return max(seconds / schedule.steps, _LEAST_SECONDS)


_NAME = "seconds of a step"
