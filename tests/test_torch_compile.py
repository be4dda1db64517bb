"""`torch.compile` calls a compiled network as it is, between what it compiles itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import functional, neuron

T = 5


def network() -> nn.Sequential:
    """`[N, 6]` -> `[N, 8]`, spikes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(v_threshold=0.2))


def vectors(seed: int = 0) -> Tensor:
    return torch.randn(T, 4, 6, generator=torch.Generator().manual_seed(seed))


def step_loop(net: nn.Module, x: Tensor) -> Tensor:
    functional.reset_net(net)
    return torch.stack([net(step) for step in x])


@pytest.mark.parametrize("is_planned", [False, True])
def test_torch_compile_calls_it_as_it_is(is_planned: bool) -> None:
    net = network().eval()
    opt = snncompile.optimize(net, T, schedule=2)
    graphs = []

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    with torch.no_grad():
        if is_planned:
            opt(vectors())
            opt.reset()
        found = torch.compile(lambda x: opt(x * 2.0) + 1.0, backend=look)(vectors())
        assert torch.equal(found, step_loop(net, 2.0 * vectors()) + 1.0)
    assert [len(graph) for graph in graphs] == [1, 1]  # what stands before it and behind it


def test_gradients_flow_through_it_inside_torch_compile() -> None:
    net, x = network().train(), vectors()
    opt = snncompile.optimize(net, T, schedule=2)
    torch.compile(lambda x: opt(x * 2.0).sum(), backend="eager")(x).backward()
    found = net[0].weight.grad.clone()
    net.zero_grad()
    step_loop(net, 2.0 * x).sum().backward()
    torch.testing.assert_close(found, net[0].weight.grad)
