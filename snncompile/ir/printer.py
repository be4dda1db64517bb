"""The text form of a graph: deterministic, one node a line, for goldens, dumps and readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .graph import Node, Ref, StepGraph, TensorType, map_refs


def print_graph(graph: StepGraph) -> str:
    """Render a graph; equal graphs render equally."""
    lines = [f"graph [{', '.join(sorted(graph.facts))}]" if graph.facts else "graph"]
    for node in graph:
        lines.append(f"  {_node(node)}")
        if node.chain is not None:
            lines += [f"    {_node(part)}" for part in node.chain.nodes]
            lines.append(f"    -> {', '.join(f'%{name}' for name in node.chain.results)}")
    lines += [
        f"  {edge.source} -> {edge.target} ({edge.kind.value}, delay {edge.delay})"
        for edge in sorted(graph.carried, key=lambda edge: (edge.source, edge.target, edge.delay, edge.kind.value))
    ]
    return "\n".join(lines) + "\n"


def _node(node: Node) -> str:
    notes = []
    if node.coupling is not None:
        notes.append(node.coupling.value + (f"/{node.batching.value}" if node.batching else ""))
    if node.channels_last:
        notes.append("channels-last")
    if node.events_below:
        notes.append(f"driven by events below {node.events_below:.0%}")
    if node.keeps_bits:
        notes.append(f"keeps {node.keeps_bits} bit{'s' * (node.keeps_bits > 1)}")
    if node.output_slot is not None:
        notes.append(f"written into output {node.output_slot}")
    if node.invariant:
        notes.append("invariant")
    if node.region is not None:
        notes.append(f"region {node.region}")
    arguments = [_value(arg) for arg in node.args] + [f"{key}={_value(arg)}" for key, arg in node.kwargs.items()]
    kind = "" if node.value is None else f": {_type(node.value)}"
    suffix = f"  # {', '.join(notes)}" if notes else ""
    return f"%{node.name}{kind} = {node.kind.value} {_target(node.target)}({', '.join(arguments)}){suffix}"


def _target(target: Any) -> str:
    if callable(target):
        return getattr(target, "__name__", type(target).__name__)
    return "" if target is None else str(target)


class _Name(str):
    """Prints without quotes, so that a reference differs from a string argument."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _value(structure: Any) -> str:
    return repr(_named(structure))


def _named(structure: Any) -> Any:
    """References by name, and tensors by type: their values would make a text of any length."""
    if isinstance(structure, Tensor):
        return _Name(f"<{TensorType.of(structure)}>")
    if isinstance(structure, (tuple, list)) and not hasattr(structure, "_fields"):
        return type(structure)(_named(item) for item in structure)
    if isinstance(structure, Mapping):
        return {key: _named(item) for key, item in structure.items()}
    return map_refs(structure, lambda ref: _Name(f"%{ref.name}"))


def _type(value: Any) -> str:
    if isinstance(value, TensorType):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_type(item) for item in value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_type(item)}' for key, item in value.items())}}}"
    return repr(value) if not isinstance(value, Ref) else value.name
