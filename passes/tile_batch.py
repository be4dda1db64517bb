"""Judges whether a batch may run in parts: nothing may couple its samples.

A sample's result is then the same in every part but for rounding: library kernels may round differently at another
batch size. Synonym: micro-batching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ScheduleError
from ..ir import Batching, OpKind, StepGraph, TimeCoupling, Verdict, tensor_types
from ..schedule import output_names
from .infra import Pass, PassContext, PassResult

_GIVEN = (OpKind.INPUT, OpKind.CONSTANT, OpKind.OUTPUT)
_SAMPLE_BY_SAMPLE = (Batching.FOLD, Batching.ELEMENTWISE, Batching.SELECT)


@dataclass(frozen=True)
class TileBatch(Pass):
    """Let a plan for a part of the batch stand for the whole, or say what couples the samples.

    Attributes:
        tiles: How many parts there are.
        size: Samples in each.
    """

    name: ClassVar[str] = "tile-batch"
    requires: ClassVar[frozenset[str]] = frozenset({"coupling", "chains"})
    provides: ClassVar[frozenset[str]] = frozenset({"tiles"})
    tiles: int
    size: int

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        if obstacle := self._coupling(graph, context):
            raise ScheduleError(f"the batch cannot run in parts: {obstacle}")
        reason = f"the batch runs in {self.tiles} parts of {self.size} samples, one after the other"
        return PassResult(graph, False, (self.decide("", Verdict.DONE, reason),))

    def _coupling(self, graph: StepGraph, context: PassContext) -> str:
        """What may couple the samples of a batch; empty if nothing does."""
        without_samples: set[str] = set()  # made of parameters alone
        for node in graph:
            if node.kind is OpKind.CONSTANT:
                without_samples.add(node.name)
            if node.kind in _GIVEN:
                continue
            if node.refs and all(name in without_samples for name in node.refs):
                without_samples.add(node.name)
            elif any(not leaf.shape or leaf.shape[0] != self.size for leaf in tensor_types(node.value)):
                return f"{node.where} computes something that is not one row for each sample"
            elif node.kind is OpKind.STATEFUL:
                # A neuron that has a kernel computes each element for itself.
                types = tuple(graph[name].value for name in node.refs)
                if context.kernels is None or context.kernels.obstacle(context.net, node, types):
                    return f"{node.where} has no kernel, so it may look at several samples at once"
            elif node.coupling is not TimeCoupling.POINTWISE or node.batching not in _SAMPLE_BY_SAMPLE:
                return f"{node.where} may look at several samples at once"
        results = [graph[name] for name in output_names(graph)]
        if any(node.kind in _GIVEN or node.timeless or node.name in without_samples for node in results):
            return "an output is not computed from the samples step by step"
        return ""
