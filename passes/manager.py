"""Runs passes in order; checks order, promises and invariants, and names the guilty one."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import PassError, SnnCompileError, VerifyError
from ..ir import Decision, StepGraph, Verdict, print_graph, verify_graph
from ..options import Environment
from ..schedule import Candidate, Schedule
from .infra import Numerics, Pass, PassContext, PassResult


@dataclass(frozen=True)
class PipelineResult:
    """What the pipeline leaves: graph, schedule, all decisions, seconds of each pass, and what was chosen from."""

    graph: StepGraph
    schedule: Schedule
    decisions: tuple[Decision, ...]
    seconds: tuple[tuple[str, float], ...]
    front: tuple[Candidate, ...] = ()


class PassManager:
    """An ordered list of passes.

    Args:
        passes: In the order in which they run.
        given: Facts established before the first pass.

    Raises:
        PassError: A pass requires a fact that nothing before it provides, or two passes share a name.
    """

    def __init__(self, passes: Sequence[Pass], given: frozenset[str] = frozenset()) -> None:
        known = set(given)
        for position, one in enumerate(passes):
            if missing := one.requires - known:
                raise PassError(
                    f"pass {position} ({one.name}) requires {', '.join(sorted(missing))}, which no pass before it "
                    "provides; move it behind the pass that does"
                )
            known |= one.provides
        names = [one.name for one in passes]
        if len(set(names)) < len(names):
            raise PassError(f"two passes share a name: {', '.join(names)}")
        self.passes = tuple(passes)

    def run(self, graph: StepGraph, context: PassContext, environment: Environment | None = None) -> PipelineResult:
        """Run every pass, verify each result.

        Raises:
            PassError: A pass broke an invariant or a promise, or failed; names it.
            SnnCompileError: What a pass itself raises about the network or the budget.
        """
        environment = environment or Environment()
        decisions: list[Decision] = []
        seconds: list[tuple[str, float]] = []
        schedule: Schedule | None = None
        front: tuple[Candidate, ...] = ()
        for position, one in enumerate(self.passes):
            if one.numerics is Numerics.REASSOCIATES and not context.options.reassociate:
                decisions.append(one.decide("", Verdict.REFUSED, "it reorders arithmetic and reassociate=False"))
                continue
            started = time.perf_counter()
            result = _run_checked(one, graph, context)
            seconds.append((one.name, time.perf_counter() - started))
            _dump(position, one, graph, result, environment)
            graph = result.graph
            decisions += result.decisions
            schedule = result.schedule or schedule
            front = result.front or front
        if schedule is None:
            raise PassError("no pass of the pipeline chose a schedule")
        return PipelineResult(graph, schedule, tuple(decisions), tuple(seconds), front)


def _run_checked(one: Pass, graph: StepGraph, context: PassContext) -> PassResult:
    if missing := one.requires - graph.facts:
        raise PassError(f"pass {one.name} requires {', '.join(sorted(missing))}, which the graph does not have")
    before = print_graph(graph)
    try:
        result = one.run(graph, context)
    except SnnCompileError:
        raise
    except Exception as error:
        raise PassError(f"pass {one.name} failed: {type(error).__name__}: {error}") from error
    if print_graph(graph) != before:
        raise PassError(f"pass {one.name} changed its input graph; it must return a new one")
    graph = result.graph.with_facts(one.provides)
    try:
        verify_graph(graph)
    except VerifyError as error:
        raise PassError(f"pass {one.name} left a broken graph: {error}") from error
    return replace(result, graph=graph)


def _dump(position: int, one: Pass, before: StepGraph, result: PassResult, environment: Environment) -> None:
    if environment.dump_directory is not None:
        environment.dump_directory.mkdir(parents=True, exist_ok=True)
        text = print_graph(result.graph) + "".join(f"# {decision}\n" for decision in result.decisions)
        if result.schedule is not None:
            text += f"{result.schedule}\n"
        (environment.dump_directory / f"{position:02d}_{one.name}.txt").write_text(text, encoding="utf-8")
    if environment.debug >= 3 and result.changed:
        old, new = print_graph(before).splitlines(), print_graph(result.graph).splitlines()
        print("\n".join(difflib.unified_diff(old, new, "before", one.name, lineterm="", n=1)), file=sys.stderr)
