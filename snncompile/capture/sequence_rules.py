"""From an operation on whole sequences to the same operation on one step, where there is one.

The tables of `ir.batching_rules` say how an operation on a step is run on a chunk of steps; here they are read the
other way. An operation that no rule covers needs the whole sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import Effects, Node, OpKind, Ref, map_refs, refs_in
from ..ir.batching_rules import (
    DIM_RULES,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_METHODS,
    ELEMENTWISE_MODULES,
    FOLD_FUNCTIONS,
    FOLD_MODULES,
    IN_PLACE_OPERATORS,
    JOIN_NAMES,
    shift_name,
)
from ..torch_private import tree_leaves
from .adapter import Leaf
from .sequence_values import SequenceValue, TimeAxis
from .step_modes import has_single_step_form, in_multi_step_mode

_MATRIX_PRODUCTS = (torch.matmul, operator.matmul, "matmul")
_RESHAPES = frozenset({"flatten", "view", "reshape", "unflatten"})


@dataclass(frozen=True)
class SequenceRules:
    """Finds the single-step form of operations.

    Attributes:
        net: The network, in multi-step mode.
        leaves: Treatment of its leaf modules.
        by_step: Names of nodes whose values are those of one step already.
        values: What each node yields for all steps.
        steps: T.
        squeezed: Filled with pairs of a node and a fixed operand whose first dimension, of size 1, meets time.
    """

    net: nn.Module
    leaves: Mapping[str, Leaf]
    by_step: frozenset[str]
    values: Mapping[str, SequenceValue]
    steps: int
    squeezed: set[tuple[str, str]] = field(default_factory=set)

    def single_step(self, node: Node) -> Node | Ref | None:
        """The node on values of one step, or the value that stands for it there; None if it needs all steps."""
        if node.name in self.by_step:
            return self.filled(node)
        axes = {self.values[name].axis for name in node.refs} - {TimeAxis.NONE, TimeAxis.PLAIN}
        result = self.values[node.name]
        if TimeAxis.MIXED in axes:
            return None
        if node.kind in (OpKind.MODULE, OpKind.STATEFUL, OpKind.OPAQUE):
            return self.filled(node) if len(axes) == 1 and self._module_is_free(node, axes.pop()) else None
        if not axes:
            return self.filled(node) if result.axis is TimeAxis.NONE else None
        if len(axes) > 1 or result.axis not in (TimeAxis.FIRST, TimeAxis.BATCH):
            return None
        axis = axes.pop()
        if _in_place(node) in (*ELEMENTWISE_FUNCTIONS, *ELEMENTWISE_METHODS):
            # Made out-of-place by a later pass, which sees to the readers of what is overwritten.
            return self.filled(node) if axis is result.axis and self._is_aligned(node) else None
        if result.effects != Effects():
            return None
        if self._selects_from_tuple(node):
            return self.filled(node)
        name = node.target if node.kind is OpKind.METHOD else shift_name(node.target)
        if name in _RESHAPES:
            return self._reshaped(node)
        if axis is not result.axis:
            return None
        changed = self._operation(node, axis)
        return None if changed is None else self.filled(changed)

    def filled(self, node: Node) -> Node:
        """Sizes and numbers of the sequence are known; those of a step are not what the network asked for."""

        def fill(ref: Ref) -> Any:
            known = self.values[ref.name]
            return known.value if known.axis is TimeAxis.PLAIN else ref

        return replace(node, args=map_refs(node.args, fill), kwargs=map_refs(dict(node.kwargs), fill))

    # Modules

    def _module_is_free(self, node: Node, axis: TimeAxis) -> bool:
        """Whether a module takes each step alone."""
        leaf, module = self.leaves[node.target], self.net.get_submodule(node.target)
        effects = self.values[node.name].effects
        if leaf.kind is OpKind.OPAQUE or effects.statistics or self.values[node.name].axis is not axis:
            return False
        if in_multi_step_mode(module):
            all_first = all(self.values[name].axis is TimeAxis.FIRST for name in node.refs)
            return all_first and has_single_step_form(module)
        if leaf.kind is OpKind.STATEFUL or len(node.args) != 1 or node.kwargs:
            return False
        rank = self._rank(node.args[0])
        if leaf.acts_like in ELEMENTWISE_MODULES and (effects == Effects() or getattr(module, "inplace", False)):
            return not effects.random
        if effects != Effects():
            return False
        if leaf.acts_like is nn.Softmax or leaf.acts_like is nn.LogSoftmax:
            return getattr(module, "dim", None) == -1
        if axis is TimeAxis.FIRST:
            return leaf.acts_like is nn.Linear and rank >= 3
        if leaf.acts_like is nn.Flatten:
            return isinstance(module, nn.Flatten) and module.start_dim % rank != 0 and module.end_dim % rank != 0
        return leaf.acts_like is not None and FOLD_MODULES.get(leaf.acts_like) in (rank, 0)

    # Functions and methods

    def _operation(self, node: Node, axis: TimeAxis) -> Node | None:
        """The node with its dimensions moved by one where time is a dimension of its own."""
        known = ELEMENTWISE_FUNCTIONS if node.kind is OpKind.FUNCTION else ELEMENTWISE_METHODS
        if node.target in known:
            return node if self._is_aligned(node) else None
        if node.target in _MATRIX_PRODUCTS:
            return node if self._multiplies_matrices(node) else None
        if node.kind is OpKind.FUNCTION and node.target in FOLD_FUNCTIONS:
            return node if self._folds(node, axis) else None
        if node.target is operator.getitem:
            return self._indexed(node, axis)
        name = shift_name(node.target)
        if name == "permute":
            return self._permuted(node, axis)
        if name == "expand":
            return self._expanded(node)
        if name in JOIN_NAMES:
            return self._joined(node, axis, 1 if name == "stack" else 0)
        return self._moved(node, name, axis) if name is not None and name in DIM_RULES else None

    def _is_aligned(self, node: Node) -> bool:
        """Whether the first dimensions of all operands that have time meet, and nothing else meets them."""
        ranks = {self._rank(Ref(name)) for name in node.refs if self._has_time(name)}
        if len(ranks) != 1:
            return False
        (rank,) = ranks
        for name in node.refs:
            fixed = self.values[name].value
            if self._has_time(name) or not isinstance(fixed, Tensor) or fixed.dim() < rank:
                continue
            if fixed.dim() > rank or fixed.shape[0] != 1:
                return False
            if self.values[node.name].axis is TimeAxis.FIRST:
                self.squeezed.add((node.name, name))
        return True

    def _multiplies_matrices(self, node: Node) -> bool:
        """Whether time is a batch dimension of the product: of both operands, or of the first with a fixed matrix."""
        left, right = node.args
        if not isinstance(left, Ref) or not isinstance(right, Ref) or not self._has_time(left.name):
            return False
        if self._has_time(right.name):
            return self._rank(left) == self._rank(right) >= 3
        return self._rank(left) >= 3 and self._rank(right) == 2

    def _folds(self, node: Node, axis: TimeAxis) -> bool:
        first = node.args[0] if node.args else None
        if not isinstance(first, Ref) or any(self._has_time(name) for name in refs_in((node.args[1:], node.kwargs))):
            return False
        if axis is TimeAxis.FIRST:
            return node.target is torch.nn.functional.linear and self._rank(first) >= 3
        return FOLD_FUNCTIONS[node.target] in (self._rank(first), 0)

    def _reshaped(self, node: Node) -> Node | Ref | None:
        """Rows stay in order, so each step's part of the result is that of its part of the operand."""
        first = node.args[0]
        source, result = self.values[first.name].value, self.values[node.name].value
        if not isinstance(source, Tensor) or not isinstance(result, Tensor) or source.dtype != result.dtype:
            return None
        before, after = (self.step_shape(name) for name in (first.name, node.name))
        if before == after:
            return Ref(first.name)
        return replace(node, kind=OpKind.METHOD, target="reshape", args=(first, *after), kwargs={})

    def _indexed(self, node: Node, axis: TimeAxis) -> Node | None:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not index or index[0] != slice(None) or any(refs_in(item) for item in index):
            return None
        rest = index[1:] if axis is TimeAxis.FIRST else index
        if any(isinstance(item, (Tensor, list)) for item in rest):
            return None
        return replace(node, args=(node.args[0], rest)) if rest else None

    def _permuted(self, node: Node, axis: TimeAxis) -> Node | None:
        filled = self.filled(node)
        numbers = filled.args[1:]
        if len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
            numbers = tuple(numbers[0])
        rank = self._rank(node.args[0])
        if filled.kwargs or any(type(number) is not int for number in numbers):
            return None
        order = [number % rank for number in numbers]
        if order[0] != 0:
            return None
        if axis is TimeAxis.FIRST:
            order = [number - 1 for number in order[1:]]
        return replace(filled, args=(filled.args[0], *order) if node.kind is OpKind.METHOD else (filled.args[0], order))

    def _expanded(self, node: Node) -> Node | None:
        if node.kind is not OpKind.METHOD or self._rank(node.args[0]) != self.values[node.name].value.dim():
            return None
        return replace(node, args=(node.args[0], *self.step_shape(node.name)), kwargs={})

    def _joined(self, node: Node, axis: TimeAxis, more: int) -> Node | None:
        tensors = node.args[0] if node.args else None
        if not isinstance(tensors, (tuple, list)) or not all(
            isinstance(item, Ref) and self._has_time(item.name) for item in tensors
        ):
            return None
        dim = self.filled(node).args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        rank = self._rank(tensors[0]) + more
        if type(dim) is not int or dim % rank == 0:
            return None
        return replace(node, args=(tensors,), kwargs={"dim": dim % rank - (axis is TimeAxis.FIRST)})

    def _moved(self, node: Node, name: str, axis: TimeAxis) -> Node | None:
        """Dimension arguments one to the left; none may be that of time."""
        rule, filled = DIM_RULES[name], self.filled(node)
        given = dict(rule.defaults) | dict(zip(rule.parameters, filled.args[1:], strict=False)) | dict(filled.kwargs)
        if len(filled.refs) != 1 or not isinstance(filled.args[0], Ref):
            return None
        if rule.required and not any(key in given for key in rule.dims):
            return None
        # `unsqueeze` counts dimensions of its result.
        rank = self._rank(filled.args[0]) + (name == "unsqueeze")
        for key in rule.dims:
            if key not in given:
                continue
            many = isinstance(given[key], (tuple, list))
            dims = [dim for dim in (given[key] if many else [given[key]]) if type(dim) is int]
            if len(dims) != (len(given[key]) if many else 1) or any(dim % rank == 0 for dim in dims):
                return None
            moved = [dim % rank - (axis is TimeAxis.FIRST) for dim in dims]
            given[key] = tuple(moved) if many else moved[0]
        return replace(filled, args=(filled.args[0],), kwargs=given)

    # Values

    def step_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one step of a value that has time."""
        known = self.values[name]
        shape = tuple(known.value.shape)
        return shape[1:] if known.axis is TimeAxis.FIRST else (shape[0] // self.steps, *shape[1:])

    def _has_time(self, name: str) -> bool:
        return self.values[name].axis in (TimeAxis.FIRST, TimeAxis.BATCH)

    def _rank(self, ref: Any) -> int:
        leaves = [leaf for leaf in tree_leaves(self.values[ref.name].value) if isinstance(leaf, Tensor)]
        return max((leaf.dim() for leaf in leaves), default=0)

    def _selects_from_tuple(self, node: Node) -> bool:
        if node.target is not operator.getitem or not isinstance(node.args[0], Ref):
            return False
        return isinstance(self.values[node.args[0].name].value, (tuple, list)) and isinstance(node.args[1], int)


def _in_place(node: Node) -> Any:
    """The out-of-place operation that a node does in place; None if it does none."""
    if node.kind is OpKind.METHOD:
        name = str(node.target)
        return name[:-1] if name.endswith("_") and not name.endswith("__") else None
    if node.kwargs.get("inplace") is True:
        return node.target
    return IN_PLACE_OPERATORS.get(node.target)
