"""Lets the kernels of neurons whose values leave the network write them where they leave it.

A sequence of outputs is one tensor. What a kernel computes for it chunk by chunk need not be put into it by a copy;
where gradients are recorded, this holds for a chunk of all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..ir import Node, OpKind, StepGraph, TensorType, Verdict
from ..schedule import output_names
from .infra import Pass, PassContext, PassResult


@dataclass(frozen=True)
class WriteIntoOutputs(Pass):
    """Mark the neurons whose value is an output and nothing else."""

    name: ClassVar[str] = "write-into-outputs"
    requires: ClassVar[frozenset[str]] = frozenset({"chains"})
    provides: ClassVar[frozenset[str]] = frozenset({"outputs"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        is_sequence = context.options.readout == "sequence"
        if not is_sequence or context.kernels is None or "outputs" in graph.facts:
            return PassResult(graph, False)
        outputs = output_names(graph)
        marked, decisions = {}, []
        for slot, name in enumerate(outputs):
            node = graph[name]
            if node.kind is not OpKind.STATEFUL or outputs.count(name) > 1:
                continue
            if obstacle := self._obstacle(graph, node, context):
                decisions.append(self.decide(node.where, Verdict.REFUSED, obstacle))
            else:
                marked[name] = replace(node, output_slot=slot)
                decisions.append(self.decide(node.where, Verdict.DONE, f"its kernel writes into output {slot}"))
        return PassResult(graph.with_nodes(marked) if marked else graph, bool(marked), tuple(decisions))

    @staticmethod
    def _obstacle(graph: StepGraph, node: Node, context: PassContext) -> str:
        """Why the value must be put into the output; empty if the kernel can write it there."""
        if set(graph.consumers[node.name]) != {graph.output.name}:
            return "other nodes read its value"
        value, first = node.value, graph[node.refs[0]].value
        if not isinstance(value, TensorType) or not isinstance(first, TensorType) or node.shares:
            return "its value is not a tensor of its own"
        # The output is contiguous, and a kernel lays its value out as its first input.
        contiguous = torch.empty(value.shape, device="meta").stride()
        if first.shape != value.shape or first.dtype != value.dtype or first.stride != contiguous:
            return "its input does not lie as the output does"
        assert context.kernels is not None
        types = tuple(graph[name].value for name in node.refs)
        return context.kernels.obstacle(context.net, node, types)
