"""Neurons, delays and other parts as people write them by hand, each with its own way to keep state."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn


class Fire(torch.autograd.Function):
    """A step whose derivative is a triangle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (1.0 - x.abs()).clamp(min=0.0)


def fire(x: Tensor) -> Tensor:
    """Spikes where x is positive."""
    spike: Tensor = Fire.apply(x)
    return spike


class HandWritten(nn.Module):
    """What the neurons written by hand share."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.threshold = nn.Parameter(torch.tensor(0.4))


class AttributeLIF(HandWritten):
    """The potential is an attribute, None at first; reset by subtraction."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else self.decay * self.v + x
        spike = fire(v - self.threshold)
        self.v = v - spike.detach() * self.threshold
        return spike


class AdaptiveLIF(HandWritten):
    """A rising threshold and a pause after each spike, which an integer tensor counts down."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.v = self.rise = self.pause = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None or self.rise is None or self.pause is None:
            self.v, self.rise = torch.zeros_like(x), torch.zeros_like(x)
            self.pause = torch.zeros_like(x, dtype=torch.int64)
        v = torch.where(self.pause > 0, self.decay * self.v, self.decay * self.v + x)
        spike = fire(v - self.threshold - self.rise)
        self.v, self.rise = v * (1.0 - spike), 0.9 * self.rise + 0.2 * spike
        self.pause = torch.where(spike > 0.0, 1, (self.pause - 1).clamp(min=0))
        return spike


class BufferLIF(HandWritten):
    """The potential is a buffer that every step replaces; another one counts spikes in place."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.register_buffer("v", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        v = self.decay * self.v + x
        spike = fire(v - self.threshold)
        self.v = v - spike
        self.count += spike.detach().sum().to(torch.int64)
        return spike


class DictLIF(HandWritten):
    """Current and potential in a dictionary."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.state: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        current = 0.5 * self.state.get("i", torch.zeros_like(x)) + x
        v = self.decay * self.state.get("v", torch.zeros_like(x)) + current
        spike = fire(v - self.threshold)
        self.state["i"], self.state["v"] = current, v - spike
        return spike


class TupleLIF(HandWritten):
    """Current and potential in a tuple."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        current, v = (torch.zeros_like(x), torch.zeros_like(x)) if self.state is None else self.state
        current = 0.5 * current + x
        v = self.decay * v + current
        spike = fire(v - self.threshold)
        self.state = (current, v * (1.0 - spike))
        return spike


class ClockedLIF(HandWritten):
    """Leaks at every second step only, by a Python number that counts them."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.clock = 0
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.clock += 1
        decay = self.decay if self.clock % 2 == 0 else 1.0
        v = x if self.v is None else decay * self.v + x
        spike = fire(v - self.threshold)
        self.v = v - spike
        return spike


class InPlaceLIF(HandWritten):
    """The potential is one tensor that every step writes into."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
        self.v.mul_(self.decay)
        self.v.add_(x)
        spike = fire(self.v - self.threshold)
        self.v.sub_(spike.detach())
        return spike


class LateralLIF(HandWritten):
    """The spikes of the last step come back through a layer over the last dimension."""

    def __init__(self, decay: float, features: int) -> None:
        super().__init__(decay)
        self.lateral = nn.Linear(features, features)
        self.v = self.spikes = None

    def forward(self, x: Tensor) -> Tensor:
        if self.spikes is not None:
            x = x + self.lateral(self.spikes)
        v = x if self.v is None else self.decay * self.v + x
        self.spikes = fire(v - self.threshold)
        self.v = v - self.spikes
        return self.spikes


class SilentLIF(AttributeLIF):
    """Skips its reset where nothing fired: a branch on values, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else self.decay * self.v + x
        spike = fire(v - self.threshold)
        self.v = v - spike if spike.any() else v
        return spike


class ExplicitLIF(HandWritten):
    """Takes its potential as an argument and returns the next one."""

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = x if v is None else self.decay * v + x
        spike = fire(v - self.threshold)
        return spike, v - spike


HAND_WRITTEN: tuple[type[HandWritten], ...] = (
    AttributeLIF,
    AdaptiveLIF,
    BufferLIF,
    DictLIF,
    TupleLIF,
    ClockedLIF,
    InPlaceLIF,
)


# Delays and other parts.


class ListDelay(nn.Module):
    """Past inputs in a list; zeros until it is full."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.past: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.past.append(x)
        return self.past.pop(0) if len(self.past) > self.steps else torch.zeros_like(x)


class DequeDelay(nn.Module):
    """Past inputs in a queue of bounded length, whose oldest entry comes out."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.past: deque[Tensor] = deque(maxlen=steps)

    def forward(self, x: Tensor) -> Tensor:
        late = self.past[0] if len(self.past) == self.past.maxlen else torch.zeros_like(x)
        self.past.append(x)
        return late


class AttributeDelay(nn.Module):
    """One attribute for each step of the delay."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.names = [f"past_{number}" for number in range(steps)]
        for name in self.names:
            setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor | None = x
        for name in self.names:
            late: Tensor | None = getattr(self, name)
            setattr(self, name, value)
            value = late
        return torch.zeros_like(x) if value is None else value


class RingDelay(nn.Module):
    """Past inputs in the rows of a tensor, and a Python number that says which is the oldest."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.next = steps, 0
        self.ring: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ring is None:
            self.ring = torch.zeros(self.steps, *x.shape)
        late = self.ring[self.next].clone()
        rows = list(self.ring)
        rows[self.next] = x
        self.ring = torch.stack(rows)
        self.next = (self.next + 1) % self.steps
        return late


class ReadsPotential(nn.Module):
    """Is held back by the potential of a neuron elsewhere, as that one's latest step has left it."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = (source,)  # no part of this module

    def forward(self, x: Tensor) -> Tensor:
        v: Any = self.source[0].v
        return x - 0.1 * v if isinstance(v, Tensor) else x


class ReadsMembrane(nn.Module):
    """Reads the potential that snnTorch's neurons keep in a buffer, which is empty at first."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = (source,)  # no part of this module

    def forward(self, x: Tensor) -> Tensor:
        mem: Any = self.source[0].mem
        return x - 0.1 * mem if mem.numel() > 0 else x


class KeepsState(nn.Module):
    """A cell that passes its state through `forward`, with an attribute to keep it in."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.state = self.cell(x, self.state)
        return y
