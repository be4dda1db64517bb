"""What a forward may do that torch.fx would trace into something else: own backward functions, and switched modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..ir import AutogradCall
from ..torch_private import tree_leaves


class Untraceable(Exception):
    """The module at work must be called as it is."""


@contextmanager
def autograd_functions_as_leaves(create: Callable[[AutogradCall, tuple[Any, ...]], fx.Proxy]) -> Iterator[None]:
    """Inside, `Function.apply` on traced values makes one node of the call; traced through, its backward would be lost.

    Args:
        create: Makes a node that calls the function with these arguments.
    """
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return original.__func__(cls, *args, **kwargs)
        if kwargs or any(callable(leaf) and not isinstance(leaf, (fx.Proxy, type)) for leaf in leaves):
            raise Untraceable(f"it hands code to {cls.__name__}.apply")
        return create(AutogradCall(cls), args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


def modes() -> tuple[bool, ...]:
    """The switches of torch that decide what an operation does beside its arguments."""
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))
