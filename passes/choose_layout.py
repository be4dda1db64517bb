"""Lets 2d convolutions compute channels-last where that is measured to be faster.

Library kernels round differently in another layout, so this needs `reassociate=True`. All convolutions change together:
between two layouts every image would have to be copied. Where spikes come in and are few, a convolution is driven by
them instead: the library multiplies by zeros all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..capture import is_plain_convolution
from ..ir import Batching, Decision, Node, OpKind, StepGraph, Verdict, has_registers
from ..schedule import MAX_CHUNK, SPIKING, chunk_lengths
from .infra import Numerics, Pass, PassContext, PassResult

_TIMED_STEPS = 4
_MOST_EVENTS = 0.5  # of an input; beyond it, telling what is not zero is wasted
_KEEP_ZEROS = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)
_KEEP_ZEROS_BY_NAME = frozenset(
    {"add", "__add__", "cat", "concat", "getitem", "relu", "flatten", "reshape", "view", "max_pool2d", "avg_pool2d"}
)


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
        now, then, decisions = 0.0, 0.0, []
        driven: dict[str, Node] = {}
        for name in (node.name for node in convolutions if not node.invariant):
            now += _seconds(graph, graph[name], context)
            seconds = _seconds(tried, tried[name], context)
            if (found := _driven_by_events(tried, tried[name], seconds, context)) is not None:
                driven[name], by_events = found
                decisions.append(
                    self.decide(driven[name].where, Verdict.DONE, _events_told(driven[name], seconds, by_events))
                )
                seconds = by_events
            then += seconds
        compared = f"{len(convolutions)} convolutions: {_ms(then)} a step channels-last, {_ms(now)} as they are"
        if then >= now:
            return PassResult(graph, False, (self._decide(Verdict.REFUSED, compared),))
        return PassResult(tried.with_nodes(driven), True, (self._decide(Verdict.DONE, compared), *decisions))

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


def _seconds(graph: StepGraph, node: Node, context: PassContext) -> float:
    """Seconds a step at the best chunk length."""
    lengths = chunk_lengths(min(context.options.steps, MAX_CHUNK))
    return min(context.measurements.seconds(graph, node, length) / length for length in lengths)


def _driven_by_events(graph: StepGraph, node: Node, seconds: float, context: PassContext) -> tuple[Node, float] | None:
    """A convolution of spikes in its event-driven form and its seconds a step, if that is faster.

    Its time grows with the part of its input that is not zero, so where it equals the library's can be told from two.
    """
    (operand,) = node.refs
    if context.kernels is None or context.kernels.event_obstacle(context.net, node):
        return None
    if not _carries_spikes(graph, graph[operand], context):
        return None
    length = min(context.options.steps, _TIMED_STEPS)
    candidate = replace(node, events_below=_MOST_EVENTS)
    by_events = context.measurements.seconds(graph, candidate, length) / length
    if by_events >= seconds:
        return None
    return replace(candidate, events_below=min(_MOST_EVENTS, SPIKING * seconds / by_events)), by_events


def _events_told(node: Node, seconds: float, by_events: float) -> str:
    return (
        f"driven by events where less than {node.events_below:.0%} of its input is not zero: "
        f"{_ms(by_events)} a step at {SPIKING:.1%}, {_ms(seconds)} by the library"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _carries_spikes(graph: StepGraph, node: Node, context: PassContext) -> bool:
    """Whether a value is made of the outputs of neurons by what leaves zeros zeros."""
    if node.kind is OpKind.STATEFUL:
        return True
    read = [graph[name] for name in node.refs]
    changing = [_carries_spikes(graph, each, context) for each in read if each.kind is not OpKind.CONSTANT]
    if node.kind is OpKind.MODULE:
        return context.acts_like(node) in _KEEP_ZEROS and all(changing)
    if node.kind in (OpKind.FUNCTION, OpKind.METHOD):
        if _name(node) in ("mul", "__mul__"):
            return any(changing)
        return _name(node) in _KEEP_ZEROS_BY_NAME and bool(changing) and all(changing)
    return False


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
