"""The memory budget is kept in inference and in training; an impossible one says what would do."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import InfeasibleBudgetError, neuron


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        neuron.IFNode(v_reset=None),
        nn.Conv2d(16, 16, 3, padding=1),
        neuron.LIFNode(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64, 10),
        neuron.NonSpikingLIFNode(),
    ).eval()


def measured(opt: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return snncompile.measure_peak(lambda: opt(x))


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 4.0, 16.0])
def test_auto_stays_within_the_budget(factor: float) -> None:
    net, x = conv_net(), torch.rand(32, 4, 1, 8, 8)
    with pytest.raises(InfeasibleBudgetError) as raised:
        snncompile.optimize(net, 32, 1000, example_input=x)
    budget = int(raised.value.minimum_bytes * factor)
    opt = snncompile.optimize(net, 32, budget, example_input=x)
    assert measured(opt, x) <= opt.report.predicted_peak_bytes <= budget
    opt.reset()
    with torch.no_grad():
        assert snncompile.verify(net, opt, x).exact


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 5, "auto"])
def test_the_smallest_feasible_budget_is_feasible_and_no_byte_less(schedule: Any) -> None:
    net, x = conv_net(), torch.rand(8, 4, 1, 8, 8)
    with pytest.raises(InfeasibleBudgetError, match="memory_budget 1 B") as raised:
        snncompile.optimize(net, 8, 1, schedule=schedule, example_input=x)
    minimum = raised.value.minimum_bytes
    assert raised.value.where is not None
    assert "segment" in raised.value.where
    assert pickle.loads(pickle.dumps(raised.value)).minimum_bytes == minimum
    snncompile.optimize(net, 8, minimum, schedule=schedule, example_input=x)
    with pytest.raises(InfeasibleBudgetError):
        snncompile.optimize(net, 8, minimum - 1, schedule=schedule, example_input=x)


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1MiB"}, {"schedule": "depth-first"}, {"schedule": 16}])
def test_static_input_summed_costs_the_same_at_1024_steps_as_at_64(options: dict[str, Any]) -> None:
    net, x = conv_net(), torch.rand(4, 1, 8, 8)
    peaks = []
    for steps in (64, 1024):
        opt = snncompile.optimize(net, steps, static_input=True, readout="sum", **options)
        snncompile.functional.reset_net(net)
        peaks.append(measured(opt, x))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_layer_by_layer_needs_many_times_the_tightest_budget() -> None:
    net, x = conv_net(), torch.rand(4, 1, 8, 8)
    with pytest.raises(InfeasibleBudgetError) as raised:
        snncompile.optimize(net, 256, 1, static_input=True, readout="sum", example_input=x)
    breadth_first = snncompile.optimize(net, 256, schedule="breadth-first", static_input=True, readout="sum")
    assert measured(breadth_first, x) > 10 * raised.value.minimum_bytes


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 4])
@pytest.mark.parametrize("steps", [4, 11, 40])
def test_a_training_step_holds_no_more_than_predicted(schedule: Any, steps: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), neuron.LIFNode(), nn.Flatten(), nn.Linear(512, 10)
    )
    x = torch.rand(steps, 4, 1, 8, 8)
    opt = snncompile.optimize(net, steps, schedule=schedule, example_input=x)
    assert opt.report.mode == "training"

    def step() -> None:
        opt(x).sum().backward()

    peak = snncompile.measure_peak(step)
    assert peak <= opt.report.predicted_peak_bytes
    assert opt.report.predicted_peak_bytes <= 1.05 * peak


def test_training_budget_names_what_is_needed() -> None:
    net = nn.Sequential(nn.Linear(8, 8), neuron.LIFNode())
    with pytest.raises(InfeasibleBudgetError, match="no_grad") as raised:
        snncompile.optimize(net, 16, 64, example_input=torch.rand(16, 4, 8))
    snncompile.optimize(net, 16, raised.value.minimum_bytes, example_input=torch.rand(16, 4, 8))


def test_measure_peak_counts_what_lives_at_once() -> None:
    x = torch.zeros(1000)  # 4000 bytes

    def three_then_one() -> Tensor:
        a = x + 1
        b = a + 1
        c = b + 1
        del a, b
        return c[:10] + 1

    assert snncompile.measure_peak(three_then_one) == 12000
    assert snncompile.measure_peak(lambda: x[:5].view(5)) == 0
    assert snncompile.measure_peak(lambda: x.add_(1)) == 0
    with pytest.raises(TypeError):
        snncompile.measure_peak(x)  # type: ignore[arg-type]
