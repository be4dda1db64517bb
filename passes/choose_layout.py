"""Lets 2d convolutions compute channels-last where that is measured to be faster.

Library kernels round differently in another layout, so this needs `reassociate=True`. All convolutions change together:
between two layouts every image would have to be copied. Where spikes come in and are few, a convolution is driven by
events then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..capture import is_plain_convolution
from ..ir import Batching, Decision, Node, OpKind, StepGraph, Verdict, has_registers
from .events import Considered, carriers_of_spikes, consider_events, milliseconds, seconds_a_step
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
        now, then = 0.0, 0.0
        carriers, considered = carriers_of_spikes(tried, context), list[Considered]()
        for name in (node.name for node in convolutions if not node.invariant):
            now += seconds_a_step(graph, graph[name], context)
            if (found := consider_events(tried, tried[name], carriers, context)) is not None:
                considered.append(found)
                then += found.seconds
            else:
                then += seconds_a_step(tried, tried[name], context)
        compared = (
            f"{len(convolutions)} convolutions: {milliseconds(then)} a step channels-last, "
            f"{milliseconds(now)} as they are"
        )
        if then >= now:
            return PassResult(graph, False, (self._decide(Verdict.REFUSED, compared),))
        decisions = [self.decide(*each.decision) for each in considered]
        changed = tried.with_nodes({each.node.name: each.node for each in considered})
        return PassResult(changed, True, (self._decide(Verdict.DONE, compared), *decisions))

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
