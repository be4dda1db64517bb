"""Eliminate dead: what nobody reads and nobody notices goes; state, randomness and statistics stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import snncompile
from snncompile import neuron
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.eliminate_dead import EliminateDead

from .graphs import (
    Calls,
    Stage,
    T,
    assert_idempotent,
    assert_nothing_matches,
    assert_step_loop,
    first_stage,
    operations_of,
    said_of,
    text_of,
    vectors,
)
from .networks import CurrentLIF, Feedback, Scale, StepCounter

NEVER_READ = "done: its value is never read"

NOTICED: list[Tensor] = []


@fx.wrap
def notice(x: Tensor) -> Tensor:
    """A function that tracing does not look into, and that leaves a trace of each call."""
    NOTICED.append(x)
    return x


class Auxiliary(nn.Module):
    """A network with a second head that is computed and thrown away: `[N, 6]` -> `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head, self.second = nn.Linear(6, 6), Scale((6,)), nn.Linear(6, 3), nn.Linear(6, 3)
        self.site = neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Any:
        features = self.site(self.body(x))
        gated = self.gate(features)
        scores = self.second(gated).softmax(-1)
        torch.maximum(scores, gated[:, :3])
        return self.head(features)


def canonical(net: nn.Module) -> Stage:
    return first_stage(net).after(Canonicalise())


def beside(forward: Callable[..., Any], *parts: nn.Module) -> nn.Module:
    """A network that computes something, and returns something else."""

    def both(x: Tensor, layer: nn.Module, *parts: nn.Module) -> Any:
        forward(x, *parts)
        return layer(x)

    return Calls(both, nn.Linear(6, 6), *parts)


def test_a_branch_that_nobody_reads_goes_with_all_it_is_made_of(golden: Callable[[str], None]) -> None:
    golden(text_of(canonical(Auxiliary().eval()).run(EliminateDead())))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
def test_the_network_without_its_dead_branch_computes_the_same(schedule: str | int, training: bool) -> None:
    assert_step_loop(Auxiliary().train(training), schedule=schedule)


def test_a_parameter_of_a_dead_branch_gets_no_gradient() -> None:
    net = Auxiliary().train()
    snncompile.optimize(net, T, schedule="breadth-first")(vectors()).sum().backward()
    assert net.second.weight.grad is None
    assert net.head.weight.grad is not None


def test_a_network_without_dead_nodes_is_left_as_it_is() -> None:
    net = Calls(lambda x, first, second: (y := first(x), second(y)), nn.Linear(6, 6), nn.ReLU())
    assert_nothing_matches(EliminateDead(), canonical(net))


@pytest.mark.parametrize("training", [False, True])
def test_a_second_run_finds_nothing(training: bool) -> None:
    assert_idempotent(EliminateDead(), canonical(Auxiliary().train(training)))


def test_what_a_dead_node_alone_reads_is_dead_and_what_others_read_is_not() -> None:
    def forward(x: Tensor) -> Tensor:
        shared, own = x * 2.0, x * 3.0
        (shared + own).relu()
        return shared

    result = canonical(Calls(forward)).run(EliminateDead())
    assert operations_of(result.graph) == ["mul"]
    assert [decision.node for decision in result.decisions] == ["mul_1", "add", "relu"]
    assert said_of(result, "relu") == [NEVER_READ]


def test_an_input_that_nobody_reads_stays() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y * 2.0

    stage = first_stage(Second(), vectors(), vectors()).after(Canonicalise())
    assert_nothing_matches(EliminateDead(), stage)
    assert_step_loop(Second(), vectors(), vectors(), schedule="breadth-first")


KEPT: dict[str, Callable[[], nn.Module]] = {
    "a neuron, whose state can be read": lambda: beside(lambda x, site: site(x), neuron.IFNode()),
    "one of two outputs": lambda: beside(lambda x, site: site(x)[1], CurrentLIF(0.5)),
    "an opaque module, which counts its calls": lambda: beside(lambda x, site: site(x), StepCounter()),
    "a dropout, which draws what later ones would draw": lambda: beside(lambda x, site: site(x), nn.Dropout(0.5)),
    "a random function": lambda: beside(torch.bernoulli),
    "a batch norm, which updates its statistics": lambda: beside(lambda x, norm: norm(x), nn.BatchNorm1d(6)),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_dead_node_that_is_noticed_stays(name: str) -> None:
    net = KEPT[name]().train()
    graph = canonical(net).run(EliminateDead()).graph
    assert len(operations_of(graph)) == 2


@pytest.mark.parametrize("name", KEPT)
def test_what_a_dead_node_leaves_behind_is_what_the_step_loop_leaves(name: str) -> None:
    net = nn.Sequential(KEPT[name](), nn.Dropout(0.5)).train()
    with torch.no_grad():
        parity = snncompile.verify(net, snncompile.optimize(net, T, schedule="breadth-first"), vectors().sigmoid())
    assert parity.exact


def test_what_a_dead_module_keeps_for_its_next_step_is_kept() -> None:
    assert_step_loop(beside(lambda x, site: site(x), Feedback()).eval(), schedule="breadth-first")


def test_an_idle_dropout_and_a_batch_norm_in_eval_mode_are_dead() -> None:
    for module in (nn.Dropout(0.5), nn.BatchNorm1d(6)):
        net = beside(lambda x, module: module(x).relu(), module).eval()
        assert operations_of(canonical(net).run(EliminateDead()).graph) == ["parts_0"]


def test_a_dead_call_of_an_unknown_function_stays() -> None:
    def forward(x: Tensor, layer: nn.Module) -> Any:
        notice(x)
        return layer(x)

    stage = canonical(Calls(forward, nn.Linear(6, 6)).eval())
    assert operations_of(stage.graph) == ["notice", "parts_0"]
    assert_nothing_matches(EliminateDead(), stage)
    opt = snncompile.optimize(stage.context.net, T, example_input=vectors())
    NOTICED.clear()
    with torch.no_grad():
        opt(vectors())
    assert len(NOTICED) == T
