"""Joins neurons with the pointwise operations around them, so that one kernel makes one pass over memory.

A chain is grown from a neuron along its edges while everything in it has the neuron's shape and layout and the graph
stays free of cycles; what is broadcast, such as a scale for each channel, is an operand. Synonym: loop fusion (Allen
and Kennedy). Each operation rounds as before, so results keep every bit. Where gradients are recorded, a chain goes
backward in one pass too, and keeps what it reads, but nothing in between.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx

from ..capture import has_hooks
from ..ir import (
    Batching,
    Chain,
    Decision,
    Edge,
    EdgeKind,
    Effects,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    TimeCoupling,
    Verdict,
    renamed_args,
)
from ..ir.step_statistics import BATCH_NORMS
from ..ir.verifier import recurrent_components
from ..schedule import Schedule
from .infra import KernelProbe, Pass, PassContext, PassResult


@dataclass(frozen=True)
class FuseNeuronChains(Pass):
    """Make one node of each neuron and what can be computed along with it."""

    name: ClassVar[str] = "fuse-neuron-chains"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "regions", "invariants"})
    provides: ClassVar[frozenset[str]] = frozenset({"chains"})
    max_nodes: int = 64
    max_operands: int = 16

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        if context.kernels is None or "chains" in graph.facts:
            return PassResult(graph, False)  # without kernels a chain would only be slower
        decisions: list[Decision] = []
        chains = []
        for members in self._grown(graph, context, context.kernels):
            chain = _chain_node(graph, members)
            what = " -> ".join(members)
            if len(chain.refs) > self.max_operands:
                obstacle = f"it would read {len(chain.refs)} values, more than {self.max_operands}"
            else:
                obstacle = context.kernels.obstacle(context.net, chain, _operand_types(graph, chain))
            if obstacle:
                decisions.append(self.decide(chain.where, Verdict.REFUSED, f"{what} stay apart: {obstacle}"))
            else:
                decisions.append(self.decide(chain.where, Verdict.DONE, f"{what} in one pass over memory"))
                chains.append((members, chain))
        if not chains:
            return PassResult(graph, False, tuple(decisions))
        return PassResult(_contracted(graph, chains), True, tuple(decisions))

    def _grown(self, graph: StepGraph, context: PassContext, kernels: KernelProbe) -> Iterator[tuple[str, ...]]:
        """The members of each chain of more than one node, in program order."""
        position = {node.name: index for index, node in enumerate(graph)}
        groups = _Groups(graph)
        fusable = {node.name for node in _candidates(graph, context)}
        pointwise: dict[str, bool] = {}

        def joins(name: str) -> bool:
            if name not in pointwise:
                alone = _chain_node(graph, (name,))
                types = _operand_types(graph, alone)
                pointwise[name] = not kernels.pointwise_obstacle(context.net, alone, types)
            return pointwise[name]

        for neuron in [node for node in graph if node.kind is OpKind.STATEFUL and node.name in fusable]:
            waiting = [neuron.name]
            while waiting:
                name = waiting.pop(0)
                for other in (*graph[name].refs, *graph.consumers[name]):
                    if other not in fusable or groups.of(other) == groups.of(neuron.name):
                        continue
                    if not _lie_alike(graph[other], neuron) or graph[other].region != neuron.region:
                        continue
                    if groups.size(other) + groups.size(neuron.name) > self.max_nodes:
                        continue
                    if not joins(neuron.name) or not joins(other):  # last, as both are traced for it
                        continue
                    if groups.join(neuron.name, other):
                        waiting.append(other)
        placed = _named_by(context.options.schedule)
        for group in groups.joined():
            members = tuple(sorted(group, key=position.__getitem__))
            # A schedule for chains knows them by their first neuron; one that names more wants to place that itself.
            if placed.intersection(members) <= {_first_neuron(graph, members).name}:
                yield members


def _named_by(schedule: object) -> frozenset[str]:
    """The nodes that a schedule of the user's names."""
    if not isinstance(schedule, Schedule):
        return frozenset()
    return frozenset(name for _, segment in schedule.segments() for name in segment.nodes)


