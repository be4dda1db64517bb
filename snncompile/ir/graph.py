"""The folded graph: one node for each operation of a step, held in a `networkx.MultiDiGraph`.

An edge of delay 0 stays within a step; an edge of delay d >= 1 reaches d steps ahead. Graphs are values: a pass
returns a new one and leaves its input as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

import networkx as nx
import torch

from .kinds import Batching, OpKind, TimeCoupling
from .layout import chunk_strides, lie_alike


@dataclass(frozen=True)
class Ref:
    """The value of another node of the same step, where it stands among the arguments."""

    name: str


@dataclass(frozen=True)
class TensorType:
    """One step's tensor: shape, strides (elements), dtype and device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        return TensorType(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def holds_like(self, other: TensorType) -> bool:
        """Whether one may take the place of the other, laid out differently perhaps."""
        return (self.shape, self.dtype, self.device) == (other.shape, other.dtype, other.device)

    def lies_like(self, other: TensorType) -> bool:
        """Whether one may take the place of the other, and both lie in memory alike."""
        return self.holds_like(other) and lie_alike(self.shape, self.stride, other.stride)

    def of_length(self, steps: int) -> TensorType:
        """The same sequence `[T, N, *]` with so many steps."""
        return replace(self, shape=(steps, *self.shape[1:]))

    def of_chunk(self, steps: int) -> TensorType:
        """The tensor that gathers such steps."""
        return TensorType((steps, *self.shape), chunk_strides(self.shape, self.stride), self.dtype, self.device)

    @cached_property
    def gathered_bytes(self) -> int:
        """Bytes that each step takes in a chunk that gathers them: the gaps of a strided view are kept."""
        return chunk_strides(self.shape, self.stride)[0] * self.dtype.itemsize if math.prod(self.shape) else 0

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Effects:
    """What a node was seen to do beside computing its value."""

    random: bool = False  # drew random numbers
    mutates: bool = False  # wrote into an input, a constant or a buffer
    writes_operand: bool = False  # wrote into a value that other nodes may read
    statistics: bool = False  # normalised by the statistics of its input's batch


