"""What a forward may do that torch.fx would trace into something else: own backward functions, and switched modes."""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..ir import AutogradCall
from ..surrogate import SurrogateFunction
from ..torch_private import tree_leaves
from .hidden_states import Unreadable


class Untraceable(Exception):
    """The module at work must be called as it is."""


@contextmanager
def autograd_functions_as_leaves(create: Callable[[AutogradCall, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside, `Function.apply` on traced values makes one node of the call; traced through, its backward would be lost.

    Args:
        create: Makes a node that calls the function with these arguments.
    """
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return original.__func__(cls, *args, **kwargs)
        if kwargs or any(_is_code(leaf) for leaf in leaves):
            raise Untraceable(f"it hands code to {cls.__name__}.apply")
        objects = {place: arg for place, arg in enumerate(args) if not isinstance(arg, _GRAPH_ARGUMENTS)}
        rest = tuple(arg for place, arg in enumerate(args) if place not in objects)
        return create(AutogradCall(cls, objects), rest)

    _set_apply(classmethod(apply))
    try:
        yield
    finally:
        _set_apply(original)


def _set_apply(method: Any) -> None:
    torch.autograd.Function.apply = method  # type: ignore[method-assign]


_GRAPH_ARGUMENTS = (fx.Proxy, torch.Tensor, bool, int, float, complex, str, type(None), tuple, list, dict, torch.dtype)


def _is_code(value: Any) -> bool:
    """Whether calling a value may run any module; a surrogate function keeps nothing and does not."""
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return True
    return isinstance(value, nn.Module) and not isinstance(value, SurrogateFunction)


@contextmanager
def traced_values_are_tensors(is_library: Callable[[str], bool]) -> Iterator[None]:
    """Inside, a forward that asks `isinstance(x, Tensor)` of a traced value is told that it is one.

    One that asks it of a hidden state reads that state.

    Args:
        is_library: Whether a file holds code of torch or Python, which must learn what the value is.
    """
    original = builtins.isinstance

    def isinstance_(value: Any, cls: Any) -> bool:
        if not original(value, (fx.Proxy, Unreadable)) or original(value, cls):
            return original(value, cls)
        code = sys._getframe(1).f_code
        asks_for_user = code.co_name == "is_tensor" or not is_library(code.co_filename)
        if asks_for_user and original(value, Unreadable):
            value.raise_read()
        return asks_for_user and torch.Tensor in (cls if original(cls, tuple) else (cls,))

    builtins.isinstance = isinstance_
    try:
        yield
    finally:
        builtins.isinstance = original


def modes() -> tuple[bool, ...]:
    """The switches of torch that decide what an operation does beside its arguments."""
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))
