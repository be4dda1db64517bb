"""Says of every node how it is tied to time, and how it may take several steps at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..errors import CaptureError
from ..ir import (
    MODULE_KINDS,
    Batching,
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
    refs_in,
    tensor_types,
)
from ..ir.batching_rules import (
    DIM_RULES,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_METHODS,
    ELEMENTWISE_MODULES,
    EXACT_EXPONENTS,
    FOLD_FUNCTIONS,
    FOLD_MODULES,
    JOIN_NAMES,
    ROUNDS_BY_POSITION,
    SHAPE_NAMES,
    is_known_pure,
    shift_name,
)
from ..ir.step_statistics import BATCH_NORMS, BatchNorm, fold_channels_obstacle
from .infra import Pass, PassContext, PassResult

_JOINS_NOTHING = (Batching.PER_STEP, Batching.SCAN, Batching.WHOLE)  # so that nothing can be joined wrongly


@dataclass(frozen=True)
class MarkTimeCoupling(Pass):
    """Give each node its time coupling and batching; chain what must keep its order."""

    name: ClassVar[str] = "mark-time-coupling"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "no-dead-nodes", "shapes"})
    provides: ClassVar[frozenset[str]] = frozenset({"coupling"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        if "coupling" in graph.facts:
            return PassResult(graph, False)
        weights = _constant_values(graph)
        decisions: list[Decision] = []
        marked: dict[str, Node] = {}
        carried = list(graph.carried)
        # What is computed from weights alone is there once, not once a step.
        tried = graph.with_nodes({name: replace(graph[name], invariant=True) for name in weights})
        for node in graph.scheduled:
            coupling, reason = _coupling(node, graph, context)
            batching, why = _batching(node, coupling, graph, weights, context)
            marked[node.name] = candidate = replace(node, coupling=coupling, batching=batching, reason=reason)
            is_tried = batching not in _JOINS_NOTHING and node.name not in weights
            if is_tried and (error := context.probe.batching_error(tried, candidate)):
                why = f"run over a chunk as {batching.value} it gives another result: {error}"
                marked[node.name] = replace(candidate, batching=Batching.PER_STEP)
            if reason := why or reason:
                decisions.append(self.decide(node.where, Verdict.NOTE, reason))
        chains = [[node for node in marked.values() if _is_ordered(node, context)], *_shared_statistics(marked)]
        for order in (chain for nodes in chains if (chain := _order_edges(nodes))):
            carried += order
            names = ", ".join(dict.fromkeys(edge.target for edge in order))
            reason = f"{names} keep their order at every step, and so does all that lies between them"
            decisions.append(self.decide("", Verdict.NOTE, reason))
        return PassResult(graph.with_nodes(marked, carried=carried), True, tuple(decisions))


def _coupling(node: Node, graph: StepGraph, context: PassContext) -> tuple[TimeCoupling, str]:
    """The coupling, and a reason where it keeps the node from being batched."""
    if _needs_whole_sequence(node, graph, context):
        return TimeCoupling.SEQUENCE, ""
    if node.effects.writes_operand:
        raise CaptureError(
            f"{node.name} writes in place into a value it reads, which other operations may read too; "
            "write it out of place",
            where=node.where,
        )
    if node.effects.random:
        return TimeCoupling.RANDOM, "it draws random numbers at each step, in order"
    if node.kind in (OpKind.STATEFUL, OpKind.LOAD, OpKind.STORE):
        return TimeCoupling.STATEFUL, ""
    if node.kind is OpKind.OPAQUE:
        leaf = context.leaves[node.target]
        return (TimeCoupling.UNKNOWN if leaf.ordered else TimeCoupling.STATEFUL), leaf.reason
    if _normalises_each_image(node, context):
        return TimeCoupling.POINTWISE, ""
    if node.effects.statistics:
        return TimeCoupling.STEP_STATISTICS, "batch norm in train mode sees the statistics of one step at a time"
    if node.effects.mutates:
        return TimeCoupling.UNKNOWN, "it writes into its buffers"
    if node.kind is OpKind.FUNCTION and not is_known_pure(node.target):
        return TimeCoupling.UNKNOWN, "an unknown function, kept in order"
    return TimeCoupling.POINTWISE, ""


def _needs_whole_sequence(node: Node, graph: StepGraph, context: PassContext) -> bool:
    """Whether a node takes all T steps at once; so does what takes its result apart."""
    if node.kind in MODULE_KINDS:
        return context.leaves[node.target].whole
    return _selects_from_tuple(node, graph) and _needs_whole_sequence(graph[node.args[0].name], graph, context)


def _normalises_each_image(node: Node, context: PassContext) -> bool:
    """Instance norm without running statistics: torch computes it as a batch norm of single images."""
    if node.kind is not OpKind.MODULE or node.effects.mutates:
        return False
    return context.leaves[node.target].acts_like in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _is_ordered(node: Node, context: PassContext) -> bool:
    return node.coupling is not None and node.coupling.is_ordered


def _shared_statistics(nodes: Mapping[str, Node]) -> list[list[Node]]:
    """The calls of each batch norm in train mode: they update its running statistics in order."""
    calls: dict[str, list[Node]] = {}
    for node in nodes.values():
        if node.kind is OpKind.MODULE and node.coupling is TimeCoupling.STEP_STATISTICS:
            calls.setdefault(node.target, []).append(node)
    return list(calls.values())


def _order_edges(nodes: list[Node]) -> list[Edge]:
    """A chain within the step, closed by a delay of 1: together a cycle, and so a recurrent region."""
    if len(nodes) < 2:
        return []
    names = [node.name for node in nodes]
    chain = [Edge(a, b, 0, EdgeKind.ORDER) for a, b in pairwise(names)]
    return [*chain, Edge(names[-1], names[0], 1, EdgeKind.ORDER)]


def _is_pure(node: Node) -> bool:
    return node.kind is OpKind.METHOD or is_known_pure(node.target)


def _constant_values(graph: StepGraph) -> frozenset[str]:
    """Nodes computed from parameters and buffers alone."""
    constant: set[str] = set()
    for node in graph:
        pure = node.kind in (OpKind.FUNCTION, OpKind.METHOD) and node.effects == Effects() and _is_pure(node)
        if node.kind is OpKind.CONSTANT or (pure and constant.issuperset(node.refs)):
            constant.add(node.name)
    return frozenset(constant)


def _batching(
    node: Node, coupling: TimeCoupling, graph: StepGraph, weights: frozenset[str], context: PassContext
) -> tuple[Batching, str]:
    """The batching, and a reason where a node runs one call a step although others of its coupling do not."""
    if coupling is TimeCoupling.SEQUENCE:
        return Batching.WHOLE, ""
    if node.kind is OpKind.STATEFUL:
        return Batching.SCAN, ""
    if coupling is TimeCoupling.STEP_STATISTICS:
        return _statistics_batching(node, graph, context)
    if coupling is not TimeCoupling.POINTWISE:
        return Batching.PER_STEP, ""
    types = {name: tensor_types(graph[name].value) for name in node.refs}
    if node.kind is OpKind.MODULE:
        found = _module_batching(node, types, context)
    elif _selects_from_tuple(node, graph):
        found = Batching.SELECT
    else:
        found = _operation_batching(node, types, weights)
    if found is Batching.ELEMENTWISE and not context.options.reassociate and _rounds_by_position(node, context):
        return Batching.PER_STEP, "over a chunk its kernel rounds differently than step by step"
    if found is None:
        return Batching.PER_STEP, "no rule says how it takes several steps at once, so it runs one call a step"
    return found, ""


def _statistics_batching(node: Node, graph: StepGraph, context: PassContext) -> tuple[Batching, str]:
    """The batching of what normalises by the statistics of each step, and what that comes to."""
    if node.kind is not OpKind.MODULE or context.leaves[node.target].acts_like not in BATCH_NORMS:
        return Batching.PER_STEP, ""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Ref):
        return Batching.PER_STEP, ""
    norm = cast(BatchNorm, context.net.get_submodule(node.target))
    if obstacle := fold_channels_obstacle(norm, tensor_types(graph[node.args[0].name].value)[0]):
        return Batching.PER_STEP, f"statistics of each step, one call a step: {obstacle}"
    return Batching.FOLD_CHANNELS, "statistics of each step, computed for the whole chunk at once"


def _rounds_by_position(node: Node, context: PassContext) -> bool:
    operation = context.leaves[node.target].acts_like if node.kind is OpKind.MODULE else node.target
    if operation in (operator.pow, torch.pow, "pow") and len(node.args) == 2 and not isinstance(node.args[1], Ref):
        return node.args[1] not in EXACT_EXPONENTS
    return operation in ROUNDS_BY_POSITION


def _module_batching(node: Node, types: dict[str, list[TensorType]], context: PassContext) -> Batching | None:
    cls = context.leaves[node.target].acts_like
    module = context.net.get_submodule(node.target)
    if cls is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Ref):
        return None
    rank = len(types[node.args[0].name][0].shape)
    if cls in ELEMENTWISE_MODULES:
        return Batching.ELEMENTWISE
    if cls is nn.Flatten:
        return Batching.FOLD if isinstance(module, nn.Flatten) and _keeps_batch(module, rank) else None
    if cls is nn.Softmax or cls is nn.LogSoftmax:
        dim = getattr(module, "dim", None)
        # Over the last dimension each row is alone; over another, rows share vectors; that rounds differently.
        return Batching.FOLD if isinstance(dim, int) and rank > 1 and dim % rank == rank - 1 else None
    return _fold(FOLD_MODULES.get(cls), rank)


def _keeps_batch(module: nn.Flatten, rank: int) -> bool:
    return module.start_dim % rank != 0 and module.end_dim % rank != 0


def _fold(batched_rank: int | None, rank: int) -> Batching | None:
    """Time may join the batch, or be the batch where the step's input has none."""
    if batched_rank is None:
        return None
    if batched_rank == rank or (batched_rank == 0 and rank >= 2):
        return Batching.FOLD
    return Batching.ELEMENTWISE if batched_rank == rank + 1 else None


