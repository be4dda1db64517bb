"""The VGG that the field trains on CIFAR10-DVS, events in two channels of 48x48.

Shape and neurons as in SpikingJelly's tutorial on memory, which publishes figures for it; without its dropout, so that
every system computes the same.
"""

from __future__ import annotations

from torch import nn

from snncompile.neuron import LIFNode
from snncompile.surrogate import ATan

# Channels in multiples of the first convolution's, and whether a pooling comes before the convolution.
LAYERS = ((1, False), (2, False), (4, True), (4, False), (8, True), (8, False), (8, True), (8, False))


class DvsBlock(nn.Sequential):
    """Convolution, batch norm and neurons, after a pooling if asked for."""

    def __init__(self, inputs: int, outputs: int, pools: bool) -> None:
        super().__init__(
            *((nn.AvgPool2d(2),) if pools else ()),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            LIFNode(tau=1.333, decay_input=False, surrogate_function=ATan(), detach_reset=True),
        )


class DvsVgg(nn.Sequential):
    """`[N, 2, 48, 48]` to `[N, 10]`.

    Args:
        width: Channels of the first convolution; the original has 64.
    """

    def __init__(self, width: int = 64) -> None:
        widths = [2, *(factor * width for factor, _ in LAYERS)]
        blocks = [
            DvsBlock(inputs, outputs, pools)
            for inputs, outputs, (_, pools) in zip(widths, widths[1:], LAYERS, strict=False)
        ]
        super().__init__(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(widths[-1] * 9, 10))
