"""Sorts a network in multi-step mode: what works on each step alone, and what needs the whole sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from ..ir import Effects, Node, OpKind, Ref, map_refs, refs_in
from ..torch_private import tree_leaves
from .capture import Captured
from .copies import copy_network
from .hidden_states import RandomState
from .leaves import adapter_of, state_holders, without_hooks
from .sequence_rules import SequenceRules
from .sequence_values import SequenceValue, TimeAxis
from .step_modes import in_multi_step_mode, step_mode_of

_TRIED_STEPS = 3


def _unchanged(value: Any) -> Any:
    """Marks a value without time that the network returns."""
    return value


class Splitter:
    """Sorts the nodes of a traced network into single-step ones and groups that need the whole sequence.

    Args:
        net: The network.
        captured: From `capture_sequence`.
        values: What its nodes yield for all steps.
        steps: T.

    Attributes:
        nodes: All nodes but the output, by name; with those that mark what is returned without time.
        output: The output node, which reads those.
        free: The single-step forms of the nodes that have one.
        rules: Find those forms.
    """

    def __init__(self, net: nn.Module, captured: Captured, values: Mapping[str, SequenceValue], steps: int) -> None:
        self.net = net
        self.captured = captured
        self.values = dict(values)
        self.nodes = {node.name: node for node in captured.graph if node.kind is not OpKind.OUTPUT}
        self.differing: set[str] = set()  # stateful modules that give other bits step by step
        self.output = self._with_results_marked(captured.graph.output)
        self.rules = SequenceRules(net, captured.leaves, captured.by_step, self.values, steps)
        self.free = {name: form for name in self.moving() if (form := self._single_step(self.nodes[name])) is not None}

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

    def moving(self) -> list[str]:
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

    def groups(self) -> list[list[str]]:
        """The nodes that need the whole sequence, in groups that only exchange values whose steps can be told apart."""
        names = self.moving()
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
                if source in bound and not self.can_be_handed_out(source):
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

    def can_be_handed_out(self, name: str) -> bool:
        """Whether the steps of a value can be told apart."""
        known = self.values[name]
        return isinstance(known.value, Tensor) and known.axis in (TimeAxis.FIRST, TimeAxis.BATCH)

    def _sharing_state_with(self, bound: Iterable[str]) -> set[str]:
        """Calls of modules whose state a bound node touches too."""
        held = {id(part) for name in bound for part in self.holders(self.nodes[name])}
        return {
            name for name in self.moving() if not held.isdisjoint(id(part) for part in self.holders(self.nodes[name]))
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


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
