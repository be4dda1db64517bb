"""A NIR graph without nesting, its structure checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from snncompile.errors import CaptureError

__all__ = ["Edge", "FlatGraph", "Key", "flatten", "path_of"]

Key = tuple[str, ...]  # names from the outermost graph inwards
Edge = tuple[Key, Key]


def path_of(key: Key) -> str:
    """A node's name as errors spell it."""
    return ".".join(key)


@dataclass(frozen=True)
class FlatGraph:
    """Nodes and edges of a graph and of all graphs in it.

    An Input or Output of an inner graph is a node like any other, which hands on the sum of what comes in.

    Attributes:
        nodes: NIR nodes.
        edges: From and to, those of one graph in the order in which it lists them; several into one node add up.
        inputs, outputs: The outermost graph's, sorted by name, which is the order in which a file holds them.
    """

    nodes: Mapping[Key, Any]
    edges: tuple[Edge, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]


def flatten(graph: Any, supported: Collection[str]) -> FlatGraph:
    """Take the nesting out of a NIR graph and check that every node has a place in it.

    Args:
        graph: A ``nir.NIRGraph``.
        supported: Names of the node types that may occur, ``NIRGraph``, ``Input`` and ``Output`` aside.

    Raises:
        CaptureError: A node of another type, a graph without Input or Output, an inner graph with several of one, an
            edge to nowhere or listed twice, or a node that does not lie between an Input and an Output.
    """
    nodes = dict(_nodes_within(graph, (), supported))
    inputs, outputs = (_ends(graph, (), kind) for kind in ("Input", "Output"))
    for kind, ends in (("Input", inputs), ("Output", outputs)):
        if not ends:
            raise CaptureError(f"the graph has no {kind}; add a node nir.{kind}, and an edge to connect it")
    flat = FlatGraph(nodes, tuple(_edges_within(graph, ())), inputs, outputs)
    _check_connected(flat)
    return flat


def _type_name(node: Any) -> str:
    return type(node).__name__


def _nodes_within(graph: Any, prefix: Key, supported: Collection[str]) -> Iterator[tuple[Key, Any]]:
    for name, node in sorted(graph.nodes.items()):
        key = (*prefix, name)
        kind = _type_name(node)
        if kind == "NIRGraph":
            yield from _nodes_within(node, key, supported)
        elif kind in supported or kind in ("Input", "Output"):
            yield key, node
        else:
            raise CaptureError(
                f"the NIR node {path_of(key)!r} is of type {kind}, which has no translation; supported are "
                f"{', '.join(sorted({*supported, 'Input', 'Output', 'NIRGraph'}))}",
                where=path_of(key),
            )


def _ends(graph: Any, prefix: Key, kind: str) -> tuple[Key, ...]:
    return tuple((*prefix, name) for name in sorted(graph.nodes) if _type_name(graph.nodes[name]) == kind)


def _edges_within(graph: Any, prefix: Key) -> Iterator[Edge]:
    """The edges between nodes; what ends at an inner graph ends at its Input, and starts at its Output."""
    where = path_of(prefix) or None
    for edge, count in Counter((source, target) for source, target in graph.edges).items():
        missing = [name for name in edge if name not in graph.nodes]
        if missing:
            raise CaptureError(f"the edge {edge} names {missing[0]!r}, which the graph does not have", where=where)
        if count > 1:
            raise CaptureError(f"the edge {edge} is listed {count} times, expected once", where=where)
        source, target = ((*prefix, name) for name in edge)
        if _type_name(graph.nodes[edge[0]]) == "Output" or _type_name(graph.nodes[edge[1]]) == "Input":
            raise CaptureError(f"the edge {edge} leaves an Output or enters an Input of its own graph", where=where)
        yield _port(graph, source, "Output"), _port(graph, target, "Input")
    for name, node in sorted(graph.nodes.items()):
        if _type_name(node) == "NIRGraph":
            yield from _edges_within(node, (*prefix, name))


def _port(graph: Any, key: Key, kind: str) -> Key:
    node = graph.nodes[key[-1]]
    if _type_name(node) != "NIRGraph":
        return key
    ends = _ends(node, key, kind)
    if len(ends) != 1:
        raise CaptureError(
            f"the inner graph {path_of(key)!r} has {len(ends)} nodes of type {kind}, expected one: an edge names only "
            "the graph, not which of them it means; split the graph or take it out of the nesting",
            where=path_of(key),
        )
    return ends[0]


def _check_connected(flat: FlatGraph) -> None:
    graph: Any = nx.DiGraph(flat.edges)
    graph.add_nodes_from(flat.nodes)
    fed = set(flat.inputs).union(*(nx.descendants(graph, key) for key in flat.inputs))
    read = set(flat.outputs).union(*(nx.ancestors(graph, key) for key in flat.outputs))
    for key, node in flat.nodes.items():
        for reached, fact in ((fed, "is not reached from any Input"), (read, "leads to no Output")):
            if key not in reached:
                raise CaptureError(
                    f"the {_type_name(node)} {path_of(key)!r} {fact}; connect it or remove it", where=path_of(key)
                )
