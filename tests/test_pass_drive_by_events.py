"""Drive by events: linear layers of spikes add up the weights of what is not zero, where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import nn

from snncompile import neuron
from snncompile.ir import Node, StepGraph
from snncompile.passes.drive_by_events import DriveByEvents
from snncompile.pipeline import default_passes

from .graphs import Stage, assert_idempotent, assert_nothing_matches, first_stage, said_of, text_of, vectors


@dataclass(frozen=True)
class Costs:
    """Made-up seconds a step: those of a layer by what drives it."""

    by_events: float
    by_library: float = 2e-3

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        return (self.by_events if node.events_below else self.by_library) * steps


@dataclass(frozen=True)
class Kernels:
    """Has an event-driven form of every layer, or of none."""

    obstacle: str = ""

    def event_obstacle(self, net: nn.Module, node: Node) -> str:
        return self.obstacle


def network() -> nn.Sequential:
    """`[N, 6]` -> `[N, 3]`."""
    return nn.Sequential(
        nn.Linear(6, 8), neuron.IFNode(0.3), nn.Linear(8, 5), neuron.LIFNode(), nn.Dropout(), nn.Linear(5, 3)
    ).eval()


def ready(net: nn.Module | None = None, costs: Costs = Costs(5e-4), kernels: Any = Kernels(), **more: Any) -> Stage:
    """Everything before the pass has run; costs are made up."""
    names = [one.name for one in default_passes()]
    before = default_passes()[: names.index("choose-layout")]
    stage = first_stage(net or network(), vectors(), reassociate=True, **more).after(*before)
    return replace(stage, context=replace(stage.context, measurements=costs, kernels=kernels))


def driven(stage: Stage) -> dict[str, float]:
    graph = stage.run(DriveByEvents()).graph
    return {node.target: node.events_below for node in graph if node.events_below}


def test_layers_of_spikes_are_driven_by_them(golden: Callable[[str], None]) -> None:
    golden(text_of(ready().run(DriveByEvents())))


def test_the_report_says_when() -> None:
    result = ready(costs=Costs(1e-3)).run(DriveByEvents())
    assert said_of(result, "2") == [
        "done: driven by events where less than 25% of its input is not zero: "
        "1.00 ms a step at 12.5%, 2.00 ms by the library"
    ]


def test_idempotent() -> None:
    assert_idempotent(DriveByEvents(), ready())


@pytest.mark.parametrize(("by_events", "below"), [(1e-9, 0.5), (5e-4, 0.5), (1e-3, 0.25), (1.9e-3, 0.125 * 2.0 / 1.9)])
def test_from_where_on_the_library_is_faster_is_told_from_two_times(by_events: float, below: float) -> None:
    assert driven(ready(costs=Costs(by_events))) == {"2": pytest.approx(below), "5": pytest.approx(below)}


@pytest.mark.parametrize(
    "stage",
    [
        lambda: ready(kernels=None),
        lambda: ready(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), neuron.IFNode())),
        lambda: ready(nn.Sequential(neuron.IFNode(), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()),
        lambda: ready(needs_grad=True),
    ],
    ids=["no kernels", "no spikes", "no zeros", "gradients"],
)
def test_where_nothing_matches(stage: Callable[[], Stage]) -> None:
    assert_nothing_matches(DriveByEvents(), stage())


@pytest.mark.parametrize(
    ("costs", "kernels", "reason"),
    [
        (Costs(2e-3), Kernels(), "2.00 ms a step at 12.5%, 2.00 ms by the library"),
        (Costs(1e-3), Kernels("c++ failed"), "c++ failed"),
    ],
)
def test_refusals_name_the_reason(costs: Costs, kernels: Kernels, reason: str) -> None:
    result = ready(costs=costs, kernels=kernels).run(DriveByEvents())
    assert not result.changed
    assert said_of(result, "2") == [f"refused: is not driven by events: {reason}"]
