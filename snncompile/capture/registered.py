"""Neurons of the user's own classes, registered in one line."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import OpKind
from ..stateful import REGISTERED, real_number, registered_states
from .adapter import Adapter, Leaf, States, Tensors


def register_neuron(cls: type[nn.Module], states: Mapping[str, float]) -> None:
    """Say that modules of a class are neurons, so that each runs as one step function instead of as its operations.

    ``snncompile.register_neuron(MyLIF, states={"v": 0.0})`` is all there is to it: the class stays as it is. Without
    it, a neuron that keeps tensors in attributes is traced through, and gives the same results.

    Args:
        cls: Its ``forward`` takes one step's inputs ``[N, *]``, reads and replaces its states as attributes, and keeps
            nothing else from step to step. A state that holds a number is taken for a tensor full of it, of the shape
            of the first input.
        states: Name of each attribute that holds a state -> the number that it holds after a reset. Where the class has
            no ``reset()`` of its own, resetting a network puts these numbers there.

    Raises:
        TypeError: `cls` is no class of modules, a name is no string or a reset value no real number.
        ValueError: There are no states, or a name is no identifier.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"register_neuron expects a class derived from nn.Module, got {cls!r}")
    if not isinstance(states, Mapping):
        raise TypeError(f"states must map attribute names to reset values, got {type(states).__name__}")
    if not states:
        raise ValueError(f"{cls.__name__} needs at least one state; a module without state need not be registered")
    for name in states:
        if not isinstance(name, str):
            raise TypeError(f"names of states must be strings, got {name!r}")
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot be the name of an attribute")
    REGISTERED[cls] = {name: real_number(f"reset value of {name}", value) for name, value in states.items()}


class RegisteredAdapter(Adapter):
    """A registered neuron runs by its own forward, with the states put into its attributes and taken out again."""

    def leaf(self, module: nn.Module) -> Leaf | None:
        return Leaf(OpKind.STATEFUL) if type(module) in REGISTERED else None

    def state_store(self, module: nn.Module) -> MutableMapping[str, Any]:
        return vars(module) if type(module) in REGISTERED else {}

    def state_keys(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(registered_states(module))

    def reset_values(self, module: nn.Module) -> States:
        return tuple(registered_states(module).values())

    def read(self, module: nn.Module) -> States:
        return tuple(getattr(module, name) for name in self.state_keys(module))

    def write(self, module: nn.Module, states: States) -> None:
        for name, value in zip(self.state_keys(module), states, strict=True):
            setattr(module, name, value)

    def check(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        """A state that does not fit makes the module's own operations fail."""

    def materialize(self, module: nn.Module, inputs: Tensors, states: States) -> States:
        return tuple(
            state if isinstance(state, Tensor) else torch.full_like(inputs[0], state, requires_grad=False)
            for state in states
        )

    def step(self, module: nn.Module, inputs: Tensors, states: States) -> tuple[Tensors, States]:
        before = self.read(module)
        try:
            self.write(module, states)
            outputs = module(*inputs)
            after = self.read(module)
        finally:
            self.write(module, before)
        return (outputs if isinstance(outputs, tuple) else (outputs,)), after
