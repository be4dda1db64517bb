"""Builds the schedules that need no search, and checks the ones that users write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import networkx as nx

from ..errors import ScheduleError
from ..ir import Batching, StepGraph
from .plan import Loop, Schedule, Segment

Unit = tuple[str, ...]


def schedule_units(graph: StepGraph) -> tuple[Unit, ...]:
    """What a schedule orders: single nodes, and recurrent regions as wholes; topological, close to program order."""
    position = {node.name: index for index, node in enumerate(graph)}
    placed = {node.name for node in graph.scheduled}
    unit_of: dict[str, Unit] = {name: region for region in graph.regions for name in region}
    for name in placed:
        unit_of.setdefault(name, (name,))
    order: nx.DiGraph[Unit] = nx.DiGraph()
    order.add_nodes_from(unit_of[name] for name in placed)
    for edge in graph.edges:
        if edge.source in placed and edge.target in placed and unit_of[edge.source] != unit_of[edge.target]:
            order.add_edge(unit_of[edge.source], unit_of[edge.target])
    return tuple(nx.lexicographical_topological_sort(order, key=lambda unit: position[unit[0]]))


def body_of(units: Iterable[Unit], chunk: int) -> tuple[Segment | Loop, ...]:
    """Units in order at one chunk length; a region gets a loop of its own, step by step."""
    body: list[Segment | Loop] = []
    for unit in units:
        if len(unit) > 1 and chunk > 1:
            body.append(Loop(1, (Segment(unit),)))
        elif body and isinstance(body[-1], Segment):
            body[-1] = Segment(body[-1].nodes + unit)
        else:
            body.append(Segment(unit))
    return tuple(body)


def needs_whole_sequence(graph: StepGraph, unit: Unit) -> bool:
    """Whether a unit takes all T steps at once."""
    return any(graph[name].batching is Batching.WHOLE for name in unit)


def uniform_schedule(graph: StepGraph, steps: int, chunk: int, label: str) -> Schedule:
    """Every node at one chunk length, less those that take all T steps at once."""
    units = schedule_units(graph)
    if chunk == steps or not any(needs_whole_sequence(graph, unit) for unit in units):
        return Schedule(steps, Loop(chunk, body_of(units, chunk)), label)
    body: list[Segment | Loop] = []
    for is_whole, group in groupby(units, key=lambda unit: needs_whole_sequence(graph, unit)):
        run = tuple(group)
        body += body_of(run, steps) if is_whole else [Loop(chunk, body_of(run, chunk))]
    return Schedule(steps, Loop(steps, tuple(body)), label)


def check_schedule(graph: StepGraph, schedule: Schedule, steps: int) -> None:
    """Check that a schedule runs every node once, in an order that its edges allow.

    Raises:
        ScheduleError: It does not; says which node or loop is at fault.
    """
    if schedule.steps != steps:
        raise ScheduleError(f"the schedule is for T = {schedule.steps}, expected T = {steps}")
    _check_chunks(schedule.root, steps)
    order = [name for _, segment in schedule.segments() for name in segment.nodes]
    expected = {node.name for node in graph.scheduled}
    if missing := expected - set(order):
        raise ScheduleError(f"the schedule leaves out {', '.join(sorted(missing))}")
    if unknown := set(order) - expected:
        raise ScheduleError(f"the schedule names {', '.join(sorted(unknown))}, which the graph does not have to run")
    if len(order) != len(expected):
        raise ScheduleError("the schedule runs some node twice")
    _check_order(graph, order)
    _check_regions(graph, schedule)
    _check_whole_sequences(graph, schedule)


def _check_chunks(loop: Loop, limit: int) -> None:
    if not 1 <= loop.chunk <= limit:
        raise ScheduleError(f"a loop of chunk {loop.chunk} stands in {limit} steps; expected 1 to {limit}")
    for item in loop.body:
        if isinstance(item, Loop):
            _check_chunks(item, loop.chunk)


def _check_order(graph: StepGraph, order: Sequence[str]) -> None:
    position = {name: index for index, name in enumerate(order)}
    region = {node.name: node.region for node in graph}
    for edge in graph.edges:
        if edge.source not in position or edge.target not in position:
            continue
        within_region = region[edge.source] is not None and region[edge.source] == region[edge.target]
        if edge.delay and (within_region or edge.source == edge.target):
            continue
        if position[edge.source] > position[edge.target]:
            raise ScheduleError(f"the schedule runs {edge.target} before {edge.source}, which it waits for")


def _check_regions(graph: StepGraph, schedule: Schedule) -> None:
    for members in graph.regions:
        homes = [(chunk, segment) for chunk, segment in schedule.segments() if set(members) & set(segment.nodes)]
        if len(homes) != 1 or homes[0][0] != 1:
            raise ScheduleError(f"the recurrent region {', '.join(members)} must stand in one segment of chunk 1")


def _check_whole_sequences(graph: StepGraph, schedule: Schedule) -> None:
    at_once = {
        name
        for item in (schedule.root.body if schedule.root.chunk == schedule.steps else ())
        if isinstance(item, Segment)
        for name in item.nodes
    }
    for node in graph.scheduled:
        if node.batching is Batching.WHOLE and node.name not in at_once:
            raise ScheduleError(
                f"{node.name} takes all {schedule.steps} steps at once, so it must stand in a root loop of that chunk"
            )
