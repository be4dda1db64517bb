"""A CUDA graph of one step of SpikingJelly's network, replayed for every step: no launch costs, states in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..case import Case, potentials
from ..workloads import Workload
from .spikingjelly import IMPORTS, peer_network
from .system import Prepared, System

WARM_UP_STEPS = 3


def prepare_graph(case: Case) -> Prepared:
    workload = case.workload
    network = peer_network(case, "s")
    step_inputs = tuple((x if workload.static_input else x[0]).clone() for x in case.inputs)
    with torch.no_grad():
        for _ in range(WARM_UP_STEPS):
            network(*step_inputs)
        states = Rest(network)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = network(*step_inputs)
            states.keep_in_place()

    def forward() -> Tensor:
        outputs = []
        total: Tensor | None = None
        for t in range(workload.steps):
            if not workload.static_input:
                for target, source in zip(step_inputs, case.inputs, strict=True):
                    target.copy_(source[t])
            graph.replay()
            if workload.readout == "sum":
                total = output.clone() if total is None else total + output
            else:
                outputs.append(output.clone())
        return torch.stack(outputs) if total is None else total

    return Prepared(case, forward, network, states.clear, lambda: [state.detach() for state in states.tensors])


class Rest:
    """The tensors in which a captured step finds and leaves its states."""

    def __init__(self, network: nn.Module) -> None:
        self._neurons = [module for module in network.modules() if isinstance(getattr(module, "v", None), Tensor)]
        rest: list[Any] = [module.v_reset or 0.0 for module in self._neurons]
        self.tensors = [torch.full_like(v, value) for v, value in zip(potentials(network), rest, strict=True)]
        self._rest = [state.clone() for state in self.tensors]
        for module, state in zip(self._neurons, self.tensors, strict=True):
            module.v = state

    def keep_in_place(self) -> None:
        """While a step is captured: its last act is to write the states back to where it found them."""
        for module, state in zip(self._neurons, self.tensors, strict=True):
            state.copy_(module.v)  # type: ignore[arg-type]

    def clear(self) -> None:
        for state, rest in zip(self.tensors, self._rest, strict=True):
            state.copy_(rest)


def is_feed_forward_inference(workload: Workload) -> bool:
    """A container's own last output would be a state that the graph does not know."""
    return not workload.trains and not workload.is_multi_step and workload.suite != "recurrent"


SYSTEMS = (
    System(
        "cuda-graph",
        "CUDA graph of the step",
        prepare_graph,
        is_feed_forward_inference,
        devices=("cuda",),
        imports=IMPORTS,
    ),
)
