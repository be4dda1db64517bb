"""Python attributes that a forward pass changes: state that tracing would freeze into a wrong constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_MISSING = object()
_CONTAINERS = (list, dict, set)
_OWN_BY_TORCH = frozenset({"_parameters", "_buffers", "_modules", "training"})


class AttributeSnapshot:
    """The attributes of some modules at one moment; finds and undoes what changed since.

    Args:
        modules: Qualified name -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._before = {name: _attributes(module) for name, module in modules.items()}

    def changed(self) -> Iterator[tuple[str, str]]:
        """Qualified module name and attribute of every difference."""
        for name, module in self._modules.items():
            before, now = self._before[name], vars(module)
            for attribute in before.keys() | (now.keys() - _OWN_BY_TORCH):
                if _differs(before.get(attribute, (_MISSING, None)), now.get(attribute, _MISSING)):
                    yield name, attribute

    def restore(self) -> None:
        """Put every attribute back, contents of lists, dicts and sets included."""
        for name, attribute in list(self.changed()):
            attributes = vars(self._modules[name])
            value, content = self._before[name].get(attribute, (_MISSING, None))
            if value is _MISSING:
                del attributes[attribute]
                continue
            attributes[attribute] = value
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(content)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, type(value)(value) if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
        if name not in _OWN_BY_TORCH
    }


def _differs(before: tuple[Any, Any], now: Any) -> bool:
    value, content = before
    if value is not now:
        return True
    if content is None:
        return False
    if isinstance(content, dict):
        return content.keys() != now.keys() or any(content[key] is not now[key] for key in content)
    if isinstance(content, set):
        return bool(content != now)
    return len(content) != len(now) or any(old is not new for old, new in zip(content, now, strict=True))
