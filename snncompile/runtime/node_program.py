"""Runs one node alone, as the emitted program would, on operands made up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codegen import Lowering, Namespace
from ..ir import Node, OpKind, StepGraph, TensorType
from ..torch_private import tree_map
from .scan_kernels import ScanKernels
from .states import StateSlot


class NodeProgram:
    """One node as a function of its operands.

    Args:
        graph: Where the node stands.
        node: The node.
        chunked: Over `[C, N, *]` instead of `[N, *]`.
        into_output: As a node that has an output slot writes its value; each call gets the outputs by slot.
    """

    def __init__(self, graph: StepGraph, node: Node, *, chunked: bool, into_output: bool = False) -> None:
        self.node = node
        namespace = Namespace(needs_grad=False)
        lowering = Lowering(graph, namespace)
        spelled = {name: f"operand{number}" for number, name in enumerate(node.refs)}
        spell = spelled.__getitem__
        if into_output:
            expression = lowering.into_output(node, spell, "0", "steps" if chunked else None)
        else:
            expression = lowering.chunk(node, spell, "steps") if chunked else lowering.step(node, spell)
        arguments = ", ".join([*spelled.values(), "steps", "net", "state", "out"])
        source = f"def run({arguments}):\n    return {expression}\n"
        exec(compile(source, f"<node {node.name}>", "exec"), namespace.globals)
        self._run = namespace.globals["run"]

    def __call__(self, operands: Mapping[str, Any], steps: int, net: Any, state: Any, out: Any = ()) -> Any:
        return self._run(*(operands[name] for name in self.node.refs), steps, net, state, out)


def operand_types(
    graph: StepGraph, node: Node, steps: int, *, chunked: bool, inputs: tuple[TensorType, ...]
) -> dict[str, Any]:
    """Types of what a node reads: whole chunks of what changes, single steps of what does not.

    Args:
        inputs: Types of the caller's sequences `[T, N, *]`, whose time stride a slice keeps.
    """

    def of_chunk(leaf: Any) -> Any:
        return leaf.of_chunk(steps) if isinstance(leaf, TensorType) else leaf

    found = {}
    for name in node.refs:
        source = graph[name]
        if source.invariant or not chunked:
            found[name] = source.value
        elif source.kind is OpKind.INPUT and (sequence := inputs[source.target]) != source.value:
            found[name] = sequence.of_length(steps)
        else:
            found[name] = tree_map(of_chunk, source.value)
    return found


def make_operands(types: Mapping[str, Any], make: Callable[[TensorType], Tensor]) -> dict[str, Any]:
    """Tensors of the given types."""
    return {
        name: tree_map(lambda leaf: make(leaf) if isinstance(leaf, TensorType) else leaf, value)
        for name, value in types.items()
    }


def fresh_slot(module: nn.Module, kernels: ScanKernels | None = None, original: nn.Module | None = None) -> StateSlot:
    """A slot at the reset values, whatever the module holds now."""
    slot = StateSlot(module, kernels, original)
    slot.states = slot.adapter.reset_values(module)
    return slot


def empty_like_type(leaf: TensorType) -> Tensor:
    """An uninitialised tensor of a type."""
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)


def zeros_like_type(leaf: TensorType) -> Tensor:
    """A tensor of zeros of a type."""
    return empty_like_type(leaf).zero_()
