"""A delay line: what came in some steps ago comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snncompile.nir.membrane import tensor_of
from snncompile.stateful import StatefulModule

__all__ = ["Delay"]


class Delay(StatefulModule):
    """y[t] = x[t - d], with 0 for what would have come before the first step.

    The states ``x_1`` ... ``x_D`` are the inputs of the last D steps, D the largest of the delays; they move up by one
    name a step, and none is copied but the newest.

    Shapes:
        x ``[N, *]`` floating point -> y of the same shape; every state too.

    Args:
        steps: d >= 0 in steps, an int or an array of them that broadcasts to one sample's shape.

    Raises:
        ValueError: A delay is negative or not whole.

    Source: ``nir.Delay``.
    """

    steps: Tensor

    def __init__(self, steps: Any) -> None:
        super().__init__()
        delays = tensor_of(steps)
        whole = delays.to(torch.int64, copy=True)
        if bool((whole != delays).any()) or bool((whole < 0).any()):
            raise ValueError(f"steps must be whole numbers >= 0, got {delays.tolist()}")
        # Not in the state_dict: another delay has other states, which loading does not make.
        self.register_buffer("steps", whole, persistent=False)
        self.distinct: tuple[int, ...] = tuple(whole.unique().tolist())
        for number in range(1, self.distinct[-1] + 1):
            self.register_state(f"x_{number}", 0.0)

    @property
    def is_register(self) -> bool:
        """Whether the output of a step depends on earlier inputs only, so that it is there before the input is."""
        return self.distinct[0] >= 1

    def read(self, taps: tuple[Tensor, ...]) -> Tensor:
        """y[t] from ``(x[t], x[t-1], ..., x[t-D])``; a register never looks at the first."""
        y = taps[self.distinct[0]]
        for steps in self.distinct[1:]:
            y = torch.where(self.steps == steps, taps[steps], y)
        return y

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        taps = (*inputs, *states)
        # A copy, as the caller may write the next step's input into the same tensor.
        return (self.read(taps),), (inputs[0].clone(), *states)[: len(states)]

    def extra_repr(self) -> str:
        return f"steps={self.distinct if len(self.distinct) > 1 else self.distinct[0]}, {super().extra_repr()}"
