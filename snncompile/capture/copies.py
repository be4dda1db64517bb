"""Which tensors a network holds, wherever its modules keep them; and copies of all the rest."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..explicit_states import ExplicitStates


def copy_network(net: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy of a network, random generators included.

    Args:
        net: The network, or a part of one.
        tensors: What to put in the place of tensors, by their id; others are copied.

    Raises:
        CaptureError: The network holds something that cannot be copied.
    """
    # A tensor with a history, such as a carried state, cannot be copied with it.
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in tensors_of(net) if not tensor.is_leaf}
    memo.update(tensors)
    for module in net.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                memo[id(value)] = value.clone_state()  # a deep copy would go on drawing from the same state
    try:
        return copy.deepcopy(net, memo)
    except Exception as error:
        raise CaptureError(f"the network cannot be copied, which planning needs: {error}") from error


def copy_sharing_tensors(net: nn.Module) -> nn.Module:
    """A copy to trace: what tracing does to Python objects it does to the copy's.

    A tensor with a history, such as a carried state, is not shared: a forward that writes into it would add to the
    history, which no later writing takes back.
    """
    with torch.enable_grad():
        return copy_network(
            net, {id(tensor): tensor if tensor.is_leaf else tensor.clone() for tensor in tensors_of(net)}
        )


def tensors_of(net: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the modules of a network hold as parameter, buffer, state or attribute."""
    modules = list(net.modules())
    if isinstance(net, ExplicitStates):
        yield from _tensors_in(net.start)
        modules.append(net.wrapped)
    for module in modules:
        for value in vars(module).values():
            yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _tensors_in(item)
