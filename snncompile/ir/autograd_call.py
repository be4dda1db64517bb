"""A call of a user's `torch.autograd.Function`, which has a backward of its own and so is never traced through."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch


class AutogradCall:
    """The function as one callable; equal for the same function with the same objects.

    Args:
        function: The class whose `apply` is called.
        objects: Arguments that are no tensors or numbers, by their position among all arguments.
    """

    def __init__(
        self, function: type[torch.autograd.Function], objects: Mapping[int, Any] = MappingProxyType({})
    ) -> None:
        self.function = function
        self.objects = dict(objects)
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        rest = iter(args)
        count = len(args) + len(self.objects)
        return self.function.apply(*(self.objects[n] if n in self.objects else next(rest) for n in range(count)))

    def _key(self) -> tuple[Any, ...]:
        return (self.function, *((place, id(value)) for place, value in self.objects.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutogradCall) and other._key() == self._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}.apply"
