"""What an adapter tells the compiler about a framework's modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ir import OpKind

States = tuple[Any, ...]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Leaf:
    """A module that is not traced through.

    Attributes:
        kind: MODULE (no state), STATEFUL (has a step function) or OPAQUE (called as it is, step by step).
        reason: Why, where it is not obvious.
        ordered: An OPAQUE module whose calls must also keep their order among those of other modules.
        acts_like: The torch class whose treatment of a batch a MODULE shares, if one is known.
        whole: It takes all T steps at once.
    """

    kind: OpKind
    reason: str = ""
    ordered: bool = False
    acts_like: type[nn.Module] | None = None
    whole: bool = False


class Adapter(ABC):
    """Knows one framework: which modules are leaves, and the step function of those with state.

    A step function is pure: `(inputs, states) -> (outputs, states')` for one time step. States live in the module,
    in the framework's own place, before and after a call; in between the compiled program holds them.
    """

    @abstractmethod
    def leaf(self, module: nn.Module) -> Leaf | None:
        """How to treat a module of this framework; None for a module it does not know.

        Raises:
            CaptureError: The module cannot be run step by step.
        """

    def state_store(self, module: nn.Module) -> MutableMapping[str, Any]:
        """Where a module keeps its states, by name; empty for one without."""
        return {}

    def state_keys(self, module: nn.Module) -> Iterable[str]:
        """The names in `state_store` that are states."""
        return tuple(self.state_store(module))

    def runs_parts_by_step(self, module: nn.Module) -> bool:
        """Whether a sequential container in multi-step mode runs its single-step parts one step after the other."""
        return False

    def is_stateless(self, module: nn.Module) -> bool:
        """Whether a part of a neuron is known to hold no state."""
        return False

    @abstractmethod
    def reset_values(self, module: nn.Module) -> States:
        """What the states are after `reset()`; plain numbers broadcast to the input's shape."""

    @abstractmethod
    def read(self, module: nn.Module) -> States:
        """The states the module holds now."""

    @abstractmethod
    def write(self, module: nn.Module, states: States) -> None:
        """Leave the states in the module."""

    @abstractmethod
    def check(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        """Raise what the module itself would raise if its states do not fit an input of this shape `[N, *]`."""

    @abstractmethod
    def materialize(self, module: nn.Module, inputs: Tensors, states: States) -> States:
        """States as tensors fit for these inputs."""

    @abstractmethod
    def step(self, module: nn.Module, inputs: Tensors, states: States) -> tuple[Tensors, States]:
        """One time step: outputs and new states."""
