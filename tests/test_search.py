"""The search: what it returns is a front and beats every uniform chunk. `test_search_exhaustive.py` is its referee."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snncompile import Loop, Schedule, Segment
from snncompile.ir import Edge, EdgeKind, Node, OpKind, Ref, StepGraph, TensorType
from snncompile.schedule import (
    Candidate,
    Footprint,
    check_schedule,
    search_front,
    simulate_peak,
    uniform_schedule,
)
from snncompile.schedule.search import NEST_SHARE, chunk_lengths, merge_segments

SEEDS = st.integers(min_value=0, max_value=2**20)


def tensor(features: int) -> TensorType:
    """`[4, features]` in float32: 16 bytes for each feature."""
    return TensorType((4, features), (features, 1), torch.float32, torch.device("cpu"))


def random_graph(rng: random.Random, count: int) -> StepGraph:
    """Scheduled nodes that read one or two earlier values, some with state; sometimes two make a recurrent region."""
    nodes = [Node("x", OpKind.INPUT, 0, value=tensor(8))]
    carried: list[Edge] = []
    for number in range(count):
        name = f"n{number}"
        operands = tuple(Ref(node.name) for node in rng.sample(nodes[-3:], k=min(len(nodes), rng.randint(1, 2))))
        value = tensor(rng.choice([1, 4, 16, 64]))
        if rng.random() < 0.4:
            nodes.append(Node(name, OpKind.STATEFUL, name, operands, value=value, state=(value,)))
            carried.append(Edge(name, name, 1, EdgeKind.STATE))
        else:
            nodes.append(Node(name, OpKind.FUNCTION, torch.add, operands, value=value))
    if count >= 3 and rng.random() < 0.3 and Ref("n0") in nodes[2].args:
        carried.append(Edge("n1", "n0", 1, EdgeKind.STATE))
        nodes[1:3] = [Node(**{**vars_of(node), "region": 0}) for node in nodes[1:3]]
    nodes.append(Node("output", OpKind.OUTPUT, None, (Ref(nodes[-1].name),), value=nodes[-1].value))
    return StepGraph(nodes, carried)


def vars_of(node: Node) -> dict[str, Any]:
    return {name: getattr(node, name) for name in node.__dataclass_fields__}


@dataclass(frozen=True)
class MadeUpCosts:
    """Each node has an overhead, a time a step, a chunk length from which it slows down, and a work space."""

    seed: int
    put_overhead: float = 0.02

    def _of(self, node: Node) -> tuple[float, float, int, int]:
        rng = random.Random(f"{self.seed} {node.name}")
        return rng.uniform(0.0, 4.0), rng.uniform(0.2, 1.0), rng.choice([2, 4, 100]), rng.choice([0, 16, 400])

    def footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
        output = node.value.nbytes * steps
        return Footprint(output + self._of(node)[3] * steps, output)

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        overhead, step, comfortable, _ = self._of(node)
        return overhead + steps * step * (1.0 if steps <= comfortable else 1.7)

    def trial_seconds(self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]) -> None:
        return None

    def within(self, budget: int) -> MadeUpCosts:
        return self

    def put_seconds(self, size: int) -> float:
        return self.put_overhead + size * 1e-5

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        return False

    def training_peak_bytes(self, graph: StepGraph, schedule: Schedule) -> int:
        raise NotImplementedError


def estimate(graph: StepGraph, schedule: Schedule, costs: MadeUpCosts) -> float:
    """Seconds of a nest as the search counts them: the nodes, and the gathering of what leaves an inner loop."""
    order = [name for _, segment in schedule.segments() for name in segment.nodes]
    position = {name: index for index, name in enumerate(order)}

    def of(loop: Loop, *, outermost: bool) -> float:
        total = 0.0
        inside: list[str] = []
        for item in loop.body:
            if isinstance(item, Loop):
                total += of(item, outermost=False)
                inside += [name for _, segment in Schedule(1, item).segments() for name in segment.nodes]
            else:
                total += sum(costs.seconds(graph, graph[name], loop.chunk) / loop.chunk for name in item.nodes)
                inside += item.nodes
        last = max(position[name] for name in inside)
        if not outermost:
            for name in inside:
                if max((position.get(reader, -1) for reader in graph.consumers[name]), default=-1) > last:
                    total += costs.put_seconds(loop.chunk * graph[name].value.nbytes) / loop.chunk
        return total

    straight = uniform_schedule(graph, schedule.steps, schedule.root.chunk, "")
    share = 1.0 if schedule.root == straight.root else 1.0 + NEST_SHARE
    return schedule.steps * of(schedule.root, outermost=True) * share


def fastest_within(front: list[Candidate], budget: int) -> float:
    return min((candidate.seconds for candidate in front if candidate.peak.peak_bytes <= budget), default=float("inf"))


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_chunk_lengths_are_the_powers_of_two_and_all_steps(steps: int, expected: tuple[int, ...]) -> None:
    assert chunk_lengths(steps) == expected


def test_merge_segments_joins_neighbours_at_every_level_and_nothing_across_a_loop() -> None:
    a, b, c, d = (Segment((name,)) for name in "abcd")
    assert merge_segments((a, b, Loop(2, (c, d)), a, Loop(2, (b, Loop(1, (c, d)))), Loop(2, (d,)))) == (
        Segment(("a", "b")),
        Loop(2, (Segment(("c", "d")),)),
        Segment(("a",)),
        Loop(2, (Segment(("b",)), Loop(1, (Segment(("c", "d")),)))),
        Loop(2, (Segment(("d",)),)),
    )
    assert merge_segments(()) == ()


@given(seed=SEEDS, count=st.integers(1, 9), steps=st.sampled_from([1, 2, 6, 16]))
def test_the_front_gets_slower_and_leaner_and_holds_legal_schedules(seed: int, count: int, steps: int) -> None:
    graph, costs = random_graph(random.Random(seed), count), MadeUpCosts(seed)
    front = search_front(graph, steps, costs, "sum")
    assert front
    for faster, slower in pairwise(front):
        assert faster.seconds <= slower.seconds
        assert faster.peak.peak_bytes > slower.peak.peak_bytes
    for candidate in front:
        check_schedule(graph, candidate.schedule, steps)
        assert candidate.peak == simulate_peak(graph, candidate.schedule, costs, "sum")
        assert candidate.seconds == pytest.approx(estimate(graph, candidate.schedule, costs))


@given(seed=SEEDS, count=st.integers(1, 9), steps=st.sampled_from([2, 6, 16]))
def test_the_search_is_no_slower_than_a_uniform_chunk_of_the_same_bytes(seed: int, count: int, steps: int) -> None:
    graph, costs = random_graph(random.Random(seed), count), MadeUpCosts(seed)
    front = search_front(graph, steps, costs, "sum")
    for chunk in chunk_lengths(steps):
        uniform = uniform_schedule(graph, steps, chunk, "uniform")
        budget = simulate_peak(graph, uniform, costs, "sum").peak_bytes
        assert fastest_within(front, budget) <= estimate(graph, uniform, costs) * (1 + 1e-9), f"chunk {chunk}"


@pytest.mark.parametrize("count", [25, 60])
def test_a_long_network_is_cut_before_its_heavy_units_and_still_beats_every_uniform_chunk(count: int) -> None:
    graph, costs = random_graph(random.Random(count), count), MadeUpCosts(count)
    front = search_front(graph, 16, costs, "sum")
    assert len(front) > 1
    for candidate in front:
        check_schedule(graph, candidate.schedule, 16)
    for chunk in chunk_lengths(16):
        uniform = uniform_schedule(graph, 16, chunk, "uniform")
        budget = simulate_peak(graph, uniform, costs, "sum").peak_bytes
        assert fastest_within(front, budget) <= estimate(graph, uniform, costs) * (1 + 1e-9), f"chunk {chunk}"
