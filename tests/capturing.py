"""What the tests of capture share: modules made of a function, and what is asked of a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snncompile import neuron
from snncompile.capture import FakeNetwork, capture, propagate_shapes
from snncompile.ir import OpKind, StepGraph
from snncompile.runtime import run_first_step

Forward = Callable[[Any, Tensor], Any]


class Plain(nn.Module):
    """A module of the user's with the given forward and attributes."""

    def __init__(self, forward: Forward, **attributes: Any) -> None:
        super().__init__()
        self.__dict__["_run"] = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.__dict__["_run"](self, x)


class Block(nn.Module):
    """A user's module: a residual around a layer and a neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.fire = neuron.LIFNode()

    def forward(self, x: Tensor) -> Any:
        return self.fire(self.fc(x)) + x


class StepTotal(nn.Module):
    """Adds its input up in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Buffer(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.mean(0))
        return x + self.total


class LoudNeuron(neuron.IFNode):
    """A neuron whose forward may differ from its step."""

    def forward(self, *inputs: Tensor) -> Tensor:
        spike: Tensor = super().forward(*inputs)
        return spike * 2.0


def hooked(module: nn.Module, register: str) -> nn.Module:
    getattr(module, register)(lambda *arguments: None)
    return module


def with_own_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x * 2.0
    return module


def keeps_output(self: Any, x: Tensor) -> Any:
    y = x if self.previous is None else x + 0.5 * self.previous
    self.previous = y
    return y


def zeros() -> Tensor:
    return torch.zeros(6)


def typed(net: nn.Module, *inputs: Tensor) -> StepGraph:
    """The graph with the types of one step `[N, *]` for these inputs; one of `[4, 6]` where none is given."""
    fakes = FakeNetwork(net)
    steps = tuple(fakes.twin(step) for step in inputs or (torch.zeros(4, 6),))
    graph = capture(net).graph
    return propagate_shapes(graph, fakes, steps, net, run_first_step(graph, net, steps).registers)


def operations(graph: StepGraph) -> list[tuple[str, Any]]:
    """Kind and target of all but inputs and the output, in order."""
    outside = (OpKind.INPUT, OpKind.OUTPUT)
    return [(node.kind.value, node.target) for node in graph if node.kind not in outside]
