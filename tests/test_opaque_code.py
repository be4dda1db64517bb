"""What a forward does beside calling operations: own backward functions, switched modes, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snncompile
from snncompile import neuron

STEPS = 5


class Spike(torch.autograd.Function):
    """A user's own surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0.0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1.0 + x.abs()) ** 2


class Fire(nn.Module):
    """Traced through, down to the autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return Spike.apply(x - self.threshold)  # type: ignore[no-any-return, no-untyped-call]


class FrozenBranch(nn.Module):
    def __init__(self, switch: Any) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(4, 4), nn.Linear(4, 4)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        with self.switch():
            y = self.frozen(x)
        return self.trained(y.float())


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(lambda value: torch.tanh(self.layer(value)), x, use_reentrant=self.reentrant)
        return result


def network(part: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), part, neuron.LIFNode(), nn.Linear(4, 2))


def half_precision() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


PARTS = {
    "autograd function": Fire,
    "no_grad": lambda: FrozenBranch(torch.no_grad),
    "autocast": lambda: FrozenBranch(half_precision),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "reentrant checkpoint": lambda: Checkpointed(reentrant=True),
}


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
@pytest.mark.parametrize("name", PARTS)
def test_outputs_states_and_gradients_are_those_of_the_step_loop(name: str, schedule: Any) -> None:
    torch.manual_seed(0)
    net = network(PARTS[name]())
    opt = snncompile.optimize(net, STEPS, schedule=schedule)
    parity = snncompile.verify(net, opt, torch.randn(STEPS, 4, 4))
    assert parity.ok, str(parity)
    assert len(parity.gradients) == len(list(net.parameters()))


def test_an_autograd_function_is_one_node_and_the_layers_around_it_are_batched() -> None:
    net = network(Fire())
    opt = snncompile.optimize(net, STEPS, schedule="breadth-first", example_input=torch.randn(STEPS, 4, 4))
    assert "Spike = per_step(" in opt.code
    assert "batched(net['0']" in opt.code
    assert "batched(net['3']" in opt.code


@pytest.mark.parametrize("name", ["no_grad", "autocast"])
def test_a_module_that_switches_modes_runs_step_by_step_and_the_report_says_why(name: str) -> None:
    opt = snncompile.optimize(network(PARTS[name]()), STEPS, example_input=torch.randn(STEPS, 4, 4))
    reasons = [d.reason for d in opt.report.decisions if d.pass_name == "capture" and d.node == "1"]
    assert reasons == ["kept as it is and run step by step: it computes under no_grad, autocast or the like"]


def test_functions_are_called_as_before_once_tracing_is_over() -> None:
    snncompile.optimize(network(Fire()), STEPS)
    x = torch.tensor([0.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(Spike.apply(x), x)  # type: ignore[no-untyped-call]
    assert gradient.item() == pytest.approx(1.0 / 1.5**2)
