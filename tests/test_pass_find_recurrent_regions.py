"""Find recurrent regions: what feeds back runs step by step, and only that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.ir import Edge, EdgeKind, StepGraph
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.find_recurrent_regions import FindRecurrentRegions
from snncompile.passes.mark_time_coupling import MarkTimeCoupling

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
from .networks import StepCounter


class SharedNeuron(nn.Module):
    """One neuron before and behind a layer, so that its state feeds back through it; layers around: `[N, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.beside, self.behind = (nn.Linear(6, 6) for _ in range(4))
        self.shared, self.alone = neuron.LIFNode(v_threshold=0.2), neuron.LIFNode(v_threshold=0.2)

    def forward(self, x: Tensor) -> Any:
        spikes = self.shared(self.before(x))
        again = self.shared(self.inside(spikes))
        return self.behind(self.alone(again + self.beside(spikes)))


class Recurrent(nn.Module):
    """Feeds its own spikes of the step before back through a layer, from a plain attribute: `[N, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.feedforward, self.feedback = nn.Linear(6, 6), nn.Linear(6, 6)
        self.site = neuron.LIFNode(v_threshold=0.2)
        self.spikes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.feedforward(x)
        if self.spikes is not None:
            current = current + self.feedback(self.spikes)
        self.spikes = self.site(current)
        return self.spikes

    def reset(self) -> None:
        self.spikes = None


def marked(net: nn.Module) -> Stage:
    return first_stage(net).after(Canonicalise(), MarkTimeCoupling())


def regions(net: nn.Module) -> tuple[tuple[str, ...], ...]:
    return marked(net).run(FindRecurrentRegions()).graph.regions


def two_sites(x: Tensor, site: nn.Module, layer: nn.Module) -> Any:
    return site(layer(site(x)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a shared neuron": SharedNeuron,
    "a shared neuron with nothing between": lambda: Calls(lambda x, site: site(site(x)), neuron.IFNode(0.4)),
    "a shared opaque module": lambda: Calls(two_sites, StepCounter(), nn.Linear(6, 6)),
    "spikes of the step before": lambda: nn.Sequential(nn.Linear(6, 6), Recurrent(), nn.Linear(6, 3)),
    "two regions": lambda: nn.Sequential(
        Calls(two_sites, neuron.IFNode(0.4), nn.Linear(6, 6)),
        nn.Linear(6, 6),
        Calls(two_sites, neuron.LIFNode(v_threshold=0.2), nn.Linear(6, 6)),
    ),
    "draws in order": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)),
    "a shared batch norm": lambda: Calls(two_sites, nn.BatchNorm1d(6), nn.Linear(6, 6)),
}


def test_a_feedback_through_a_shared_neuron_is_a_region_of_only_its_nodes(golden: Callable[[str], None]) -> None:
    golden(text_of(marked(SharedNeuron()).run(FindRecurrentRegions())))


@pytest.mark.parametrize(
    ("schedule", "training"), [("depth-first", False), ("breadth-first", False), (3, False), ("breadth-first", True)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_regions_computes_what_the_step_loop_computes(
    name: str, schedule: str | int, training: bool
) -> None:
    assert_step_loop(NETWORKS[name]().train(training), schedule=schedule)


@pytest.mark.parametrize("name", ["a shared neuron", "two regions", "draws in order"])
def test_a_second_run_changes_nothing(name: str) -> None:
    assert_idempotent(FindRecurrentRegions(), marked(NETWORKS[name]()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 3), neuron.LIFNode()),
        lambda: Calls(lambda x, layer: layer(layer(x)), nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.Linear(6, 6), StepCounter(), StepCounter()),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
    ],
    ids=["neurons in a row", "a shared layer", "states of their own", "one draw", "two batch norms"],
)
def test_a_network_without_feedback_across_nodes_is_left_as_it_is(make: Callable[[], nn.Module]) -> None:
    assert_nothing_matches(FindRecurrentRegions(), marked(make().train()))


def test_a_region_is_noted_under_its_first_node() -> None:
    result = marked(SharedNeuron()).run(FindRecurrentRegions())
    assert said_of(result, "shared") == ["note: recurrent region 0 runs step by step: shared, inside, shared_1"]
    assert len(result.decisions) == 1


def test_regions_are_numbered_in_program_order() -> None:
    result = marked(NETWORKS["two regions"]()).run(FindRecurrentRegions())
    assert [(node.name, node.region) for node in result.graph.scheduled] == [
        ("ifnode_0_parts_0", 0),
        ("linear_0_parts_1", 0),
        ("ifnode_0_parts_0_1", 0),
        ("linear_1", None),
        ("lifnode_2_parts_0", 1),
        ("linear_2_parts_1", 1),
        ("lifnode_2_parts_0_1", 1),
    ]
    assert [decision.node for decision in result.decisions] == ["ifnode_0_parts_0", "lifnode_2_parts_0"]


def test_a_branch_around_the_feedback_stays_outside() -> None:
    def forward(x: Tensor, site: nn.Module, inside: nn.Module, around: nn.Module) -> Any:
        spikes = site(x)
        return site(inside(spikes)) + around(spikes)

    net = Calls(forward, neuron.IFNode(0.4), nn.Linear(6, 6), nn.Linear(6, 6))
    assert regions(net) == (("parts_0", "parts_1", "parts_0_1"),)
    assert "parts_2" in operations_of(marked(net).graph)


def test_overlapping_feedbacks_are_one_region() -> None:
    def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Any:
        return second(first(second(first(x))))

    net = Calls(forward, neuron.IFNode(0.4), neuron.LIFNode(v_threshold=0.2))
    assert regions(net) == (("parts_0", "parts_1", "parts_0_1", "parts_1_1"),)
    assert_step_loop(net.eval(), schedule="breadth-first")


def test_what_lies_between_two_draws_is_in_their_region() -> None:
    assert regions(NETWORKS["draws in order"]().train()) == (("dropout_0", "linear_1", "dropout_2"),)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_called_twice_feeds_back_in_train_mode_only(training: bool) -> None:
    found = regions(NETWORKS["a shared batch norm"]().train(training))
    assert found == ((("parts_0", "parts_1", "parts_0_1"),) if training else ())


def test_a_delay_of_several_steps_feeds_back_too() -> None:
    stage = marked(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    carried = [Edge("relu_1", "linear_0", 3, EdgeKind.STATE)]
    delayed = StepGraph(stage.graph, carried, stage.graph.facts)
    result = replace(stage, graph=delayed).run(FindRecurrentRegions())
    assert result.graph.regions == (("linear_0", "relu_1"),)


def test_a_region_that_is_none_is_cleared() -> None:
    stage = marked(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    wrong = {node.name: replace(node, region=0) for node in stage.graph.scheduled}
    result = replace(stage, graph=stage.graph.with_nodes(wrong)).run(FindRecurrentRegions())
    assert result.changed
    assert result.graph.regions == ()


@pytest.mark.parametrize("schedule", ["breadth-first", 3])
def test_only_the_region_runs_step_by_step(schedule: str | int) -> None:
    opt: Any = snncompile.optimize(SharedNeuron().eval(), T, schedule=schedule, example_input=vectors())
    chunks = {name: chunk for chunk, segment in opt.report.schedule.segments() for name in segment.nodes}
    assert {name for name, chunk in chunks.items() if chunk == 1} == {"shared", "inside", "shared_1"}
    assert chunks["alone"] == (T if schedule == "breadth-first" else schedule)
