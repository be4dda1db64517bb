"""Which layers are driven by events: where spikes come in and are few, a library multiplies by zeros all the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..ir import Node, OpKind, StepGraph, Verdict
from ..ir.batching_rules import called_name
from ..schedule import MAX_CHUNK, SPIKING, chunk_lengths
from .infra import PassContext

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
class Considered:
    """What was found of a layer of spikes.

    Attributes:
        node: The layer, in its event-driven form if that is faster.
        seconds: A step takes in this form.
        reason: For the report.
    """

    node: Node
    seconds: float
    reason: str

    @property
    def decision(self) -> tuple[str, Verdict, str]:
        return self.node.where, Verdict.DONE if self.node.events_below else Verdict.REFUSED, self.reason


def consider_events(graph: StepGraph, node: Node, carriers: Collection[str], context: PassContext) -> Considered | None:
    """A layer in its event-driven form, if that is faster; None if no spikes come in, or there are no kernels.

    Its time grows at most in proportion to the part of its input that is not zero, so two times tell up to where it is
    the faster.

    Args:
        graph: Where the layer stands.
        node: The layer.
        carriers: From `carriers_of_spikes`.
        context: What is known besides.
    """
    if context.kernels is None or len(node.refs) != 1 or node.refs[0] not in carriers:
        return None
    by_library = seconds_a_step(graph, node, context)
    if obstacle := context.kernels.event_obstacle(context.net, node):
        return Considered(node, by_library, f"is not driven by events: {obstacle}")
    length = min(context.options.steps, _TIMED_STEPS)
    driven = replace(node, events_below=_MOST_EVENTS)
    seconds = context.measurements.seconds(graph, driven, length) / length
    compared = f"{milliseconds(seconds)} a step at {SPIKING:.1%}, {milliseconds(by_library)} by the library"
    if seconds >= by_library:
        return Considered(node, by_library, f"is not driven by events: {compared}")
    driven = replace(node, events_below=min(_MOST_EVENTS, SPIKING * by_library / seconds))
    below = f"driven by events where less than {driven.events_below:.0%} of its input is not zero"
    return Considered(driven, seconds, f"{below}: {compared}")


def seconds_a_step(graph: StepGraph, node: Node, context: PassContext) -> float:
    """Seconds a step at the best chunk length."""
    lengths = chunk_lengths(min(context.options.steps, MAX_CHUNK))
    return min(context.measurements.seconds(graph, node, length) / length for length in lengths)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def carriers_of_spikes(graph: StepGraph, context: PassContext) -> frozenset[str]:
    """The values that are made of the outputs of neurons by what leaves zeros zeros."""
    found: set[str] = set()
    for node in graph:
        read = [name for name in node.refs if graph[name].kind is not OpKind.CONSTANT]
        if node.kind is OpKind.STATEFUL or _leaves_zeros(node, [name in found for name in read], context):
            found.add(node.name)
    return frozenset(found)


def _leaves_zeros(node: Node, are_carriers: Sequence[bool], context: PassContext) -> bool:
    """Whether a node's value is mostly zeros where these of its operands are."""
    if node.kind is OpKind.MODULE:
        return context.acts_like(node) in _KEEP_ZEROS and all(are_carriers)
    if node.kind not in (OpKind.FUNCTION, OpKind.METHOD):
        return False
    name = called_name(node.target)
    if name in ("mul", "__mul__"):
        return any(are_carriers)
    return name in _KEEP_ZEROS_BY_NAME and bool(are_carriers) and all(are_carriers)
