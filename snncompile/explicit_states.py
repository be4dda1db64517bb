"""Networks that pass their states through `forward`, as those that keep them.

snnTorch without `init_hidden`, Norse, and many networks written by hand take the states of the last step as arguments
and return those of this one: `y, s = net(x, s)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError

__all__ = ["ExplicitStates", "with_states"]

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_MAX_TRIED = 64


def with_states(net: nn.Module, count: int = 1) -> ExplicitStates:
    """Say how many states a network passes through `forward`, so that it can be compiled.

    `opt = snncompile.optimize(snncompile.with_states(net, 2), T)` is called as the network is:
    `y, mem1, mem2 = opt(x_seq, mem1, mem2)`, with the states of the first step going in and those after the last step
    coming out, in the network's own structures. A state may be None where the network takes that for a start. What is
    handed in is left as it is, even if the network writes into the list that it is given.

    Args:
        net: Its `forward` takes the inputs of one step and then `count` states (or `*states`), and returns a tuple of
            its outputs and then the `count` new states.
        count: Number of states, at least 1; each may be a tensor or any nesting of tuples, lists, dicts and tensors.
            What is no tensor in it must stay the same from step to step.

    Raises:
        TypeError, ValueError: `net` is no module, or `count` is no number of states that its `forward` takes.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"with_states expects an nn.Module, got {type(net).__name__}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count must be an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    wrapped = ExplicitStates(net, count)
    if not wrapped.input_names:
        raise ValueError(
            f"forward of {type(net).__name__} must take at least one input and then {count} states by position, "
            f"its arguments are {inspect.signature(net.forward)}"
        )
    return wrapped


