"""The networks of the workloads, in plain `torch.nn` and `snncompile.neuron`.

Each is built of modules only where time matters: whatever a network of another framework must do differently, such as
flattening in multi-step mode, is a module that can be exchanged (see `systems/spikingjelly_network.py`).
"""

from __future__ import annotations

from .dvs_vgg import DvsVgg
from .resnet import ResNet18
from .resnet50 import BLOCKS, SpikingResNet50
from .sew_resnet import SewResNet18
from .small import LinearStack, RecurrentLayer, RecurrentNetwork, ResidualIF
from .vgg import Vgg16

__all__ = [
    "BLOCKS",
    "DvsVgg",
    "LinearStack",
    "RecurrentLayer",
    "RecurrentNetwork",
    "ResNet18",
    "ResidualIF",
    "SewResNet18",
    "SpikingResNet50",
    "Vgg16",
]
