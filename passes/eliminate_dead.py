"""Removes operations whose value nobody reads and whose execution nobody notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Effects, Node, OpKind, StepGraph, Verdict
from ..ir.batching_rules import is_known_pure
from .infra import Pass, PassContext, PassResult

_REMOVABLE = (OpKind.CONSTANT, OpKind.LOAD, OpKind.MODULE, OpKind.FUNCTION, OpKind.METHOD)


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove unread nodes without state, randomness or writes."""

    name: ClassVar[str] = "eliminate-dead"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"no-dead-nodes"})

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        readers = {name: len(users) for name, users in graph.consumers.items()}
        dead: list[str] = []
        for node in reversed(list(graph)):
            if readers[node.name] == 0 and _is_removable(node):
                dead.append(node.name)
                for source in node.refs:
                    readers[source] -= 1
        if not dead:
            return PassResult(graph, False)
        decisions = tuple(self.decide(name, Verdict.DONE, "its value is never read") for name in reversed(dead))
        return PassResult(graph.without(dead), True, decisions)


def _is_removable(node: Node) -> bool:
    # A dead random node still draws, and so shifts what every later one draws.
    if node.kind is OpKind.FUNCTION and not is_known_pure(node.target):
        return False
    return node.kind in _REMOVABLE and node.effects == Effects()