class ExplicitStates(nn.Module):
    """A network between whose steps the states stay in attributes; parameters and submodules are the network's own.

    Args:
        net: See `with_states`.
        count: See `with_states`.
    """

    # Kept out of the tree of modules: the parts of the network are this module's own parts.
    _net: nn.Module
    _count: int
    _start: _Start
    _template: Any
    _returned: int
    _own_changes: tuple[str, ...]

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        self.__dict__.update(_net=net, _count=count, _start=_Start(), _template=None, _returned=0, _own_changes=())
        for name in _SHARED:
            self.__dict__[name] = net.__dict__[name]

    @property
    def input_names(self) -> list[str]:
        """Names of the network's arguments before the states."""
        parameters = inspect.signature(self._net.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in parameters if p.kind in kinds]
        takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        return names if takes_any else names[: -self._count]

    @property
    def count(self) -> int:
        """Number of states."""
        return self._count

    @property
    def wrapped(self) -> nn.Module:
        """The network itself."""
        return self._net

    @property
    def start(self) -> tuple[Any, ...] | None:
        """The states of the next step, where they are not of the lasting form."""
        return self._start.states

    @property
    def state_attributes(self) -> list[str]:
        """Names of the attributes that hold the states' tensors; none before it is known how many there are."""
        return [f"state_{number}" for number in range(_count_of(self._template))]

    @property
    def own_changes(self) -> tuple[str, ...]:
        """Attributes of the network itself, not of a part, that a step was seen to change."""
        return self._own_changes

    @property
    def lasting_form(self) -> str:
        """How the states are nested after a step; empty before it is known."""
        return "" if self._template is None else describe(self._template)

    @property
    def training(self) -> bool:
        """The network's own mode, which its forward may ask for."""
        return bool(self._net.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_net" in self.__dict__:
            self._net.training = mode

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        """One step `[N, *]`: the network's outputs without its states.

        Raises:
            TypeError: The network returns something else than outputs and states.
            CaptureError: Its states are not built as those of the step before.
        """
        result: Any = self._net.forward(*inputs, *self._states())
        if isinstance(result, fx.Proxy) and self._template is not None:
            result = _parts(result, range(self._returned))  # of a part that is called as it is
        if not isinstance(result, tuple) or len(result) <= self._count:
            what = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise TypeError(
                f"a network with {self._count} states must return a tuple of outputs and then the states, got {what}"
            )
        outputs, states = result[: -self._count], result[-self._count :]
        if self._template is None:
            self.__dict__.update(_template=_template_of(states), _returned=len(result))
        leaves = _leaves_like(self._template, states)
        if leaves is None:
            raise CaptureError(
                f"the states after this step are {describe(states)}, after another they were "
                f"{describe(self._template)}; they may hold tensors, tuples, lists and dicts, and only the tensors may "
                "change from step to step"
            )
        self.__dict__.update(zip(self.state_attributes, leaves, strict=True))
        return outputs

    def complete(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """As many states as the network takes, None for those left out; the lists and dicts are copies.

        Raises:
            TypeError: There are more.
        """
        if len(states) > self._count:
            raise TypeError(f"the network takes {self._count} states after its inputs, got {len(states)}")
        return (*(_copied(state) for state in states), *(None,) * (self._count - len(states)))

    def forget_form(self) -> None:
        """Take what the next step returns for the lasting form."""
        self.__dict__["_template"] = None

    def has_tried(self, form: str) -> bool:
        """Whether a step from such states is known to work."""
        return self._template is not None and form in self._start.tried

    def learn(self, twin: ExplicitStates, form: str, own_changes: tuple[str, ...]) -> None:
        """What a copy has found out by steps from states of this form.

        Args:
            twin: The copy.
            form: How the states were nested.
            own_changes: Attributes of the network itself that the steps changed.
        """
        changes = tuple(sorted({*self._own_changes, *own_changes}))
        self.__dict__.update(_returned=twin._returned, _own_changes=changes)
        is_new = not _is_like(self._template, twin._template)
        if is_new:  # what hangs on the old one, such as a plan, notices by its identity
            self.__dict__["_template"] = twin._template
        if is_new or len(self._start.tried) >= _MAX_TRIED:
            self._start.tried.clear()
        self._start.tried.add(form)

    def put_states(self, states: tuple[Any, ...]) -> None:
        """Start from these states.

        Args:
            states: From `complete`.
        """
        leaves = None if self._template is None else _leaves_like(self._template, states)
        self._start.states = states if leaves is None else None
        for number, name in enumerate(self.state_attributes):
            self.__dict__[name] = None if leaves is None else leaves[number]

    def take_states(self) -> tuple[Any, ...]:
        """The states after the last step, in the network's structures; they are let go of here."""
        states = self._states()
        self._start.states = None
        self.__dict__.update(dict.fromkeys(self.state_attributes))
        return states

    def _states(self) -> tuple[Any, ...]:
        held = [getattr(self, name, None) for name in self.state_attributes]
        if self._template is None or any(leaf is None for leaf in held):
            start = self._start.states
            return (None,) * self._count if start is None else tuple(_copied(state) for state in start)
        states: tuple[Any, ...] = _fill(self._template, iter(held))
        return states


class _Start:
    """What belongs to the next call alone: states that are not of the lasting form; and which forms were tried."""

    __slots__ = ("states", "tried")

    def __init__(self) -> None:
        self.states: tuple[Any, ...] | None = None
        self.tried: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Start:
        twin = _Start()
        twin.tried = set(self.tried)
        # A state with a history cannot be copied with it.
        twin.states = map_tensors(self.states, lambda state: memo.get(id(state), state.detach().clone()))
        return twin


class _Slot:
    """Where a tensor stands among nested states."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "tensor"


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with everything in them changed that is none of these."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        twin = copy.copy(value)
        twin.update((key, map_leaves(item, change)) for key, item in value.items())
        return twin
    return change(value)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists and dicts with every tensor changed."""
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def describe(states: Any) -> str:
    """How states are nested, with the types and shapes of their tensors."""
    if isinstance(states, Tensor):
        return f"{str(states.dtype).removeprefix('torch.')}[{', '.join(map(str, states.shape))}]"
    if isinstance(states, tuple) and hasattr(states, "_fields"):
        held = ", ".join(f"{name}={describe(item)}" for name, item in zip(states._fields, states, strict=True))
        return f"{type(states).__name__}({held})"
    if isinstance(states, (tuple, list)):
        opening, closing = "()" if isinstance(states, tuple) else "[]"
        return f"{opening}{', '.join(map(describe, states))}{closing}"
    if isinstance(states, dict):
        return f"{{{', '.join(f'{key!r}: {describe(item)}' for key, item in states.items())}}}"
    return repr(states)


def _parts(traced: Any, keys: Iterable[Any]) -> tuple[Any, ...]:
    """The parts of a traced value."""
    return tuple(traced[key] for key in keys)


def _copied(state: Any) -> Any:
    return map_leaves(state, lambda leaf: leaf)


def _template_of(states: Any) -> Any:
    return map_tensors(states, lambda _: _Slot())


def _items(template: Any) -> list[Any]:
    """Keys of what a template holds."""
    if isinstance(template, dict):
        return list(template)
    return list(range(len(template))) if isinstance(template, (tuple, list)) else []


def _count_of(template: Any) -> int:
    if isinstance(template, _Slot):
        return 1
    return sum(_count_of(template[key]) for key in _items(template))


def _leaves_like(template: Any, value: Any) -> list[Any] | None:
    """The tensors that stand in the slots, in order; None where the value is not built like the template."""
    if isinstance(template, _Slot):
        return [value] if isinstance(value, (Tensor, fx.Proxy)) else None
    if isinstance(value, fx.Proxy):  # of a part that is called as it is, and that the trial has shown to fit
        keys = _items(template)
        parts = zip(keys, _parts(value, keys), strict=True)
        return [leaf for key, part in parts for leaf in _leaves_like(template[key], part) or ()]
    keys = _items(template)
    if type(value) is not type(template) or keys != _items(value):
        return None
    if not isinstance(template, (tuple, list, dict)):
        return [] if _is_same(template, value) else None
    leaves = []
    for key in keys:
        inside = _leaves_like(template[key], value[key])
        if inside is None:
            return None
        leaves += inside
    return leaves


def _is_like(one: Any, other: Any) -> bool:
    """Whether two templates are the same."""
    if isinstance(one, (tuple, list, dict)):
        keys = _items(one)
        is_built_so = type(one) is type(other) and keys == _items(other)
        return is_built_so and all(_is_like(one[key], other[key]) for key in keys)
    return type(one) is type(other) and (isinstance(one, _Slot) or _is_same(one, other))


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _is_same(one: Any, other: Any) -> bool:
    """Whether what is no tensor has stayed as it was."""
    return one is other or (isinstance(one, _PLAIN) and bool(one == other))


def _fill(template: Any, values: Iterator[Any]) -> Any:
    return map_leaves(template, lambda leaf: next(values) if isinstance(leaf, _Slot) else leaf)
