"""State that persists between time steps: the base class on which neurons and the compiler build."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["REGISTERED", "StatefulModule", "real_number", "registered_states"]

# Classes of the user's that are neurons -> name and reset value of each attribute that holds a state.
REGISTERED: WeakKeyDictionary[type[nn.Module], dict[str, float]] = WeakKeyDictionary()


def registered_states(module: nn.Module) -> Mapping[str, float]:
    """Name and reset value of each attribute that holds a state, as `register_neuron` was told; none otherwise."""
    return REGISTERED.get(type(module), {})


def real_number(name: str, value: Any) -> float:
    """A finite float; `TypeError` or `ValueError` naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _misfit(owner: str, name: str, state: Tensor, shape: tuple[int, ...]) -> str:
    return (
        f"state {name} of {owner} has shape {tuple(state.shape)}, the input has {shape}; "
        "call reset() before a new batch shape"
    )


class StatefulModule(nn.Module):
    """A module that keeps state between time steps; subclass it to write a neuron.

    A subclass registers its states in ``__init__`` and defines :meth:`step`, one time step as a pure function;
    everything else (both step modes, carrying states over, reset) follows from it::

        class Accumulator(StatefulModule):
            def __init__(self):
                super().__init__()
                self.register_state("total", 0.0)

            def step(self, inputs, states):
                total = states[0] + inputs[0]
                return (total,), (total,)

    A state is read and written as an attribute (``module.total``). It is a float, its reset value, until the first
    step gives it the input's shape. States follow ``.to()``, are deep-copied and pickled with the module (without
    their autograd history), and are not in the ``state_dict``.

    Args:
        step_mode: "s" (single-step, ``[N, *]`` -> ``[N, *]``) or "m" (multi-step, ``[T, N, *]`` -> ``[T, N, *]``).

    Raises:
        ValueError: ``step_mode`` is neither "s" nor "m".
    """

    _states: dict[str, float | Tensor]
    _reset_values: dict[str, float]

    def __init__(self, step_mode: str = "s") -> None:
        super().__init__()
        self._states = {}
        self._reset_values = {}
        self.step_mode = step_mode

    @property
    def step_mode(self) -> str:
        """What one call is: one time step ("s"), or T time steps along the first axis ("m")."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in ("s", "m"):
            raise ValueError(f'step_mode must be "s" or "m", got {value!r}')
        self._step_mode = value

    def register_state(self, name: str, reset_value: float) -> None:
        """Declare a state that starts at ``reset_value`` and returns to it at :meth:`reset`.

        Raises:
            TypeError: ``reset_value`` is not a real number.
            ValueError: ``name`` is not an identifier, is taken, or ``reset_value`` is not finite.
        """
        if not name.isidentifier() or hasattr(self, name):
            raise ValueError(f"a state of {type(self).__name__} needs an unused identifier as its name, got {name!r}")
        self._reset_values[name] = self._states[name] = real_number(f"reset_value of {name}", reset_value)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in the order in which :meth:`step` takes and returns them."""
        return tuple(self._states)

    @property
    def states(self) -> tuple[float | Tensor, ...]:
        """The states as they are now, in the order of :attr:`state_names`."""
        return tuple(self._states.values())

    @property
    def reset_values(self) -> tuple[float, ...]:
        """What :meth:`reset` returns the states to, in the order of :attr:`state_names`."""
        return tuple(self._reset_values.values())

    def check_states(self, shape: tuple[int, ...]) -> None:
        """Check that the states fit one step's input of this shape ``[N, *]``.

        Raises:
            ValueError: A state has another shape, from an earlier batch.
        """
        for name, state in self._states.items():
            if isinstance(state, Tensor) and state.shape != shape:
                raise ValueError(_misfit(type(self).__name__, name, state, shape))

    def materialize_states(self, inputs: tuple[Tensor, ...], states: tuple[float | Tensor, ...]) -> tuple[Tensor, ...]:
        """Give every state the shape, dtype and device of ``inputs[0]``, one step's input ``[N, *]``.

        Changes neither its arguments nor the module.

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: A state has another shape, from an earlier batch.
        """
        x = inputs[0]
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point tensors, got {x.dtype}")
        return tuple(self._materialize(name, state, x) for name, state in zip(self._states, states, strict=True))

    def _materialize(self, name: str, state: float | Tensor, x: Tensor) -> Tensor:
        if not isinstance(state, Tensor):
            return torch.full_like(x, state, requires_grad=False)
        if state.shape != x.shape:
            raise ValueError(_misfit(type(self).__name__, name, state, tuple(x.shape)))
        return state.to(device=x.device, dtype=x.dtype)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One time step: outputs and new states.

        Must be a pure function of its arguments and the module's parameters and buffers: it reads and writes no
        attribute that changes between steps and changes no tensor in place. The compiler relies on it.

        Args:
            inputs: What ``forward`` was called with, each of one step's shape ``[N, *]``.
            states: One tensor per name in :attr:`state_names`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(inputs, states)")

    def forward(self, *inputs: Tensor) -> Any:
        """Run one step (mode "s") or T steps (mode "m") from the current states and keep the new ones.

        Returns:
            The output of :meth:`step`, unpacked if there is only one; in mode "m" each output is stacked along a
            new first axis.

        Raises:
            TypeError: An input is not a tensor, the first is not of floating point, or there is none.
            ValueError: A state has another shape, or the inputs of mode "m" do not share one T >= 1.
        """
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            got = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            raise TypeError(f"{type(self).__name__} takes floating-point tensors, got {got}")
        outputs = self._single_step(inputs) if self.step_mode == "s" else self._multi_step(inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _single_step(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = self.materialize_states(inputs, tuple(self._states.values()))
        outputs, states = self.step(inputs, states)
        self._states.update(zip(self._states, states, strict=True))
        return outputs

    def _multi_step(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes = [tuple(x.shape) for x in inputs]
        if any(len(shape) == 0 or shape[0] == 0 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(
                f'{type(self).__name__} in step_mode "m" takes inputs [T, N, *] of one T >= 1, got shapes {shapes}'
            )
        steps = [self._single_step(step_inputs) for step_inputs in zip(*(x.unbind(0) for x in inputs), strict=True)]
        return tuple(torch.stack(output_seq) for output_seq in zip(*steps, strict=True))

    def reset(self) -> None:
        """Put every state back to its reset value."""
        self._states.update(self._reset_values)

    def detach_states(self) -> None:
        """Cut the autograd history of every state, as truncated backpropagation through time does between windows."""
        self._states.update(_detached(self._states))

    def extra_repr(self) -> str:
        return f"step_mode={self.step_mode!r}"

    def __getattr__(self, name: str) -> Any:
        # Asked for only after the normal look-up failed; while unpickling there may be no _states yet.
        states = self.__dict__.get("_states", {})
        return states[name] if name in states else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        states = self.__dict__.get("_states", {})
        if name not in states:
            super().__setattr__(name, value)
        else:
            states[name] = value if isinstance(value, Tensor) else real_number(f"state {name}", value)

    def __getstate__(self) -> dict[str, Any]:
        # torch neither deep-copies nor pickles a tensor in the middle of an autograd graph.
        return {**self.__dict__, "_states": _detached(self._states)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._states.update({name: fn(state) for name, state in self._states.items() if isinstance(state, Tensor)})
        return self


def _detached(states: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {name: state.detach() if isinstance(state, Tensor) else state for name, state in states.items()}
