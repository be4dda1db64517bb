"""snnTorch and Norse, where they have the layers of a workload: the same dynamics, their own loops over time.

All three agree on a LIF neuron with τ = 2 that decays its input and resets to 0, h = v + (x - v)/2. snnTorch writes it
as β v + x, so it gets weights (or, without weights, inputs) of half the size, which is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snncompile.neuron import LIFNode

from ..case import Case, step_loop
from ..networks import RecurrentLayer
from ..workloads import Workload
from .spikingjelly_network import with_shared_tensors
from .system import Prepared, System

HALF = 0.5  # 1/τ


def prepare_snntorch(case: Case) -> Prepared:
    import snntorch

    def leaky() -> nn.Module:
        made: nn.Module = snntorch.Leaky(beta=HALF, reset_mechanism="zero", reset_delay=False, init_hidden=True)
        return made

    network = SnnTorchNetwork(case.network, leaky)
    neurons = [module for module in network.modules() if isinstance(module, snntorch.SpikingNeuron)]

    def reset() -> None:
        for module in (*neurons, *network.recurrent_layers()):
            module.reset_mem()

    return Prepared(
        case,
        lambda: step_loop(case.workload, network, case.inputs),
        network,
        reset,
        lambda: [module.mem.detach() for module in neurons],
    )


class SnnTorchNetwork(nn.Sequential):
    """A sequence of linear layers and snnTorch's neurons, with the weights of another."""

    def __init__(self, network: nn.Module, leaky: Callable[[], nn.Module]) -> None:
        modules: list[nn.Module] = []
        for module in network.children():
            feeds_neurons = isinstance(module, nn.Linear) and len(modules) + 1 < len(list(network.children()))
            if isinstance(module, LIFNode):
                if not modules:
                    modules.append(Halved())
                modules.append(leaky())
            elif isinstance(module, RecurrentLayer):
                modules.append(SnnTorchRecurrence(module, leaky()))
            else:
                modules.append(halved(module) if feeds_neurons else copy.deepcopy(module))
        super().__init__(*modules)

    def recurrent_layers(self) -> list[SnnTorchRecurrence]:
        return [module for module in self if isinstance(module, SnnTorchRecurrence)]


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return HALF * x


def halved(module: nn.Module) -> nn.Module:
    """A copy with parameters of half the size."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(HALF)
    return module


class SnnTorchRecurrence(nn.Module):
    """The spikes of the last step through a linear layer, around a neuron of snnTorch.

    Its own RLeaky adds the recurrent current to a membrane that it resets a step later, which are other dynamics.
    """

    def __init__(self, layer: RecurrentLayer, leaky: nn.Module) -> None:
        super().__init__()
        self.linear, self.recurrent, self.neuron = halved(layer.linear), halved(layer.recurrent), leaky
        self.spikes: Tensor | None = None

    def reset_mem(self) -> None:
        self.spikes = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.linear(x)
        if self.spikes is not None:
            current = current + self.recurrent(self.spikes)
        self.spikes = self.neuron(current)
        return self.spikes


def prepare_norse(case: Case) -> Prepared:
    import norse.torch as norse

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=case.inputs[0].device)

    parameters = norse.LIFBoxParameters(
        tau_mem_inv=number(HALF), v_leak=number(0.0), v_th=number(1.0), v_reset=number(0.0)
    )

    def cell() -> nn.Module:
        made: nn.Module = norse.LIFBoxCell(parameters, dt=1.0)
        return made

    modules = [
        cell()
        if isinstance(module, LIFNode)
        else NorseRecurrence(module, cell())
        if isinstance(module, RecurrentLayer)
        else with_shared_tensors(module)
        for module in case.network.children()
    ]
    network = norse.SequentialState(*modules)
    final: list[Any] = []

    def forward() -> Tensor:
        state = None
        outputs = []
        for x in case.inputs[0].unbind():
            y, state = network(x, state)
            outputs.append(y)
        final[:] = [state]
        return torch.stack(outputs)

    return Prepared(case, forward, network, final.clear, lambda: _membranes(final))


class NorseRecurrence(nn.Module):
    """The spikes of the last step through a linear layer, around a cell of Norse."""

    def __init__(self, layer: RecurrentLayer, cell: nn.Module) -> None:
        super().__init__()
        self.linear, self.recurrent, self.cell = layer.linear, layer.recurrent, cell

    def forward(self, x: Tensor, state: Any = None) -> Any:
        spikes, inner = (None, None) if state is None else state
        current = self.linear(x)
        if spikes is not None:
            current = current + self.recurrent(spikes)
        spikes, inner = self.cell(current, inner)
        return spikes, (spikes, inner)


def _membranes(states: Any) -> list[Tensor]:
    """Every `v` in nested states."""
    if hasattr(states, "v"):
        return [states.v.detach()]
    return [v for part in states for v in _membranes(part)] if isinstance(states, (list, tuple)) else []


def _offers(framework: str) -> Callable[[Workload], bool]:
    return lambda workload: framework in workload.frameworks


SYSTEMS = (
    System("snntorch", "snnTorch", prepare_snntorch, _offers("snntorch"), imports=("snntorch",)),
    System("norse", "Norse", prepare_norse, _offers("norse"), imports=("norse.torch",)),
)
