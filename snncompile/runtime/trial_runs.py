"""What runs of a whole network have in common that planning makes to learn from, on a copy and on random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..capture import copy_network, has_hooks
from ..explicit_states import ExplicitStates
from ..ir import Batching, Effects, OpKind, StepGraph, TensorType, TimeCoupling
from .timing import random_operand

_HARMLESS = (TimeCoupling.POINTWISE, TimeCoupling.STATEFUL, None)
_GIVEN = (OpKind.INPUT, OpKind.CONSTANT, OpKind.OUTPUT)


def trial_obstacle(net: nn.Module, graph: StepGraph) -> str:
    """Why a run would leave something behind, or depend on more than its inputs; empty if none of it would."""
    if isinstance(net, ExplicitStates) or any(map(has_hooks, net.modules())):
        return "hooks, and states that the caller passes, are Python's"
    for node in (node for node in graph if node.kind not in _GIVEN):
        if node.kind in (OpKind.LOAD, OpKind.STORE):
            return f"{node.where or node.name} keeps a tensor in an attribute from step to step"
        if node.kind is OpKind.OPAQUE or node.batching is Batching.WHOLE:
            return f"{node.where or node.name} runs Python code that a replay would leave out"
        if node.effects != Effects() or node.coupling not in _HARMLESS:
            return f"{node.where or node.name} does more than to return a value"
    return ""


def trial_copy(net: nn.Module) -> nn.Module:
    """A copy of a network that shares its parameters."""
    return copy_network(net, {id(parameter): parameter for parameter in net.parameters()})


def trial_inputs(inputs: Sequence[TensorType], steps: int, *, is_static: bool) -> list[Tensor]:
    """Random inputs of these types, for so many steps unless they are those of every step."""
    return [random_operand(leaf if is_static else leaf.of_length(steps)) for leaf in inputs]
