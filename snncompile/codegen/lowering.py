"""From a node to the Python expression that computes it, for one step or for a chunk of steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..ir import Batching, Node, OpKind, Ref, StepGraph, refs_in, tensor_types
from ..ir.batching_rules import DIM_RULES, JOIN_NAMES, SHAPE_NAMES, shift_name
from .names import Namespace

Spelling = Callable[[str], str]  # node name -> source of the value that the node at hand reads


class Lowering:
    """Spells the nodes of one graph.

    Args:
        graph: With couplings and invariants marked.
        namespace: Collects the globals that expressions use.
    """

    def __init__(self, graph: StepGraph, namespace: Namespace) -> None:
        self.graph = graph
        self.namespace = namespace

    def step(self, node: Node, spell: Spelling) -> str:
        """The expression on values of one step `[N, *]`."""
        if node.kind is OpKind.FUNCTION:
            if node.target is operator.getitem:
                return f"{self._value(node.args[0], spell)}[{self._index(node.args[1], spell)}]"
            return f"{self.namespace.function(node.target)}({self._arguments(node.args, node.kwargs, spell)})"
        if node.kind is OpKind.METHOD:
            first = self._value(node.args[0], spell)
            return f"{first}.{node.target}({self._arguments(node.args[1:], node.kwargs, spell)})"
        if node.kind is OpKind.LOAD:
            return f"state[{node.target!r}].load()"
        if node.kind is OpKind.STORE:
            return f"state[{node.target!r}].store({self._arguments(node.args, {}, spell)})"
        if node.kind is OpKind.STATEFUL:
            return f"state[{node.target!r}].step({self._arguments(node.args, node.kwargs, spell)})"
        if node.batching is Batching.WHOLE:
            return f"net[{node.target!r}].step({self._arguments(node.args, {}, spell)})"
        return f"net[{node.target!r}]({self._arguments(node.args, node.kwargs, spell)})"

    def chunk(self, node: Node, spell: Spelling, steps: str) -> str:
        """The expression on values of a chunk `[C, N, *]`; `steps` spells the chunk's length."""
        if node.kind is OpKind.LOAD:
            return f"state[{node.target!r}].load_chunk({steps})"
        if node.kind is OpKind.STORE:
            method = "store" if self.graph[node.refs[0]].invariant else "store_chunk"
            return f"state[{node.target!r}].{method}({self._arguments(node.args, {}, spell)})"
        if node.batching is Batching.SCAN:
            arguments = ", ".join(self._scanned(arg, spell) for arg in node.args)
            return f"state[{node.target!r}].scan({steps}, {arguments})"
        if node.batching is Batching.FOLD:
            return self._folded(node, spell)
        if node.batching is Batching.FOLD_CHANNELS:
            source = self._expanded(spell, steps)(node.args[0].name)
            return f"batch_norm_by_step(net[{node.target!r}], {source})"
        if node.batching is Batching.ELEMENTWISE:
            return self.step(node, self._lifted(node, spell))
        if node.batching is Batching.SELECT or (node.kind is OpKind.FUNCTION and node.batching is Batching.WHOLE):
            return self.step(node, spell)
        if node.batching is Batching.WHOLE:
            return f"net[{node.target!r}]({self._arguments(node.args, {}, self._expanded(spell, steps))})"
        if node.batching is Batching.SHIFT_DIMS:
            return self._shifted(node, spell, steps)
        return self._per_step(node, spell, steps)

    def into_output(self, node: Node, spell: Spelling, begin: str, steps: str | None) -> str:
        """The expression that also writes the value where it leaves the network.

        Args:
            node: Has an output slot.
            spell: Of what it reads.
            begin: The first step.
            steps: The chunk's length; None for a single step.
        """
        head = f"state[{node.target!r}]."
        if steps is None:
            arguments = ", ".join(self._value(arg, spell) for arg in node.args)
            return f"{head}step_into(out[{node.output_slot}], {begin}, {arguments})"
        arguments = ", ".join(self._scanned(arg, spell) for arg in node.args)
        return f"{head}scan_into(out[{node.output_slot}], {begin}, {steps}, {arguments})"

    def _scanned(self, arg: Any, spell: Spelling) -> str:
        source = self._value(arg, spell)
        return source if isinstance(arg, Ref) and not self.graph[arg.name].invariant else f"Still({source})"

    def _folded(self, node: Node, spell: Spelling) -> str:
        first: Ref = node.args[0]
        source = spell(first.name)
        if node.kind is OpKind.MODULE:
            return f"batched(net[{node.target!r}], {source})"
        inner = self.step(node, lambda name: "rows" if name == first.name else spell(name))
        return f"batched(lambda rows: {inner}, {source})"

    def _lifted(self, node: Node, spell: Spelling) -> Spelling:
        """Operands with fewer dimensions than the widest get ones behind time."""
        ranks = {name: [len(leaf.shape) for leaf in tensor_types(self.graph[name].value)] for name in node.refs}
        widest = max((rank for found in ranks.values() for rank in found), default=0)

        def spell_lifted(name: str) -> str:
            short = not self.graph[name].invariant and len(ranks[name]) == 1 and ranks[name][0] < widest
            return f"lift({spell(name)}, {widest})" if short else spell(name)

        return spell_lifted

    def _per_step(self, node: Node, spell: Spelling, steps: str) -> str:
        moving = [name for name in node.refs if not self.graph[name].invariant]
        parameters = {name: f"s{number}" for number, name in enumerate(moving)}
        inner = self.step(node, lambda name: parameters.get(name) or spell(name))
        values = "".join(f", {spell(name)}" for name in moving)
        return f"per_step({steps}, lambda {', '.join(parameters.values())}: {inner}{values})"

    def _shifted(self, node: Node, spell: Spelling, steps: str) -> str:
        if node.target is operator.getitem:
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            return f"{self._value(node.args[0], spell)}[{self._index((slice(None), *index), spell)}]"
        name = shift_name(node.target)
        assert name is not None
        if name in SHAPE_NAMES:
            return self._shifted_shape(node, name, spell, steps)
        if name in JOIN_NAMES:
            args, kwargs = _shifted_join(node)
            spell = self._expanded(spell, steps)
        else:
            args, kwargs = _shifted_dims(node, name)
        if node.kind is OpKind.METHOD:
            return f"{self._value(args[0], spell)}.{node.target}({self._arguments(args[1:], kwargs, spell)})"
        return f"{self.namespace.function(node.target)}({self._arguments(args, kwargs, spell)})"

    def _expanded(self, spell: Spelling, steps: str) -> Spelling:
        """Operands that are the same at every step, seen once for each step without a copy."""

        def spell_expanded(name: str) -> str:
            if not self.graph[name].invariant:
                return spell(name)
            rank = len(tensor_types(self.graph[name].value)[0].shape)
            return f"{spell(name)}.expand({steps}{', -1' * rank})"

        return spell_expanded

    def _shifted_shape(self, node: Node, name: str, spell: Spelling, steps: str) -> str:
        numbers = node.args[1:]
        if len(numbers) == 1 and isinstance(numbers[0], (tuple, list, torch.Size)):
            numbers = tuple(numbers[0])
        source = self._value(node.args[0], spell)
        if name == "permute":
            return f"{source}.permute(0, {', '.join(str(shift_dim(number)) for number in numbers)})"
        # A view of one step need not be a view of the chunk; reshape is where it can be.
        method = "reshape" if name == "view" else name
        return f"{source}.{method}({', '.join([steps, *map(str, numbers)])})"

    def _arguments(self, args: tuple[Any, ...], kwargs: Any, spell: Spelling) -> str:
        spelled = [self._value(arg, spell) for arg in args]
        return ", ".join(spelled + [f"{key}={self._value(arg, spell)}" for key, arg in kwargs.items()])

    def _value(self, structure: Any, spell: Spelling) -> str:
        if isinstance(structure, Ref):
            return spell(structure.name)
        if not refs_in(structure) and not isinstance(structure, (tuple, list, dict, slice)):
            return self.namespace.literal(structure)
        if isinstance(structure, slice):
            parts = [self._value(part, spell) for part in (structure.start, structure.stop, structure.step)]
            return f"slice({', '.join(parts)})"
        if isinstance(structure, dict):
            entries = (f"{key!r}: {self._value(item, spell)}" for key, item in structure.items())
            return f"{{{', '.join(entries)}}}"
        items = [self._value(item, spell) for item in structure]
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return f"{self.namespace.bind(type(structure), type(structure).__name__)}({', '.join(items)})"
        if isinstance(structure, tuple):
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        return f"[{', '.join(items)}]"

    def _index(self, index: Any, spell: Spelling) -> str:
        items = index if isinstance(index, tuple) else (index,)
        return ", ".join(self._index_item(item, spell) for item in items) + ("," if isinstance(index, tuple) else "")

    def _index_item(self, item: Any, spell: Spelling) -> str:
        if isinstance(item, slice):
            parts = ("" if part is None else self._value(part, spell) for part in (item.start, item.stop))
            step = "" if item.step is None else f":{self._value(item.step, spell)}"
            return ":".join(parts) + step
        return self._value(item, spell)


def shift_dim(dim: int) -> int:
    """A dimension of a step as a dimension of a chunk; negative ones count from the other end and stay."""
    return dim + 1 if dim >= 0 else dim


def _shifted_dims(node: Node, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rule = DIM_RULES[name]
    given = dict(rule.defaults) | dict(zip(rule.parameters, node.args[1:], strict=False)) | dict(node.kwargs)
    for key in rule.dims:
        if key in given:
            dims = given[key]
            given[key] = tuple(map(shift_dim, dims)) if isinstance(dims, (tuple, list)) else shift_dim(dims)
    return (node.args[0],), given


def _shifted_join(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return (node.args[0],), {"dim": shift_dim(dim)}
