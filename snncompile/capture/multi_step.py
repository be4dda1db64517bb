"""A network in multi-step mode as a graph of one step.

What works on each step alone becomes the same operation on one step. The rest is gathered in `SequenceModule`s, which
run on all T steps at once: a network in which nothing can be freed becomes one of them, and still computes what it did.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import nn

from ..errors import CaptureError
from ..ir import (
    Decision,
    Edge,
    EdgeKind,
    Effects,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    Verdict,
    map_refs,
    refs_in,
    verify_graph,
)
from .adapter import Leaf
from .capture import Captured, capture_sequence, state_edges
from .fakes import resolve_attribute
from .sequence_groups import Splitter
from .sequence_module import Operation, SequenceModule
from .sequence_values import TimeAxis, run_sequence


class SequenceNetwork(nn.Module):
    """A network and the modules that gather what needs its whole sequence.

    Args:
        net: The network; its parameters, buffers and submodules are found here under the same names.
        sequences: Name -> module.
    """

    # Kept out of the tree of modules: the parts of the network are this module's own parts.
    _net: nn.Module

    def __init__(self, net: nn.Module, sequences: Mapping[str, SequenceModule]) -> None:
        super().__init__()
        self.__dict__["_net"] = net
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = net.__dict__[name]
        self.__dict__["_modules"] = {**net._modules, **sequences}
        self.training = net.training

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(net, name)


def capture_multi_step(net: nn.Module, inputs: tuple[TensorType, ...]) -> tuple[Captured, nn.Module]:
    """Trace a network in multi-step mode and find the graph of one step.

    Args:
        net: The network.
        inputs: Types of the sequences `[T, N, *]`.

    Returns:
        The graph, and the network in which its nodes find their modules.

    Raises:
        CaptureError: The network cannot be run on inputs of these shapes.
    """
    captured = capture_sequence(net, inputs)
    steps = inputs[0].shape[0]
    emitter = _Emitter(Splitter(net, captured, run_sequence(captured, net, inputs), steps))
    nodes, sequences = emitter.emit()
    home = SequenceNetwork(net, sequences) if sequences else net
    edges = state_edges(home, [node for node in nodes if node.target not in sequences])
    graph = StepGraph(nodes, [*edges, *emitter.sequence_edges()])
    verify_graph(graph)
    decisions = tuple(
        Decision("capture", name, Verdict.NOTE, f"runs on all {steps} steps at once: {reason}")
        for name, reason in emitter.reasons.items()
    )
    return Captured(graph, {**captured.leaves, **emitter.leaves}, captured.traced, decisions), home


@dataclass(frozen=True)
class _Attribute:
    """Looks up a tensor of the network, anew at every call."""

    net: nn.Module
    path: str

    def __call__(self) -> Any:
        return resolve_attribute(self.net, self.path)


class _Emitter:
    """Writes the graph of one step: free nodes, and one node for each group."""

    def __init__(self, splitter: Splitter) -> None:
        self.splitter = splitter
        self.groups = splitter.groups()
        self.group_of = {name: number for number, group in enumerate(self.groups) for name in group}
        self.alias: dict[str, Ref] = {}
        self.nodes: list[Node] = []
        self.sequences: dict[str, SequenceModule] = {}
        self.leaves: dict[str, Leaf] = {}
        self.reasons: dict[str, str] = {}

    def emit(self) -> tuple[list[Node], dict[str, SequenceModule]]:
        splitter = self.splitter
        for item in self._order():
            if isinstance(item, int):
                self._emit_group(item)
            elif isinstance(form := splitter.free[item], Ref):
                self.alias[item] = self._resolved(form)
            else:
                form = self._with_first_items(form)
                self.nodes.append(replace(form, args=self._renamed(form.args), kwargs=self._renamed(dict(form.kwargs))))
        output = splitter.output
        self.nodes.append(replace(output, args=self._renamed(splitter.rules.filled(output).args)))
        return self.nodes, self.sequences

    def _with_first_items(self, form: Node) -> Node:
        """The node with what it reads of `splitter.rules.squeezed` taken without the dimension that met time."""

        def first_item(ref: Ref) -> Ref:
            if (form.name, ref.name) not in self.splitter.rules.squeezed:
                return ref
            name = self._unique(f"{ref.name}_of_a_step")
            self.nodes.append(Node(name, OpKind.FUNCTION, operator.getitem, args=(self._resolved(ref), 0)))
            return Ref(name)

        return replace(form, args=map_refs(form.args, first_item))

    def _order(self) -> list[Any]:
        """Names of free nodes and numbers of groups, in an order that all their values allow."""
        splitter = self.splitter
        position = {name: index for index, name in enumerate(splitter.nodes)}
        order: nx.DiGraph[Any] = nx.DiGraph()
        for name in splitter.moving():
            item = self.group_of.get(name, name)
            order.add_node(item)
            for source in splitter.nodes[name].refs:
                if splitter.values[source].axis is not TimeAxis.PLAIN:
                    before = self.group_of.get(source, source)
                    if before != item:
                        order.add_edge(before, item)
        first = {number: position[group[0]] for number, group in enumerate(self.groups)}
        return list(
            nx.lexicographical_topological_sort(
                order, key=lambda item: first[item] if isinstance(item, int) else position[item]
            )
        )

    def _emit_group(self, number: int) -> None:
        splitter, group = self.splitter, self.groups[number]
        members = set(group)
        operations = self._operations(group)
        inside = {operation.node.name for operation in operations}
        operands = list(dict.fromkeys(name for o in operations for name in o.node.refs if name not in inside))
        results = [name for name in group if self._is_read_outside(name, members)] or [group[-1]]
        results.sort(key=lambda name: not splitter.can_be_handed_out(name))  # those without time last
        timeless = sum(not splitter.can_be_handed_out(name) for name in results)
        module = SequenceModule(
            operations,
            [(n, self._folded(n)) for n in operands],
            [(n, self._folded(n) if splitter.can_be_handed_out(n) else None) for n in results],
            timeless,
            splitter.rules.steps,
        )
        name = self._unique("sequence")
        self.sequences[name] = module
        kind = OpKind.OPAQUE if any(self._has_effects(member) for member in group) else OpKind.MODULE
        self.leaves[name] = Leaf(kind, whole=True)
        reasons = [why for member in group if (why := splitter.why_bound(member))]
        self.reasons[name] = "; ".join(reasons) or "what it reads has no steps"
        args = tuple(self._resolved(Ref(operand)) for operand in operands)
        self.nodes.append(Node(name, kind, name, args=args, timeless=timeless == len(results)))
        if len(results) == 1:
            self.alias[results[0]] = Ref(name)
            return
        for index, result in enumerate(results):
            part = self._unique(f"{result}_of_{name}")
            is_timeless = index >= len(results) - timeless
            self.nodes.append(
                Node(part, OpKind.FUNCTION, operator.getitem, args=(Ref(name), index), timeless=is_timeless)
            )
            self.alias[result] = Ref(part)

    def _operations(self, group: list[str]) -> list[Operation]:
        """The group's operations, and before them what they read that is made of parameters alone."""
        splitter = self.splitter
        position = {name: index for index, name in enumerate(splitter.nodes)}
        wanted = set(group)
        waiting = list(group)
        while waiting:
            for source in splitter.nodes[waiting.pop()].refs:
                if splitter.values[source].axis is TimeAxis.NONE and source not in wanted:
                    wanted.add(source)
                    waiting.append(source)
        return [self._operation(name) for name in sorted(wanted, key=position.__getitem__)]

    def _operation(self, name: str) -> Operation:
        splitter = self.splitter
        node = splitter.nodes[name]
        if node.kind is OpKind.CONSTANT:
            return Operation(node, _Attribute(splitter.net, node.target))
        spares = splitter.values[name].effects.writes_operand
        if spares and not splitter.reads_alone(name):
            raise CaptureError(
                f"{name} writes in place into a sequence that other operations may read too; write it out of place",
                where=node.where,
            )
        subject = None if node.kind in (OpKind.FUNCTION, OpKind.METHOD) else splitter.net.get_submodule(node.target)
        moving = {source for source in node.refs if splitter.values[source].axis not in (TimeAxis.NONE, TimeAxis.PLAIN)}
        stepwise = frozenset(moving if name in splitter.captured.by_step else ())
        return Operation(splitter.rules.filled(node), subject, stepwise, spares)

    def _has_effects(self, name: str) -> bool:
        node = self.splitter.nodes[name]
        return node.kind in (OpKind.STATEFUL, OpKind.OPAQUE) or self.splitter.values[name].effects != Effects()

    def _is_read_outside(self, name: str, members: set[str]) -> bool:
        splitter = self.splitter
        if name in refs_in(splitter.output.args):
            return True
        return any(name in node.refs for other, node in splitter.nodes.items() if other not in members)

    def _folded(self, name: str) -> int | None:
        """Rows that each step has in the first axis of a value with time folded into it."""
        known = self.splitter.values[name]
        return known.value.shape[0] // self.splitter.rules.steps if known.axis is TimeAxis.BATCH else None

    def sequence_edges(self) -> list[Edge]:
        """Groups with effects keep their order, and each carries what it keeps to the next sequence."""
        ordered = [name for name in self.sequences if self.leaves[name].kind is OpKind.OPAQUE]
        edges = [Edge(name, name, 1, EdgeKind.STATE) for name in ordered]
        return edges + [Edge(a, b, 0, EdgeKind.ORDER) for a, b in pairwise(ordered)]

    def _resolved(self, ref: Ref) -> Ref:
        return self.alias.get(ref.name, ref)

    def _renamed(self, structure: Any) -> Any:
        return map_refs(structure, self._resolved)

    def _unique(self, wish: str) -> str:
        taken = {*self.splitter.nodes, *(node.name for node in self.nodes), *self.splitter.net._modules}
        return next(name for number in range(len(taken) + 1) if (name := f"{wish}_{number}") not in taken)
