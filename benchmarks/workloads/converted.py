"""Converted networks: an image network of ReLUs as a network of integrate-and-fire neurons, shown one image T times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from snncompile import ann2snn

from ..networks import ResNet18, Vgg16
from .workload import SEED, Workload

NETWORKS: dict[str, Callable[[int], nn.Module]] = {"resnet18": ResNet18, "vgg16": Vgg16}
CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Converted(Workload):
    """Rate-coded image classification: outputs are summed, every step sees the image.

    The weights are random, but batch norms have the statistics that training leaves, and one spike stands for the
    largest activation on calibration images: neurons fire about as often as those of a trained network (3 to 6 % in the
    one that `make demo` trains). The results have the rate.

    Attributes:
        network_name: "resnet18" or "vgg16".
        width: Channels of the first convolution; 64 in the originals.
    """

    suite: ClassVar[str] = "converted"
    description: ClassVar[str] = "converted image network, 32x32"
    static_input: ClassVar[bool] = True
    readout: ClassVar[Literal["sequence", "sum"]] = "sum"

    network_name: str
    width: int = 64

    @property
    def size(self) -> str:
        width = "" if self.width == 64 else f" width={self.width}"
        return f"{self.network_name}{width} "

    def network(self) -> nn.Module:
        torch.manual_seed(SEED)
        ann = NETWORKS[self.network_name](self.width)
        images = images_like_photographs(CALIBRATION_IMAGES)
        settle_batch_norms(ann, images)
        return ann2snn.convert(ann, images, progress=False)

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED + 1)
        return (images_like_photographs(self.batch),)


def images_like_photographs(count: int) -> Tensor:
    """`[count, 3, 32, 32]`, mean 0 and variance 1: smooth, as neighbouring pixels of a photograph are."""
    coarse = torch.randn(count, 3, 8, 8)
    images = nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (images - images.mean()) / images.std()


def settle_batch_norms(network: nn.Module, images: Tensor) -> None:
    """Give every batch norm the statistics that its input has on these images; leaves the network in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    network.eval()
