"""The module that a node calls, in the form in which it runs."""

from __future__ import annotations

from torch import nn

from .. import capture
from ..ir import Node
from .event_modules import event_driven
from .spike_bits import KeepsBits


def module_of(net: nn.Module, node: Node) -> nn.Module:
    """The module that a node calls, in a network or in its twin; of a chain's node, the chain."""
    if node.events_below:
        return event_driven(net.get_submodule(node.target), node.events_below)
    module = capture.module_of(net, node)
    return KeepsBits(module, node.keeps_bits) if node.keeps_bits else module
