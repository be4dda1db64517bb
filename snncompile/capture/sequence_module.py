"""Operations that need the whole sequence, as one module: `[T, N, *]` in; `[T, N, *]`, or one result, out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import reset_net
from ..ir import Node, OpKind, map_refs
from ..torch_private import tree_leaves, tree_map
from .step_modes import in_multi_step_mode, step_mode_of


@dataclass(frozen=True)
class Operation:
    """A node of a network in multi-step mode, with what it names.

    Attributes:
        node: The node; its arguments name other operations' values.
        subject: The module it calls; for a CONSTANT, a function that looks the tensor up.
        stepwise: The operands of which it takes one step at a time; empty: it takes all operands whole.
        spares: It writes into what it reads, which no one reads after it, and so is given copies.
    """

    node: Node
    subject: Any = None
    stepwise: frozenset[str] = frozenset()
    spares: bool = False

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """The value, given those of the operations it reads."""
        if self.spares:
            values = {name: tree_map(_copied, values[name]) for name in self.node.refs}
        if not self.stepwise:
            return self._call(lambda name: values[name])
        moving = [leaf for name in self.stepwise for leaf in tree_leaves(values[name]) if isinstance(leaf, Tensor)]
        results = [self._call(_StepOf(values, self.stepwise, step)) for step in range(moving[0].shape[0])]
        columns = zip(*(tree_leaves(result) for result in results), strict=True)
        stacked = iter([torch.stack(column) for column in columns])
        return tree_map(lambda _: next(stacked), results[0])

    def _call(self, value_of: Callable[[str], Any]) -> Any:
        node = self.node
        if node.kind is OpKind.CONSTANT:
            return self.subject()
        args, kwargs = (map_refs(part, lambda ref: value_of(ref.name)) for part in (node.args, dict(node.kwargs)))
        if node.kind is OpKind.FUNCTION:
            return node.target(*args, **kwargs)
        if node.kind is OpKind.METHOD:
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return out_of_place(self.subject)(*args, **kwargs)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class _StepOf:
    """Looks up an operand: one step of it, if it has steps."""

    values: Mapping[str, Any]
    stepwise: frozenset[str]
    step: int

    def __call__(self, name: str) -> Any:
        if name not in self.stepwise:
            return self.values[name]
        return tree_map(lambda leaf: leaf[self.step] if isinstance(leaf, Tensor) else leaf, self.values[name])


def out_of_place(module: nn.Module) -> nn.Module:
    """The module to call: an out-of-place twin sharing all parameters where the module works in place."""
    if not getattr(module, "inplace", False):
        return module
    twin = copy.copy(module)
    twin.inplace = False  # type: ignore[assignment]
    return twin


class SequenceModule(nn.Module):
    """Runs operations on whole sequences, in multi-step mode, as the network itself does.

    The modules that it calls are the network's own and no submodules of this one: states, parameters and modes are
    theirs.

    Args:
        operations: In program order.
        operands: Names of the values that come in, each with the number of rows that T steps fold into its first axis,
            or None where that is T itself.
        results: Names of the values that go out, likewise; those without time last.
        timeless: How many of the results have no time axis.
        steps: T.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        operands: Iterable[tuple[str, int | None]],
        results: Iterable[tuple[str, int | None]],
        timeless: int,
        steps: int,
    ) -> None:
        super().__init__()
        self._operations = tuple(operations)
        self._operands = tuple(operands)
        self._results = tuple(results)
        self.timeless = timeless
        self.steps = steps
        modules = [operation.subject for operation in operations if isinstance(operation.subject, nn.Module)]
        # In tuples, where torch does not look for submodules.
        self._called = tuple(modules)
        self._multi_step = tuple(m for module in modules for m in module.modules() if in_multi_step_mode(m))

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """The network's modules that this one calls."""
        return self._called

    def forward(self, *operands: Tensor) -> Any:
        """All steps: `[T, N, *]` for each operand and each result that has time."""
        values: dict[str, Any] = {
            name: operand if folded is None else operand.flatten(0, 1)
            for (name, folded), operand in zip(self._operands, operands, strict=True)
        }
        with step_mode_of(self._multi_step, "m"):
            for operation in self._operations:
                values[operation.node.name] = operation(values)
        results = [
            values[name] if folded is None else values[name].unflatten(0, (-1, folded))
            for name, folded in self._results
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def step(self, *operands: Tensor) -> Any:
        """As a call whose T steps are all the same: `[N, *]` for each operand and each result that has time."""
        results = self(*(operand.expand(self.steps, *operand.shape) for operand in operands))
        if not isinstance(results, tuple):
            return results if self.timeless else results[0]
        timed = len(results) - self.timeless
        return (*(result[0] for result in results[:timed]), *results[timed:])

    def reset(self) -> None:
        """Put the states of the modules that it calls back to their reset values."""
        for module in self._called:
            reset_net(module)

    def extra_repr(self) -> str:
        return ", ".join(operation.node.name for operation in self._operations)
