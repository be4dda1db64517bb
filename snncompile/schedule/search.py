"""Searches the loop nests: dynamic programming over cuts of the topological order and chunk lengths.

For an interval of units and a chunk length C, the front of that interval holds the Pareto-optimal ways (seconds a
step, bytes) to run it as the body of a loop of C steps. A body is a sequence of parts; a part runs straight through at
C, or is an inner loop at a shorter chunk, taken from that chunk's front of the part's interval.

    front[C][i, j] = pareto over k of front[C][i, k] + part[C][k, j]
    part[C][k, j]  = straight[C][k, j]  or  front[c][k, j] for c < C

Synonyms: loop distribution and strip-mining (Allen and Kennedy), looped schedules of multirate dataflow
(Bhattacharyya, Murthy, Lee). What is not optimal: a value read both inside and outside an inner loop is counted at
both lengths, fronts are thinned to a few points, and long networks are cut only before their heavy units; so the bytes
here are an upper bound, and the peak simulator has the last word on each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from ..ir import StepGraph
from ..options import Readout
from .build import Unit, body_of, needs_whole_sequence, schedule_units
from .measurements import Measurements
from .plan import Loop, Schedule, Segment
from .simulate import Peak, gathered_bytes, simulate_peak

MAX_BLOCKS = 24
MAX_FRONT = 6
HEAVY_SHARE = 0.02
# No kernel gains from longer chunks; so the choice, and with it the peak, is the same for every longer T.
MAX_CHUNK = 64

# Nodes are timed alone, on operands that the cache holds. The shorter the pieces that an inner loop cuts a chunk into,
# the less of that is true; converted ResNets took this much longer in nests than their nodes do (see CHANGELOG).
NEST_SHARE = 0.05

_P = TypeVar("_P")


@dataclass(frozen=True)
class Candidate:
    """A schedule with its estimated seconds for all T steps and its simulated peak."""

    schedule: Schedule
    seconds: float
    peak: Peak


@dataclass(frozen=True)
class _Point:
    """One way to run an interval over a chunk: seconds a step, bytes, and the loop body."""

    seconds: float
    size: int
    body: tuple[Segment | Loop, ...]


def search_front(graph: StepGraph, steps: int, measurements: Measurements, readout: Readout) -> list[Candidate]:
    """The time-memory front of schedules for a graph, fastest first; bytes by the simulator."""
    tables = _Tables(graph, steps, measurements)
    fronts: dict[int, dict[tuple[int, int], list[_Point]]] = {}
    for chunk in tables.chunks:
        fronts[chunk] = _fronts_at(chunk, fronts, tables)
    whole = (0, len(tables.blocks))
    nothing = [_Point(0.0, 0, ())]  # a network that only hands on its input has no interval
    candidates = []
    roots = tables.chunks[-1:] if tables.has_whole else tables.chunks
    for chunk in roots:
        # Straight through as well: by the bounds that the fronts go by, it may have looked fatter than it is.
        straight = [point for _, point in tables.straight(chunk, 0)[-1:]]
        nests = [
            replace(point, seconds=point.seconds * (1.0 + NEST_SHARE)) for point in fronts[chunk].get(whole, nothing)
        ]
        for point in [*nests, *straight]:
            if point.seconds == float("inf"):
                continue
            schedule = Schedule(steps, Loop(chunk, merge_segments(point.body)), "auto")
            peak = simulate_peak(graph, schedule, measurements, readout)
            candidates.append(Candidate(schedule, point.seconds * steps, peak))
    candidates.sort(key=lambda candidate: (candidate.seconds, candidate.peak.peak_bytes))
    return pareto(candidates, lambda candidate: candidate.peak.peak_bytes)


def chunk_lengths(steps: int) -> tuple[int, ...]:
    """Powers of two up to T, and T itself; none above `MAX_CHUNK`."""
    longest = min(steps, MAX_CHUNK)
    powers = [1 << exponent for exponent in range(longest.bit_length())]
    return tuple(powers) if powers[-1] == longest else (*powers, longest)


def pareto(points: list[_P], size: Callable[[_P], int]) -> list[_P]:
    """Of points sorted by time, those smaller than every faster one."""
    front: list[_P] = []
    for point in points:
        if not front or size(point) < size(front[-1]):
            front.append(point)
    return front


def merge_segments(body: Sequence[Segment | Loop]) -> tuple[Segment | Loop, ...]:
    """Join neighbouring segments of one body."""
    merged: list[Segment | Loop] = []
    for item in body:
        last = merged[-1] if merged else None
        if isinstance(item, Segment) and isinstance(last, Segment):
            merged[-1] = Segment(last.nodes + item.nodes)
        else:
            merged.append(item if isinstance(item, Segment) else Loop(item.chunk, merge_segments(item.body)))
    return tuple(merged)


def _fronts_at(
    chunk: int, shorter: dict[int, dict[tuple[int, int], list[_Point]]], tables: _Tables
) -> dict[tuple[int, int], list[_Point]]:
    """Fronts of all intervals at one chunk length, from those at the shorter ones."""
    count = len(tables.blocks)
    parts: dict[tuple[int, int], list[_Point]] = {}
    for start in range(count):
        for stop, straight in tables.straight(chunk, start):
            options = [straight]
            outputs = chunk * tables.crossing[start][stop]
            for length, front in shorter.items():
                puts = tables.put_seconds(start, stop, length)
                options += [
                    _Point(point.seconds + puts, point.size + outputs, (Loop(length, point.body),))
                    for point in front[start, stop]
                ]
            parts[start, stop] = _thin([option for option in options if option.seconds != float("inf")])
    if chunk == 1:
        return parts  # at one step a sequence of straight parts is one straight part
    fronts: dict[tuple[int, int], list[_Point]] = {}
    for start in range(count):
        for stop in range(start + 1, count + 1):
            options = list(parts[start, stop])
            for middle in range(start + 1, stop):
                kept = chunk * tables.crossing[start][middle]
                options += [
                    _Point(left.seconds + right.seconds, max(left.size, kept + right.size), left.body + right.body)
                    for left in fronts[start, middle]
                    for right in parts[middle, stop]
                ]
            fronts[start, stop] = _thin(options)
    return fronts


def _thin(points: list[_Point]) -> list[_Point]:
    """The Pareto front, at most `MAX_FRONT` points of it, both ends kept."""
    front = pareto(sorted(points, key=lambda point: (point.seconds, point.size)), lambda point: point.size)
    if len(front) <= MAX_FRONT:
        return front
    last = len(front) - 1
    return [front[round(index * last / (MAX_FRONT - 1))] for index in range(MAX_FRONT)]


class _Tables:
    """Seconds and bytes of the blocks that the search orders: units, joined where a cut cannot pay."""

    def __init__(self, graph: StepGraph, steps: int, measurements: Measurements) -> None:
        self.graph = graph
        self.measurements = measurements
        self.has_whole = any(needs_whole_sequence(graph, unit) for unit in schedule_units(graph))
        self.chunks = chunk_lengths(steps)
        if self.has_whole and self.chunks[-1] != steps:
            self.chunks = (*self.chunks, steps)
        self._steps = steps
        self.blocks = _blocks(graph, measurements)
        block_of = {name: index for index, block in enumerate(self.blocks) for unit in block for name in unit}
        self._last_reader = {
            name: max([block_of[reader] for reader in graph.consumers[name] if reader in block_of], default=index)
            for name, index in block_of.items()
        }
        self._names = [[name for unit in block for name in unit] for block in self.blocks]
        self._bytes = {name: gathered_bytes(graph, name) for name in block_of}

    @cached_property
    def crossing(self) -> list[list[int]]:
        """`crossing[start][stop]`: bytes a step of the values of blocks [start, stop) that later blocks read."""
        count = len(self.blocks)
        table = [[0] * (count + 1) for _ in range(count + 1)]
        for start in range(count):
            for stop in range(start + 1, count + 1):
                table[start][stop] = sum(
                    self._bytes[name]
                    for index in range(start, stop)
                    for name in self._names[index]
                    if self._last_reader[name] >= stop
                )
        return table

    def put_seconds(self, start: int, stop: int, length: int) -> float:
        """Seconds a step to gather what later blocks read from blocks [start, stop), in pieces of `length` steps."""
        return sum(
            self.measurements.put_seconds(length * self._bytes[name]) / length
            for index in range(start, stop)
            for name in self._names[index]
            if self._last_reader[name] >= stop
        )

    def straight(self, chunk: int, start: int) -> list[tuple[int, _Point]]:
        """Blocks from `start` run straight through at one chunk length: a point for every end."""
        points = []
        seconds, size = 0.0, 0
        live: dict[str, int] = {}
        position = {name: order for order, name in enumerate(n for names in self._names for n in names)}
        for stop in range(start + 1, len(self.blocks) + 1):
            for unit in self.blocks[stop - 1]:
                length = 1 if len(unit) > 1 else chunk
                if chunk != self._steps and needs_whole_sequence(self.graph, unit):
                    seconds = float("inf")  # no loop of shorter chunks may hold it
                    continue
                for name in unit:
                    node = self.graph[name]
                    footprint = self.measurements.footprint(self.graph, node, length, chunked=length > 1)
                    size = max(size, sum(live.values()) + footprint.work_bytes)
                    live[name] = footprint.output_bytes if length == chunk else self._bytes[name] * chunk
                    seconds += self.measurements.seconds(self.graph, node, length) / length
                    if length != chunk and not set(self.graph.consumers[name]) <= {*unit, self.graph.output.name}:
                        seconds += self.measurements.put_seconds(self._bytes[name])
                    self._forget_dead(live, position, name)
            units = [unit for block in self.blocks[start:stop] for unit in block]
            points.append((stop, _Point(seconds, size, body_of(units, chunk))))
        return points

    def _forget_dead(self, live: dict[str, int], position: dict[str, int], at: str) -> None:
        for name in list(live):
            readers = [position[reader] for reader in self.graph.consumers[name] if reader in position]
            if max(readers, default=-1) <= position[at]:
                del live[name]


def _blocks(graph: StepGraph, measurements: Measurements) -> list[list[Unit]]:
    """Units grouped so that a cut is possible before each heavy one; all units where they are few."""
    units = schedule_units(graph)
    if len(units) <= MAX_BLOCKS:
        return [[unit] for unit in units]
    seconds = [sum(measurements.seconds(graph, graph[name], 1) for name in unit) for unit in units]
    blocks: list[list[Unit]] = []
    for unit, own in zip(units, seconds, strict=True):
        if not blocks or len(unit) > 1 or own >= HEAVY_SHARE * sum(seconds):
            blocks.append([unit])
        else:
            blocks[-1].append(unit)
    while len(blocks) > MAX_BLOCKS:
        # Join the neighbours whose common border is crossed by the most bytes: the least useful cut.
        costs = _border_bytes(graph, blocks)
        worst = max(range(len(costs)), key=costs.__getitem__)
        blocks[worst : worst + 2] = [blocks[worst] + blocks[worst + 1]]
    return blocks


def _border_bytes(graph: StepGraph, blocks: list[list[Unit]]) -> list[int]:
    block_of = {name: index for index, block in enumerate(blocks) for unit in block for name in unit}
    costs = [0] * (len(blocks) - 1)
    for name, index in block_of.items():
        last = max([block_of[reader] for reader in graph.consumers[name] if reader in block_of], default=index)
        for border in range(index, last):
            costs[border] += gathered_bytes(graph, name)
    return costs
