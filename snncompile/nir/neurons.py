"""NIR's neurons, discretised in time: one step advances t by dt.

NIR gives differential equations. Here they are integrated by Euler's forward method, with v[t-1] on the right-hand
side; then the neuron fires and resets within the same step:

    h[t] = v[t-1] + dt·v̇                    charge, with v̇ from the neuron's equation at v[t-1] and x[t]
    s[t] = 1 if h[t] > v_threshold else 0    fire: at the threshold itself a NIR neuron does not
    v[t] = s[t]·v_reset + (1 - s[t])·h[t]    reset

This is how Norse (``LIFBoxCell``), snnTorch (``reset_mechanism="zero", reset_delay=False``) and SpikingJelly step, and
how they read NIR. Time constants and dt are in the same unit, seconds by NIR's convention.

NIR leaves the state at t = 0 open. Here a potential starts at rest: at v_leak where there is a leak, at v_reset for
`IF`, at 0 for `Integrator`; currents start at 0. No gradient flows into the start.

Parameters may be numbers or arrays of any shape that broadcasts to one sample's; each becomes an ``nn.Parameter`` of
torch's default dtype. Shapes of all neurons: x ``[N, *]``, floating point, to an output and states of the same shape.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from snncompile.nir.membrane import Membrane, Spike, SpikingMembrane, fire, parameter
from snncompile.stateful import StatefulModule
from snncompile.surrogate import Sigmoid

__all__ = ["IF", "LI", "LIF", "CubaLI", "CubaLIF", "Integrator", "Scale", "Threshold"]


class Integrator(Membrane):
    """NIR's ``I``: v̇ = r·x, discretised as v[t] = v[t-1] + dt·r·x[t]; the output is v[t].

    Args:
        r: Resistance.
        dt: Length of a step, in seconds.

    Source: ``nir.I``.
    """

    def __init__(self, r: Any, *, dt: float) -> None:
        super().__init__(0.0, dt)
        self.r = parameter(r)

    @property
    def rest(self) -> Tensor:
        return self.r.new_zeros(())

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v = states[0] + self.dt * self.r * inputs[0]
        return (v,), (v,)


class IF(SpikingMembrane):
    """Integrate and fire: v̇ = r·x, discretised as h[t] = v[t-1] + dt·r·x[t]; then fire and reset.

    A graph that means one unit of charge per input and step, r = 1 without a length of the step, needs dt = 1.

    Args:
        r: Resistance.
        v_threshold: The potential above which the neuron fires.
        v_reset: The potential after a spike, and at the start.
        dt: Length of a step, in seconds.
        surrogate_function: Θ with a gradient, a callable tensor -> tensor; None stands for ``Sigmoid()``.
        detach_reset: Keep the gradient out of the reset.

    Source: ``nir.IF``.
    """

    def __init__(
        self,
        r: Any,
        v_threshold: Any,
        v_reset: Any = 0.0,
        *,
        dt: float,
        surrogate_function: Spike | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_reset, v_threshold, v_reset, dt, surrogate_function, detach_reset)
        self.r = parameter(r)

    @property
    def rest(self) -> Tensor:
        return self.v_reset

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        spike, v = self.fire_and_reset(states[0] + self.dt * self.r * inputs[0])
        return (spike,), (v,)


class LI(Membrane):
    """Leaky integrator: tau·v̇ = (v_leak - v) + r·x; the output is v[t].

    Discretised as v[t] = v[t-1] + dt/tau·((v_leak - v[t-1]) + r·x[t]).

    Args:
        tau: Time constant, in seconds.
        r: Resistance.
        v_leak: The potential that v decays to, and starts at.
        dt: Length of a step, in seconds.

    Source: ``nir.LI``.
    """

    def __init__(self, tau: Any, r: Any, v_leak: Any, *, dt: float) -> None:
        super().__init__(v_leak, dt)
        self.tau, self.r, self.v_leak = parameter(tau), parameter(r), parameter(v_leak)

    @property
    def rest(self) -> Tensor:
        return self.v_leak

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v = _leaky_charge(inputs[0], states[0], self.tau, self.r, self.v_leak, self.dt)
        return (v,), (v,)


class LIF(SpikingMembrane):
    """Leaky integrate and fire: tau·v̇ = (v_leak - v) + r·x; then fire and reset.

    Discretised as h[t] = v[t-1] + dt/tau·((v_leak - v[t-1]) + r·x[t]).

    Args:
        tau: Time constant, in seconds.
        r: Resistance.
        v_leak: The potential that v decays to, and starts at.
        v_threshold: The potential above which the neuron fires.
        v_reset: The potential after a spike.
        dt: Length of a step, in seconds.
        surrogate_function: Θ with a gradient, a callable tensor -> tensor; None stands for ``Sigmoid()``.
        detach_reset: Keep the gradient out of the reset.

    Source: ``nir.LIF``.
    """

    def __init__(
        self,
        tau: Any,
        r: Any,
        v_leak: Any,
        v_threshold: Any,
        v_reset: Any = 0.0,
        *,
        dt: float,
        surrogate_function: Spike | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_leak, v_threshold, v_reset, dt, surrogate_function, detach_reset)
        self.tau, self.r, self.v_leak = parameter(tau), parameter(r), parameter(v_leak)

    @property
    def rest(self) -> Tensor:
        return self.v_leak

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        h = _leaky_charge(inputs[0], states[0], self.tau, self.r, self.v_leak, self.dt)
        spike, v = self.fire_and_reset(h)
        return (spike,), (v,)


class CubaLI(Membrane):
    """Current-based leaky integrator: tau_syn·i̇ = -i + w_in·x, tau_mem·v̇ = (v_leak - v) + r·i; the output is v[t].

    Discretised as

        i[t] = i[t-1] + dt/tau_syn·(w_in·x[t] - i[t-1])
        v[t] = v[t-1] + dt/tau_mem·((v_leak - v[t-1]) + r·i[t])

    where the potential takes in the current of the same step, as it does in Norse, snnTorch and SpikingJelly when they
    read NIR. The states are v and ``current``, the i above.

    Args:
        tau_syn: Time constant of the synapse, in seconds.
        tau_mem: Time constant of the membrane, in seconds.
        r: Resistance.
        v_leak: The potential that v decays to, and starts at.
        w_in: Weight of the input.
        dt: Length of a step, in seconds.

    Source: ``nir.CubaLI``.
    """

    def __init__(self, tau_syn: Any, tau_mem: Any, r: Any, v_leak: Any, w_in: Any = 1.0, *, dt: float) -> None:
        super().__init__(v_leak, dt)
        self.tau_syn, self.tau_mem = parameter(tau_syn), parameter(tau_mem)
        self.r, self.v_leak, self.w_in = parameter(r), parameter(v_leak), parameter(w_in)
        self.register_state("current", 0.0)

    @property
    def rest(self) -> Tensor:
        return self.v_leak

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v, current = states
        current = _synapse(inputs[0], current, self.tau_syn, self.w_in, self.dt)
        v = _leaky_charge(current, v, self.tau_mem, self.r, self.v_leak, self.dt)
        return (v,), (v, current)


class CubaLIF(SpikingMembrane):
    """Current-based leaky integrate and fire: the current and charge of :class:`CubaLI`, then fire and reset.

    The reset leaves the current alone. The states are v and ``current``.

    Args:
        tau_syn, tau_mem, r, v_leak, w_in, dt: As for :class:`CubaLI`.
        v_threshold: The potential above which the neuron fires.
        v_reset: The potential after a spike.
        surrogate_function: Θ with a gradient, a callable tensor -> tensor; None stands for ``Sigmoid()``.
        detach_reset: Keep the gradient out of the reset.

    Source: ``nir.CubaLIF``.
    """

    def __init__(
        self,
        tau_syn: Any,
        tau_mem: Any,
        r: Any,
        v_leak: Any,
        v_threshold: Any,
        v_reset: Any = 0.0,
        w_in: Any = 1.0,
        *,
        dt: float,
        surrogate_function: Spike | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_leak, v_threshold, v_reset, dt, surrogate_function, detach_reset)
        self.tau_syn, self.tau_mem = parameter(tau_syn), parameter(tau_mem)
        self.r, self.v_leak, self.w_in = parameter(r), parameter(v_leak), parameter(w_in)
        self.register_state("current", 0.0)

    @property
    def rest(self) -> Tensor:
        return self.v_leak

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v, current = states
        current = _synapse(inputs[0], current, self.tau_syn, self.w_in, self.dt)
        h = _leaky_charge(current, v, self.tau_mem, self.r, self.v_leak, self.dt)
        spike, v = self.fire_and_reset(h)
        return (spike,), (v, current)


class Threshold(StatefulModule):
    """y[t] = 1 if x[t] > threshold else 0, with a surrogate gradient; it keeps no state.

    Args:
        threshold: The value above which the output is 1.
        surrogate_function: Θ with a gradient, a callable tensor -> tensor; None stands for ``Sigmoid()``.

    Source: ``nir.Threshold``.
    """

    def __init__(self, threshold: Any, *, surrogate_function: Spike | None = None) -> None:
        super().__init__()
        self.threshold = parameter(threshold)
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (fire(self.surrogate_function, inputs[0], self.threshold),), ()


class Scale(nn.Module):
    """y[t] = scale·x[t], element by element.

    Args:
        scale: The factors, of a shape that broadcasts to one sample's.

    Source: ``nir.Scale``.
    """

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _leaky_charge(x: Tensor, v: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, dt: float) -> Tensor:
    return v + dt / tau * ((v_leak - v) + r * x)


def _synapse(x: Tensor, current: Tensor, tau: Tensor, w_in: Tensor, dt: float) -> Tensor:
    return current + dt / tau * (w_in * x - current)
