"""One spelling for each operation: sizes become constants, in-place becomes out-of-place, identities go."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import CaptureError
from ..ir import Decision, Node, OpKind, Ref, StepGraph, Verdict, map_refs, tensor_types
from .infra import Pass, PassContext, PassResult

_IN_PLACE_OPERATORS: Mapping[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_VIEW_NAMES = """
    view reshape flatten unflatten squeeze unsqueeze transpose permute expand chunk split narrow select getitem
    detach contiguous to view_as T swapaxes movedim
""".split()  # noqa: SIM905


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
        for original in graph:
            node = _substituted(original, replaced)
            if _is_plain_value(node):
                replaced[node.name] = node.value
                continue
            if _is_identity(node, context):
                replaced[node.name] = node.args[0]
                decisions.append(self.decide(node.name, Verdict.DONE, "does nothing here and was removed"))
                continue
            functional = _out_of_place(node, context)
            if functional is not node and isinstance(node.args[0], Ref):
                _refuse_written_view(graph, original)
                # Whoever reads the written tensor from here on reads the result.
                for name in [n for n, value in replaced.items() if value == node.args[0]]:
                    replaced[name] = Ref(node.name)
                replaced[node.args[0].name] = Ref(node.name)
                decisions.append(self.decide(node.name, Verdict.DONE, "written in place; now out of place"))
            nodes.append(functional)
        gone = {node.name for node in graph} - {node.name for node in nodes}
        changed = bool(gone) or any(node is not graph[node.name] for node in nodes)
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


def _is_plain_value(node: Node) -> bool:
    """Sizes, shapes, dtypes: known once the shapes are, and no tensor among them."""
    return node.kind in (OpKind.FUNCTION, OpKind.METHOD) and node.value is not None and not tensor_types(node.value)


def _is_identity(node: Node, context: PassContext) -> bool:
    if node.kind is not OpKind.MODULE or len(node.args) != 1 or node.kwargs or node.effects.random:
        return False
    module = context.net.get_submodule(node.target)
    return type(module) in _IDENTITIES and (isinstance(module, nn.Identity) or not module.training)


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
        if (functional := _IN_PLACE_OPERATORS.get(node.target)) is not None:
            return replace(node, target=functional, effects=pure)
        name = getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and callable(getattr(torch, name[:-1], None)):
            return replace(node, target=getattr(torch, name[:-1]), effects=pure)
    if node.kind is OpKind.METHOD and node.target.endswith("_") and not node.target.endswith("__"):
        if not callable(getattr(torch.Tensor, node.target[:-1], None)):
            raise CaptureError(
                f"the in-place method {node.target} has no out-of-place form; write it out of place", where=node.where
            )
        return replace(node, target=node.target[:-1], effects=pure)
    return node


def _refuse_written_view(graph: StepGraph, node: Node) -> None:
    """Writing through a view changes every other view of the tensor too, which renaming readers cannot express."""
    root = written = node.args[0].name
    while _is_view(graph[root]):
        root = graph[root].refs[0]
    aliases = {root}
    for other in graph:
        if _is_view(other) and other.refs[0] in aliases:
            aliases.add(other.name)
    position = {other.name: index for index, other in enumerate(graph)}
    for alias in aliases - {written}:
        if any(position[reader] > position[node.name] for reader in graph.consumers[alias]):
            raise CaptureError(
                f"{node.name} writes in place into {written}, and {alias}, which shares its memory, is read "
                "afterwards; write it out of place",
                where=node.where,
            )


def _is_view(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.kind in (OpKind.FUNCTION, OpKind.METHOD) and name in _VIEW_NAMES and bool(node.refs)
