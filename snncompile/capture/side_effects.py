"""Python attributes that a forward pass changes: state that tracing would freeze into a wrong constant."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

_MISSING = object()
_OWN_BY_TORCH = frozenset({"_parameters", "_buffers", "_modules"})
_CLOSED = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)


class AttributeSnapshot:
    """The attributes of some modules at one moment; finds and undoes what changed since.

    Lists, dicts, sets, plain objects and tensors are followed into, so that a change inside one is seen as well.

    Args:
        modules: Qualified name -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._before = {
            name: {attribute: _Saved(value) for attribute, value in _attributes(module).items()}
            for name, module in modules.items()
        }

    def changed(self) -> Iterator[tuple[str, str]]:
        """Qualified module name and attribute of every difference."""
        for name, module in self._modules.items():
            before, now = self._before[name], _attributes(module)
            for attribute in sorted(before.keys() | now.keys()):
                saved = before.get(attribute)
                if saved is None or saved.differs_from(now.get(attribute, _MISSING)):
                    yield name, attribute

    def value(self, name: str, attribute: str) -> Any:
        """What an attribute held then; None where there was none."""
        saved = self._before[name].get(attribute)
        return None if saved is None else saved.value

    def restore(self, changed: Collection[tuple[str, str]] | None = None) -> None:
        """Put every attribute back, contents included.

        Args:
            changed: What `changed` has just found; None to look.
        """
        for name, attribute in list(self.changed()) if changed is None else changed:
            attributes = place_of(self._modules[name], attribute)
            saved = self._before[name].get(attribute)
            if saved is None:
                del attributes[attribute]
            else:
                saved.restore()
                attributes[attribute] = saved.value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes and buffers."""
    plain = {name: value for name, value in vars(module).items() if name not in _OWN_BY_TORCH}
    return plain | module._buffers


def place_of(module: nn.Module, attribute: str) -> dict[str, Any]:
    """The dictionary in which a module keeps an attribute or buffer."""
    buffers: dict[str, Any] = module._buffers
    return buffers if attribute in buffers else vars(module)


class _Saved:
    """A value and, where it can be changed from inside, what it holds."""

    def __init__(self, value: Any, above: frozenset[int] = frozenset()) -> None:
        self.value = value
        self.data = value.detach().clone() if isinstance(value, Tensor) else None
        self.is_trainable = isinstance(value, Tensor) and value.requires_grad
        inside = above | {id(value)}
        # What holds itself is followed once.
        held = {} if id(value) in above else _held_by(value)
        self.held = {key: _Saved(item, inside) for key, item in held.items()}
        self.is_open = id(value) not in above

    def differs_from(self, now: Any) -> bool:
        if now is not self.value:
            return True
        if self.data is not None:
            return now.requires_grad != self.is_trainable or not _same_data(self.data, now)
        if not self.is_open:
            return False
        held = _held_by(now)
        return held.keys() != self.held.keys() or any(saved.differs_from(held[k]) for k, saved in self.held.items())

    def restore(self) -> None:
        if self.data is not None:
            if self.value.is_leaf:
                self.value.requires_grad_(self.is_trainable)
            if not _same_data(self.data, self.value):  # every write counts as a change to what backward has kept
                with torch.no_grad():
                    self.value.copy_(self.data)
            return
        for saved in self.held.values():
            saved.restore()
        items = {key: saved.value for key, saved in self.held.items()}
        if isinstance(self.value, (list, deque)):
            self.value.clear()
            self.value.extend(items.values())
        elif isinstance(self.value, set):
            self.value.clear()
            self.value.update(items.values())
        elif self.is_open and not isinstance(self.value, tuple) and (store := _store_of(self.value)) is not None:
            store.clear()
            store.update(items)


def _store_of(value: Any) -> MutableMapping[Any, Any] | None:
    """The mapping in which a dict or a plain object keeps its contents."""
    if isinstance(value, MutableMapping):
        return value
    return None if isinstance(value, _CLOSED) else getattr(value, "__dict__", None)


def _held_by(value: Any) -> dict[Any, Any]:
    """What a value holds, under keys by which to find it again."""
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if isinstance(value, set):
        return {item: item for item in value}
    return dict(_store_of(value) or {})


def _same_data(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    if torch.equal(before, now):
        return True
    same: Tensor = (before == now) | ((before != before) & (now != now))  # a NaN stays a NaN
    return bool(same.all())
