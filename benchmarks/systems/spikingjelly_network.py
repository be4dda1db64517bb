"""The same network built of SpikingJelly's modules: same weights, same order, in step mode "s" or "m"."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from snncompile import neuron, surrogate

from ..networks import RecurrentLayer

# SpikingJelly's layers add a step mode to torch's classes of the same names, and no parameters.
LAYERS = ("Conv2d", "Linear", "BatchNorm2d", "AvgPool2d", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten")


def translated(network: nn.Module, step_mode: str) -> nn.Module:
    """A network of the same parameters and buffers in which every module that has a step mode is SpikingJelly's.

    Args:
        network: Of `torch.nn` and `snncompile.neuron`.
        step_mode: "s" or "m".
    """
    from spikingjelly.activation_based import functional

    network = with_shared_tensors(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            parent.register_module(name, _translated_module(child))
    functional.set_step_mode(network, step_mode)
    return network


def with_shared_tensors(network: nn.Module) -> nn.Module:
    """A copy of the modules, not of parameters and buffers."""
    shared = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _translated_module(module: nn.Module) -> nn.Module:
    from spikingjelly.activation_based import layer

    if isinstance(module, neuron.SpikingNode):
        return _translated_neuron(module)
    if isinstance(module, RecurrentLayer):
        return _recurrent_container(module)
    if type(module).__module__.startswith("torch.nn.") and type(module).__name__ in LAYERS:
        # The layer stays what it is, with all its arguments and parameters, and gets the subclass's step mode.
        module.__class__ = getattr(layer, type(module).__name__)
        module.step_mode = "s"  # type: ignore[assignment]
    return module


def _translated_neuron(module: neuron.SpikingNode) -> nn.Module:
    from spikingjelly.activation_based import neuron as peers
    from spikingjelly.activation_based import surrogate as peer_surrogates

    function = module.surrogate_function
    assert isinstance(function, (surrogate.Sigmoid, surrogate.ATan))
    shared: dict[str, Any] = {
        "v_threshold": module.v_threshold,
        "v_reset": module.v_reset,
        "surrogate_function": getattr(peer_surrogates, type(function).__name__)(alpha=function.alpha),
        "detach_reset": module.detach_reset,
    }
    made: nn.Module
    if isinstance(module, neuron.LIFNode):
        made = peers.LIFNode(tau=module.tau, decay_input=module.decay_input, **shared)
    elif isinstance(module, neuron.IFNode):
        made = peers.IFNode(**shared)
    else:
        raise TypeError(f"no SpikingJelly neuron for {type(module).__name__}")
    return made.train(module.training)


def _recurrent_container(module: RecurrentLayer) -> nn.Module:
    """Its own recurrence: one linear layer on the input and the last spikes side by side, the sum of both products."""
    from spikingjelly.activation_based import layer

    made: nn.Module = layer.LinearRecurrentContainer(
        _translated_neuron(module.neuron), module.linear.in_features, module.linear.out_features
    )
    weight: Tensor = torch.cat([module.linear.weight, module.recurrent.weight], dim=1)
    made.rc.weight = nn.Parameter(weight.detach().clone())  # type: ignore[union-attr]
    made.rc.bias = nn.Parameter(module.linear.bias.detach().clone())  # type: ignore[union-attr]
    return made.train(module.training)
