"""A workload made concrete: weights, inputs, and what the step loop computes with them.

One process makes the case and writes it to a file that all systems read, so that all run the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snncompile import functional

from .outcome import Departure, Outcome, compare
from .workloads import Workload

# Two units in the last place of a float32, several times what another order of summation costs: how far a change of
# that size leads is how far rounding may lead.
PERTURBATION = 2.0**-22


@dataclass(frozen=True)
class Case:
    """One workload with its numbers.

    Attributes:
        workload: What it was made from.
        network: Single-step, of `snncompile.neuron`; of SpikingJelly's modules in multi-step mode if the workload says
            so.
        inputs: `[T, N, *]` each, or `[N, *]` if static.
        cotangent: For training, the gradient of the loss by the output.
        expected: The reference's outcome.
        rounding: How far the reference departs from itself when weights and inputs change in their last bits.
        firing_rate: Share of neurons that fire in a step, over all neurons and steps.
        neurons: Of one sample.
    """

    workload: Workload
    network: nn.Module
    inputs: tuple[Tensor, ...]
    cotangent: Tensor | None
    expected: Outcome
    rounding: Departure
    firing_rate: float
    neurons: int

    def save(self, path: Path) -> None:
        torch.save(self, path)

    @staticmethod
    def load(path: Path, device: torch.device) -> Case:
        case: Case = torch.load(path, weights_only=False)
        inputs = tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in case.inputs)
        cotangent = None if case.cotangent is None else case.cotangent.to(device)
        network = case.network.to(device)
        return Case(
            *(case.workload, network, inputs, cotangent, case.expected.to(device)),
            *(case.rounding, case.firing_rate, case.neurons),
        )


def make_case(workload: Workload, device: torch.device) -> Case:
    """Build the network and run the reference twice: as it is, and with its last bits changed."""
    network = workload.network()
    if workload.is_multi_step:
        from .systems.spikingjelly_network import translated

        network = translated(network, step_mode="m")
    network = network.to(device)
    inputs = tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in workload.inputs())
    cotangent: Tensor | None = None
    if workload.trains:
        with torch.no_grad():
            shape = reference_output(workload, copy.deepcopy(network), inputs).shape
        torch.manual_seed(2)
        cotangent = torch.randn(shape).to(device)
    # The reference runs on copies: what training does to running statistics is no part of the case.
    counter = SpikeCounter(copy.deepcopy(network))
    expected = reference_outcome(workload, counter.network, inputs, cotangent)
    rounded = perturbed(network), tuple(_perturbed(x).requires_grad_(x.requires_grad) for x in inputs)
    rounding = compare(expected, reference_outcome(workload, *rounded, cotangent))
    return Case(
        *(workload, network, inputs, cotangent, expected, rounding),
        *(counter.rate(), counter.neurons() // workload.batch),
    )


def reference_outcome(
    workload: Workload, network: nn.Module, inputs: tuple[Tensor, ...], cotangent: Tensor | None
) -> Outcome:
    def forward() -> Tensor:
        return reference_output(workload, network, inputs)

    output = run(forward, cotangent)
    return Outcome(
        output.detach(), tuple(potentials(network)), tuple(gradients(network, inputs)) if workload.trains else ()
    )


def reference_output(workload: Workload, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    if workload.is_multi_step:
        output: Tensor = network(*inputs)
        return output
    return step_loop(workload, network, inputs)


def step_loop(workload: Workload, network: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """One call of the network for each step; the outputs stacked, or summed as they come."""
    outputs = (network(*(x if workload.static_input else x[t] for x in inputs)) for t in range(workload.steps))
    if workload.readout == "sum":
        return reduce(torch.add, outputs)
    return torch.stack(list(outputs))


def run(forward: Callable[[], Tensor], cotangent: Tensor | None) -> Tensor:
    """The output of an inference, or of forward and backward if there is a gradient to start backward with."""
    if cotangent is None:
        with torch.no_grad():
            return forward()
    output = forward()
    output.backward(cotangent)
    return output


def potentials(network: nn.Module) -> list[Tensor]:
    """The membrane potential of every neuron, in the order of the modules; SpikingJelly's have the same name."""
    found = (getattr(module, "v", None) for module in network.modules())
    return [v.detach() for v in found if isinstance(v, Tensor)]


def gradients(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = (*network.parameters(), *(x for x in inputs if x.requires_grad))
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def clear_gradients(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for leaf in (*network.parameters(), *inputs):
        leaf.grad = None


def perturbed(network: nn.Module) -> nn.Module:
    """A copy whose weights differ in their last bits."""
    network = copy.deepcopy(network)
    functional.reset_net(network)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(_perturbed(parameter))
    return network


def _perturbed(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor * (1.0 + PERTURBATION * (2.0 * torch.rand_like(tensor) - 1.0))


class SpikeCounter:
    """Counts what the neurons of a network send out while it runs.

    Attributes:
        network: Whose neurons are watched.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._spikes: list[Tensor] = []
        self._outputs = 0
        for module in network.modules():
            if isinstance(getattr(module, "v", None), (float, int, Tensor)) and hasattr(module, "v_threshold"):
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spikes.append((output != 0).sum())
        self._outputs += output.numel()

    def rate(self) -> float:
        return sum(int(count) for count in self._spikes) / max(1, self._outputs)

    def neurons(self) -> int:
        """Of the whole batch."""
        return sum(v.numel() for v in potentials(self.network))
