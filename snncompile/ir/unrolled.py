"""The unrolled T x depth view of a folded graph, for tests, drawings and readers; never the working form."""

from __future__ import annotations

from typing import NamedTuple

import networkx as nx

from .graph import StepGraph


class Cell(NamedTuple):
    """One operation at one step."""

    name: str
    step: int


def unroll(graph: StepGraph, steps: int) -> nx.DiGraph[Cell]:
    """Every node at every step; an edge of delay d leads from step t to step t + d, where that exists."""
    unrolled: nx.DiGraph[Cell] = nx.DiGraph()
    for step in range(steps):
        for node in graph:
            unrolled.add_node(Cell(node.name, step), node=node)
    for edge in graph.edges:
        for step in range(steps - edge.delay):
            unrolled.add_edge(Cell(edge.source, step), Cell(edge.target, step + edge.delay))
    return unrolled
