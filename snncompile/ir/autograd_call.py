"""A call of a user's `torch.autograd.Function`, which has a backward of its own and so is never traced through."""

from __future__ import annotations

from typing import Any

import torch


class AutogradCall:
    """The function as one callable; equal for the same function.

    Args:
        function: The class whose `apply` is called.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutogradCall) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}.apply"
