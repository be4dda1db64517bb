"""A torchvision-style ResNet-50 as a spiking network, written out because torchvision is not a dependency.

As SpikingJelly's conversion makes it: each ReLU is a scaled IF neuron with soft reset, everything else stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snncompile import neuron

BLOCKS = (3, 4, 6, 3)  # in each stage
EXPANSION = 4


class ScaledIF(nn.Sequential):
    """What a ReLU becomes: `IFNode` between two scales."""

    def __init__(self, scale: float) -> None:
        super().__init__(Scale(1.0 / scale), neuron.IFNode(v_reset=None), Scale(scale))


class Scale(nn.Module):
    """Multiplies by a number kept in a buffer."""

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 with batch norm, and a shortcut around them."""

    def __init__(self, inputs: int, width: int, stride: int, scale: float) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.fire1, self.fire2, self.fire3 = ScaledIF(scale), ScaledIF(1.1 * scale), ScaledIF(1.2 * scale)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.fire1(self.bn1(self.conv1(x)))
        out = self.fire2(self.bn2(self.conv2(out)))
        spikes: Tensor = self.fire3(self.bn3(self.conv3(out)) + identity)
        return spikes


class SpikingResNet50(nn.Module):
    """`[N, 3, H, W]` to `[N, classes]`, one step; thresholds differ from site to site.

    Args:
        width: Channels of the first stage; the original has 64.
        classes: Outputs.
        blocks: In each stage.
    """

    def __init__(self, width: int = 64, classes: int = 1000, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.fire = ScaledIF(1.7)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        made: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                own = width * 2**stage
                stride = 2 if stage > 0 and number == 0 else 1
                made.append(Bottleneck(inputs, own, stride, 0.9 + 0.07 * len(made)))
                inputs = EXPANSION * own
        self.blocks = nn.Sequential(*made)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.fire(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.blocks(x)), 1))
        return logits
