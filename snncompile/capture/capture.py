"""From an fx trace to a folded graph: names, kinds, and the state edges that time adds."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..ir import Decision, Edge, EdgeKind, Node, OpKind, Ref, StepGraph, Verdict, verify_graph
from .adapter import Leaf
from .leaves import state_holders
from .tracer import ROOT, StepTracer, load_register, store_register, strip_root, trace_step


@dataclass(frozen=True)
class Captured:
    """One step of a network as a graph.

    Attributes:
        graph: The folded graph, shapes unknown.
        leaves: Qualified name -> treatment of each leaf module.
        traced: Qualified names of the modules whose forward was traced through.
        decisions: What a user should know about the capture.
    """

    graph: StepGraph
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    traced: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

    @property
    def registers(self) -> frozenset[str]:
        """Dotted paths of the attributes that carry a tensor from step to step."""
        return frozenset(node.target for node in self.graph if node.kind in (OpKind.LOAD, OpKind.STORE))

    def registers_of(self, owner: str) -> frozenset[str]:
        """Names of those attributes of one module."""
        split = (path.rpartition(".") for path in self.registers)
        return frozenset(attribute for module, _, attribute in split if module == owner)


def capture(net: nn.Module, rejected: frozenset[str] = frozenset()) -> Captured:
    """Trace one step of a network of single-step modules.

    Args:
        net: The network.
        rejected: Dotted paths of attributes that must not become registers.

    Raises:
        CaptureError: The network cannot be traced, or contains modules that have no single-step form.
    """
    fx_graph, tracer = trace_step(net, rejected)
    nodes, carried = _Converter(net, tracer).convert(fx_graph)
    graph = StepGraph(nodes, carried)
    verify_graph(graph)
    decisions = [
        Decision("capture", name, Verdict.NOTE, f"kept as it is and run step by step: {leaf.reason}")
        for name, leaf in sorted(tracer.leaves.items())
        if leaf.kind is OpKind.OPAQUE
    ]
    return Captured(graph, dict(tracer.leaves), tuple(dict.fromkeys(tracer.traced)), tuple(decisions))


class _Converter:
    """Turns fx nodes into graph nodes under readable, unique names."""

    def __init__(self, net: nn.Module, tracer: StepTracer) -> None:
        self._net = net
        self._root = tracer.root
        self._leaves = tracer.leaves
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def convert(self, fx_graph: fx.Graph) -> tuple[list[Node], list[Edge]]:
        nodes = []
        inputs = 0
        for fx_node in fx_graph.nodes:
            node = self._node(fx_node, inputs)
            inputs += node.kind is OpKind.INPUT
            nodes.append(node)
        return nodes, self._state_edges(nodes)

    def _node(self, fx_node: fx.Node, inputs: int) -> Node:
        kind, target = self._kind_and_target(fx_node, inputs)
        if kind is OpKind.STATEFUL and fx_node.kwargs:
            raise CaptureError(
                f"a stateful module is called with keyword arguments {', '.join(fx_node.kwargs)}; "
                "pass them by position",
                where=target,
            )
        args = fx_node.args
        if kind in (OpKind.LOAD, OpKind.STORE):
            args = args[1:]
        if kind is OpKind.CONSTANT and (made := getattr(self._root, str(fx_node.target), None)) is not None:
            # The root holds tensors that forward made while it was traced, under names that the network does not know.
            kind, target, args = OpKind.FUNCTION, torch.clone, (self._literal(made, fx_node),)
        name = self._unique(self._wish(fx_node, target))
        self._names[fx_node.name] = name
        return Node(
            name,
            kind,
            target,
            args=self._arguments(args),
            kwargs=self._arguments(dict(fx_node.kwargs)),
            scope=fx_node.meta.get("scope", ""),
        )

    def _kind_and_target(self, fx_node: fx.Node, inputs: int) -> tuple[OpKind, Any]:
        if fx_node.op == "placeholder":
            return OpKind.INPUT, inputs
        if fx_node.op == "output":
            return OpKind.OUTPUT, None
        if fx_node.target is load_register:
            return OpKind.LOAD, fx_node.args[0]
        if fx_node.target is store_register:
            return OpKind.STORE, fx_node.args[0]
        if fx_node.op == "call_function":
            return OpKind.FUNCTION, fx_node.target
        if fx_node.op == "call_method":
            return OpKind.METHOD, fx_node.target
        target = strip_root(str(fx_node.target))
        if fx_node.op == "get_attr":
            return OpKind.CONSTANT, target
        return self._leaves[target].kind, target

    def _literal(self, made: Tensor, fx_node: fx.Node) -> Tensor:
        """A tensor that forward makes of nothing but Python values: the same at every step."""
        if made.requires_grad:
            raise CaptureError(
                "forward computes with a trainable tensor that is not registered, so that its value at this moment "
                "would be frozen; register it as an nn.Parameter",
                where=fx_node.meta.get("scope") or None,
            )
        return made

    def _wish(self, fx_node: fx.Node, target: Any) -> str:
        if fx_node.op in ("placeholder", "output") or target is torch.clone:
            return fx_node.name
        if fx_node.target in (load_register, store_register):
            path = str(target).replace(".", "_")
            return path if fx_node.target is load_register else f"next_{path}"
        if fx_node.op == "call_function":
            return str(getattr(target, "__name__", "call")).strip("_")
        if fx_node.op == "call_method":
            return str(target).strip("_")
        path = str(target).replace(".", "_")
        if fx_node.op == "call_module" and (not path or path[0].isdigit()):
            cls = type(self._net.get_submodule(str(target))).__name__.lower()
            return f"{cls}_{path}" if path else cls
        return path if path and not path[0].isdigit() else f"constant_{path}"

    def _unique(self, wish: str) -> str:
        clean = "".join(char if f"a{char}".isidentifier() else "_" for char in wish) or "value"
        if keyword.iskeyword(clean) or not clean.isidentifier():
            clean = f"value_{clean}"
        name, number = clean, 1
        while name in self._taken:
            name, number = f"{clean}_{number}", number + 1
        self._taken.add(name)
        return name

    def _arguments(self, structure: Any) -> Any:
        """References for nodes, and plain lists and dicts for the immutable ones of fx."""
        if isinstance(structure, fx.Node):
            return Ref(self._names[structure.name])
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return type(structure)(*(self._arguments(item) for item in structure))
        if isinstance(structure, tuple):
            return tuple(self._arguments(item) for item in structure)
        if isinstance(structure, list):
            return [self._arguments(item) for item in structure]
        if isinstance(structure, dict):
            return {key: self._arguments(item) for key, item in structure.items()}
        if isinstance(structure, slice):
            return slice(*(self._arguments(item) for item in (structure.start, structure.stop, structure.step)))
        return structure

    def _state_edges(self, nodes: list[Node]) -> list[Edge]:
        """Calls that touch the same state, in program order: a chain within the step, closed by a delay of 1."""
        calls: dict[int, list[str]] = {}
        registers: dict[str, list[str]] = {}
        for node in nodes:
            if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE):
                for module in state_holders(self._net.get_submodule(node.target)):
                    calls.setdefault(id(module), []).append(node.name)
        for node in nodes:
            if node.kind in (OpKind.LOAD, OpKind.STORE):
                registers.setdefault(node.target, []).append(node.name)
        edges: dict[Edge, None] = {}
        for names in (*calls.values(), *(names for names in registers.values() if len(names) > 1)):
            for earlier, later in pairwise(names):
                edges[Edge(earlier, later, 0, EdgeKind.STATE)] = None
            edges[Edge(names[-1], names[0], 1, EdgeKind.STATE)] = None
        return list(edges)


def check_output(graph: StepGraph) -> None:
    """A step must return tensors that depend on the network, in tuples, lists or dicts.

    Raises:
        CaptureError: Something else is returned.
    """
    for leaf in _leaves(graph.output.args[0]):
        if not isinstance(leaf, Ref):
            raise CaptureError(
                f"one step returns {leaf!r}; expected tensors, or tuples, lists and dicts of tensors", where=ROOT
            )


def _leaves(structure: Any) -> list[Any]:
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    if isinstance(structure, (tuple, list)):
        return [leaf for item in structure for leaf in _leaves(item)]
    return [structure]
