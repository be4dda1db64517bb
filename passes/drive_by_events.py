"""Lets linear layers be driven by the spikes that come in, where that is measured to be faster.

The weights of what is not zero are added up in another order than a library's product has, so this needs
`reassociate=True`. Convolutions are driven by events along with their layout: see `choose_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..ir import Batching, Node, OpKind, StepGraph
from .events import carriers_of_spikes, consider_events
from .infra import Numerics, Pass, PassContext, PassResult


@dataclass(frozen=True)
class DriveByEvents(Pass):
    """Give linear layers of spikes their event-driven form."""

    name: ClassVar[str] = "drive-by-events"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATES
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "invariants"})
    provides: ClassVar[frozenset[str]] = frozenset({"events"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        if context.needs_grad or "events" in graph.facts:
            return PassResult(graph, False)
        carriers = carriers_of_spikes(graph, context)
        linear = [node for node in graph if _is_linear(node, context)]
        found = [each for node in linear if (each := consider_events(graph, node, carriers, context)) is not None]
        decisions = tuple(self.decide(*each.decision) for each in found)
        driven = {each.node.name: each.node for each in found if each.node.events_below}
        return PassResult(graph.with_nodes(driven) if driven else graph, bool(driven), decisions)


def _is_linear(node: Node, context: PassContext) -> bool:
    if node.kind is not OpKind.MODULE or node.batching is Batching.PER_STEP or node.invariant:
        return False
    return context.acts_like(node) is nn.Linear and "weight" in context.net.get_submodule(node.target)._parameters
