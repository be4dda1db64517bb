"""Training steps: forward, backward with surrogate gradients, no optimiser (it costs every system the same)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..networks import DvsVgg, SewResNet18
from .workload import SEED, Workload


@dataclass(frozen=True)
class SewTraining(Workload):
    """SEW-ResNet-18 in multi-step mode, as it is trained: its batch norms see all steps at once.

    Attributes:
        image: Height and width.
        width: Channels of the first stage; 64 in the original.
    """

    suite: ClassVar[str] = "sew-training"
    description: ClassVar[str] = "SEW-ResNet-18 training step"
    trains: ClassVar[bool] = True
    is_multi_step: ClassVar[bool] = True

    image: int
    width: int = 64

    @property
    def size(self) -> str:
        width = "" if self.width == 64 else f" width={self.width}"
        return f"{self.image}x{self.image}{width} "

    def network(self) -> nn.Module:
        torch.manual_seed(SEED)
        return SewResNet18(self.image, self.width, classes=10).train()

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        image = torch.randn(self.batch, 3, self.image, self.image)
        return (image.expand(self.steps, *image.shape).contiguous(),)


@dataclass(frozen=True)
class SewStepTraining(SewTraining):
    """The same in single-step mode: batch norms see one step at a time."""

    suite: ClassVar[str] = "sew-training-steps"
    description: ClassVar[str] = "SEW-ResNet-18 training step, statistics of each step"
    is_multi_step: ClassVar[bool] = False


@dataclass(frozen=True)
class DvsTraining(Workload):
    """The VGG for CIFAR10-DVS in multi-step mode, on random events.

    Attributes:
        width: Channels of the first convolution; 64 in the original.
    """

    suite: ClassVar[str] = "dvs-training"
    description: ClassVar[str] = "CIFAR10-DVS VGG training step"
    trains: ClassVar[bool] = True
    is_multi_step: ClassVar[bool] = True

    width: int = 64

    @property
    def size(self) -> str:
        return "" if self.width == 64 else f"width={self.width} "

    def network(self) -> nn.Module:
        torch.manual_seed(SEED)
        return DvsVgg(self.width).train()

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        return (torch.poisson(torch.full((self.steps, self.batch, 2, 48, 48), 0.2)),)
