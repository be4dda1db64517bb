"""From a network of single-step modules to a folded graph with shapes."""

from __future__ import annotations

from .adapter import Adapter, Leaf
from .capture import Captured, capture, check_output
from .copies import copy_network, tensors_of
from .fakes import FakeNetwork, resolve_attribute
from .hidden_states import RandomState
from .leaves import ADAPTERS, adapter_of, classify, has_hooks, without_hooks
from .shapes import EffectsRecorder, propagate_shapes
from .tracer import input_names

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Captured",
    "EffectsRecorder",
    "FakeNetwork",
    "Leaf",
    "RandomState",
    "adapter_of",
    "capture",
    "check_output",
    "classify",
    "copy_network",
    "has_hooks",
    "input_names",
    "propagate_shapes",
    "resolve_attribute",
    "tensors_of",
    "without_hooks",
]