def _selects_from_tuple(node: Node, graph: StepGraph) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], Ref) or not isinstance(node.args[1], int):
        return False
    return isinstance(graph[node.args[0].name].value, (tuple, list))


def _operation_batching(node: Node, types: dict[str, list[TensorType]], weights: frozenset[str]) -> Batching | None:
    if node.target in (FOLD_FUNCTIONS if node.kind is OpKind.FUNCTION else ()):
        first = node.args[0] if node.args else None
        others = set(refs_in((node.args[1:], node.kwargs)))
        if not isinstance(first, Ref) or not others <= weights or first.name in others:
            return None
        return _fold(FOLD_FUNCTIONS[node.target], len(types[first.name][0].shape))
    known = ELEMENTWISE_FUNCTIONS if node.kind is OpKind.FUNCTION else ELEMENTWISE_METHODS
    if node.target in known:
        return Batching.ELEMENTWISE
    if node.target is operator.getitem:
        return Batching.SHIFT_DIMS if _is_basic_index(node.args[1]) else None
    name = shift_name(node.target)
    return Batching.SHIFT_DIMS if name is not None and _SHIFTABLE[_family(name)](node, name, types) else None


def _is_basic_index(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or (type(item) is int) or _plain_slice(item) for item in items)


def _plain_slice(item: Any) -> bool:
    return isinstance(item, slice) and not refs_in(item)