def _candidates(graph: StepGraph, context: PassContext) -> Iterator[Node]:
    """The nodes that may be part of a chain, if a kernel can compute them."""
    calls: dict[object, int] = {}
    for node in graph:
        if node.kind is OpKind.STATEFUL:
            calls[node.target] = calls.get(node.target, 0) + 1
    written = {name for node in graph if node.effects.writes_operand for name in node.refs}
    for node in graph.scheduled:
        if node.chain is not None or node.shares or node.effects != Effects() or node.name in written:
            continue
        if not isinstance(node.value, TensorType) or not node.value.dtype.is_floating_point:
            continue
        if not all(isinstance(graph[name].value, TensorType) for name in node.refs):
            continue
        if context.needs_grad and not _takes_its_own_type(graph, node):
            continue  # kernels do not add up the gradient of what is broadcast
        if node.kind is OpKind.STATEFUL:
            # A neuron that is called twice in a step hands its state on in between.
            if node.batching is Batching.SCAN and calls[node.target] == 1 and _takes_its_own_type(graph, node):
                yield node
        elif (
            node.coupling is TimeCoupling.POINTWISE
            and (node.batching is Batching.ELEMENTWISE or _is_batch_norm(node, context))
            and not (node.kind is OpKind.MODULE and has_hooks(context.net.get_submodule(node.target)))
        ):
            yield node


def _is_batch_norm(node: Node, context: PassContext) -> bool:
    """Whether a node normalises by running statistics: a factor and an offset for each channel."""
    return node.kind is OpKind.MODULE and context.acts_like(node) in BATCH_NORMS


def _takes_its_own_type(graph: StepGraph, node: Node) -> bool:
    return all(_lie_alike(graph[name], node) for name in node.refs)


def _lie_alike(node: Node, other: Node) -> bool:
    """Whether the values of two nodes are tensors that lie in memory alike."""
    one, two = node.value, other.value
    return isinstance(one, TensorType) and isinstance(two, TensorType) and one.lies_like(two)


class _Groups:
    """Nodes in groups, with the edges within a step between them, which must stay free of cycles."""

    def __init__(self, graph: StepGraph) -> None:
        self._members = {node.name: [node.name] for node in graph}
        self._group = {node.name: node.name for node in graph}
        self._edges: nx.DiGraph[str] = nx.DiGraph()
        self._edges.add_nodes_from(self._group)
        self._edges.add_edges_from((edge.source, edge.target) for edge in graph.edges if edge.delay == 0)

    def of(self, name: str) -> str:
        return self._group[name]

    def size(self, name: str) -> int:
        return len(self._members[self._group[name]])

    def join(self, one: str, other: str) -> bool:
        """Make one group of two neighbours' groups; False if what lies between them would wait for itself."""
        kept, gone = self._group[one], self._group[other]
        if self._is_reached_around(kept, gone) or self._is_reached_around(gone, kept):
            return False
        for name in self._members[gone]:
            self._group[name] = kept
        self._members[kept] += self._members.pop(gone)
        nx.contracted_nodes(self._edges, kept, gone, self_loops=False, copy=False)
        return True

    def _is_reached_around(self, start: str, end: str) -> bool:
        """Whether there is a path by way of other groups."""
        seen = {start}
        waiting = [group for group in self._edges.successors(start) if group != end]
        while waiting:
            group = waiting.pop()
            if group == end:
                return True
            if group not in seen:
                seen.add(group)
                waiting += self._edges.successors(group)
        return False

    def joined(self) -> list[list[str]]:
        """The groups of more than one node."""
        return [members for members in self._members.values() if len(members) > 1]


def _first_neuron(graph: StepGraph, members: Sequence[str]) -> Node:
    """The neuron that lends a chain its name; of an operation that is tried alone, that."""
    nodes = [graph[name] for name in members]
    return next((node for node in nodes if node.kind is OpKind.STATEFUL), nodes[0])


