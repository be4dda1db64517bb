"""Chooses the loop nest: the one asked for, or the fastest that fits into the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import InfeasibleBudgetError
from ..ir import Decision, StepGraph, Verdict
from ..options import render_bytes
from ..schedule import MAX_CHUNK, Candidate, Peak, Schedule, check_schedule, simulate_peak, uniform_schedule
from .infra import Pass, PassContext, PassResult
from .schedule_candidates import leanest, peak_bytes, plain_loops, schedule_front, sorted_front


@dataclass(frozen=True)
class ChooseSchedule(Pass):
    """Pick a schedule under the memory budget."""

    name: ClassVar[str] = "choose-schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "regions", "invariants", "chains", "bits", "outputs"})
    provides: ClassVar[frozenset[str]] = frozenset({"schedule"})
    tolerance: float = 0.02  # among schedules this close in time, the leanest wins
    uncertainty: float = 0.25  # plain loops that are thought to be slower by this much are run beside the fastest
    most_tried: int = 3
    worth_a_trial: float = 0.01  # seconds of T steps, of `MAX_CHUNK` where T is longer: a longer T chooses alike

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        asked = context.options.schedule
        front: tuple[Candidate, ...] = ()
        if asked == "auto":
            schedule, reason, front = self._search(graph, context)
        else:
            schedule, reason = self._asked_for(graph, context), "as asked for"
            self._check_budget(graph, schedule, context)
        decisions = [self.decide("", Verdict.DONE, f"{schedule.label}: {reason}")]
        decisions += self._roundings(graph, schedule, context)
        return PassResult(graph, False, tuple(decisions), schedule, front)

    def _asked_for(self, graph: StepGraph, context: PassContext) -> Schedule:
        steps, asked = context.options.steps, context.options.schedule
        if isinstance(asked, Schedule):
            check_schedule(graph, asked, steps)
            return asked
        if isinstance(asked, int):
            return uniform_schedule(graph, steps, asked, f"chunk {asked}")
        return uniform_schedule(graph, steps, 1 if asked == "depth-first" else steps, str(asked))

    def _search(self, graph: StepGraph, context: PassContext) -> tuple[Schedule, str, tuple[Candidate, ...]]:
        budget = context.options.memory_budget
        limit = math.inf if budget is None else budget
        fastest: Candidate | None = None
        best: Candidate | None = None
        front = tuple(schedule_front(graph, context))
        for candidate in front:
            if peak_bytes(candidate) > limit:
                continue
            fastest = fastest or candidate
            if candidate.seconds <= fastest.seconds * (1 + self.tolerance):
                best = candidate
        if best is None:
            best = leanest(front, graph, context)
            if peak_bytes(best) > limit:
                raise _infeasible(context, best.peak, "the smallest feasible peak", best.schedule)
            front = tuple(sorted_front([*front, best]))
        within = "without a budget" if budget is None else f"within {render_bytes(budget)}"
        how = "estimated"
        stretch = min(context.options.steps, MAX_CHUNK) / context.options.steps
        if not context.needs_grad and best.seconds * stretch >= self.worth_a_trial:
            front, best, how = self._tried(front, best, graph, context)
        reason = (
            f"the fastest {within} of {len(front)} on the time-memory front, "
            f"{how} {best.seconds * 1e3:.1f} ms at {render_bytes(peak_bytes(best))}"
        )
        return best.schedule, reason, front

    def _tried(
        self, front: tuple[Candidate, ...], best: Candidate, graph: StepGraph, context: PassContext
    ) -> tuple[tuple[Candidate, ...], Candidate, str]:
        """The choice after a trial of the plain loops that may be as fast; what was not run is scaled alike."""
        plain = [other for other in plain_loops(graph, context) if other.schedule.root != best.schedule.root]
        plain = [other for other in plain if other.seconds <= best.seconds * (1 + self.uncertainty)][: self.most_tried]
        tried = [best, *plain]
        estimates = [(each.schedule, each.seconds) for each in tried]
        found = context.measurements.trial_seconds(graph, estimates) if plain else None
        if found is None or (seconds := found[0]) is None:
            return front, best, "estimated"
        known = [replace(each, seconds=took) for each, took in zip(tried, found, strict=True) if took is not None]
        fastest = min(each.seconds for each in known)
        chosen = min((each for each in known if each.seconds <= fastest * (1 + self.tolerance)), key=peak_bytes)
        scale, roots = seconds / best.seconds, [each.schedule.root for each in known]
        others = [replace(each, seconds=each.seconds * scale) for each in front if each.schedule.root not in roots]
        # What is only thought to be faster and leaner than what was run does not take its place.
        others = [each for each in others if each.seconds > chosen.seconds or peak_bytes(each) > peak_bytes(chosen)]
        how = f"run beside {len(known) - 1} plain loops and expected to take"
        return tuple(sorted_front([*others, *known])), chosen, how

    def _check_budget(self, graph: StepGraph, schedule: Schedule, context: PassContext) -> None:
        budget = context.options.memory_budget
        if budget is None:
            return
        if context.needs_grad:
            peak = Peak(context.measurements.training_peak_bytes(graph, schedule), "backward", ())
        else:
            peak = simulate_peak(graph, schedule, context.measurements, context.options.readout)
        if peak.peak_bytes > budget:
            raise _infeasible(context, peak, f"what schedule={context.options.schedule!r} needs", schedule)

    def _roundings(self, graph: StepGraph, schedule: Schedule, context: PassContext) -> Iterator[Decision]:
        """Where a library kernel rounds differently over a chunk than over a step."""
        for chunk, segment in schedule.segments():
            for name in segment.nodes:
                if chunk > 1 and context.measurements.rounds_differently(graph, graph[name], chunk):
                    reason = f"its library kernel rounds differently over {chunk} steps than over one"
                    yield self.decide(graph[name].where, Verdict.NOTE, reason)


def _infeasible(context: PassContext, peak: Peak, what: str, schedule: Schedule) -> InfeasibleBudgetError:
    budget = context.options.memory_budget or 0
    segment = next(
        (
            f"segment {number}, chunk {chunk}"
            for number, (chunk, s) in enumerate(schedule.segments())
            if peak.node in s.nodes
        ),
        "",
    )
    place = ", ".join(part for part in (peak.node, segment) if part)
    advice = (
        "; gradients are recorded, so backward keeps every step: "
        "call under torch.no_grad() for inference, or lower N or T"
        if context.needs_grad
        else "; raise memory_budget or lower N"
    )
    return InfeasibleBudgetError(
        f"memory_budget {render_bytes(budget)} ({budget} bytes) is below {what}, {render_bytes(peak.peak_bytes)} "
        f"({peak.peak_bytes} bytes){advice}",
        minimum_bytes=peak.peak_bytes,
        where=place or None,
    )
