"""The schedules that a budget is met from: the fronts that the search finds, and the plain loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir import StepGraph
from ..schedule import (
    Candidate,
    Peak,
    Schedule,
    chunk_lengths,
    output_names,
    pareto,
    search_front,
    simulate_peak,
    uniform_schedule,
)
from .infra import PassContext


def peak_bytes(candidate: Candidate) -> int:
    return candidate.peak.peak_bytes


def schedule_front(graph: StepGraph, context: PassContext) -> list[Candidate]:
    """The front of the schedules that there are for these options."""
    return sorted_front(_training_loops(graph, context) if context.needs_grad else _nests(graph, context))


def _nests(graph: StepGraph, context: PassContext) -> list[Candidate]:
    """The front of the search and, if it is the leanest of all, the step loop."""
    steps = context.options.steps
    front = search_front(graph, steps, context.measurements, context.options.readout)
    depth_first = uniform_schedule(graph, steps, 1, "auto")
    peak = simulate_peak(graph, depth_first, context.measurements, context.options.readout)
    if peak.peak_bytes < min(map(peak_bytes, front)):
        front.append(Candidate(depth_first, _seconds(graph, depth_first, context), peak))
    return front


def _training_loops(graph: StepGraph, context: PassContext) -> list[Candidate]:
    """Uniform chunks from the fastest to the first that fits: no nest saves what backward keeps."""
    steps, budget = context.options.steps, context.options.memory_budget
    found = []
    for chunk in chunk_lengths(steps):
        schedule = uniform_schedule(graph, steps, chunk, "auto")
        seconds = _seconds(graph, schedule, context) + _joining_seconds(graph, chunk, context)
        found.append((seconds, schedule))
    tried = []
    for seconds, schedule in sorted(found, key=lambda each: each[0]):
        held = context.measurements.training_peak_bytes(graph, schedule)
        tried.append(Candidate(schedule, seconds, Peak(held, "backward", ())))
        if budget is None or held <= budget:
            break
    return tried


def plain_loops(graph: StepGraph, context: PassContext) -> list[Candidate]:
    """The uniform chunk lengths that fit into the budget, the fastest first."""
    steps, budget = context.options.steps, context.options.memory_budget
    found = []
    for chunk in chunk_lengths(steps):
        schedule = uniform_schedule(graph, steps, chunk, "auto")
        peak = simulate_peak(graph, schedule, context.measurements, context.options.readout)
        if budget is None or peak.peak_bytes <= budget:
            found.append(Candidate(schedule, _seconds(graph, schedule, context), peak))
    return sorted(found, key=lambda candidate: candidate.seconds)


def leanest(front: Sequence[Candidate], graph: StepGraph, context: PassContext) -> Candidate:
    """The leanest schedule that a plan finds whose budget is just that.

    How long the chunks are that are timed depends on the budget, and which nests are looked at on what they take. So
    every plan that finds nothing that fits also looks at what is found under the tightest of all budgets; what is
    leaner counts where it is found again under a budget of its own size.

    Args:
        front: What was found under the budget of this plan.
    """
    if context.needs_grad:  # there are only the plain loops, and all of them were tried
        return min(front, key=peak_bytes)
    smallest, _ = _descend(_leanest_under(1, graph, context), graph, context)
    seen = min(front, key=peak_bytes)
    if peak_bytes(seen) < peak_bytes(smallest):
        seen, is_found_again = _descend(seen, graph, context)
        if is_found_again:
            return seen
    return smallest


def _descend(known: Candidate, graph: StepGraph, context: PassContext) -> tuple[Candidate, bool]:
    """The leanest that is found from budget to tighter budget, and whether a plan of just that budget finds it."""
    while True:
        found = _leanest_under(peak_bytes(known), graph, context)
        if peak_bytes(found) >= peak_bytes(known):
            return known, peak_bytes(found) == peak_bytes(known)
        known = found


def _leanest_under(budget: int, graph: StepGraph, context: PassContext) -> Candidate:
    within = replace(context, measurements=context.measurements.within(budget))
    return min(schedule_front(graph, within), key=peak_bytes)


def sorted_front(found: Iterable[Candidate]) -> list[Candidate]:
    """Those than which none is both faster and leaner, the fastest first."""
    ordered = sorted(found, key=lambda candidate: (candidate.seconds, peak_bytes(candidate)))
    return pareto(ordered, peak_bytes)


def _seconds(graph: StepGraph, schedule: Schedule, context: PassContext) -> float:
    """The nodes of a schedule, over all T steps."""
    return sum(
        context.measurements.seconds(graph, graph[name], length) * schedule.steps / length
        for length, segment in schedule.segments()
        for name in segment.nodes
    )


def _joining_seconds(graph: StepGraph, chunk: int, context: PassContext) -> float:
    """What it takes in training to join the chunks of the outputs forward and of the inputs' gradients backward."""
    steps, is_whole = context.options.steps, chunk == context.options.steps
    joined = [
        output.value.nbytes
        for output in map(graph.__getitem__, output_names(graph))
        if context.options.readout == "sequence" and not (is_whole and output.output_slot is not None)
    ]
    if context.input_gradients and not is_whole and not context.options.static_input:
        joined += [node.value.nbytes for node in graph.inputs]
    return sum(context.measurements.put_seconds(steps * size) for size in joined)
