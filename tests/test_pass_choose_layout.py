"""Choose layout: convolutions compute channels-last where rounding may change and all together run faster so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.ir import Node, StepGraph
from snncompile.passes.choose_layout import ChooseLayout
from snncompile.pipeline import default_passes

from .graphs import (
    Stage,
    T,
    assert_idempotent,
    assert_nothing_matches,
    first_stage,
    images,
    said_of,
    text_of,
)
from .networks import Feedback


@dataclass(frozen=True)
class Costs:
    """Made-up seconds: those of a convolution by its layout, whatever the chunk."""

    as_it_is: float
    channels_last: float

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        return (self.channels_last if node.channels_last else self.as_it_is) * steps


FASTER, SLOWER = Costs(3e-3, 2e-3), Costs(2e-3, 3e-3)


def network() -> nn.Sequential:
    """`[N, 2, 6, 6]` -> `[N, 5]`."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        neuron.IFNode(0.3),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        neuron.LIFNode(v_threshold=0.05),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).eval()


def ready(net: nn.Module | None = None, costs: Costs = FASTER, **options: Any) -> Stage:
    """Everything before the pass has run; costs are made up."""
    names = [one.name for one in default_passes()]
    before = default_passes()[: names.index(ChooseLayout.name)]
    stage = first_stage(net or network(), options.pop("x", images()), reassociate=True, **options).after(*before)
    return replace(stage, context=replace(stage.context, measurements=costs))


def marked(graph: StepGraph) -> list[str]:
    """The convolutions that compute channels-last."""
    return [node.name for node in graph if node.channels_last]


def test_all_convolutions_change_together(golden: Callable[[str], None]) -> None:
    golden(text_of(ready().run(ChooseLayout())))


def test_values_follow_the_layout_of_what_computes_them() -> None:
    graph = ready().run(ChooseLayout()).graph
    images_of = [node.name for node in graph.scheduled if len(node.value.shape) == 4]
    assert len(images_of) == 6
    assert all(graph[name].value.stride[1] == 1 for name in images_of)  # channels lie side by side


def test_idempotent() -> None:
    assert_idempotent(ChooseLayout(), ready())


def test_what_is_not_faster_stays() -> None:
    stage = ready(costs=SLOWER)
    result = stage.run(ChooseLayout())
    assert not result.changed
    assert marked(result.graph) == []
    assert said_of(result, "") == ["refused: 2 convolutions: 6.00 ms a step channels-last, 4.00 ms as they are"]


def test_what_is_computed_once_does_not_count() -> None:
    stage = ready(x=images()[0], static_input=True)
    result = stage.run(ChooseLayout())
    # The first convolution sees the same image at every step.
    assert said_of(result, "") == ["done: 2 convolutions: 2.00 ms a step channels-last, 3.00 ms as they are"]


@pytest.mark.parametrize(
    ("make", "needs_grad", "reason"),
    [
        (network, True, "gradients are recorded, which flow to the weights as they lie"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Feedback()).eval(),
            False,
            "tensors are carried from step to step in attributes, as the first step laid them out",
        ),
    ],
)
def test_refusals_name_the_reason(make: Callable[[], nn.Module], needs_grad: bool, reason: str) -> None:
    result = ready(make(), needs_grad=needs_grad).run(ChooseLayout())
    assert not result.changed
    assert said_of(result, "") == [f"refused: {reason}"]


def test_without_convolutions_nothing_matches() -> None:
    assert_nothing_matches(ChooseLayout(), ready(nn.Sequential(nn.Flatten(), nn.Linear(72, 3), neuron.IFNode())))


# driven by events


@dataclass(frozen=True)
class EventCosts:
    """Made-up seconds: those of a convolution by what drives it, whatever the chunk."""

    by_events: float

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        return (self.by_events if node.events_below else 2e-3 if node.channels_last else 3e-3) * steps


class Kernels:
    """Has an event-driven form of every convolution."""

    def event_obstacle(self, net: nn.Module, node: Node) -> str:
        return ""


def driven(net: nn.Module, costs: EventCosts = EventCosts(5e-4), kernels: Any = Kernels()) -> dict[str, float]:  # noqa: B008
    stage = ready(net.eval(), costs)
    stage = replace(stage, context=replace(stage.context, kernels=kernels))
    graph = stage.run(ChooseLayout()).graph
    return {node.name: node.events_below for node in graph if node.events_below}


def test_a_convolution_of_spikes_is_driven_by_them_where_that_is_faster() -> None:
    assert driven(network()) == {"conv2d_3": pytest.approx(0.5)}
    assert driven(network(), EventCosts(1e-3)) == {"conv2d_3": pytest.approx(0.25)}
    assert driven(network(), EventCosts(2.5e-3)) == {}
    assert driven(network(), kernels=None) == {}


def spiking(*between: nn.Module) -> nn.Module:
    return nn.Sequential(neuron.IFNode(0.3), *between, nn.Conv2d(2, 3, 3, padding=1), neuron.IFNode())


class Shortcut(nn.Module):
    """A convolution of the sum of spikes and something else."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.spikes, self.other, self.conv = neuron.IFNode(0.3), other, nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(2.0 * self.spikes(x) + self.other(x))


@pytest.mark.parametrize(
    ("net", "is_driven"),
    [
        (spiking(), True),
        (spiking(nn.MaxPool2d(2), nn.Dropout()), True),
        (spiking(nn.BatchNorm2d(2)), False),
        (spiking(nn.Sigmoid()), False),
        (Shortcut(neuron.LIFNode()), True),
        (Shortcut(nn.Identity()), False),
        (nn.Sequential(nn.Conv2d(2, 2, 3), neuron.IFNode()), False),
    ],
)
def test_spikes_are_followed_through_what_leaves_zeros_zeros(net: nn.Module, is_driven: bool) -> None:
    assert bool(driven(net)) is is_driven


@pytest.mark.parametrize("schedule", ["depth-first", 2, "breadth-first"])
def test_results_are_those_of_the_step_loop_but_for_rounding(schedule: str | int, channels_last: None) -> None:
    net, x = network(), images()
    with torch.no_grad():
        opt = snncompile.optimize(net, T, reassociate=True, schedule=schedule, example_input=x)
        decided = [d for d in opt.report.decisions if d.pass_name == ChooseLayout.name]
        assert [d.verdict.value for d in decided if not d.node] == ["done"]
        parity = snncompile.verify(net, opt, x)
    assert all(each.max_error < 1e-5 for each in (*parity.outputs, *parity.states)), parity


def test_changed_weights_are_honoured(channels_last: None) -> None:
    net, x = network(), images()
    with torch.no_grad():
        opt = snncompile.optimize(net, T, reassociate=True, schedule=2, example_input=x)
        before = opt(x)
        opt.reset()
        net[0].weight.mul_(3.0)
        after = opt(x)
        expected = loop(net, x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=0.0, atol=1e-5)


def loop(net: nn.Module, x_seq: Tensor) -> Tensor:
    snncompile.functional.reset_net(net)
    return torch.stack([net(x) for x in x_seq])


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is chosen, whatever this machine measures."""

    def seconds(graph: StepGraph, node: Node, context: Any) -> float:
        return 1.0 if node.channels_last else 2.0

    for module in ("choose_layout", "events"):
        monkeypatch.setattr(f"snncompile.passes.{module}.seconds_a_step", seconds)
