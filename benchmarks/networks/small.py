"""Networks of one idea: linear layers with neurons, a recurrence, a neuron with a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snncompile.neuron import IFNode, LIFNode

RATE = 0.1  # of the spikes that a layer is made for


class LinearStack(nn.Sequential):
    """`[N, width]` spikes to `[N, width]` spikes through `layers` times Linear and LIF.

    The weights are such that a layer that a tenth of its inputs feeds sends on about as much, at any depth.
    """

    def __init__(self, layers: int, width: int) -> None:
        modules: list[nn.Module] = []
        for _ in range(layers):
            linear = nn.Linear(width, width, bias=False)
            nn.init.normal_(linear.weight, std=1.55 / (RATE * width) ** 0.5)
            modules += [linear, LIFNode(tau=2.0)]
        super().__init__(*modules)


class RecurrentLayer(nn.Module):
    """LIF(W x[t] + R s[t-1]): `[N, inputs]` to the spikes s, `[N, width]`; s[-1] = 0."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.recurrent = nn.Linear(width, width, bias=False)
        self.neuron = LIFNode(tau=2.0)
        self.spikes: Tensor | None = None

    def reset(self) -> None:
        self.spikes = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.linear(x)
        if self.spikes is not None:
            current = current + self.recurrent(self.spikes)
        self.spikes = self.neuron(current)
        return self.spikes


class RecurrentNetwork(nn.Sequential):
    """`[N, width]` to `[N, classes]`: a recurrent layer of neurons and a linear readout."""

    def __init__(self, width: int, classes: int = 10) -> None:
        layer = RecurrentLayer(width, width)
        nn.init.normal_(layer.linear.weight, std=1.5 / (RATE * width) ** 0.5)
        nn.init.normal_(layer.recurrent.weight, std=0.5 / (RATE * width) ** 0.5)
        super().__init__(layer, nn.Linear(width, classes))


class ResidualIF(nn.Module):
    """IF(x) with soft reset, and a residual added to its spikes: two streams in, one out, no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = IFNode(v_reset=None)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.neuron(x) + residual
        return y


def spike_trains(*shape: int) -> Tensor:
    """Random spikes of the rate that the weights are made for."""
    return (torch.rand(shape) < RATE).float()
