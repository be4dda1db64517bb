"""Finds the cycles across nodes: what feeds back must run step by step, and only that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir import StepGraph, Verdict
from ..ir.verifier import recurrent_components
from .infra import Pass, PassContext, PassResult


@dataclass(frozen=True)
class FindRecurrentRegions(Pass):
    """Number the strongly connected components of more than one node."""

    name: ClassVar[str] = "find-recurrent-regions"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling"})
    provides: ClassVar[frozenset[str]] = frozenset({"regions"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        components = recurrent_components(graph)
        region_of = {name: number for number, members in enumerate(components) for name in members}
        changes = {
            node.name: replace(node, region=region_of.get(node.name))
            for node in graph
            if node.region != region_of.get(node.name)
        }
        if not changes:
            return PassResult(graph, False)
        decisions = tuple(
            self.decide(members[0], Verdict.NOTE, f"recurrent region {number} runs step by step: {', '.join(members)}")
            for number, members in enumerate(components)
        )
        return PassResult(graph.with_nodes(changes), True, decisions)
