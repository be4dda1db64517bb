"""Which inputs a network takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..explicit_states import ExplicitStates


def input_names(net: nn.Module) -> list[str]:
    """Names of the positional arguments that a network's forward requires; at least one."""
    if isinstance(net, ExplicitStates):
        return net.input_names
    # Every call asks, and reading a signature takes as long as a small layer.
    function = getattr(net.forward, "__func__", None)
    if function is None:
        return _required_arguments(net.forward)
    if function not in _known:
        _known[function] = _required_arguments(net.forward)
    return list(_known[function])


_known: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()  # of functions that are methods named forward


def _required_arguments(forward: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return required or ["x"]
