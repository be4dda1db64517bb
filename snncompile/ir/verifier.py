"""The invariants of a graph, as a table of named rules; run after every pass, always.

A rule yields one sentence for each breach. Rules that hold only after some pass name the fact they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import networkx as nx

from ..errors import VerifyError
from .graph import EdgeKind, StepGraph, refs_in
from .kinds import Batching, OpKind, TimeCoupling


@dataclass(frozen=True)
class Rule:
    """One invariant: what it is called, when it holds, and how to find breaches."""

    name: str
    needs: frozenset[str]
    breaches: Callable[[StepGraph], Iterator[str]]


def verify_graph(graph: StepGraph) -> None:
    """Check every rule whose facts are established.

    Raises:
        VerifyError: Some rule is broken; lists all breaches.
    """
    # Later rules may assume what earlier ones state, so the first broken rule ends the check.
    for rule in RULES:
        if rule.needs <= graph.facts and (found := list(rule.breaches(graph))):
            raise VerifyError(f"the graph breaks the rule '{rule.name}': {'; '.join(found)}")


def _references_resolve(graph: StepGraph) -> Iterator[str]:
    for node in graph:
        for name in node.refs:
            if name not in graph:
                yield f"{node.name} reads {name}, which does not exist"
    for edge in graph.carried:
        for name in (edge.source, edge.target):
            if name not in graph:
                yield f"an edge {edge.source} -> {edge.target} names {name}, which does not exist"


def _one_output_at_the_end(graph: StepGraph) -> Iterator[str]:
    outputs = [node.name for node in graph if node.kind is OpKind.OUTPUT]
    if len(outputs) != 1:
        yield f"expected one output node, found {len(outputs)}"
    elif [node.name for node in graph][-1] != outputs[0]:
        yield f"the output node {outputs[0]} is not the last one"


def _program_order(graph: StepGraph) -> Iterator[str]:
    position = {node.name: index for index, node in enumerate(graph)}
    for edge in graph.edges:
        if edge.delay < 0:
            yield f"{edge.source} -> {edge.target} has the negative delay {edge.delay}"
        elif edge.delay == 0 and position[edge.source] >= position[edge.target]:
            yield f"{edge.target} stands before {edge.source}, which it waits for within the step"


def _cycles_have_delay(graph: StepGraph) -> Iterator[str]:
    within = nx.DiGraph([(edge.source, edge.target) for edge in graph.edges if edge.delay == 0])
    if not nx.is_directed_acyclic_graph(within):
        cycle = " -> ".join(source for source, _ in nx.find_cycle(within))
        yield f"the cycle {cycle} has no delay"


def _states_are_carried(graph: StepGraph) -> Iterator[str]:
    # Of several calls that share a state, only the first waits for an earlier step; within a step, edges have no cycle.
    carried = {edge.target for edge in graph.carried if edge.kind is EdgeKind.STATE}
    for node in graph:
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE) and node.name not in carried:
            yield f"{node.name} has state but no state edge reaches it"


def _values_are_known(graph: StepGraph) -> Iterator[str]:
    for node in graph:
        if node.value is None and node.kind is not OpKind.OUTPUT:
            yield f"{node.name} has no type"


def _couplings_are_marked(graph: StepGraph) -> Iterator[str]:
    for node in graph.scheduled:
        if node.coupling is None or node.batching is None:
            yield f"{node.name} has no time coupling or no batching"
        elif (node.coupling is TimeCoupling.SEQUENCE) is not (node.batching is Batching.WHOLE):
            yield f"{node.name} is {node.coupling.value} and may not be run as {node.batching.value}"
        elif node.kind is OpKind.STATEFUL and node.batching is not Batching.SCAN:
            yield f"{node.name} has state and must be scanned, not run as {node.batching.value}"
        elif not _may_run_as(node.coupling, node.batching):
            yield f"{node.name} is {node.coupling.value} and may not be batched as {node.batching.value}"


def _may_run_as(coupling: TimeCoupling, batching: Batching) -> bool:
    if batching is Batching.FOLD_CHANNELS:
        return coupling is TimeCoupling.STEP_STATISTICS
    free = (Batching.SCAN, Batching.PER_STEP, Batching.WHOLE)
    return coupling is TimeCoupling.POINTWISE or batching in free


def _regions_are_the_cycles(graph: StepGraph) -> Iterator[str]:
    from_cycles = {frozenset(members) for members in recurrent_components(graph)}
    from_nodes = {frozenset(members) for members in graph.regions}
    for members in from_cycles ^ from_nodes:
        yield f"{', '.join(sorted(members))}: a recurrent region must be exactly the nodes of a cycle"


def _timeless_values_only_leave(graph: StepGraph) -> Iterator[str]:
    for node in graph:
        for name in node.refs:
            if graph[name].timeless and node.kind is not OpKind.OUTPUT:
                yield f"{node.name} reads {name}, which has no steps"


def _invariants_are_pure(graph: StepGraph) -> Iterator[str]:
    free = (OpKind.CONSTANT, OpKind.INPUT)
    for node in graph:
        if not node.invariant or node.kind in free:
            continue
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE) or node.coupling is not TimeCoupling.POINTWISE:
            yield f"{node.name} is hoisted although it is {node.coupling.value if node.coupling else node.kind.value}"
        for name in node.refs:
            if not graph[name].invariant:
                yield f"{node.name} is hoisted but reads {name}, which changes from step to step"


def _chains_are_closed(graph: StepGraph) -> Iterator[str]:
    for node in graph:
        if node.chain is None:
            continue
        if node.kind is not OpKind.STATEFUL or not node.chain.neurons:
            yield f"{node.name} is a chain without a neuron"
        if len(node.chain.operands) != len(node.refs):
            yield f"the chain {node.name} has {len(node.chain.operands)} operands and reads {len(node.refs)} values"
        known = set(node.chain.operands)
        for part in node.chain.nodes:
            for name in part.refs:
                if name not in known:
                    yield f"{part.name} of the chain {node.name} reads {name}, which it does not know"
            known.add(part.name)
        for name in node.chain.results:
            if name not in known:
                yield f"the chain {node.name} hands on {name}, which it does not compute"


def _written_into_outputs(graph: StepGraph) -> Iterator[str]:
    for node in graph:
        if node.output_slot is None:
            continue
        slots = [slot for slot, name in enumerate(refs_in(graph.output.args)) if name == node.name]
        if slots != [node.output_slot] or set(graph.consumers[node.name]) != {graph.output.name}:
            yield f"{node.name} is written into output {node.output_slot}, but that is not all that reads it"
        if node.kind is not OpKind.STATEFUL or node.shares:
            yield f"{node.name} is written into an output, but its value is not one that a kernel computes"


def recurrent_components(graph: StepGraph) -> list[list[str]]:
    """The cycles across nodes: strongly connected components of more than one node, in program order.

    A node whose only cycle is its own state is a scan, not a region.
    """
    position = {node.name: index for index, node in enumerate(graph)}
    components = [
        sorted(members, key=position.__getitem__) for members in nx.strongly_connected_components(graph.networkx)
    ]
    return sorted((members for members in components if len(members) > 1), key=lambda members: position[members[0]])


RULES: tuple[Rule, ...] = (
    Rule("references resolve", frozenset(), _references_resolve),
    Rule("one output, at the end", frozenset(), _one_output_at_the_end),
    Rule("every cycle has a delay", frozenset(), _cycles_have_delay),
    Rule("program order is topological", frozenset(), _program_order),
    Rule("states are carried", frozenset(), _states_are_carried),
    Rule("chains are closed", frozenset(), _chains_are_closed),
    Rule("timeless values only leave", frozenset(), _timeless_values_only_leave),
    Rule("values are known", frozenset({"shapes"}), _values_are_known),
    Rule("couplings are marked", frozenset({"coupling"}), _couplings_are_marked),
    Rule("regions are the cycles", frozenset({"regions"}), _regions_are_the_cycles),
    Rule("invariants are pure", frozenset({"invariants"}), _invariants_are_pure),
    Rule("written into outputs", frozenset({"outputs"}), _written_into_outputs),
)
