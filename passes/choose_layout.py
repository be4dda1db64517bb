"""Lets 2d convolutions compute channels-last where that is measured to be faster.

Library kernels round differently in another layout, so this needs `reassociate=True`. All convolutions change together:
between two layouts every image would have to be copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..capture import is_plain_convolution
from ..ir import Batching, Decision, Node, OpKind, StepGraph, Verdict, has_registers
from ..schedule import MAX_CHUNK, chunk_lengths
from .infra import Numerics, Pass, PassContext, PassResult


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Give convolutions their weights channels-last if all of them together run faster so."""

    name: ClassVar[str] = "choose-layout"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATES
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "invariants"})
    provides: ClassVar[frozenset[str]] = frozenset({"layouts"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        convolutions = [node for node in graph if _is_convolution(node, context)]
        if not convolutions or "layouts" in graph.facts:
            return PassResult(graph, False)
        if obstacle := _obstacle(graph, context):
            return PassResult(graph, False, (self._decide(Verdict.REFUSED, obstacle),))
        marked = graph.with_nodes({node.name: replace(node, channels_last=True) for node in convolutions})
        tried = context.retype(marked)
        names = [node.name for node in convolutions]
        now, then = (_seconds(each, names, context) for each in (graph, tried))
        compared = (
            f"{len(names)} convolutions: {then * 1e3:.2f} ms a step channels-last, {now * 1e3:.2f} ms as they are"
        )
        if then >= now:
            return PassResult(graph, False, (self._decide(Verdict.REFUSED, compared),))
        return PassResult(tried, True, (self._decide(Verdict.DONE, compared),))

    def _decide(self, verdict: Verdict, reason: str) -> Decision:
        return self.decide("", verdict, reason)


def _is_convolution(node: Node, context: PassContext) -> bool:
    if node.kind is not OpKind.MODULE or node.batching is not Batching.FOLD:
        return False
    module = context.net.get_submodule(node.target)
    return context.acts_like(node) is nn.Conv2d and "weight" in module._parameters and is_plain_convolution(module)


def _obstacle(graph: StepGraph, context: PassContext) -> str:
    if context.needs_grad:
        return "gradients are recorded, which flow to the weights as they lie"
    if has_registers(graph):
        return "tensors are carried from step to step in attributes, as the first step laid them out"
    return ""


def _seconds(graph: StepGraph, names: Iterable[str], context: PassContext) -> float:
    """Seconds a step, each operation at its own best chunk length."""
    lengths = chunk_lengths(min(context.options.steps, MAX_CHUNK))
    total = 0.0
    for node in (graph[name] for name in names):
        if not node.invariant:
            total += min(context.measurements.seconds(graph, node, length) / length for length in lengths)
    return total
