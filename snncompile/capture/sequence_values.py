"""Runs a network in multi-step mode without data, and says of every value where its time steps are.

The network is run for T and for T + 1 steps: where a shape grows is where time is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..functional import reset_net
from ..ir import Effects, Node, OpKind, TensorType
from ..torch_private import no_modes, tree_leaves, tree_map
from .capture import Captured
from .copies import copy_network
from .fakes import FakeNetwork
from .leaves import without_hooks
from .sequence_module import Operation
from .shapes import EffectsRecorder, zeros_for


class TimeAxis(Enum):
    """Where the steps of a value are."""

    FIRST = "first"  # [T, *]
    BATCH = "batch"  # [T * N, *]: time is folded into the batch, the steps one after the other
    NONE = "none"  # made of parameters and buffers alone: the same at every step
    PLAIN = "plain"  # no tensor: a size, a shape, a number
    MIXED = "mixed"  # anything else that depends on the inputs


@dataclass(frozen=True)
class SequenceValue:
    """What a node of a network in multi-step mode yields.

    Attributes:
        value: The value for T steps; its tensors have no data.
        axis: Where its steps are.
        effects: What the node did besides.
    """

    value: Any
    axis: TimeAxis
    effects: Effects


def run_sequence(captured: Captured, net: nn.Module, inputs: tuple[TensorType, ...]) -> Mapping[str, SequenceValue]:
    """Run a traced network in multi-step mode on sequences without data.

    Args:
        captured: From `capture_sequence`.
        net: The network.
        inputs: Types of the sequences `[T, N, *]`.

    Raises:
        CaptureError: A node fails on inputs of these shapes.
    """
    graph, steps = captured.graph, inputs[0].shape[0]
    now = _Run(captured, net, inputs)
    longer = _Run(captured, net, tuple(_one_step_more(leaf) for leaf in inputs), now)
    found: dict[str, SequenceValue] = {}
    for node in graph:
        if node.kind is OpKind.OUTPUT:
            continue
        value = now.values[node.name]
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            axis = TimeAxis.PLAIN
        elif node.name in now.fixed:
            axis = TimeAxis.NONE
        else:
            axis = _axis(value, longer.values[node.name], steps)
        found[node.name] = SequenceValue(value, axis, now.effects[node.name])
    return found


class _Run:
    """One run of all nodes, from reset states.

    Args:
        captured: The traced network.
        net: The network.
        inputs: Types of the sequences.
        shorter: A run of one step less; where a node takes no other length, its value there is lengthened.

    Attributes:
        values: What each node yields.
        effects: What it does besides.
        fixed: Names of the nodes whose values depend on no input.
    """

    def __init__(
        self, captured: Captured, net: nn.Module, inputs: tuple[TensorType, ...], shorter: _Run | None = None
    ) -> None:
        self._net = net
        self._fakes = FakeNetwork(net)
        self._by_step = captured.by_step
        self._steps = inputs[0].shape[0]
        self.values: dict[str, Any] = {}
        self.effects: dict[str, Effects] = {}
        self.fixed: set[str] = set()
        with self._fakes.mode, torch.no_grad():
            reset_net(self._fakes.net)
            self._inputs = [torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device) for x in inputs]
            self._run(captured, shorter)

    def _run(self, captured: Captured, shorter: _Run | None) -> None:
        for node in captured.graph:
            if node.kind is OpKind.OUTPUT:
                continue
            is_operation = node.kind in (OpKind.FUNCTION, OpKind.METHOD)
            if node.kind is OpKind.CONSTANT or (is_operation and self.fixed.issuperset(node.refs)):
                self.fixed.add(node.name)
            operands = [self.values[name] for name in node.refs if captured.graph[name].kind is not OpKind.CONSTANT]
            with EffectsRecorder(operands) as recorder:
                try:
                    self.values[node.name] = self._value(node)
                except Exception as error:
                    if shorter is None:
                        raise CaptureError(f"{node.where} fails on these inputs: {error}", where=node.where) from error
                    self.values[node.name] = tree_map(self._lengthened, shorter.values[node.name])
            self.effects[node.name] = recorder.effects

    def _value(self, node: Node) -> Any:
        if node.kind is OpKind.INPUT:
            return self._inputs[node.target]
        if node.kind is OpKind.CONSTANT:
            return self._fakes.constant(node.target)
        stepwise = self._stepwise(node)
        if node.kind in (OpKind.FUNCTION, OpKind.METHOD):
            return Operation(node, stepwise=stepwise)(self.values)
        try:
            return Operation(node, self._fakes.module(node.target), stepwise)(self.values)
        except Exception:  # whatever a module raises that needs data
            return self._call_for_real(node, stepwise)

    def _stepwise(self, node: Node) -> frozenset[str]:
        """The operands that a node takes one step at a time."""
        if node.name not in self._by_step:
            return frozenset()
        moving = (name for name in node.refs if name not in self.fixed)
        return frozenset(
            name for name in moving if any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.values[name]))
        )

    def _call_for_real(self, node: Node, stepwise: frozenset[str]) -> Any:
        """Call a copy of a module whose code needs data on zeros."""
        rng = torch.get_rng_state()
        try:
            with no_modes():
                module = without_hooks(copy_network(self._net.get_submodule(node.target), {}))
                reset_net(module)
                operation = Operation(node, module, stepwise)
                operands = {name: tree_map(zeros_for, self.values[name]) for name in operation.node.refs}
                result = operation(operands)
        finally:
            torch.set_rng_state(rng)
        return tree_map(lambda leaf: self._fakes.twin(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _lengthened(self, leaf: Any) -> Any:
        steps = self._steps - 1
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] % steps:
            return leaf
        return torch.empty(
            (leaf.shape[0] // steps * self._steps, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device
        )


def _axis(value: Any, longer: Any, steps: int) -> TimeAxis:
    """Where the steps of a value are, from its shapes for T and for T + 1."""
    left, right = ([leaf for leaf in tree_leaves(v) if isinstance(leaf, Tensor)] for v in (value, longer))
    axes = {_axis_of(a, b, steps) for a, b in zip(left, right, strict=False)}
    return axes.pop() if len(axes) == 1 and len(left) == len(right) else TimeAxis.MIXED


def _axis_of(value: Tensor, longer: Tensor, steps: int) -> TimeAxis:
    if value.dim() == 0 or longer.dim() != value.dim() or value.shape[1:] != longer.shape[1:]:
        return TimeAxis.MIXED
    if (value.shape[0], longer.shape[0]) == (steps, steps + 1):
        return TimeAxis.FIRST
    batch = value.shape[0] // steps
    is_folded = batch > 0 and (value.shape[0], longer.shape[0]) == (batch * steps, batch * (steps + 1))
    return TimeAxis.BATCH if is_folded else TimeAxis.MIXED


def _one_step_more(leaf: TensorType) -> TensorType:
    return TensorType((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.stride, leaf.dtype, leaf.device)
