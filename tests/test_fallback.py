"""Modules that cannot be followed or tried out like others: they run step by step, and planning does them no harm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, neuron
from snncompile.stateful import StatefulModule

T = 7


def in_a_net(site: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), site, nn.Linear(6, 3), neuron.IFNode(0.2))


def dense_input(steps: int = T) -> Tensor:
    return 2.0 * torch.rand(steps, 4, 6, generator=torch.Generator().manual_seed(1))


def reasons(opt: Any) -> dict[str, str]:
    return {d.node: d.reason for d in opt.report.decisions if d.pass_name == "capture"}


class Renormalising(StatefulModule):
    """A step function that looks into its state's values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("total", 0.0)

    def step(self, inputs: Any, states: Any) -> Any:
        total = states[0] + inputs[0]
        if total.abs().max() > 2.0:
            total = total / total.abs().max()
        return (total,), (total,)


class Pair(nn.Module):
    """Kept as it is because it counts; returns a list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return [x, x * self.calls]


class LooksAtLists(nn.Module):
    """Goes by what another module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.fc = Pair(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.pair(x)
        if isinstance(y, list):
            y = y[0] + 0.1 * y[1]
        return self.fc(y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Renormalising, LooksAtLists])
def test_what_cannot_be_followed_without_data_runs_step_by_step(make: type[nn.Module], training: bool) -> None:
    net = in_a_net(make()).train(training)
    opt = snncompile.optimize(net, T, schedule=3)
    with torch.set_grad_enabled(training):
        assert snncompile.verify(net, opt, dense_input()).ok
        opt.plan(dense_input())
    assert list(reasons(opt)) == ["1"]
    assert "cannot be followed without data" in reasons(opt)["1"]


def test_a_network_that_cannot_run_is_refused_where_it_fails() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(CaptureError, match=r"1\.0 fails on inputs float32\[4, 5\]") as raised:
        snncompile.optimize(net, T)(dense_input())
    assert raised.value.where == "1.0"


class Recording(StatefulModule):
    """Keeps more than its states: a list, and the statistics of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.norm = nn.BatchNorm1d(6)
        self.record: list[Tensor] = []

    def step(self, inputs: Any, states: Any) -> Any:
        v = self.norm(0.9 * states[0] + inputs[0])
        self.record.append(v.detach())
        return (v,), (v,)


@pytest.mark.parametrize("schedule", ["auto", "breadth-first", 3])
def test_planning_does_nothing_that_a_step_does_beside_its_states(
    schedule: str | int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path))  # so that every node is timed
    net = in_a_net(Recording()).train()
    site: Any = net.get_submodule("1")
    opt = snncompile.optimize(net, T, schedule=schedule)
    opt.plan(dense_input())
    assert site.record == []
    assert site.norm.num_batches_tracked == 0
    reference: Any = copy.deepcopy(net)
    opt(dense_input())
    for x in dense_input():
        reference(x)
    assert len(site.record) == T
    assert torch.equal(site.norm.running_mean, reference[1].norm.running_mean)


class ForSteps(nn.Module):
    """Made for a number of steps: it takes not one more before it is reset."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.gains, self.step = nn.Parameter(torch.linspace(0.5, 1.5, limit)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * self.gains[self.step - 1]

    def reset(self) -> None:
        self.step = 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, T])
@pytest.mark.parametrize("schedule", ["auto", "breadth-first", "depth-first"])
@pytest.mark.parametrize("training", [True, False])
def test_planning_asks_no_module_for_more_than_T_steps(steps: int, schedule: str, training: bool) -> None:
    net = in_a_net(ForSteps(steps)).train(training)
    opt = snncompile.optimize(net, steps, schedule=schedule)
    with torch.set_grad_enabled(training):
        assert snncompile.verify(net, opt, dense_input(steps)).ok


class RateCoded(nn.Module):
    """Draws spikes at the rates of its input, which must be probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x)


class Counted(RateCoded):
    """The same in a module that is kept as it is."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.bernoulli(x / self.calls)


@pytest.mark.parametrize("make", [RateCoded, Counted])
def test_planning_finds_values_that_an_operation_takes(
    make: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path))  # so that every node is timed
    net = nn.Sequential(make(), nn.Linear(6, 3), neuron.IFNode()).eval()
    opt = snncompile.optimize(net, T)
    with torch.no_grad():
        assert snncompile.verify(net, opt, dense_input() / 2.0).ok


class MaskedGradient(torch.autograd.Function):
    """A surrogate gradient whose shapes on the way depend on values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0.0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = torch.zeros_like(x)
        near = x.abs() < 0.5
        grad[near] = grads[0][near] * 2.0
        return grad


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = MaskedGradient.apply(x)
        return result


def test_a_backward_function_that_needs_data_can_be_planned() -> None:
    net = in_a_net(Masked()).train()
    parity = snncompile.verify(net, snncompile.optimize(net, T, schedule=3), dense_input())
    assert parity.ok, str(parity)
    assert parity.gradients


def test_verify_compares_what_modules_count() -> None:
    net = in_a_net(LooksAtLists()).eval()
    opt = snncompile.optimize(copy.deepcopy(net), T)
    net.get_submodule("1.pair").calls = 0
    with torch.no_grad():
        assert snncompile.verify(net, opt, dense_input()).ok
        net.get_submodule("1.pair").calls = 1
        parity = snncompile.verify(net, opt, dense_input())
    assert "1.pair.calls.0" in [c.name for c in parity.states if not c.close]
