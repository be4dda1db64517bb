"""The modules that planning runs in place of a network's own."""

from __future__ import annotations

from torch import nn

from ..capture import copy_network, out_of_place, without_hooks
from ..functional import reset_net
from ..ir import Node, OpKind, TimeCoupling
from .modules import module_of


class TrialModules:
    """A module for each node that calls one; a copy where running it would spoil its state or statistics.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._copies: dict[tuple[str, bool], nn.Module] = {}

    def of(self, node: Node) -> nn.Module:
        """The module to run for a node; a copy is the same at every call."""
        module = module_of(self._net, node)
        if node.kind is OpKind.MODULE and node.coupling is TimeCoupling.POINTWISE:
            return out_of_place(module)
        key = (node.target, node.chain is None)
        if key not in self._copies:
            self._copies[key] = without_hooks(copy_network(module, {}))
            reset_net(self._copies[key])
        return self._copies[key]
