"""Lets backward keep spikes as bits, a 32nd of what it would keep.

A convolution or a linear layer keeps its input for the gradient of its weight, a pooling layer for that of its input.
Where that input is the spikes of a neuron, and nothing else needs these as they are, the layer keeps them as bits; sums
of spikes, such as residual additions make, as a few bits each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..ir import Batching, Decision, Node, OpKind, StepGraph, TensorType, Verdict, refs_in
from ..ir.batching_rules import called_name
from .infra import Pass, PassContext, PassResult

# Layers that keep their input.
_KEEPERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)  # of spikes are spikes
# Functions whose backward needs nothing of what they read.
_SUMS = frozenset({"add", "__add__"})
_JOINS = frozenset({"cat", "concat"})
_KEEP_NOTHING = _SUMS | _JOINS | {"sub", "__sub__", "stack"}
_LARGEST = 15  # of sums of spikes: they are kept as 4 bits at most


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
            obstacle = _obstacle(graph, spikes[node.refs[0]].owner, context)
            if called[node.target] > 1:
                obstacle = "it is called more than once in a step"
            if obstacle:
                decisions.append(self.decide(node.where, Verdict.REFUSED, obstacle))
            else:
                planes = spikes[node.refs[0]].largest.bit_length()
                kept = "spikes, as bits" if planes == 1 else f"sums of spikes, as {planes} bits each"
                marked[node.name] = replace(node, keeps_bits=planes)
                decisions.append(self.decide(node.where, Verdict.DONE, f"backward keeps its input, {kept}"))
        return PassResult(graph.with_nodes(marked) if marked else graph, bool(marked), tuple(decisions))


@dataclass(frozen=True)
class _Spikes:
    """A value that is whole numbers from 0 on.

    Attributes:
        owner: The node in whose memory it lies.
        largest: The largest number that it may hold.
    """

    owner: str
    largest: int


def _spikes(graph: StepGraph, context: PassContext) -> dict[str, _Spikes]:
    """The values that are spikes, or sums of few of them."""
    found: dict[str, _Spikes] = {}
    results: dict[str, tuple[int | None, ...]] = {}  # of stateful nodes
    for node in graph:
        read = [found.get(name) for name in refs_in((node.args, node.kwargs))]
        if node.kind is OpKind.STATEFUL:
            results[node.name] = _of_stateful(
                graph, node, [None if each is None else each.largest for each in read], context
            )
            if isinstance(node.value, TensorType):
                found |= _small(node.name, results[node.name])
            continue
        if node.batching is Batching.SELECT and node.shares and node.shares[0] in results:
            # One of several results, each of which has memory of its own.
            found |= _small(node.name, results[node.shares[0]][node.args[1] :])
            continue
        known = [each for each in read if each is not None]
        if node.invariant or not known or len(known) < len(read):
            continue
        if node.shares == node.refs and len(known) == 1:
            found[node.name] = known[0]
        elif not node.shares and (largest := _largest(node, [each.largest for each in known], context)):
            found[node.name] = _Spikes(node.name, largest)
    return found


def _small(name: str, results: Sequence[int | None]) -> dict[str, _Spikes]:
    """The node of this name with its spikes, if the first of these results is small enough to be kept as bits."""
    most = results[0] if results else None
    return {} if most is None or most > _LARGEST else {name: _Spikes(name, max(most, 1))}


def _of_stateful(
    graph: StepGraph, node: Node, read: Sequence[int | None], context: PassContext
) -> tuple[int | None, ...]:
    """The largest that each result of a neuron or a chain may be; see `KernelProbe.largest`."""
    assert context.kernels is not None
    types = tuple(graph[name].value for name in node.refs)
    if node.shares or len(types) != len(read) or not all(isinstance(each, TensorType) for each in types):
        return ()
    return context.kernels.largest(context.net, node, types, read)


def _largest(node: Node, read: Sequence[int], context: PassContext) -> int:
    """The largest number that a value made of spikes may hold; 0 if it may be something else, or is too large."""
    if node.kind is OpKind.MODULE:
        return read[0] if context.acts_like(node) in _MAXIMA and len(read) == 1 else 0
    if node.kind not in (OpKind.FUNCTION, OpKind.METHOD):
        return 0
    name = called_name(node.target)
    if name in _SUMS and len(node.args) == len(read) == 2 and not node.kwargs:
        return sum(read) if sum(read) <= _LARGEST else 0
    return max(read) if name in _JOINS else 0


def _keeps_its_input(node: Node, context: PassContext) -> bool:
    is_keeper = node.kind is OpKind.MODULE and context.acts_like(node) in _KEEPERS
    return is_keeper and len(node.refs) == len(node.args) == 1 and not node.kwargs


def _obstacle(graph: StepGraph, owner: str, context: PassContext) -> str:
    """Why spikes stay in memory as they are whatever a layer keeps; empty if they do not."""
    for value, reader in _readers(graph, owner):
        if reader.kind is OpKind.OUTPUT:
            return "its input leaves the network"
        if _keeps(graph, reader, value, context):
            return f"{reader.where} keeps the same spikes as they are"
    return ""


def _readers(graph: StepGraph, owner: str) -> Iterator[tuple[str, Node]]:
    """What reads the memory of a node's value, through its views too: the value that is read, and the reader."""
    for name in graph.consumers[owner]:
        node = graph[name]
        if owner in node.shares:
            yield from _readers(graph, name)
        else:
            yield owner, node


def _keeps(graph: StepGraph, reader: Node, value: str, context: PassContext) -> bool:
    """Whether backward keeps a value as it is for one of its readers."""
    if _keeps_its_input(reader, context):
        return False  # the layer keeps bits instead
    if reader.kind is OpKind.STATEFUL and context.kernels is not None:
        types = [graph[name].value for name in reader.refs]
        if not all(isinstance(each, TensorType) for each in types):
            return True
        kept = context.kernels.keeps(context.net, reader, types)
        return any(name == value and place in kept for place, name in enumerate(reader.refs))
    return not (reader.kind in (OpKind.FUNCTION, OpKind.METHOD) and called_name(reader.target) in _KEEP_NOTHING)
