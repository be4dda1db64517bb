"""Finds the modules whose forward reads the state of another module, by making that state unreadable while tracing."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NoReturn

import torch

from ..torch_private import tree_leaves

Place = tuple[str, MutableMapping[str, Any], str]  # qualified module name, the dict that holds the state, its key there


class StateRead(Exception):
    """A forward under trace reads what changes from step to step."""

    def __init__(self, owner: str, attribute: str) -> None:
        super().__init__(f"it reads {attribute!r} of {owner or 'the network'}, which changes from step to step")
        self.owner = owner


class Unreadable:
    """Stands for a state: may be looked up and passed on, and raises `StateRead` as soon as it is used."""

    def __init__(self, owner: str, attribute: str) -> None:
        self.__dict__.update(_owner=owner, _attribute=attribute)

    def raise_read(self, *_: Any, **__: Any) -> NoReturn:
        raise StateRead(self.__dict__["_owner"], self.__dict__["_attribute"])

    __getattr__ = __setattr__ = raise_read

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        for found in (*args, *(kwargs or {}).values()):
            if isinstance(found, cls):
                found.raise_read()
        raise StateRead("", "a state")


_USES = """
    bool float int index len iter next getitem setitem delitem contains call eq ne lt le gt ge neg pos abs invert
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv mod rmod pow rpow matmul
    rmatmul and rand or ror xor rxor
""".split()  # noqa: SIM905
for _use in _USES:
    setattr(Unreadable, f"__{_use}__", Unreadable.raise_read)
Unreadable.__hash__ = object.__hash__  # type: ignore[method-assign]  # torch puts buffers into sets

_OWN_BY_TORCH = frozenset(vars(torch.nn.Module()))


def places_held_by(name: str, module: torch.nn.Module, *, unset: bool) -> Iterator[Place]:
    """Where a module that runs as it is, or a part of it, may keep a tensor from one step to the next.

    Args:
        name: Qualified name of the module.
        module: The module.
        unset: Count attributes that are None as well: a tensor may come there.
    """
    for part in module.modules():
        yield from ((name, part._buffers, key) for key, value in part._buffers.items() if unset or value is not None)
        for key, value in vars(part).items():
            if key not in _OWN_BY_TORCH and (_holds_tensors(value) or (unset and value is None)):
                yield name, vars(part), key


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a collection with one in it, or one that has nothing in it yet."""
    if isinstance(value, (list, tuple, dict, set, deque)):
        return not value or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    return isinstance(value, torch.Tensor)


class HiddenStates:
    """Puts `Unreadable` stand-ins in the place of states while inside."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._places = [(store, key, store[key], Unreadable(owner, key)) for owner, store, key in places]

    def __enter__(self) -> None:
        for store, key, _, stand_in in self._places:
            store[key] = stand_in

    def __exit__(self, *error: Any) -> None:
        for store, key, state, _ in self._places:
            store[key] = state


class RandomState:
    """The global random number generators of torch, Python and NumPy at one moment; a context that restores them."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = _numpy_random().get_state(legacy=False) if _numpy_random() else None

    def has_moved(self) -> bool:
        """Whether numbers were drawn since."""
        if not torch.equal(self._torch, torch.get_rng_state()) or self._python != random.getstate():
            return True
        if self._numpy is None:
            return False
        return pickle.dumps(self._numpy) != pickle.dumps(_numpy_random().get_state(legacy=False))

    def __enter__(self) -> RandomState:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            _numpy_random().set_state(self._numpy)


def _numpy_random() -> Any:
    """NumPy's generator, where NumPy has been imported; without it no forward can draw from it."""
    return getattr(sys.modules.get("numpy"), "random", None)
