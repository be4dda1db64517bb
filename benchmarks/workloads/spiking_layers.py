"""Linear layers with leaky integrate-and-fire neurons: feed-forward stacks, and a recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..networks import LinearStack, RecurrentNetwork
from ..networks.small import spike_trains
from .workload import SEED, Workload

FRAMEWORKS = frozenset({"snntorch", "norse"})


@dataclass(frozen=True)
class LinearStacks(Workload):
    """L layers of Linear(n, n) and LIF, fed with spikes: the shape of the field's public benchmark.

    Attributes:
        layers: L.
        width: n.
    """

    suite: ClassVar[str] = "linear-lif"
    description: ClassVar[str] = "layers of Linear(n, n) and LIF"
    frameworks: ClassVar[frozenset[str]] = FRAMEWORKS

    layers: int
    width: int

    @property
    def size(self) -> str:
        return f"L={self.layers} n={self.width} "

    def network(self) -> nn.Module:
        torch.manual_seed(SEED)
        return LinearStack(self.layers, self.width).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        return (spike_trains(self.steps, self.batch, self.width),)


@dataclass(frozen=True)
class Recurrent(Workload):
    """A recurrent layer of LIF neurons and a linear readout, on a long sequence of spikes.

    Attributes:
        width: Inputs and neurons.
    """

    suite: ClassVar[str] = "recurrent"
    description: ClassVar[str] = "recurrent LIF network"
    frameworks: ClassVar[frozenset[str]] = FRAMEWORKS

    width: int

    @property
    def size(self) -> str:
        return f"n={self.width} "

    def network(self) -> nn.Module:
        torch.manual_seed(SEED)
        return RecurrentNetwork(self.width).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        return (spike_trains(self.steps, self.batch, self.width),)
