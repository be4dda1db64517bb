"""Lets backward keep spikes as bits, a 32nd of what it would keep.

A convolution or a linear layer keeps its input for the gradient of its weight, a pooling layer for that of its input.
Where that input is the spikes of a neuron, and nothing else needs these as they are, the layer keeps them as bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..ir import Decision, Node, OpKind, StepGraph, TensorType, Verdict
from .infra import Pass, PassContext, PassResult

# Layers that keep their input.
_KEEPERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)  # of spikes are spikes
# Functions whose backward needs nothing of what they read.
_KEEP_NOTHING = frozenset({"add", "__add__", "iadd", "sub", "__sub__", "cat", "concat", "stack"})


@dataclass(frozen=True)
class KeepSpikesAsBits(Pass):
    """Mark the layers whose input backward keeps as bits."""

    name: ClassVar[str] = "keep-spikes-as-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "invariants", "chains"})
    provides: ClassVar[frozenset[str]] = frozenset({"bits"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        if not context.needs_grad or context.kernels is None or "bits" in graph.facts:
            return PassResult(graph, False)
        spikes = _spikes(graph, context)
        called = Counter(node.target for node in graph if node.kind is OpKind.MODULE)
        marked: dict[str, Node] = {}
        decisions: list[Decision] = []
        for node in graph:
            if not _keeps_its_input(node, context) or node.refs[0] not in spikes:
                continue
            obstacle = _obstacle(graph, spikes[node.refs[0]], context)
            if called[node.target] > 1:
                obstacle = "it is called more than once in a step"
            if obstacle:
                decisions.append(self.decide(node.where, Verdict.REFUSED, obstacle))
            else:
                marked[node.name] = replace(node, keeps_bits=True)
                decisions.append(self.decide(node.where, Verdict.DONE, "backward keeps its input, spikes, as bits"))
        return PassResult(graph.with_nodes(marked) if marked else graph, bool(marked), tuple(decisions))


def _spikes(graph: StepGraph, context: PassContext) -> dict[str, str]:
    """The values that are zeros and ones, and the node in whose memory each lies."""
    assert context.kernels is not None
    found: dict[str, str] = {}
    for node in graph:
        if node.kind is OpKind.STATEFUL and isinstance(node.value, TensorType) and not node.shares:
            types = tuple(graph[name].value for name in node.refs)
            if all(isinstance(each, TensorType) for each in types) and context.kernels.fires(context.net, node, types):
                found[node.name] = node.name
        elif len(node.refs) == 1 and node.refs[0] in found and not node.invariant:
            if node.shares == node.refs:
                found[node.name] = found[node.refs[0]]
            elif node.kind is OpKind.MODULE and context.acts_like(node) in _MAXIMA and not node.shares:
                found[node.name] = node.name
    return found


def _keeps_its_input(node: Node, context: PassContext) -> bool:
    is_keeper = node.kind is OpKind.MODULE and context.acts_like(node) in _KEEPERS
    return is_keeper and len(node.refs) == len(node.args) == 1 and not node.kwargs


def _obstacle(graph: StepGraph, owner: str, context: PassContext) -> str:
    """Why spikes stay in memory as they are whatever a layer keeps; empty if they do not."""
    for reader in _readers(graph, owner):
        if reader.kind is OpKind.OUTPUT:
            return "its input leaves the network"
        if not _keeps_its_input(reader, context) and not _keeps_nothing(reader):
            return f"{reader.where} keeps the same spikes as they are"
    return ""


def _readers(graph: StepGraph, owner: str) -> Iterator[Node]:
    """What reads the memory of a node's value, through its views too."""
    for name in graph.consumers[owner]:
        node = graph[name]
        if owner in node.shares:
            yield from _readers(graph, name)
        else:
            yield node


def _keeps_nothing(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.kind in (OpKind.FUNCTION, OpKind.METHOD) and name in _KEEP_NOTHING
