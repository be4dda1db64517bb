"""A twin of a network whose tensors have no data: it computes shapes, strides and bytes, and changes nothing real."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..torch_private import FakeTensorMode, fake_mode, fake_twin
from .copies import copy_network, copy_sharing_tensors, tensors_of
from .leaves import BATCH_NORMS, without_hooks


class FakeNetwork:
    """A network and a mode in which to run it without data.

    Attributes:
        mode: The fake-tensor mode that its tensors belong to; enter it to run modules.
        net: The twin; submodules are found under the same qualified names.
    """

    def __init__(self, net: nn.Module) -> None:
        self.mode: FakeTensorMode = fake_mode()
        memo: dict[int, Any] = {}
        # deepcopy takes from the memo what it finds there, so every tensor is replaced wherever it is held.
        keep_alive = []
        for tensor in tensors_of(net):
            memo[id(tensor)] = self.twin(tensor)
            keep_alive.append(tensor)
        self.net: nn.Module = without_hooks(copy_network(net, memo))
        for module in self.net.modules():
            if isinstance(module, BATCH_NORMS) and module.momentum is None:
                module.momentum = 0.1  # a cumulative average divides by a count, which has no data here

    def copy(self) -> FakeNetwork:
        """Another twin, of the same data-less tensors, whose modules change nothing of this one's."""
        copied = copy.copy(self)
        copied.net = copy_sharing_tensors(self.net)
        return copied

    def twin(self, tensor: Tensor) -> Tensor:
        """The tensor without its data; a parameter stays a parameter."""
        if isinstance(tensor, nn.Parameter):
            fake = fake_twin(self.mode, tensor.detach())
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        twin = fake_twin(self.mode, tensor.detach())
        return twin.requires_grad_(tensor.requires_grad)

    def module(self, qualified_name: str) -> nn.Module:
        return self.net.get_submodule(qualified_name)

    def constant(self, path: str) -> Tensor:
        tensor: Tensor = resolve_attribute(self.net, path)
        return tensor


def resolve_attribute(net: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = net
    for part in path.split("."):
        value = getattr(value, part)
    return value
