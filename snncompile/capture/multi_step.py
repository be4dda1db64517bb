"""A network in multi-step mode as a graph of one step.

What works on each step alone becomes the same operation on one step. The rest is gathered in `SequenceModule`s, which
run on all T steps at once: a network in which nothing can be freed becomes one of them, and still computes what it did.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

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
from ..torch_private import tree_leaves
from .adapter import Leaf
from .capture import Captured, capture_sequence, state_edges
from .copies import copy_network
from .fakes import resolve_attribute
from .hidden_states import RandomState
from .leaves import adapter_of, state_holders, without_hooks
from .sequence_module import Operation, SequenceModule
from .sequence_rules import SequenceRules
from .sequence_values import SequenceValue, TimeAxis, run_sequence
from .step_modes import in_multi_step_mode, step_mode_of

_TRIED_STEPS = 3


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
    values = run_sequence(captured, net, inputs)
    return _Splitter(net, captured, values, inputs[0].shape[0]).split()


def _unchanged(value: Any) -> Any:
    """Marks a value without time that the network returns."""
    return value


@dataclass(frozen=True)
class _Attribute:
    """Looks up a tensor of the network, anew at every call."""

    net: nn.Module
    path: str

    def __call__(self) -> Any:
        return resolve_attribute(self.net, self.path)


class _Splitter:
    """Sorts the nodes of a traced network into single-step ones and groups that need the whole sequence."""

    def __init__(self, net: nn.Module, captured: Captured, values: Mapping[str, SequenceValue], steps: int) -> None:
        self.net = net
        self.captured = captured
        self.values = dict(values)
        self.nodes = {node.name: node for node in captured.graph if node.kind is not OpKind.OUTPUT}
        self.differing: set[str] = set()  # stateful modules that give other bits step by step
        self.output = self._with_results_marked(captured.graph.output)
        self.rules = SequenceRules(net, captured.leaves, captured.by_step, self.values, steps)
        self.free = {name: form for name in self._moving() if (form := self._single_step(self.nodes[name])) is not None}

    def _with_results_marked(self, output: Node) -> Node:
        """The output node, with what it returns without time, or with time folded, read through a node of its own."""

        def mark(ref: Ref) -> Ref:
            known = self.values[ref.name]
            if known.axis in (TimeAxis.FIRST, TimeAxis.PLAIN):
                return ref
            name = f"{ref.name}_result"
            self.nodes[name] = Node(name, OpKind.FUNCTION, _unchanged, args=(ref,))
            self.values[name] = SequenceValue(known.value, TimeAxis.MIXED, Effects())
            return Ref(name)

        return replace(output, args=map_refs(output.args, mark))

    def _moving(self) -> list[str]:
        """Names of the nodes to sort: all that yield tensors."""
        return [name for name in self.nodes if self.values[name].axis is not TimeAxis.PLAIN]

    def _single_step(self, node: Node) -> Node | Ref | None:
        if node.kind in (OpKind.INPUT, OpKind.CONSTANT):
            return node
        form = self.rules.single_step(node)
        if form is None or node.kind is not OpKind.STATEFUL or node.name in self.captured.by_step:
            return form
        if self._scans_alike(node):
            return form
        self.differing.add(node.name)
        return None

    def _scans_alike(self, node: Node) -> bool:
        """Whether a stateful module gives the same bits step by step as for a sequence, on a short random one."""
        module = self.net.get_submodule(node.target)
        if not in_multi_step_mode(module):
            return False
        steps = min(_TRIED_STEPS, self.rules.steps)
        generator = torch.Generator().manual_seed(0)
        operands = []
        for name in node.refs:
            leaf = self.values[name].value
            drawn = torch.rand((steps, *leaf.shape[1:]), generator=generator, dtype=torch.float32)
            operands.append((2.0 * drawn).to(device=leaf.device, dtype=leaf.dtype))
        whole, alone = (without_hooks(copy_network(module, {})) for _ in range(2))
        random = RandomState()
        try:
            with torch.no_grad():
                for twin in (whole, alone):
                    adapter = adapter_of(twin)
                    adapter.write(twin, adapter.reset_values(twin))
                expected = [whole(*operands), adapter_of(whole).read(whole)]
                random.restore()
                with step_mode_of(alone.modules(), "s"):
                    outputs = [alone(*(operand[step] for operand in operands)) for step in range(steps)]
                stacked = [torch.stack(c) for c in zip(*(tree_leaves(output) for output in outputs), strict=True)]
                got = [stacked, adapter_of(alone).read(alone)]
        except Exception:  # whatever a module raises that has no single-step form is a reason not to use one
            return False
        finally:
            random.restore()
        pairs = zip(tree_leaves(expected), tree_leaves(got), strict=False)
        return len(tree_leaves(expected)) == len(tree_leaves(got)) and all(_equal(a, b) for a, b in pairs)

    def split(self) -> tuple[Captured, nn.Module]:
        groups = self._groups()
        group_of = {name: number for number, group in enumerate(groups) for name in group}
        emitter = _Emitter(self, groups, group_of)
        nodes, sequences = emitter.emit()
        home = SequenceNetwork(self.net, sequences) if sequences else self.net
        edges = state_edges(home, [node for node in nodes if node.target not in sequences])
        graph = StepGraph(nodes, [*edges, *emitter.sequence_edges()])
        verify_graph(graph)
        leaves = {**self.captured.leaves, **emitter.leaves}
        decisions = tuple(
            Decision("capture", name, Verdict.NOTE, f"runs on all {self.rules.steps} steps at once: {reason}")
            for name, reason in emitter.reasons.items()
        )
        return Captured(graph, leaves, self.captured.traced, decisions), home

    def _groups(self) -> list[list[str]]:
        """The nodes that need the whole sequence, in groups that only exchange values whose steps can be told apart."""
        names = self._moving()
        bound = {name for name in names if name not in self.free}
        dependence: nx.DiGraph[str] = nx.DiGraph()
        dependence.add_nodes_from(names)
        together: nx.Graph[str] = nx.Graph()
        for name in names:
            for source in self.nodes[name].refs:
                if self.values[source].axis in (TimeAxis.PLAIN, TimeAxis.NONE) and source not in bound:
                    continue
                if source not in self.nodes or self.values[source].axis is TimeAxis.PLAIN:
                    continue
                dependence.add_edge(source, name)
                if source in bound and not self._can_be_handed_out(source):
                    bound.add(name)
                    together.add_edge(source, name)
        bound |= self._sharing_state_with(bound)
        together.add_nodes_from(bound)
        # What lies on a way from a group back into it belongs to it.
        while True:
            groups = list(nx.connected_components(together))
            number = {name: n for n, group in enumerate(groups) for name in group}
            contracted: nx.DiGraph[Any] = nx.DiGraph()
            contracted.add_nodes_from(number.get(name, name) for name in names)
            contracted.add_edges_from((number.get(a, a), number.get(b, b)) for a, b in dependence.edges)
            contracted.remove_edges_from(list(nx.selfloop_edges(contracted)))
            cycles = [component for component in nx.strongly_connected_components(contracted) if len(component) > 1]
            if not cycles:
                position = {name: index for index, name in enumerate(names)}
                ordered = [sorted(group, key=position.__getitem__) for group in groups]
                return sorted(ordered, key=lambda group: position[group[0]])
            for cycle in cycles:
                members = [name for part in cycle for name in (groups[part] if isinstance(part, int) else [part])]
                nx.add_path(together, members)

    def _can_be_handed_out(self, name: str) -> bool:
        known = self.values[name]
        return isinstance(known.value, Tensor) and known.axis in (TimeAxis.FIRST, TimeAxis.BATCH)

    def _sharing_state_with(self, bound: Iterable[str]) -> set[str]:
        """Calls of modules whose state a bound node touches too."""
        held = {id(part) for name in bound for part in self.holders(self.nodes[name])}
        return {
            name for name in self._moving() if not held.isdisjoint(id(part) for part in self.holders(self.nodes[name]))
        }

    def why_bound(self, name: str) -> str:
        """What ties a node to the whole sequence; empty where only its neighbours do."""
        node, effects = self.nodes[name], self.values[name].effects
        follows = any(self.values[source].axis is TimeAxis.MIXED for source in node.refs)
        if name in self.free or node.target is _unchanged or follows:
            return ""
        if node.kind in (OpKind.FUNCTION, OpKind.METHOD):
            return f"{name} has no single-step form" + (f" in {node.scope}" if node.scope else "")
        cls = type(self.net.get_submodule(node.target)).__name__
        which = f"{node.target} ({cls})" if node.target else cls
        if effects.statistics:
            return f"{which} normalises by the statistics of all steps"
        if effects.random:
            return f"{which} draws its random numbers for all steps"
        if name in self.differing:
            return f"{which} gives other bits, or nothing, step by step"
        return f"{which}: {self.captured.leaves[node.target].reason or 'it has no single-step form'}"

    def reads_alone(self, name: str) -> bool:
        """Whether nobody but a node, the caller of the network included, can see what it writes into its operands."""
        readers = [
            reader for node in (*self.nodes.values(), self.output) for reader in set(refs_in((node.args, node.kwargs)))
        ]
        return all(
            readers.count(source) == 1 and self.nodes[source].kind in (OpKind.MODULE, OpKind.STATEFUL)
            for source in self.nodes[name].refs
        )

    def holders(self, node: Node) -> list[nn.Module]:
        """The modules whose state a node touches."""
        if node.kind not in (OpKind.STATEFUL, OpKind.OPAQUE):
            return []
        return state_holders(self.net.get_submodule(node.target))


class _Emitter:
    """Writes the graph of one step: free nodes, and one node for each group."""

    def __init__(self, splitter: _Splitter, groups: list[list[str]], group_of: Mapping[str, int]) -> None:
        self.splitter = splitter
        self.groups = groups
        self.group_of = group_of
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
        self.nodes.append(replace(output, args=self._renamed(map_refs(output.args, self._plain))))
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
        for name in splitter._moving():
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
        results.sort(key=lambda name: not splitter._can_be_handed_out(name))  # those without time last
        timeless = sum(not splitter._can_be_handed_out(name) for name in results)
        module = SequenceModule(
            operations,
            [(n, self._folded(n)) for n in operands],
            [(n, self._folded(n) if splitter._can_be_handed_out(n) else None) for n in results],
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
        filled = replace(node, args=map_refs(node.args, self._plain), kwargs=map_refs(dict(node.kwargs), self._plain))
        return Operation(filled, subject, name in splitter.captured.by_step, spares)

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

    def _plain(self, ref: Ref) -> Any:
        known = self.splitter.values[ref.name]
        return known.value if known.axis is TimeAxis.PLAIN else ref

    def _resolved(self, ref: Ref) -> Ref:
        return self.alias.get(ref.name, ref)

    def _renamed(self, structure: Any) -> Any:
        return map_refs(structure, self._resolved)

    def _unique(self, wish: str) -> str:
        taken = {*self.splitter.nodes, *(node.name for node in self.nodes), *self.splitter.net._modules}
        return next(name for number in range(len(taken) + 1) if (name := f"{wish}_{number}") not in taken)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
