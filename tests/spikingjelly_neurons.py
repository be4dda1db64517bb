"""The neurons of SpikingJelly whose step is pointwise; a test that asks for them is skipped without the package."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

_EXACT = (
    *("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "IzhikevichNode", "KLIFNode", "CUBALIFNode", "ILIFNode"),
    *("HalfThresholdIFNode", "TernaryIFNode", "TernaryLIFNode", "RAFNode", "ActivationAwareIFNode"),
)
_TRANSCENDENTAL = ("EIFNode", "ComplementaryLIFNode")


def exact_neurons() -> dict[str, Callable[[], nn.Module]]:
    """Those whose step rounds alike in every kernel."""
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    return {name: getattr(sj, name) for name in _EXACT} | {"LIAFNode": lambda: sj.LIAFNode(torch.relu, True)}


def transcendental_neurons() -> dict[str, Callable[[], nn.Module]]:
    """Those that compute an exponential function, of which libraries differ in the last bits."""
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    return {name: getattr(sj, name) for name in _TRANSCENDENTAL}