def _chain_node(graph: StepGraph, members: Sequence[str]) -> Node:
    """The node that stands for several."""
    nodes = tuple(graph[name] for name in members)
    inside = {node.name for node in nodes}
    read_by = {node.name: graph.consumers[node.name] for node in nodes}
    results = tuple(name for name, readers in read_by.items() if not inside.issuperset(readers)) or (nodes[-1].name,)
    first = _first_neuron(graph, members)
    operands = dict.fromkeys(name for node in nodes for name in node.refs if name not in inside)
    # The kernel walks memory as the first operand lies in it.
    ordered = sorted(operands, key=lambda name: not _lie_alike(graph[name], first))
    within = {name: f"operand{number}" for number, name in enumerate(ordered)}
    chain = Chain(tuple(renamed_args(node, within) for node in nodes), tuple(within.values()), results)
    values = tuple(graph[name].value for name in results)
    return replace(
        first,
        kind=OpKind.STATEFUL,
        target=" + ".join(str(node.target) for node in chain.neurons),
        args=tuple(map(Ref, ordered)),
        kwargs={},
        value=values[0] if len(values) == 1 else values,
        state=tuple(leaf for node in chain.neurons for leaf in node.state),
        coupling=TimeCoupling.STATEFUL,
        batching=Batching.SCAN,
        chain=chain,
    )


def _operand_types(graph: StepGraph, chain: Node) -> list[TensorType]:
    return [graph[name].value for name in chain.refs]


def _contracted(graph: StepGraph, chains: list[tuple[tuple[str, ...], Node]]) -> StepGraph:
    """The graph with each chain as one node, and a node for each of its results where there are several."""
    position = {node.name: index for index, node in enumerate(graph)}
    chain_of = {name: chain for members, chain in chains for name in members}
    names: dict[str, str] = {}  # of a result -> of the node that has it now
    placed: dict[str, tuple[float, Node]] = {}
    for _, chain in chains:
        assert chain.chain is not None
        placed[chain.name] = (position[chain.name], chain)
        for index, result in enumerate(chain.chain.results):
            if len(chain.chain.results) == 1:
                names[result] = chain.name
            else:
                item = _item(chain, index, f"{result}_of_{chain.name}")
                names[result] = item.name
                placed[item.name] = (position[chain.name], item)
    for node in graph:
        if node.name not in chain_of:
            placed[node.name] = (position[node.name], node)
    items = set(names.values()) - set(chain_of)
    nodes = {name: node if name in items else renamed_args(node, names) for name, (_, node) in placed.items()}
    carried = []
    for edge in graph.carried:
        source, target = (chain_of[end].name if end in chain_of else end for end in (edge.source, edge.target))
        moved = Edge(source, target, edge.delay, edge.kind)
        within = edge.source in chain_of and chain_of.get(edge.target) is chain_of[edge.source]
        if (not within or edge.kind is EdgeKind.STATE) and moved not in carried:
            carried.append(moved)
    # Nodes must stand in program order again: a chain waits for all that any of its members waits for.
    order = StepGraph(nodes.values(), carried)
    within_step: nx.DiGraph[str] = nx.DiGraph()
    within_step.add_nodes_from(nodes)
    within_step.add_edges_from((edge.source, edge.target) for edge in order.edges if edge.delay == 0)
    names_in_order = nx.lexicographical_topological_sort(within_step, key=lambda name: placed[name][0])
    fused = StepGraph((nodes[name] for name in names_in_order), carried, graph.facts)
    region_of = {name: number for number, found in enumerate(recurrent_components(fused)) for name in found}
    return fused.with_nodes({node.name: replace(node, region=region_of.get(node.name)) for node in fused})


def _item(chain: Node, index: int, name: str) -> Node:
    """The node that takes one of several results."""
    return replace(
        chain,
        name=name,
        kind=OpKind.FUNCTION,
        target=operator.getitem,
        args=(Ref(chain.name), index),
        value=chain.value[index],
        state=None,
        coupling=TimeCoupling.POINTWISE,
        batching=Batching.SELECT,
        shares=(chain.name,),
        chain=None,
    )
