"""Single-step spiking neurons, and the base class on which users and the compiler build.

One time step has three parts. *Charge*: the membrane potential takes in the input, h[t] = f(v[t-1], x[t]). *Fire*:
s[t] = Θ(h[t] - v_th), with Θ(0) = 1. *Reset*: v[t] is h[t] with the spike taken out,

    hard reset (v_reset = r):        v[t] = s[t]·r + (1 - s[t])·h[t]
    soft reset (v_reset = None):     v[t] = h[t] - s[t]·v_th

where ``detach_reset=True`` lets no gradient through the s[t] of the reset. The arithmetic is that of SpikingJelly
2.0, operation by operation, so the bits agree. Time is the only thing a neuron remembers: every state is carried
from step to step until ``reset()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snncompile.surrogate import Sigmoid

__all__ = [
    "IFNode",
    "LIFNode",
    "NonSpikingIFNode",
    "NonSpikingLIFNode",
    "ParametricLIFNode",
    "SpikingNode",
    "StatefulModule",
]


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _time_constant(name: str, value: Any) -> float:
    tau = _real(name, value)
    if tau <= 1.0:
        raise ValueError(f"{name} must be greater than 1 time step, got {tau}")
    return tau


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


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
        self._reset_values[name] = self._states[name] = _real(f"reset_value of {name}", reset_value)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in the order in which :meth:`step` takes and returns them."""
        return tuple(self._states)

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
            raise ValueError(
                f"state {name} of {type(self).__name__} has shape {tuple(state.shape)}, the input has "
                f"{tuple(x.shape)}; call reset() before a new batch shape"
            )
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
            states[name] = value if isinstance(value, Tensor) else _real(f"state {name}", value)

    def __getstate__(self) -> dict[str, Any]:
        # torch neither deep-copies nor pickles a tensor in the middle of an autograd graph.
        return {**self.__dict__, "_states": _detached(self._states)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._states.update({name: fn(state) for name, state in self._states.items() if isinstance(state, Tensor)})
        return self


def _detached(states: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {name: state.detach() if isinstance(state, Tensor) else state for name, state in states.items()}


class SpikingNode(StatefulModule):
    """Charge, fire, reset, as the module's docstring defines them; a subclass defines :meth:`charge`.

    Shapes:
        x ``[N, *]`` floating point (``[T, N, *]`` in step mode "m") -> spikes s, 0 or 1, of the same shape and dtype.
        State v, the membrane potential, ``[N, *]``; starts at ``v_reset``, or at 0 for soft reset.

    Args:
        v_threshold: v_th, the potential at and above which the neuron fires.
        v_reset: r, the potential after a spike and at rest; None subtracts v_th instead (soft reset), and rest is 0.
        surrogate_function: Θ with a gradient, a callable tensor -> tensor; None stands for ``Sigmoid()``.
        detach_reset: Keep the gradient out of the reset.
        step_mode: "s" or "m".

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A number that is not finite, or an unknown step mode.
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
    ) -> None:
        super().__init__(step_mode)
        if surrogate_function is not None and not callable(surrogate_function):
            raise TypeError(f"surrogate_function must be callable, got {type(surrogate_function).__name__}")
        self.v_threshold = _real("v_threshold", v_threshold)
        self.v_reset = None if v_reset is None else _real("v_reset", v_reset)
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = _flag("detach_reset", detach_reset)
        self.register_state("v", self.v_rest)

    @property
    def v_rest(self) -> float:
        """r, the potential that the leak decays to: ``v_reset``, or 0 for soft reset."""
        return 0.0 if self.v_reset is None else self.v_reset

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        """h[t] from x[t] and v[t-1], both ``[N, *]``."""
        raise NotImplementedError(f"{type(self).__name__} must define charge(x, v)")

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        (x,), (v,) = inputs, states
        h = self.charge(x, v)
        spike = self.surrogate_function(h - self.v_threshold)
        reset_spike = spike.detach() if self.detach_reset else spike
        if self.v_reset is None:
            v = h - reset_spike * self.v_threshold
        else:
            v = reset_spike * self.v_reset + (1.0 - reset_spike) * h
        return (spike,), (v,)

    def extra_repr(self) -> str:
        reset = f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}"
        return f"{reset}, {super().extra_repr()}"


class IFNode(SpikingNode):
    """Integrate and fire: h[t] = v[t-1] + x[t].

    v is the membrane potential, x the input, h the charged potential; arguments, shapes, fire and reset are
    :class:`SpikingNode`'s.
    """

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return v + x


class LIFNode(SpikingNode):
    """Leaky integrate and fire.

    decay_input=True:   h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / τ
    decay_input=False:  h[t] = v[t-1] - (v[t-1] - r) / τ + x[t]

    v is the membrane potential, x the input, h the charged potential, r the rest (``v_reset``, or 0 for soft
    reset), τ the membrane time constant in time steps. Shapes, fire and reset are :class:`SpikingNode`'s.

    Args:
        tau: τ, greater than 1.
        decay_input: Whether the input is divided by τ too.

    The other arguments are :class:`SpikingNode`'s.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode)
        self.tau = _time_constant("tau", tau)
        self.decay_input = _flag("decay_input", decay_input)

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return _leaky_charge(x, v, self.v_rest, self.tau, self.decay_input)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class ParametricLIFNode(SpikingNode):
    """Leaky integrate and fire with a learnt time constant, one per module.

    decay_input=True:   h[t] = v[t-1] + (x[t] - (v[t-1] - r)) · σ(w)
    decay_input=False:  h[t] = v[t-1] - (v[t-1] - r) · σ(w) + x[t]

    w is the parameter (a scalar), σ the logistic function and σ(w) = 1/τ; the other symbols are :class:`LIFNode`'s.
    Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
    Networks", 2021.

    Args:
        init_tau: τ at the start, greater than 1; w starts at -ln(init_tau - 1).
        decay_input: Whether the input is multiplied by σ(w) too.

    The other arguments are :class:`SpikingNode`'s.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode)
        self.decay_input = _flag("decay_input", decay_input)
        self.w = nn.Parameter(torch.tensor(-math.log(_time_constant("init_tau", init_tau) - 1.0)))

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        rate = self.w.sigmoid()
        if self.decay_input:
            return v + (x - (v - self.v_rest)) * rate
        return v - (v - self.v_rest) * rate + x

    def extra_repr(self) -> str:
        tau = 1.0 / self.w.detach().sigmoid()
        return f"tau={tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class NonSpikingIFNode(StatefulModule):
    """An integrator for readouts: v[t] = v[t-1] + x[t], and the output is v[t].

    v is the membrane potential, starting at 0, and x the input. There is no threshold and no reset by spikes.

    Shapes:
        x ``[N, *]`` floating point (``[T, N, *]`` in step mode "m") -> v of the same shape and dtype. The output of
        a single step is the state itself, so do not change it in place.

    Args:
        step_mode: "s" or "m".
    """

    def __init__(self, step_mode: str = "s") -> None:
        super().__init__(step_mode)
        self.register_state("v", 0.0)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v = states[0] + inputs[0]
        return (v,), (v,)


class NonSpikingLIFNode(StatefulModule):
    """A leaky integrator for readouts; the output is the membrane potential v[t].

    decay_input=True:   v[t] = v[t-1] + (x[t] - (v[t-1] - r)) / τ
    decay_input=False:  v[t] = v[t-1] - (v[t-1] - r) / τ + x[t]

    x is the input, r = ``v_reset`` the rest, at which v starts, τ the membrane time constant in time steps. There
    is no threshold and no reset by spikes.

    Shapes:
        As :class:`NonSpikingIFNode`.

    Args:
        tau: τ, greater than 1.
        decay_input: Whether the input is divided by τ too.
        v_reset: r, a finite number.
        step_mode: "s" or "m".
    """

    def __init__(self, tau: float = 2.0, decay_input: bool = True, v_reset: float = 0.0, step_mode: str = "s") -> None:
        super().__init__(step_mode)
        self.tau = _time_constant("tau", tau)
        self.decay_input = _flag("decay_input", decay_input)
        self.v_reset = _real("v_reset", v_reset)
        self.register_state("v", self.v_reset)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v = _leaky_charge(inputs[0], states[0], self.v_reset, self.tau, self.decay_input)
        return (v,), (v,)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, v_reset={self.v_reset}, {super().extra_repr()}"


def _leaky_charge(x: Tensor, v: Tensor, v_rest: float, tau: float, decay_input: bool) -> Tensor:
    if decay_input:
        return v + (x - (v - v_rest)) / tau
    return v - (v - v_rest) / tau + x
