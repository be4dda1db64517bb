"""Computes once what every step would compute again: all that precedes the first state or randomness.

Loop-invariant code motion over time. The value is computed at one step's shape, so it has the step loop's bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir import Node, OpKind, StepGraph, TimeCoupling, Verdict
from .infra import Pass, PassContext, PassResult


@dataclass(frozen=True)
class HoistStatic(Pass):
    """Mark constants, a static input, and what depends on nothing else."""

    name: ClassVar[str] = "hoist-static"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "regions"})
    provides: ClassVar[frozenset[str]] = frozenset({"invariants"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        invariant: set[str] = set()
        for node in graph:
            if _is_invariant(node, invariant, context.options.static_input):
                invariant.add(node.name)
        changes = {name: replace(graph[name], invariant=True) for name in invariant if not graph[name].invariant}
        if not changes:
            return PassResult(graph, False)
        decisions = tuple(
            self.decide(node.where, Verdict.DONE, f"computed once instead of {context.options.steps} times")
            for node in graph
            if node.name in changes and node.kind not in (OpKind.INPUT, OpKind.CONSTANT)
        )
        return PassResult(graph.with_nodes(changes), True, decisions)


def _is_invariant(node: Node, invariant: set[str], static_input: bool) -> bool:
    if node.kind is OpKind.INPUT:
        return static_input
    if node.kind is OpKind.CONSTANT:
        return True
    if node.kind is OpKind.OUTPUT or node.coupling is not TimeCoupling.POINTWISE or node.region is not None:
        return False
    return invariant.issuperset(node.refs)