def _family(name: str) -> str:
    return "shape" if name in SHAPE_NAMES else "join" if name in JOIN_NAMES else "dims"


def _dims_shiftable(node: Node, name: str, types: dict[str, list[TensorType]]) -> bool:
    """One tensor, and every dimension given as a number."""
    rule = DIM_RULES[name]
    given = dict(zip(rule.parameters, node.args[1:], strict=False)) | dict(node.kwargs)
    if not node.args or not isinstance(node.args[0], Ref) or len(node.refs) != 1:
        return False
    if len(node.args) - 1 > len(rule.parameters):
        return False
    dims = [given[key] for key in rule.dims if key in given]
    if name in ("softmax", "log_softmax"):
        return bool(dims) and type(dims[0]) is int and dims[0] in (-1, len(types[node.refs[0]][0].shape) - 1)
    if rule.required and not dims:
        return False
    return all(_is_dims(dim) for dim in dims)


def _is_dims(value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return len(items) > 0 and all(type(item) is int for item in items)


def _shape_shiftable(node: Node, name: str, types: dict[str, list[TensorType]]) -> bool:
    """One tensor and a whole list of numbers; `expand` may not add dimensions."""
    if node.kwargs or not node.args or not isinstance(node.args[0], Ref) or len(node.refs) != 1:
        return False
    numbers = whole_list(node.args[1:])
    rank = len(types[node.args[0].name][0].shape)
    return all(type(number) is int for number in numbers) and (name != "expand" or len(numbers) == rank)


def _join_shiftable(node: Node, name: str, types: dict[str, list[TensorType]]) -> bool:
    """A list of tensors that all change over time; hoisting comes later, so constants are told by rank-0 refs."""
    tensors = node.args[0] if node.args else None
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(item, Ref) for item in tensors):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return type(dim) is int and len(node.args) <= 2 and set(node.kwargs) <= {"dim"}


def whole_list(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`view(2, 3)` and `view((2, 3))` alike."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args


_Check = Callable[[Node, str, dict[str, list[TensorType]]], bool]
_SHIFTABLE: dict[str, _Check] = {"shape": _shape_shiftable, "join": _join_shiftable, "dims": _dims_shiftable}
