"""VGG-16 with batch norm for images of 32x32: one linear layer instead of the three for 224x224."""

from __future__ import annotations

from torch import nn

# Channels of the convolutions, in multiples of the first one's, between poolings.
STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class Vgg16(nn.Sequential):
    """`[N, 3, 32, 32]` to `[N, classes]`.

    Args:
        width: Channels of the first convolution; the original has 64.
        classes: Outputs.
    """

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for stage in STAGES:
            for outputs in (factor * width for factor in stage):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            # Average instead of maximum: a rate passes through it unchanged.
            layers.append(nn.AvgPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(inputs, classes))