@dataclass(frozen=True)
class Chain:
    """What a neuron chain does in a step: pointwise operations around neurons, as one node of the graph.

    Attributes:
        nodes: As they stood in the graph, in order; they read each other and the operands.
        operands: What they call the values that the chain's node reads, in its order.
        results: Names of those whose values leave the chain.
    """

    nodes: tuple[Node, ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def neurons(self) -> tuple[Node, ...]:
        """Those with a state, in order."""
        return tuple(node for node in self.nodes if node.kind is OpKind.STATEFUL)


@dataclass(frozen=True)
class Node:
    """One operation of a step.

    Attributes:
        name: Unique Python identifier.
        kind: What it is.
        target: Qualified module name (MODULE, STATEFUL, OPAQUE), attribute path (CONSTANT), callable (FUNCTION),
            method name (METHOD), position (INPUT) or None (OUTPUT).
        args, kwargs: Arguments, with `Ref` for values of other nodes.
        scope: Qualified name of the module in whose forward the operation stands.
        value: What one step yields: `TensorType`s in the structure of the real value, other leaves as they are.
            None before shapes are known, () for what yields nothing.
        state: What a STATEFUL node carries from step to step, likewise.
        effects: What shape propagation saw it do.
        shares: The nodes it reads whose memory its value shares; its own name where that is memory of its state.
        coupling, batching, reason: How it is tied to time, how it runs over a chunk, and why.
        invariant: Every step computes the same value, so it is computed once.
        region: Number of the recurrent region it belongs to.
        timeless: Its value is one for the whole sequence, computed from all of it, and has no steps.
        channels_last: Of a convolution: its weight lies channels-last, and so does what it computes.
        events_below: Of a linear layer, or a convolution that lies channels-last: where less than this part of its
            input is not zero, it is driven by events, that is, computed from what is not zero alone.
        keeps_bits: Of a layer whose input is spikes, or sums of them: backward keeps this many bits of each.
        output_slot: Of a STATEFUL node that nothing but the output reads: number of the output into whose memory a
            kernel writes its value.
        chain: Of a STATEFUL node that stands for several: what they were. Its target names their neurons.
    """

    name: str
    kind: OpKind
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    scope: str = ""
    value: Any = None
    state: Any = None
    effects: Effects = Effects()
    shares: tuple[str, ...] = ()
    coupling: TimeCoupling | None = None
    batching: Batching | None = None
    reason: str = ""
    invariant: bool = False
    region: int | None = None
    timeless: bool = False
    channels_last: bool = False
    events_below: float = 0.0
    keeps_bits: int = 0
    output_slot: int | None = None
    chain: Chain | None = None

    @cached_property
    def refs(self) -> tuple[str, ...]:
        """Names of the nodes whose values this one reads, each once, in order of appearance."""
        return tuple(dict.fromkeys(refs_in((self.args, self.kwargs))))

    @property
    def where(self) -> str:
        """The qualified name to show to a user."""
        return self.target if self.kind in MODULE_KINDS and self.target else (self.scope or self.name)


MODULE_KINDS = (OpKind.MODULE, OpKind.STATEFUL, OpKind.OPAQUE)


class EdgeKind(Enum):
    """Why one node must wait for another."""

    DATA = "data"  # reads its value
    STATE = "state"  # reads the state it leaves
    ORDER = "order"  # no value flows, but the order of execution is part of the result


@dataclass(frozen=True)
class Edge:
    """`target` at step t + delay waits for `source` at step t."""

    source: str
    target: str
    delay: int
    kind: EdgeKind


class StepGraph:
    """The operations of one step in program order, and the edges between them.

    Args:
        nodes: In an order in which every delay-0 edge points forward.
        carried: Edges that are not arguments: states and orders. Data edges follow from the arguments.
        facts: Names of what passes have established; the verifier checks the rules of each.
    """

    def __init__(
        self, nodes: Iterable[Node], carried: Iterable[Edge] = (), facts: frozenset[str] = frozenset()
    ) -> None:
        self.facts = facts
        self.carried = tuple(carried)
        self._graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for node in nodes:
            if node.name in self._graph and "node" in self._graph.nodes[node.name]:
                raise ValueError(f"two nodes are named {node.name}")
            self._graph.add_node(node.name, node=node)
            for source in node.refs:
                self._graph.add_edge(source, node.name, delay=0, kind=EdgeKind.DATA)
        for edge in self.carried:
            self._graph.add_edge(edge.source, edge.target, delay=edge.delay, kind=edge.kind)

    def __iter__(self) -> Iterator[Node]:
        return (data["node"] for _, data in self._graph.nodes(data=True) if "node" in data)

    def __getitem__(self, name: str) -> Node:
        node: Node = self._graph.nodes[name]["node"]
        return node

    def __contains__(self, name: str) -> bool:
        return name in self._graph and "node" in self._graph.nodes[name]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def networkx(self) -> nx.MultiDiGraph[str]:
        """The graph itself; read it, do not change it."""
        return self._graph

    @property
    def edges(self) -> list[Edge]:
        return [Edge(s, t, data["delay"], data["kind"]) for s, t, data in self._graph.edges(data=True)]

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(node for node in self if node.kind is OpKind.INPUT)

    @cached_property
    def output(self) -> Node:
        return next(node for node in self if node.kind is OpKind.OUTPUT)

    @cached_property
    def consumers(self) -> Mapping[str, tuple[str, ...]]:
        """For each node, the nodes that read its value in the same step, in program order."""
        readers: dict[str, list[str]] = {node.name: [] for node in self}
        for node in self:
            for source in node.refs:
                readers[source].append(node.name)
        return {name: tuple(users) for name, users in readers.items()}

    @cached_property
    def scheduled(self) -> tuple[Node, ...]:
        """The nodes that a schedule must place: all but inputs, constants, the output and what is hoisted."""
        skipped = (OpKind.INPUT, OpKind.CONSTANT, OpKind.OUTPUT)
        return tuple(node for node in self if node.kind not in skipped and not node.invariant)

    @cached_property
    def regions(self) -> tuple[tuple[str, ...], ...]:
        """The nodes of each recurrent region, in program order."""
        members: dict[int, list[str]] = {}
        for node in self:
            if node.region is not None:
                members.setdefault(node.region, []).append(node.name)
        return tuple(tuple(members[number]) for number in sorted(members))

    def with_nodes(
        self, changes: Mapping[str, Node], *, facts: Iterable[str] = (), carried: Iterable[Edge] | None = None
    ) -> StepGraph:
        """The same graph with some nodes replaced under their names."""
        nodes = [changes.get(node.name, node) for node in self]
        return StepGraph(nodes, self.carried if carried is None else carried, self.facts | frozenset(facts))

    def without(self, names: Iterable[str]) -> StepGraph:
        """The same graph less some nodes and their edges."""
        gone = set(names)
        kept = [node for node in self if node.name not in gone]
        carried = [edge for edge in self.carried if edge.source not in gone and edge.target not in gone]
        return StepGraph(kept, carried, self.facts)

    def with_facts(self, facts: Iterable[str]) -> StepGraph:
        return StepGraph(self, self.carried, self.facts | frozenset(facts))


def has_registers(graph: StepGraph) -> bool:
    """Whether a step reads what an earlier step left in a register."""
    return any(node.kind is OpKind.LOAD for node in graph)


def map_refs(structure: Any, change: Callable[[Ref], Any]) -> Any:
    """Apply `change` to every `Ref` in nested tuples, lists, dicts and slices."""
    if isinstance(structure, Ref):
        return change(structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(map_refs(item, change) for item in structure))
    if isinstance(structure, (tuple, list)):
        return type(structure)(map_refs(item, change) for item in structure)
    if isinstance(structure, Mapping):
        return {key: map_refs(item, change) for key, item in structure.items()}
    if isinstance(structure, slice):
        return slice(*(map_refs(item, change) for item in (structure.start, structure.stop, structure.step)))
    return structure


def refs_in(structure: Any) -> list[str]:
    """Names of every `Ref` in a structure, in order, repeats included."""
    found: list[str] = []

    def note(ref: Ref) -> Ref:
        found.append(ref.name)
        return ref

    map_refs(structure, note)
    return found


def tensor_types(value: Any) -> list[TensorType]:
    """The tensor types in a node's value, in order."""
    if isinstance(value, TensorType):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in tensor_types(item)]
    return []


def renamed_args(node: Node, names: Mapping[str, str]) -> Node:
    """The node with the nodes it reads renamed."""
    if not any(name in names for name in node.refs):
        return node

    def rename(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    return replace(node, args=map_refs(node.args, rename), kwargs=map_refs(dict(node.kwargs), rename))
