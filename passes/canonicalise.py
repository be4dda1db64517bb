"""One spelling for each operation: sizes become constants, in-place becomes out-of-place, identities go."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..capture import resolve_attribute
from ..errors import CaptureError
from ..ir import (
    Decision,
    KeepsStrides,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    Verdict,
    map_refs,
    refs_in,
    tensor_types,
)
from ..ir.batching_rules import IN_PLACE_OPERATORS, is_known_pure
from .infra import Pass, PassContext, PassResult

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Fold what is not a tensor, make in-place operations out-of-place, drop identities."""

    name: ClassVar[str] = "canonicalise"
    requires: ClassVar[frozenset[str]] = frozenset({"shapes"})
    provides: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        replaced: dict[str, Any] = {}  # name -> what later readers use instead
        nodes: list[Node] = []
        decisions: list[Decision] = []
        memory = _SharedMemory(graph, context)
        for original in graph:
            node = _substituted(original, replaced)
            if (plain := _plain_value(node, graph)) is not None:
                replaced[node.name] = plain.value
                continue
            if _is_identity(node, context):
                replaced[node.name] = node.args[0]
                memory.note_same(original.name, original.args[0].name)
                decisions.append(self.decide(node.name, Verdict.DONE, "does nothing here and was removed"))
                continue
            functional = _out_of_place(node, context)
            if functional is not node and (written := _first(node)) is not None:
                functional = _as_written(functional, graph)
                before = _first(original)
                assert before is not None
                memory.refuse_unseen_write(original, before.name)
                memory.note_same(original.name, before.name)
                # Whoever reads the written tensor from here on reads the result.
                for name in [n for n, value in replaced.items() if value == written]:
                    replaced[name] = Ref(node.name)
                replaced[written.name] = Ref(node.name)
                decisions.append(self.decide(node.name, Verdict.DONE, "written in place; now out of place"))
            nodes += _unpacked(functional, graph) if node.kind is OpKind.OUTPUT else [functional]
        _refuse_shared_writes(nodes, context)
        gone = {node.name for node in graph} - {node.name for node in nodes}
        changed = bool(gone) or any(node.name not in graph or node is not graph[node.name] for node in nodes)
        if not changed:
            return PassResult(graph, False)
        carried = [edge for edge in graph.carried if edge.source not in gone and edge.target not in gone]
        return PassResult(StepGraph(nodes, carried, graph.facts), True, tuple(decisions))


def _substituted(node: Node, replaced: Mapping[str, Any]) -> Node:
    if not any(name in replaced for name in node.refs):
        return node

    def change(ref: Ref) -> Any:
        return replaced.get(ref.name, ref)

    return replace(node, args=map_refs(node.args, change), kwargs=map_refs(dict(node.kwargs), change))


@dataclass(frozen=True)
class _Plain:
    value: Any


def _plain_value(node: Node, graph: StepGraph) -> _Plain | None:
    """What stands for a node that computes no tensor: a size, shape or dtype, or a part of a tuple spelled out."""
    if node.kind is OpKind.OUTPUT or node.value is None:
        return None
    is_operation = node.kind in (OpKind.FUNCTION, OpKind.METHOD)
    if is_operation and _is_pure(node) and (spelled := _spelled_out(node)) is not None:
        return spelled
    if is_operation and _is_pure(node) and not tensor_types(node.value):
        return _Plain(None if node.value == () and type(node.value) is tuple else node.value)
    if (not is_operation or not _is_pure(node)) and _others(node.value) and graph.consumers[node.name]:
        raise CaptureError(
            f"{node.name} returns {_others(node.value)[0]!r}, which may differ from step to step and is no tensor; "
            "return tensors only",
            where=node.where,
        )
    return None


def _is_pure(node: Node) -> bool:
    return node.kind is OpKind.METHOD or is_known_pure(node.target) or _is_named_tuple(node.target)


