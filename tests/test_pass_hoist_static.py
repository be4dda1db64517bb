"""Hoist static: what no step changes is computed once, up to the first state or randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.ir import OpKind, StepGraph
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.eliminate_dead import EliminateDead
from snncompile.passes.find_recurrent_regions import FindRecurrentRegions
from snncompile.passes.hoist_static import HoistStatic
from snncompile.passes.mark_time_coupling import MarkTimeCoupling

from .graphs import (
    Calls,
    Stage,
    T,
    assert_idempotent,
    assert_nothing_matches,
    assert_step_loop,
    first_stage,
    images,
    said_of,
    text_of,
    vectors,
)
from .networks import Feedback, Scale, StepCounter

ONCE = f"done: computed once instead of {T} times"


class Encoder(nn.Module):
    """Direct coding: an analog layer in front of spiking ones, scaled by gates: `[N, 2, 6, 6]` -> `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.encode = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), neuron.IFNode(0.3)
        self.gate, self.head = Scale((32,)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Any:
        current = F.relu(self.norm(self.conv(x)))
        spikes = self.encode(current)
        return self.head(self.gate(spikes.flatten(1))) + current.mean((1, 2, 3)).unsqueeze(1)


def ready(net: nn.Module, *x_seq: Tensor, **options: Any) -> Stage:
    """Everything before the pass has run."""
    passes = Canonicalise(), EliminateDead(), MarkTimeCoupling(), FindRecurrentRegions()
    return first_stage(net, *x_seq, **options).after(*passes)


def hoisted(net: nn.Module, *x_seq: Tensor, static_input: bool = True) -> list[str]:
    """Names of the operations that are computed once."""
    graph = ready(net, *x_seq, static_input=static_input).run(HoistStatic()).graph
    return computed_once(graph)


def computed_once(graph: StepGraph) -> list[str]:
    given = (OpKind.INPUT, OpKind.CONSTANT)
    return [node.name for node in graph if node.invariant and node.kind not in given]


@pytest.mark.parametrize("static_input", [False, True])
def test_all_before_the_first_state_is_computed_once(golden: Callable[[str], None], static_input: bool) -> None:
    x = images()[0] if static_input else images()
    golden(text_of(ready(Encoder().eval(), x, static_input=static_input).run(HoistStatic())))


@pytest.mark.parametrize("static_input", [False, True])
@pytest.mark.parametrize(
    ("schedule", "training"), [("depth-first", False), ("breadth-first", False), (3, False), ("breadth-first", True)]
)
def test_computing_once_gives_what_the_step_loop_gives(schedule: str | int, training: bool, static_input: bool) -> None:
    x = images()[0] if static_input else images()
    assert_step_loop(Encoder().train(training), x, schedule=schedule, static_input=static_input)


@pytest.mark.parametrize("static_input", [False, True])
def test_a_second_run_changes_nothing(static_input: bool) -> None:
    x = images()[0] if static_input else images()
    assert_idempotent(HoistStatic(), ready(Encoder().eval(), x, static_input=static_input))


def test_a_network_that_sees_another_input_at_each_step_is_left_as_it_is() -> None:
    assert_nothing_matches(HoistStatic(), ready(nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 3))))


@pytest.mark.parametrize(("static_input", "calls"), [(True, 1), (False, T)])
def test_a_layer_before_the_first_state_is_called_once(
    monkeypatch: pytest.MonkeyPatch, static_input: bool, calls: int
) -> None:
    x = vectors()[0] if static_input else vectors()
    net = nn.Sequential(nn.Linear(6, 5), neuron.IFNode(), nn.Linear(5, 3)).eval()
    opt = snncompile.optimize(net, T, schedule="depth-first", static_input=static_input)
    called: list[nn.Module] = []
    original = nn.Linear.forward

    def counted(self: nn.Linear, input: Tensor) -> Tensor:
        called.append(self)
        return original(self, input)

    with torch.no_grad():
        opt.plan(x)
        monkeypatch.setattr(nn.Linear, "forward", counted)
        opt(x)
        opt(x)
    assert called.count(net[0]) == 2 * calls
    assert called.count(net[2]) == 2 * T


def test_a_constant_expression_is_computed_once_whatever_the_input() -> None:
    stage = ready(Scale((6,)))
    result = stage.run(HoistStatic())
    assert computed_once(result.graph) == ["sigmoid"]
    assert said_of(result, "sigmoid") == [ONCE]
    assert result.graph["gate"].invariant
    assert result.graph["offset"].invariant
    assert not result.graph["x"].invariant


def test_a_weight_changed_after_compiling_is_seen_by_what_is_computed_once() -> None:
    scale = Scale((6,))
    net = nn.Sequential(scale, neuron.IFNode(0.3)).eval()
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    with torch.no_grad():
        before = opt(vectors())
        scale.gate.neg_()
        opt.reset()
        after = opt(vectors())
    assert not torch.equal(before, after)
    opt.reset()
    assert snncompile.verify(net, opt, vectors()).ok


def test_a_network_without_state_is_computed_once_altogether() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    assert hoisted(net) == ["linear_0", "relu_1", "linear_2"]
    for readout in ("sequence", "sum", "mean", "last"):
        snncompile.verify(net, snncompile.optimize(net, T, static_input=True, readout=readout), vectors()[0]).check()


# What stays in the loop

STAYS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "behind a neuron": (lambda: nn.Sequential(nn.ReLU(), neuron.IFNode(0.3), nn.Linear(6, 6)), ["relu_0"]),
    "behind an opaque module": (lambda: nn.Sequential(nn.ReLU(), StepCounter(), nn.Linear(6, 6)), ["relu_0"]),
    "behind a draw": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)), ["relu_0"]),
    "behind statistics": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 6)), ["relu_0"]),
    "in a region": (
        lambda: Calls(lambda x, drop, layer: drop(x) + layer(x) + drop(x) * 2.0, nn.Dropout(0.5), nn.Linear(6, 6)),
        ["parts_1"],
    ),
    "where one of two operands changes": (
        lambda: Calls(lambda x, site, layer: layer(x) * site(x), neuron.IFNode(0.3), nn.Linear(6, 6)),
        ["parts_1"],
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_depends_on_state_randomness_or_statistics_stays_in_the_loop(name: str) -> None:
    make, once = STAYS[name]
    assert hoisted(make().train()) == once


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_the_loop_gives_what_the_step_loop_gives(name: str, training: bool) -> None:
    assert_step_loop(STAYS[name][0]().train(training), schedule="breadth-first", static_input=True)


def test_a_batch_norm_in_eval_mode_and_an_idle_dropout_do_not_end_what_is_computed_once() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), neuron.IFNode()).eval()
    assert hoisted(net) == ["linear_0", "batchnorm1d_1", "relu_3"]


def test_what_lies_between_two_draws_stays_in_their_region_though_no_step_changes_it() -> None:
    def forward(x: Tensor, layer: nn.Module) -> Tensor:
        noise = F.dropout(x, 0.5, training=True)
        return F.dropout(layer(x) + noise, 0.5, training=True)

    net = Calls(forward, nn.Linear(6, 6))
    assert hoisted(net) == ["parts_0"]
    assert_step_loop(net.train(), schedule="breadth-first", static_input=True)


def test_what_a_module_keeps_for_its_next_step_ends_what_is_computed_once() -> None:
    net = nn.Sequential(nn.ReLU(), Feedback(), nn.Linear(6, 6)).eval()
    assert hoisted(net)[0] == "relu_0"
    assert "linear_2" not in hoisted(net)
    assert_step_loop(net, schedule="breadth-first", static_input=True)


def test_an_output_that_is_computed_once_is_returned_at_every_step() -> None:
    net = Calls(lambda x, layer, site: (layer(x), site(layer(x))), nn.Linear(6, 6), neuron.IFNode(0.3)).eval()
    assert hoisted(net) == ["parts_0", "parts_0_1"]
    assert_step_loop(net, schedule="breadth-first", static_input=True)
    with torch.no_grad():
        once, spikes = snncompile.optimize(net, T, static_input=True)(vectors()[0])
    assert once.shape == spikes.shape == (T, 4, 6)
    assert all(torch.equal(step, once[0]) for step in once)
