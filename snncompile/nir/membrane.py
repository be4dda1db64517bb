"""What NIR's neurons share: parameters, a potential that starts at rest, fire and reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snncompile.stateful import StatefulModule, real_number
from snncompile.surrogate import Sigmoid

__all__ = ["Membrane", "Spike", "SpikingMembrane", "fire", "parameter", "tensor_of", "time_step"]

Spike = Callable[[Tensor], Tensor]


def time_step(value: Any) -> float:
    """dt as a float; `TypeError` or `ValueError` unless it is a positive number."""
    dt = real_number("dt", value)
    if dt <= 0.0:
        raise ValueError(f"dt must be positive, got {dt}")
    return dt


def tensor_of(value: Any) -> Tensor:
    """A number, array or tensor as a tensor without history, which may share the memory of a tensor only."""
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)


def parameter(value: Any) -> nn.Parameter:
    """A trainable copy in torch's default dtype."""
    return nn.Parameter(tensor_of(value).to(torch.get_default_dtype(), copy=True))


def fire(surrogate_function: Spike, h: Tensor, threshold: Tensor) -> Tensor:
    """1 where h > threshold, else 0; a surrogate function is 1 at 0, so it is asked the other way round.

    Where h is NaN, so that Θ is 0, this is 1.
    """
    return 1.0 - surrogate_function(threshold - h)


class Membrane(StatefulModule):
    """A neuron with a potential v that starts at :attr:`rest`, without gradient.

    Until the first step ``v`` reads as the mean of the rest, which is also what one writes to put it back.
    """

    def __init__(self, rest: Any, dt: float) -> None:
        super().__init__()
        self.dt = time_step(dt)
        self.register_state("v", float(tensor_of(rest).double().mean()))

    @property
    def rest(self) -> Tensor:
        """The potential at which v starts, of a shape that broadcasts to one sample's."""
        raise NotImplementedError(f"{type(self).__name__} must define rest")

    def _materialize(self, name: str, state: float | Tensor, x: Tensor) -> Tensor:
        if name == "v" and not isinstance(state, Tensor) and state == self._reset_values["v"]:
            return torch.empty_like(x, requires_grad=False).copy_(self.rest.detach())
        return super()._materialize(name, state, x)

    def extra_repr(self) -> str:
        return f"dt={self.dt}, {super().extra_repr()}"


class SpikingMembrane(Membrane):
    """Adds fire and reset to a neuron.

    s[t] = 1 if h[t] > v_threshold else 0, and v[t] = s[t]·v_reset + (1 - s[t])·h[t]. With ``detach_reset`` no gradient
    goes through the s[t] of the reset.
    """

    def __init__(
        self,
        rest: Any,
        v_threshold: Any,
        v_reset: Any,
        dt: float,
        surrogate_function: Spike | None,
        detach_reset: bool,
    ) -> None:
        super().__init__(rest, dt)
        self.v_threshold = parameter(v_threshold)
        self.v_reset = parameter(v_reset)
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset

    def fire_and_reset(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """s[t] and v[t] from the charged potential h[t], all ``[N, *]``."""
        spike = fire(self.surrogate_function, h, self.v_threshold)
        reset_spike = spike.detach() if self.detach_reset else spike
        return spike, reset_spike * self.v_reset + (1.0 - reset_spike) * h

    def extra_repr(self) -> str:
        return f"detach_reset={self.detach_reset}, {super().extra_repr()}"
