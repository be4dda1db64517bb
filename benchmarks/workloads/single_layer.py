"""One layer of neurons without weights: only memory limits it, so a copy of the same bytes is the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from snncompile.neuron import LIFNode

from ..networks import ResidualIF
from .workload import SEED, Workload

FLOAT_BYTES = 4


@dataclass(frozen=True)
class SingleLIF(Workload):
    """A layer of LIF neurons.

    Attributes:
        neurons: Of each sample.
    """

    suite: ClassVar[str] = "lif-layer"
    description: ClassVar[str] = "one layer of LIF neurons"
    frameworks: ClassVar[frozenset[str]] = frozenset({"snntorch", "norse"})

    neurons: int

    @property
    def size(self) -> str:
        return f"n={self.neurons} "

    def network(self) -> nn.Module:
        return nn.Sequential(LIFNode(tau=2.0)).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        return (1.5 * torch.randn(self.steps, self.batch, self.neurons),)

    def moved_bytes(self) -> int | None:
        return 2 * self.steps * self.batch * self.neurons * FLOAT_BYTES


@dataclass(frozen=True)
class TrainedLIF(SingleLIF):
    """The same forward and backward, with the gradient of the input."""

    suite: ClassVar[str] = "lif-training"
    description: ClassVar[str] = "one layer of LIF neurons, forward and backward"
    trains: ClassVar[bool] = True
    frameworks: ClassVar[frozenset[str]] = frozenset()  # their surrogate gradients are others

    def network(self) -> nn.Module:
        return super().network().train()

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.requires_grad_() for x in super().inputs())

    def moved_bytes(self) -> int | None:
        # Forward reads the input and writes spikes; backward reads the input and a gradient and writes one.
        return 5 * self.steps * self.batch * self.neurons * FLOAT_BYTES


@dataclass(frozen=True)
class IFChain(SingleLIF):
    """IF neurons with soft reset and a residual that is added to their spikes."""

    suite: ClassVar[str] = "if-chain"
    description: ClassVar[str] = "IF neurons with a residual addition"
    frameworks: ClassVar[frozenset[str]] = frozenset()

    def network(self) -> nn.Module:
        return ResidualIF().eval()

    def inputs(self) -> tuple[Tensor, ...]:
        return (*super().inputs(), torch.rand(self.steps, self.batch, self.neurons))

    def moved_bytes(self) -> int | None:
        return 3 * self.steps * self.batch * self.neurons * FLOAT_BYTES
