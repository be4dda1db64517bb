"""What a plan took for granted of a network's Python side; where any of it has changed, the plan is made anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Leaf, classify
from ..ir import OpKind

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
OWN_BY_TORCH = frozenset(vars(nn.Module()))
_DEEPEST = 6


class Same:
    """Equal to another one of the same object only, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True)
class Visited:
    """A module that a plan depends on.

    Attributes:
        module: The module.
        leaf: How it is treated; None if it was traced through.
        registers: Attributes that carry a tensor from step to step, and so may change.
    """

    module: nn.Module
    leaf: Leaf | None
    registers: frozenset[str] = frozenset()


def fingerprint(visited: Iterable[Visited]) -> tuple[Any, ...]:
    """How each module is treated, and the attributes that tracing, or a rule for batching, read from it.

    Args:
        visited: The modules that tracing went through, and the leaves it met.

    Raises:
        CaptureError: A module has no single-step form any more.
    """
    return tuple((classify(each.module), _attributes(each)) for each in visited)


def value_key(module: nn.Module, skipped: frozenset[str]) -> tuple[Any, ...]:
    """Equal as long as a module and its parts hold the same values, parameters and buffers the same tensors.

    Args:
        module: The module.
        skipped: Attributes to leave out.
    """
    own = OWN_BY_TORCH - {"training"} | skipped
    return tuple(
        (
            type(part),
            *((name, _of_value(value, 0)) for name, value in vars(part).items() if name not in own),
            *(Same(tensor) for tensor in (*part._parameters.values(), *part._buffers.values())),
        )
        for part in module.modules()
    )


def _attributes(visited: Visited) -> tuple[Any, ...]:
    if visited.leaf is not None and visited.leaf.kind is not OpKind.MODULE:
        return ()  # read when the module runs, and some are its state
    skipped = OWN_BY_TORCH | visited.registers
    return tuple((name, _of_value(value, 0)) for name, value in vars(visited.module).items() if name not in skipped)


def _of_value(value: Any, depth: int) -> Any:
    """Equal before and after unless the value, or something it holds, was changed."""
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, (Tensor, nn.Module)) or depth == _DEEPEST:
        return Same(value)
    if isinstance(value, Mapping):
        return Same(value), tuple((key, _of_value(item, depth + 1)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return Same(value), tuple(_of_value(item, depth + 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return Same(value), frozenset(Same(item) if type(item) not in PLAIN else item for item in value)
    held = None if type(value).__module__.startswith("torch") else getattr(value, "__dict__", None)
    if not isinstance(held, dict) or isinstance(value, type):
        return Same(value)
    return Same(value), tuple((name, _of_value(item, depth + 1)) for name, item in held.items())
