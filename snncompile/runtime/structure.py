"""What a module is made of, whichever tensors it holds: modules of one structure do the same operations.

The sites of a network that an ANN was converted to differ in their tensors only, so that one trace serves them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..capture import STATE_STORES, Adapter, NeuronChain, adapter_of
from ..ir import OpKind, Ref, TensorType, is_dense
from ..ir.step_statistics import BATCH_NORMS
from .fingerprint import OWN_BY_TORCH, PLAIN, Same

_DEEPEST = 8


class _Plain:
    """Instances hold nothing beside their `__dict__`."""


def _holds_only_attributes(value: Any) -> bool:
    """Whether `vars` shows all that an object holds: no slots, and no state in C."""
    cls = type(value)
    slots = any("__slots__" in vars(base) for base in cls.__mro__)
    return not slots and cls.__basicsize__ == _Plain.__basicsize__ and hasattr(value, "__dict__")


@dataclass(frozen=True)
class Structure:
    """The structure of a module.

    Attributes:
        key: Equal for modules that differ in their tensors only, and not in the types of these.
        tensors: Those tensors, in one order for all modules of the structure.
    """

    key: Any
    tensors: tuple[Tensor, ...]


def structure_of(module: nn.Module, adapter: Adapter) -> Structure:
    """The structure of a neuron or of a neuron chain, its states left out."""
    reader = _Reader()
    key = reader.chain(module) if isinstance(module, NeuronChain) else reader.neuron(module, adapter)
    return Structure(key, tuple(reader.tensors))


def apart_from_sizes(key: Any) -> tuple[Any, tuple[int, ...]]:
    """A structure's key, or types, and the sizes in it.

    Returns:
        The key where it only matters which sizes are 0, 1 or the same, and how dimensions lie in memory, and those
        sizes that are neither 0 nor 1, once each: of two equal keys, in the same order.
    """
    numbers = {0: 0, 1: 1}

    def walked(value: Any) -> Any:
        if isinstance(value, TensorType):
            sizes = tuple(numbers.setdefault(size, len(numbers)) for size in value.shape)
            order = tuple(sorted(range(len(sizes)), key=value.stride.__getitem__))
            return TensorType, sizes, order, is_dense(value.shape, value.stride), value.dtype, value.device
        return tuple(map(walked, value)) if type(value) is tuple else value

    return walked(key), tuple(numbers)[2:]


class _Reader:
    """Walks through a module; what it meets again it knows by its number."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def chain(self, chain: NeuronChain) -> Any:
        within = {name: number for number, name in enumerate(chain.chain.operands)}
        within |= {node.name: len(within) + number for number, node in enumerate(chain.chain.nodes)}
        found = []
        for node in chain.chain.nodes:
            if node.kind is OpKind.STATEFUL:
                part = chain.part(node.name)
                target = self.neuron(part, adapter_of(part))
            elif node.kind is OpKind.MODULE:
                target = self._module(chain.part(node.name), frozenset())
            else:
                target = Same(node.target)
            found.append((node.kind, target, self._arguments((node.args, dict(node.kwargs)), within)))
        return tuple(found), tuple(within[name] for name in chain.chain.results)

    def neuron(self, module: nn.Module, adapter: Adapter) -> Any:
        return Same(adapter), self._module(module, frozenset({*adapter.state_keys(module), *STATE_STORES}))

    def _module(self, module: nn.Module, skipped: Collection[str]) -> Any:
        if (number := self._met(module)) is not None:
            return number
        own = OWN_BY_TORCH - {"training"} | set(skipped)
        if type(module) in BATCH_NORMS:
            own |= {"num_features"}  # which it does not read; the sizes of its tensors say the same
        attributes = tuple((name, self._value(value, 0)) for name, value in vars(module).items() if name not in own)
        named = {**module._parameters, **module._buffers}
        tensors = tuple((name, self._value(value, 0)) for name, value in named.items() if name not in skipped)
        parts = tuple(
            (name, None if part is None else self._module(part, skipped)) for name, part in module._modules.items()
        )
        return type(module), attributes, tensors, parts, bool(module._forward_hooks or module._forward_pre_hooks)

    def _met(self, value: Any) -> int | None:
        """The number of something that was met before; from now on it has one."""
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        return None

    def _arguments(self, value: Any, within: Mapping[str, int]) -> Any:
        if isinstance(value, Ref):
            return Ref, within[value.name]
        if type(value) in (tuple, list):
            return type(value), tuple(self._arguments(item, within) for item in value)
        if type(value) is dict:
            return dict, tuple((name, self._arguments(item, within)) for name, item in value.items())
        if type(value) is slice:
            return slice, tuple(self._arguments(item, within) for item in (value.start, value.stop, value.step))
        return self._value(value, 0)

    def _value(self, value: Any, depth: int) -> Any:
        if type(value) is float:
            return float, value.hex()  # zeros of both signs are two numbers
        if type(value) in PLAIN:
            return type(value), value
        if depth == _DEEPEST:
            return Same(value)
        if isinstance(value, Tensor):
            if (number := self._met(value)) is not None:
                return number
            self.tensors.append(value)
            return type(value), TensorType.of(value), value.requires_grad
        if isinstance(value, nn.Module):
            return self._module(value, frozenset())
        if type(value) in (tuple, list):
            return type(value), tuple(self._value(item, depth + 1) for item in value)
        if type(value) is dict:
            return dict, tuple(
                (Same(name) if type(name) not in PLAIN else name, self._value(item, depth + 1))
                for name, item in value.items()
            )
        if not _holds_only_attributes(value):
            return Same(value)
        if (number := self._met(value)) is not None:
            return number
        return type(value), tuple((name, self._value(item, depth + 1)) for name, item in vars(value).items())
