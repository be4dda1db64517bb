"""Networks that pass their states through `forward`, as those that keep them.

snnTorch without `init_hidden`, Norse, and many networks written by hand take the states of the last step as arguments
and return those of this one: `y, s = net(x, s)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExplicitStates", "with_states"]

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def with_states(net: nn.Module, count: int = 1) -> ExplicitStates:
    """Say how many states a network passes through `forward`, so that it can be compiled.

    `opt = snncompile.optimize(snncompile.with_states(net, 2), T)` is called as the network is:
    `y, mem1, mem2 = opt(x_seq, mem1, mem2)`, with the states of the first step going in and those after the last step
    coming out, in the network's own structures. A state may be None where the network takes that for a start.

    Args:
        net: Its `forward` takes the inputs of one step and then `count` states, and returns a tuple of its outputs and
            then the `count` new states.
        count: Number of states, at least 1; each may be a tensor or any nesting of tuples, lists, dicts and tensors.

    Raises:
        TypeError, ValueError: `net` is no module, or `count` is no number of states.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"with_states expects an nn.Module, got {type(net).__name__}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count must be an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return ExplicitStates(net, count)


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

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        self.__dict__.update(_net=net, _count=count, _start=_Start(), _template=None)
        for name in _SHARED:
            self.__dict__[name] = net.__dict__[name]

    @property
    def input_names(self) -> list[str]:
        """Names of the network's arguments before the states."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in inspect.signature(self._net.forward).parameters.values() if p.kind in kinds]
        return names[: -self._count]

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        """One step `[N, *]`: the network's outputs without its states."""
        result = self._net.forward(*inputs, *self._states())
        if not isinstance(result, tuple) or len(result) <= self._count:
            raise TypeError(
                f"a network with {self._count} states must return a tuple of its outputs and then its states, "
                f"got {type(result).__name__}"
            )
        outputs, states = result[: -self._count], result[-self._count :]
        if self._template is None:
            self.__dict__["_template"] = _template_of(states)
        for number, leaf in enumerate(_leaves_like(self._template, states)):
            self.__dict__[f"state_{number}"] = leaf
        return outputs

    def put_states(self, states: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> None:
        """Start from these states.

        Args:
            states: As the network takes them; fewer where the rest has defaults.
            inputs: One step `[N, *]` of each input, to find out once what the states become.
        """
        if len(states) > self._count:
            raise TypeError(f"the network takes {self._count} states after its inputs, got {len(states)}")
        states = (*states, *(None,) * (self._count - len(states)))
        if self._template is None:
            twin = copy.deepcopy(ExplicitStates(self._net, self._count), _without_history(self._net))
            twin._start.states = copy.deepcopy(map_tensors(states, Tensor.detach))
            with torch.no_grad():
                twin(*(torch.zeros_like(x) for x in inputs))
            self.__dict__["_template"] = twin._template
        leaves = _leaves_like(self._template, states)
        fits = all(isinstance(leaf, Tensor) for leaf in leaves)
        self._start.states = None if fits else states
        for number, leaf in enumerate(leaves):
            self.__dict__[f"state_{number}"] = leaf if fits else None

    def take_states(self) -> tuple[Any, ...]:
        """The states after the last step, in the network's structures; they are let go of here."""
        states = self._states()
        for number in range(_count_of(self._template)):
            self.__dict__[f"state_{number}"] = None
        return states

    def _states(self) -> tuple[Any, ...]:
        held = [getattr(self, f"state_{number}", None) for number in range(_count_of(self._template))]
        if self._template is None or any(leaf is None for leaf in held):
            return (None,) * self._count if self._start.states is None else self._start.states
        states: tuple[Any, ...] = _fill(self._template, iter(held))
        return states


class _Start:
    """States to start from that are not of the lasting form."""

    __slots__ = ("states",)

    def __init__(self) -> None:
        self.states: tuple[Any, ...] | None = None


class _Slot:
    """Where a tensor stands among nested states."""

    __slots__ = ()


def _without_history(net: nn.Module) -> dict[int, Any]:
    """What to put in the place of tensors with a history, by id: they cannot be copied with it."""
    held = [value for module in net.modules() for value in (*vars(module).values(), *module._buffers.values())]
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


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


def _leaves_like(template: Any, value: Any) -> list[Any]:
    """What stands in the slots, in order; None where the value is not nested so."""
    if isinstance(template, _Slot):
        return [value]
    leaves = []
    for key in _items(template):
        try:
            item = None if value is None else value[key]
        except (LookupError, TypeError):
            item = None
        leaves += _leaves_like(template[key], item)
    return leaves


def _fill(template: Any, values: Iterator[Any]) -> Any:
    if isinstance(template, _Slot):
        return next(values)
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(_fill(item, values) for item in template))
    if isinstance(template, (tuple, list)):
        return type(template)(_fill(item, values) for item in template)
    if isinstance(template, dict):
        return {key: _fill(item, values) for key, item in template.items()}
    return template
