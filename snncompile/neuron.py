"""Single-step spiking neurons.

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

from .stateful import StatefulModule, real_number
from .surrogate import Sigmoid

__all__ = [
    "IFNode",
    "LIFNode",
    "NonSpikingIFNode",
    "NonSpikingLIFNode",
    "ParametricLIFNode",
    "SpikingNode",
    "StatefulModule",
]


def _time_constant(name: str, value: Any) -> float:
    tau = real_number(name, value)
    if tau <= 1.0:
        raise ValueError(f"{name} must be greater than 1 time step, got {tau}")
    return tau


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


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
        self.v_threshold = real_number("v_threshold", v_threshold)
        self.v_reset = None if v_reset is None else real_number("v_reset", v_reset)
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
        self.v_reset = real_number("v_reset", v_reset)
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
