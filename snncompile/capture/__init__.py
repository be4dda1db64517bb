"""From a network of single-step modules to a folded graph with shapes."""

from __future__ import annotations

from .adapter import Adapter, Leaf
from .capture import Captured, capture, capture_sequence, check_output
from .chains import NeuronChain, module_of, neurons_of
from .channels_last import ChannelsLastConv2d, is_plain_convolution
from .copies import copy_network, copy_sharing_tensors, tensors_of
from .fakes import FakeNetwork, resolve_attribute
from .fallback import Fallback
from .first_states import start_from
from .hidden_states import RandomState
from .inputs import input_names
from .leaves import ADAPTERS, STATE_STORES, adapter_of, classify, has_hooks, without_hooks
from .multi_step import capture_multi_step
from .registered import register_neuron
from .sequence_module import out_of_place
from .shapes import EffectsRecorder, NodeFailure, propagate_shapes
from .step_modes import is_multi_step, step_mode_of
from .weight_copies import weight_copy

__all__ = [
    "ADAPTERS",
    "STATE_STORES",
    "Adapter",
    "Captured",
    "ChannelsLastConv2d",
    "EffectsRecorder",
    "FakeNetwork",
    "Fallback",
    "Leaf",
    "NeuronChain",
    "NodeFailure",
    "RandomState",
    "adapter_of",
    "capture",
    "capture_multi_step",
    "capture_sequence",
    "check_output",
    "classify",
    "copy_network",
    "copy_sharing_tensors",
    "has_hooks",
    "input_names",
    "is_multi_step",
    "is_plain_convolution",
    "module_of",
    "neurons_of",
    "out_of_place",
    "propagate_shapes",
    "register_neuron",
    "resolve_attribute",
    "start_from",
    "step_mode_of",
    "tensors_of",
    "weight_copy",
    "without_hooks",
]
