"""The referee of the search: on small graphs it meets every nest of the family, by time and by simulated bytes.

What the search does not promise: bytes inside it are upper bounds, and fronts are thinned to a few points. So its front
is held to bounds: never better than the best of all nests, which would be a lie, and seldom worse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from snncompile import Loop, Schedule, Segment
from snncompile.ir import Node, OpKind, Ref, StepGraph
from snncompile.schedule import check_schedule, schedule_units, search_front, simulate_peak, uniform_schedule
from snncompile.schedule.search import chunk_lengths, merge_segments

from .test_search import MadeUpCosts, estimate, fastest_within, random_graph, tensor

STEPS = 4
MEAN_SLOWER, MOST_SLOWER, MOST_FATTER = 1.05, 1.5, 1.5


def chain_graph(rng: random.Random, count: int) -> StepGraph:
    """Nodes in a row."""
    nodes = [Node("x", OpKind.INPUT, 0, value=tensor(8))]
    for number in range(count):
        value = tensor(rng.choice([1, 4, 16, 64]))
        nodes.append(Node(f"n{number}", OpKind.FUNCTION, torch.add, (Ref(nodes[-1].name),), value=value))
    nodes.append(Node("output", OpKind.OUTPUT, None, (Ref(nodes[-1].name),), value=nodes[-1].value))
    return StepGraph(nodes)


def all_nests(graph: StepGraph, steps: int) -> Iterator[Schedule]:
    """Every nest over the units in order, with the chunk lengths that the search tries."""
    units = schedule_units(graph)
    chunks = chunk_lengths(steps)

    @cache
    def bodies(first: int, last: int, chunk: int) -> tuple[tuple[Segment | Loop, ...], ...]:
        found: dict[tuple[Segment | Loop, ...], None] = {}
        for cut in range(first + 1, last + 1):
            rests = bodies(cut, last, chunk) if cut < last else ((),)
            for part in parts(first, cut, chunk):
                for rest in rests:
                    found[merge_segments((part, *rest))] = None
        return tuple(found)

    def parts(first: int, last: int, chunk: int) -> Iterator[Segment | Loop]:
        inside = units[first:last]
        if chunk == 1 or all(len(unit) == 1 for unit in inside):
            yield Segment(tuple(name for unit in inside for name in unit))
        for shorter in chunks:
            if shorter < chunk:
                for body in bodies(first, last, shorter):
                    yield Loop(shorter, body)

    for chunk in chunks:
        for body in bodies(0, len(units), chunk):
            yield Schedule(steps, Loop(chunk, body))


def test_the_enumeration_of_one_node_and_of_two_is_what_one_counts_by_hand() -> None:
    # One node at chunks 1, 2 and 4: [1], [2], [2 [1]], [4], [4 [1]], [4 [2]], [4 [2 [1]]].
    nests = list(all_nests(chain_graph(random.Random(0), 1), STEPS))
    assert len(nests) == 7
    # Two, at chunks 1 and 2: together at 1; at 2 each node may have a loop of chunk 1 of its own, or both share one.
    assert len(list(all_nests(chain_graph(random.Random(0), 2), 2))) == 1 + 4 + 1


@pytest.mark.parametrize("make", [chain_graph, random_graph])
def test_the_enumeration_holds_legal_nests_each_once_and_the_uniform_ones(
    make: Callable[[random.Random, int], StepGraph],
) -> None:
    graph = make(random.Random(1), 3)
    nests = list(all_nests(graph, STEPS))
    assert len({nest.root for nest in nests}) == len(nests) > 50
    for nest in nests:
        check_schedule(graph, nest, STEPS)
    for chunk in chunk_lengths(STEPS):
        assert uniform_schedule(graph, STEPS, chunk, "").root in {nest.root for nest in nests}


@pytest.mark.parametrize("make", [chain_graph, random_graph])
def test_the_front_is_near_the_front_of_all_nests(make: Callable[[random.Random, int], StepGraph]) -> None:
    slower: list[float] = []
    fatter: list[float] = []
    exact = 0
    for seed in range(16):
        graph, costs = make(random.Random(seed), 2 + seed % 3), MadeUpCosts(seed)
        nests = [
            (simulate_peak(graph, nest, costs, "sum").peak_bytes, estimate(graph, nest, costs))
            for nest in all_nests(graph, STEPS)
        ]
        front = search_front(graph, STEPS, costs, "sum")
        leanest = front[-1].peak.peak_bytes
        fatter.append(leanest / min(nests)[0])
        ratios = []
        for budget in sorted({size for size, _ in nests if size >= leanest}):
            best = min(seconds for size, seconds in nests if size <= budget)
            assert fastest_within(front, budget) >= best * (1 - 1e-9)  # or the enumeration leaves something out
            ratios.append(fastest_within(front, budget) / best)
        exact += max(ratios) <= 1 + 1e-9 and fatter[-1] == 1.0
        slower += ratios
    assert len(slower) > 100
    assert sum(slower) / len(slower) <= MEAN_SLOWER
    assert max(slower) <= MOST_SLOWER
    assert max(fatter) <= MOST_FATTER
    assert exact >= 6  # of 16: the whole front is that of all nests


def test_the_fastest_of_all_nests_is_found_where_memory_does_not_matter() -> None:
    for seed in range(16):
        graph, costs = random_graph(random.Random(seed), 2 + seed % 3), MadeUpCosts(seed)
        best = min(estimate(graph, nest, costs) for nest in all_nests(graph, STEPS))
        assert search_front(graph, STEPS, costs, "sum")[0].seconds <= best * (1 + 1e-9)