def _is_named_tuple(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields")


def _spelled_out(node: Node) -> _Plain | None:
    """A named tuple that forward makes, or a part of one, needs no operation of its own."""
    if _is_named_tuple(node.target):
        return _Plain(node.target(*node.args, **node.kwargs))
    is_part = node.target in (operator.getitem, getattr) and isinstance(node.args[0], (tuple, list, dict))
    if is_part and not refs_in(node.args[1:]):
        return _Plain(node.target(*node.args))
    return None


def _others(value: Any) -> list[Any]:
    """The leaves of a value that are neither tensors nor None."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _others(item)]
    return [] if isinstance(value, TensorType) or value is None else [value]


def _is_identity(node: Node, context: PassContext) -> bool:
    if node.kind is not OpKind.MODULE or len(node.args) != 1 or node.kwargs or node.effects.random:
        return False
    module = context.net.get_submodule(node.target)
    return (
        type(module) in _IDENTITIES
        and isinstance(node.args[0], Ref)
        and (isinstance(module, nn.Identity) or not module.training)
    )


def _first(node: Node) -> Ref | None:
    """The argument that an in-place operation writes."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Ref) else None


def _out_of_place(node: Node, context: PassContext) -> Node:
    """The node as one that writes into nothing; the runtime calls in-place modules through out-of-place twins."""
    pure = replace(node.effects, mutates=False, writes_operand=False)
    if node.kind is OpKind.MODULE and node.effects.mutates:
        return (
            replace(node, effects=pure) if getattr(context.net.get_submodule(node.target), "inplace", False) else node
        )
    kwargs = {**node.kwargs, "inplace": False} if node.kwargs.get("inplace") else node.kwargs
    if kwargs is not node.kwargs:
        return replace(node, kwargs=kwargs, effects=pure)
    if node.kind is OpKind.FUNCTION:
        if (functional := IN_PLACE_OPERATORS.get(node.target)) is not None:
            return replace(node, target=functional, effects=pure)
        name = getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and is_known_pure(node.target):
            for home in (torch, F):
                if callable(functional := getattr(home, name[:-1], None)):
                    return replace(node, target=functional, effects=pure)
    if node.kind is OpKind.METHOD and node.target.endswith("_") and not node.target.endswith("__"):
        if not callable(getattr(torch.Tensor, node.target[:-1], None)):
            raise CaptureError(
                f"the in-place method {node.target} has no out-of-place form; write it out of place", where=node.where
            )
        return replace(node, target=node.target[:-1], effects=pure)
    return node


def _as_written(node: Node, graph: StepGraph) -> Node:
    """A result written in place keeps the dtype and strides of what it is written into; out of place it must as well.

    Raises:
        CaptureError: It would have another dtype.
    """
    if node.kind is OpKind.MODULE:
        return node

    def operand(ref: Ref) -> Any:
        value = graph[ref.name].value
        if not isinstance(value, TensorType):
            return value
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")

    args, kwargs = map_refs(node.args, operand), map_refs(dict(node.kwargs), operand)
    function = node.target if node.kind is OpKind.FUNCTION else getattr(torch.Tensor, node.target)
    result = function(*args, **kwargs)
    if result.shape != node.value.shape or result.dtype != node.value.dtype:
        raise CaptureError(
            f"{node.name} writes a result of {result.dtype} in place into one of {node.value.dtype}; "
            "convert it and write it out of place",
            where=node.where,
        )
    if result.stride() != node.value.stride and result.numel() > 0:
        return replace(node, kind=OpKind.FUNCTION, target=KeepsStrides(function))
    return node


class _SharedMemory:
    """Which values of a step share memory, to know what a write in place changes besides its target."""

    def __init__(self, graph: StepGraph, context: PassContext) -> None:
        self._graph = graph
        self._context = context
        self._position = {node.name: index for index, node in enumerate(graph)}
        self._group: dict[str, set[str]] = {}
        self._same: dict[str, str] = {}
        for node in graph:
            group = {node.name}.union(*(self._group[name] for name in node.shares if name in self._group))
            self._group.update(dict.fromkeys(group, group))

    def note_same(self, name: str, as_name: str) -> None:
        """Two names of one and the same tensor, which renaming its readers takes care of."""
        self._same[name] = self._same.get(as_name, as_name)

    def refuse_unseen_write(self, node: Node, written: str) -> None:
        """Refuse what renaming the readers of the written value cannot express.

        Raises:
            CaptureError: The write also changes a state, a static input, or a view that is read afterwards.
        """
        for member in sorted(self._group[written], key=self._position.__getitem__):
            if reason := self._outlives_step(self._graph[member]):
                raise CaptureError(
                    f"{node.name} writes in place into memory of {member}, {reason}; write it out of place",
                    where=node.where,
                )
            if self._position[member] < self._position[node.name] and self._is_read_after(member, node, written):
                raise CaptureError(
                    f"{node.name} writes in place into {written}, and {member}, which shares its memory, is read "
                    "afterwards; write it out of place",
                    where=node.where,
                )

    def _outlives_step(self, node: Node) -> str:
        if node.kind is OpKind.CONSTANT:
            return "which belongs to the network"
        if node.kind is OpKind.INPUT and self._context.options.static_input:
            return "the static input that every later step sees"
        return "which is its state" if node.name in node.shares else ""

    def _is_read_after(self, member: str, node: Node, written: str) -> bool:
        if self._same.get(member, member) == self._same.get(written, written):
            return False
        return any(self._position[reader] > self._position[node.name] for reader in self._graph.consumers[member])


def _refuse_shared_writes(nodes: list[Node], context: PassContext) -> None:
    """An operation that writes into a tensor of the network has no order with others that read the tensor itself."""
    readers: dict[int, list[Node]] = {}
    constants = {node.name: resolve_attribute(context.net, node.target) for node in nodes if _is_constant(node)}
    for node in nodes:
        for name in constants.keys() & set(node.refs):
            readers.setdefault(id(constants[name]), []).append(node)
    for node in nodes:
        if not (node.effects.mutates or node.effects.statistics):
            continue
        written = [constants[name] for name in node.refs if name in constants]
        if node.kind in (OpKind.MODULE, OpKind.OPAQUE):
            written += context.net.get_submodule(node.target).buffers()
        others = [reader for tensor in written for reader in readers.get(id(tensor), []) if reader is not node]
        if others:
            raise CaptureError(
                f"{node.name} writes into a tensor of the network that {others[0].name} reads as well; keep both in a "
                "module with a buffer of its own",
                where=node.where,
            )


def _is_constant(node: Node) -> bool:
    return node.kind is OpKind.CONSTANT


def _unpacked(output: Node, graph: StepGraph) -> list[Node]:
    """The output node behind one node for each tensor that it takes out of a tuple or dict."""
    parts: list[Node] = []

    def unpack(source: Ref, value: Any) -> Any:
        if isinstance(value, TensorType) or not isinstance(value, (tuple, list, Mapping)):
            return source
        keys = list(value) if isinstance(value, Mapping) else range(len(value))
        items: list[Any] = []
        for key in keys:
            if value[key] is None:
                items.append(None)
                continue
            name = f"{source.name}_{key}"
            while name in graph:
                name += "_"
            parts.append(
                Node(name, OpKind.FUNCTION, operator.getitem, (source, key), scope=output.scope, value=value[key])
            )
            items.append(unpack(Ref(name), value[key]))
        if isinstance(value, Mapping):
            return dict(zip(keys, items, strict=True))
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    args = map_refs(output.args, lambda ref: unpack(ref, graph[ref.name].value))
    return [*parts, replace(output, args=args)] if parts else [output]
