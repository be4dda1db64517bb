"""`register_neuron`: a class of the user's becomes a neuron in one line, with the results it had without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import surrogate
from snncompile.ir import OpKind

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 3, "auto")


class Adaptive(nn.Module):
    """A leaky neuron with an adapting threshold; its states are numbers until the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.8))
        self.fire = surrogate.ATan()
        self.reset()

    def reset(self) -> None:
        self.v: Any = 0.0
        self.bar: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        v = self.decay * self.v + x
        spike = self.fire(v - self.bar)
        self.v = v - spike * self.bar
        self.bar = 0.9 * self.bar + 0.1 + 0.2 * spike
        return spike


class Twin(Adaptive):
    """The same, not registered."""


class Branching(Adaptive):
    """The same, with code that looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else 2.0 * x)


snncompile.register_neuron(Adaptive, states={"v": 0.0, "bar": 1.0})
snncompile.register_neuron(Branching, states={"v": 0.0, "bar": 1.0})


def network(cls: type[Adaptive] = Adaptive) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), cls(), nn.Linear(8, 8), cls(), nn.Linear(8, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_states_and_gradients_are_those_of_the_step_loop(schedule: Any, training: bool) -> None:
    for steps in (1, 5, 7):
        net = network().train(training)
        opt = snncompile.optimize(net, steps, schedule=schedule)
        with torch.set_grad_enabled(training):
            parity = snncompile.verify(net, opt, 2.0 * torch.rand(steps, 4, 6))
        assert parity.ok, str(parity)


def test_a_registered_neuron_is_one_step_function_and_an_unregistered_one_its_operations() -> None:
    x = torch.rand(5, 4, 6)
    kinds = {}
    for cls in (Adaptive, Twin):
        opt = snncompile.optimize(network(cls).eval(), 5, schedule="breadth-first", example_input=x)
        kinds[cls] = [node.kind for node in opt.latest_program.graph]
    assert kinds[Adaptive].count(OpKind.STATEFUL) == 2
    assert OpKind.LOAD not in kinds[Adaptive]
    assert kinds[Twin].count(OpKind.STATEFUL) == 0
    assert kinds[Twin].count(OpKind.LOAD) == 4


def test_states_carry_over_and_reset() -> None:
    net, x = network().eval(), 2.0 * torch.rand(8, 4, 6)
    reference = copy.deepcopy(net)
    opt = snncompile.optimize(net, 4)
    with torch.no_grad():
        expected = torch.stack([reference(step) for step in x])
        assert torch.equal(torch.cat([opt(x[:4]), opt(x[4:])]), expected)
        assert torch.equal(net[3].bar, reference[3].bar)
        opt.reset()
        assert net[3].bar == 1.0
        assert torch.equal(opt(x[:4]), expected[:4])


class WithoutReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.8))
        self.v: Any = 0.25

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.decay * self.v + x
        y: Tensor = self.v
        return y


def test_one_without_a_reset_of_its_own_is_reset_and_detached_with_the_network() -> None:
    snncompile.register_neuron(WithoutReset, states={"v": 0.25})
    net, x = nn.Sequential(WithoutReset()), torch.rand(5, 2, 3)
    opt = snncompile.optimize(net, 5, schedule=2)
    first = opt(x)
    first.sum().backward()
    snncompile.functional.detach_net(net)
    assert not net[0].v.requires_grad
    opt(x).sum().backward()  # truncated: states go on, gradients end here
    opt.reset()
    assert net[0].v == 0.25
    again = opt(x)
    assert torch.equal(first, again)
    again.sum().backward()


def test_its_code_may_look_at_values() -> None:
    net, x = network(Branching), 2.0 * torch.rand(5, 4, 6) - 0.5
    assert snncompile.verify(net, snncompile.optimize(net, 5, schedule=2), x).ok


class Reads(nn.Module):
    """Reads a registered neuron's state from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fire = nn.Linear(6, 6), Adaptive()

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.fc(x)) + self.fire.bar


def test_a_state_read_from_outside_is_not_frozen() -> None:
    net, x = Reads(), 2.0 * torch.rand(5, 4, 6)
    assert snncompile.verify(net, snncompile.optimize(net, 5, schedule="breadth-first"), x).ok


@pytest.mark.parametrize(
    ("cls", "states", "error", "message"),
    [
        (Adaptive(), {"v": 0.0}, TypeError, "expects a class derived from nn.Module"),
        (int, {"v": 0.0}, TypeError, "expects a class derived from nn.Module"),
        (Twin, ["v"], TypeError, "must map attribute names to reset values, got list"),
        (Twin, {}, ValueError, "needs at least one state"),
        (Twin, {1: 0.0}, TypeError, "must be strings"),
        (Twin, {"v.w": 0.0}, ValueError, "cannot be the name of an attribute"),
        (Twin, {"v": None}, TypeError, "reset value of v must be a real number"),
        (Twin, {"v": float("nan")}, ValueError, "must be finite"),
    ],
)
def test_bad_arguments_are_named(cls: Any, states: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        snncompile.register_neuron(cls, states)
