"""Networks that pass their states through `forward`: handed in, threaded through T steps, handed out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import with_states

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 3, "auto")


class State(NamedTuple):
    v: Tensor
    i: Tensor


class Cell(nn.Module):
    """A current-based neuron in plain operations; its state is a named tuple, None at first."""

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = State(torch.zeros_like(x), torch.zeros_like(x))
        i = 0.8 * state.i + x
        v = 0.9 * state.v + i
        spike = torch.sigmoid(5.0 * (v - 1.0))
        return spike, State(v - spike, i)


class TwoLayers(nn.Module):
    """States as two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mem1 = 0.9 * mem1 + self.first(x)
        spike = torch.sigmoid(4.0 * (mem1 - 0.5))
        mem2 = 0.8 * mem2 + self.second(spike)
        return mem2.tanh(), mem1 - spike, mem2


class Nested(nn.Module):
    """One state: a list with a None, a named tuple and a dict in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cell = nn.Linear(6, 4), Cell()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        cell, trace = (None, None) if state is None else (state[1], state[2]["trace"])
        spike, cell = self.cell(self.linear(x), cell)
        trace = spike if trace is None else 0.5 * trace + spike
        return spike, trace.mean(-1), [None, cell, {"trace": trace}]


def step_loop(net: nn.Module, x_seq: Tensor, *states: Any) -> tuple[Any, ...]:
    steps = []
    for x in x_seq:
        result = net(x, *states)
        states = result[-len(states) :]
        steps.append(result[: -len(states)])
    return (*(torch.stack(column) for column in zip(*steps, strict=True)), *states)


CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "two tensors": (TwoLayers, (torch.zeros(4, 5), torch.zeros(4, 3))),
    "tensors that broadcast": (TwoLayers, (torch.zeros(1), torch.zeros(1))),
    "nested, from None": (Nested, (None,)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_what_comes_out_is_what_the_step_loop_hands_on(name: str, schedule: Any, training: bool) -> None:
    make, states = CASES[name]
    torch.manual_seed(0)
    net = make().train(training)
    for steps in (1, 5):
        x = torch.randn(steps, 4, 6)
        opt = snncompile.optimize(with_states(net, len(states)), steps, schedule=schedule)
        with torch.set_grad_enabled(training):
            expected, got = step_loop(net, x, *states), opt(x, *states)
            torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
            again = opt(x, *got[-len(states) :])  # carried on
            torch.testing.assert_close(again, step_loop(net, x, *expected[-len(states) :]), rtol=0.0, atol=0.0)
            parity = snncompile.verify(with_states(net, len(states)), opt, x, *states)
        assert parity.ok, str(parity)
        assert bool(parity.gradients) is training


def test_layers_without_state_are_batched() -> None:
    net = TwoLayers().eval()
    opt = snncompile.optimize(with_states(net, 2), 5, schedule="breadth-first")
    with torch.no_grad():
        opt(torch.randn(5, 4, 6), torch.zeros(4, 5), torch.zeros(4, 3))
    assert "batched(net['first']" in opt.code
    assert "batched(net['second']" in opt.code


def test_a_plan_serves_calls_with_other_states() -> None:
    opt = snncompile.optimize(with_states(TwoLayers().eval(), 2), 5)
    x = torch.randn(5, 4, 6)
    with torch.no_grad():
        opt(x, torch.zeros(4, 5), torch.zeros(4, 3))
        first = opt.latest_program
        opt(x, torch.ones(4, 5), torch.ones(4, 3))
    assert opt.latest_program is first


def test_parameters_and_checkpoints_are_the_networks_own() -> None:
    net = TwoLayers()
    opt = snncompile.optimize(with_states(net, 2), 5)
    assert opt.state_dict().keys() == net.state_dict().keys()
    assert opt.first.weight is net.first.weight


def test_nothing_is_kept_between_calls() -> None:
    opt = snncompile.optimize(with_states(TwoLayers().eval(), 2), 5)
    x, states = torch.randn(5, 4, 6), (torch.zeros(4, 5), torch.zeros(4, 3))
    with torch.no_grad():
        torch.testing.assert_close(opt(x, *states), opt(x, *states), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("net", "count", "error"),
    [(None, 1, TypeError), (nn.ReLU(), 1.5, TypeError), (nn.ReLU(), True, TypeError), (nn.ReLU(), 0, ValueError)],
)
def test_wrong_arguments(net: Any, count: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        with_states(net, count)


def test_too_many_states() -> None:
    opt = snncompile.optimize(with_states(Nested(), 1), 5)
    with pytest.raises(TypeError, match="takes 1 states after its inputs, got 2"):
        opt(torch.randn(5, 4, 6), None, None)


def test_snntorch_and_norse() -> None:
    snntorch = pytest.importorskip("snntorch")
    norse = pytest.importorskip("norse.torch")

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(6, 5), snntorch.Leaky(beta=0.9)
            self.fc2, self.lif2 = nn.Linear(5, 3), snntorch.Leaky(beta=0.8, learn_beta=True)

        def forward(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> Any:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            return spk2, mem1, mem2

    leaky = Leaky()
    starts = (leaky.lif1.init_leaky(), leaky.lif2.init_leaky())
    cells = norse.SequentialState(nn.Linear(6, 5), norse.LIFCell(), nn.Linear(5, 3), norse.LICell())
    for net, states in ((leaky, starts), (cells, (None,))):
        for steps in (1, 5, 16):
            x = 3.0 * torch.rand(steps, 4, 6)
            opt = snncompile.optimize(with_states(net, len(states)), steps, schedule="breadth-first")
            expected, got = step_loop(net, x, *states), opt(x, *states)
            torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
            assert snncompile.verify(with_states(net, len(states)), opt, x, *states).ok
