"""SEW-ResNet-18: residual blocks that add spikes.

Fang et al., "Deep Residual Learning in Spiking Neural Networks", 2021.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from snncompile.neuron import IFNode
from snncompile.surrogate import ATan


def spiking() -> nn.Module:
    return IFNode(surrogate_function=ATan(), detach_reset=True)


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), spiking()
    )


class SewBlock(nn.Module):
    """IF(BN(conv(IF(BN(conv(x)))))) + shortcut(x): the sum is of spikes, 0 to 2 and more deeper down."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3, 1))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + self.shortcut(x)
        return y


class SewResNet18(nn.Sequential):
    """`[N, 3, size, size]` to `[N, classes]`.

    Args:
        size: Of the images. From 64 on, a convolution of stride 2 and a pooling come first, as in the original for 224.
        width: Channels of the first stage; the original has 64.
        classes: Outputs.
    """

    def __init__(self, size: int = 224, width: int = 64, classes: int = 1000) -> None:
        stem: list[nn.Module]
        if size < 64:
            stem = [convolution(3, width, 3, 1)]
        else:
            stem = [convolution(3, width, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            blocks += [SewBlock(inputs, outputs, 1 if stage == 0 else 2), SewBlock(outputs, outputs, 1)]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
