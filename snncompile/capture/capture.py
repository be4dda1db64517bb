"""From an fx trace to a folded graph: names, kinds, and the state edges that time adds."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..ir import Decision, Edge, EdgeKind, Node, OpKind, Ref, StepGraph, TensorType, Verdict, verify_graph
from .adapter import Leaf
from .fakes import FakeNetwork
from .known_values import KnownValues
from .leaves import state_holders
from .sequence_trace import SequenceTracer
from .tracer import ROOT, StepTracer, load_register, store_register, strip_root, trace_step


@dataclass(frozen=True)
class Captured:
    """One step of a network as a graph.

    Attributes:
        graph: The folded graph, shapes unknown.
        leaves: Qualified name -> treatment of each leaf module.
        traced: Qualified names of the modules whose forward was traced through.
        decisions: What a user should know about the capture.
        by_step: Of a network in multi-step mode: the nodes whose values are those of one step, unlike all others.
    """

    graph: StepGraph
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    traced: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    by_step: frozenset[str] = frozenset()

    @property
    def registers(self) -> frozenset[str]:
        """Dotted paths of the attributes that carry a tensor from step to step."""
        return frozenset(node.target for node in self.graph if node.kind in (OpKind.LOAD, OpKind.STORE))

    def registers_of(self, owner: str) -> frozenset[str]:
        """Names of those attributes of one module."""
        split = (path.rpartition(".") for path in self.registers)
        return frozenset(attribute for module, _, attribute in split if module == owner)


def capture(
    net: nn.Module,
    rejected: frozenset[str] = frozenset(),
    forced: Mapping[str, Leaf] = MappingProxyType({}),
    inputs: tuple[TensorType, ...] | None = None,
    fakes: FakeNetwork | None = None,
) -> Captured:
    """Trace one step of a network of single-step modules.

    Args:
        net: The network.
        rejected: Dotted paths of attributes that must not become registers.
        forced: Qualified names of modules to keep as they are, and how.
        inputs: Types of one step `[N, *]` of each input, if they are known: a forward may branch on shapes then.
        fakes: A twin of the network, if there is one already; it stays as it is.

    Raises:
        CaptureError: The network cannot be traced.
    """
    known = None if inputs is None else KnownValues(FakeNetwork(net) if fakes is None else fakes.copy(), inputs)
    fx_graph, tracer = trace_step(net, rejected, forced, known)
    graph, _ = _converted(net, fx_graph, tracer)
    decisions = [
        Decision("capture", name, Verdict.NOTE, f"kept as it is and run step by step: {leaf.reason}")
        for name, leaf in sorted(tracer.leaves.items())
        if leaf.kind is OpKind.OPAQUE
    ]
    return Captured(graph, dict(tracer.leaves), tuple(dict.fromkeys(tracer.traced)), tuple(decisions))


def capture_sequence(net: nn.Module, inputs: tuple[TensorType, ...] | None = None) -> Captured:
    """Trace one call of a network in multi-step mode, which takes `[T, N, *]`; the graph's values are of all steps.

    Args:
        net: The network.
        inputs: Types of the sequences, if they are known.

    Raises:
        CaptureError: The network computes something else at every call.
    """
    known = None if inputs is None else KnownValues(FakeNetwork(net), inputs)
    fx_graph, tracer = trace_step(net, known=known, tracer_class=SequenceTracer)
    graph, by_step = _converted(net, fx_graph, tracer)
    return Captured(graph, dict(tracer.leaves), tuple(dict.fromkeys(tracer.traced)), by_step=by_step)


def _converted(net: nn.Module, fx_graph: fx.Graph, tracer: StepTracer) -> tuple[StepGraph, frozenset[str]]:
    """The graph of a trace, and its nodes that were marked as of one step."""
    converter = _Converter(net, tracer)
    nodes = converter.convert(fx_graph)
    graph = StepGraph(nodes, state_edges(net, nodes))
    verify_graph(graph)
    return graph, frozenset(converter.names[node.name] for node in fx_graph.nodes if node.meta.get("by_step"))


class _Converter:
    """Turns fx nodes into graph nodes under readable, unique names."""

    def __init__(self, net: nn.Module, tracer: StepTracer) -> None:
        self._net = net
        self._root = tracer.root
        self._leaves = tracer.leaves
        self.names: dict[str, str] = {}  # fx name -> name in the graph
        self._taken: set[str] = set()

    def convert(self, fx_graph: fx.Graph) -> list[Node]:
        nodes = []
        inputs = 0
        for fx_node in fx_graph.nodes:
            node = self._node(fx_node, inputs)
            inputs += node.kind is OpKind.INPUT
            nodes.append(node)
        return nodes

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
        self.names[fx_node.name] = name
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
            return Ref(self.names[structure.name])
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


def state_edges(net: nn.Module, nodes: Sequence[Node]) -> list[Edge]:
    """Calls that touch the same state, in program order: a chain within the step, closed by a delay of 1."""
    calls: dict[int, list[str]] = {}
    registers: dict[str, list[str]] = {}
    for node in nodes:
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE):
            for module in state_holders(net.get_submodule(node.target)):
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
