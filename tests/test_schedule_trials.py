"""Schedules run beside each other while planning: what is measured, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snncompile
from snncompile import neuron
from snncompile.passes.choose_schedule import ChooseSchedule
from snncompile.pipeline import default_passes
from snncompile.runtime import schedule_trials
from snncompile.runtime.scan_kernels import ScanKernels
from snncompile.schedule import Schedule, uniform_schedule

from .contract import Snapshot, conv_net, dense_net, step_loop, twin
from .graphs import Stage, T, first_stage
from .networks import Feedback, StepCounter


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path))
    # Time decides which layers are driven by events, and of those nothing is tried.
    monkeypatch.setattr(ScanKernels, "event_obstacle", lambda self, net, node: "not here")


def stage_of(net: nn.Module, *x: torch.Tensor, **options: Any) -> Stage:
    """What the choice of a schedule is given."""
    return first_stage(net, *x, **options).after(*default_passes()[:-1])


def trial(stage: Stage, *chunks: int, seconds: float = 0.01) -> list[float | None] | None:
    schedules = [uniform_schedule(stage.graph, T, chunk, "") for chunk in chunks]
    return stage.context.measurements.trial_seconds(stage.graph, [(each, seconds) for each in schedules])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("build", [dense_net, lambda: conv_net().eval()], ids=["dense", "conv"])
def test_schedules_are_run_and_nothing_is_left_behind(build: Callable[[], nn.Module], static: bool) -> None:
    net = build()
    shape = (4, 6) if build is dense_net else (4, 2, 6, 6)
    x = torch.rand(shape if static else (T, *shape))
    with torch.no_grad():
        net(x if static else x[0])  # states are carried
    before, random = Snapshot(net), torch.get_rng_state()
    found = trial(stage_of(net, x, static_input=static), 1, 2, T)
    assert found is not None
    assert all(seconds is not None and seconds > 0 for seconds in found)
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), random)


def test_what_takes_too_long_is_not_run() -> None:
    """There are 8 seconds for three rounds; one run alone would tell nothing."""
    assert trial(stage_of(dense_net()), 1, 2, T, seconds=3.0 * T) is None
    assert trial(stage_of(dense_net()), 1, 2, T, seconds=2.0 * T) is None
    one, two, whole = trial(stage_of(dense_net()), 1, 2, T, seconds=0.5 * T)  # type: ignore[misc]
    assert one is not None
    assert two is not None
    assert whole is None


def test_what_was_run_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trial(stage_of(dense_net()), 1, 2)
    monkeypatch.setattr(schedule_trials.ScheduleTrials, "_by_turns", None)
    assert trial(stage_of(dense_net(seed=2)), 1, 2) == found
    assert trial(stage_of(dense_net()), 1, 3) is None  # 3 is not known, and cannot be run here


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), neuron.LIFNode())
        self[0].register_forward_hook(lambda module, args, output: None)


HARMFUL: dict[str, Callable[[], nn.Module]] = {
    "a module with a life of its own": lambda: nn.Sequential(nn.Linear(6, 6), StepCounter(), neuron.LIFNode()),
    "a register": lambda: nn.Sequential(nn.Linear(6, 6), Feedback(), neuron.LIFNode()),
    "statistics": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), neuron.LIFNode()).train(),
    "randomness": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(), neuron.LIFNode()).train(),
    "a hook": Hooked,
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_a_run_would_change_is_not_run(kind: str) -> None:
    assert trial(stage_of(HARMFUL[kind]()), 1, 2) is None


def eager_to_try(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[Schedule, int]]]:
    """From now on every plan tries all that it may, and the slowest by estimate wins; fills with what was asked for."""
    asked: list[list[tuple[Schedule, int]]] = []

    def made_up(self: Any, graph: Any, tried: Any, rounds: int) -> list[float]:
        asked.append(list(tried))
        return [10.0 - number for number in range(len(tried))]

    monkeypatch.setattr(schedule_trials.ScheduleTrials, "_by_turns", made_up)
    eager = ChooseSchedule(worth_a_trial=0.0, uncertainty=1e9)
    monkeypatch.setattr("snncompile.pipeline.ChooseSchedule", lambda: eager)
    return asked


def test_a_plan_that_was_tried_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = eager_to_try(monkeypatch)
    net, x = conv_net().eval(), torch.rand(T, 4, 2, 6, 6)
    loop = twin(net)
    with torch.no_grad():
        opt = snncompile.optimize(net, T, example_input=x)
        assert asked
        assert opt.report.schedule == asked[0][-1][0]
        assert sum(point.is_chosen for point in opt.report.front) == 1
        assert torch.equal(opt(x), step_loop(loop, x))


def test_a_longer_run_is_planned_by_the_same_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = eager_to_try(monkeypatch)
    net, x = conv_net().eval(), torch.rand(4, 2, 6, 6)
    roots = []
    with torch.no_grad():
        for steps in (64, 1024):
            opt = snncompile.optimize(net, steps, static_input=True, readout="sum", example_input=x)
            roots.append(opt.report.schedule.root)
    assert len(asked) == 1
    assert max(steps for _, steps in asked[0]) <= 64
    assert roots[0] == roots[1]
