"""The time-memory front in the report: complete, in order, with the chosen point, as text, data and a picture."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snncompile
from snncompile import Loop, Schedule, Segment, neuron
from snncompile.report import FrontPoint
from snncompile.report.front import render_front

T = 16


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        neuron.IFNode(v_reset=None),
        nn.Conv2d(8, 8, 3, padding=1),
        neuron.LIFNode(),
        nn.Flatten(),
        nn.Linear(512, 10),
        neuron.IFNode(),
    ).eval()


def report_of(budget: int | None = None, **options: Any) -> Any:
    return snncompile.optimize(conv_net(), T, budget, example_input=torch.rand(T, 4, 1, 8, 8), **options).report


def point(seconds: float, size: int, chunk: int, *, is_chosen: bool = False) -> FrontPoint:
    return FrontPoint(seconds, size, Schedule(T, Loop(chunk, (Segment(("a",)),))), is_chosen)


def test_the_front_gets_slower_and_leaner_and_holds_the_plan() -> None:
    report = report_of()
    front = report.front
    assert len(front) > 1
    for faster, slower in pairwise(front):
        assert faster.seconds <= slower.seconds
        assert faster.peak_bytes > slower.peak_bytes
    (chosen,) = [each for each in front if each.is_chosen]
    assert chosen.schedule == report.schedule
    assert chosen.peak_bytes == report.predicted_peak_bytes
    assert all(0.0 < each.seconds < float("inf") for each in front)


def test_every_point_of_the_front_is_a_plan_of_its_own() -> None:
    for each in report_of().front:
        opt = snncompile.optimize(conv_net(), T, schedule=each.schedule, example_input=torch.rand(T, 4, 1, 8, 8))
        assert opt.report.predicted_peak_bytes == each.peak_bytes


def test_under_a_budget_the_front_shows_what_more_memory_would_buy() -> None:
    unlimited = report_of()
    budget = unlimited.front[-1].peak_bytes
    report = report_of(budget)
    assert report.front[-1].is_chosen
    assert report.front[0].peak_bytes > budget


def test_in_training_the_front_holds_what_was_tried() -> None:
    net = nn.Sequential(nn.Linear(8, 8), neuron.LIFNode())
    report = snncompile.optimize(net, T, example_input=torch.rand(T, 4, 8)).report
    assert report.mode == "training"
    assert [each.is_chosen for each in report.front].count(True) == 1


@pytest.mark.parametrize("schedule", ["depth-first", 4])
def test_a_schedule_that_was_asked_for_has_no_front(schedule: str | int) -> None:
    report = report_of(schedule=schedule)
    assert report.front == ()
    assert "front" not in str(report)
    assert report.to_dict()["front"] == []


def test_the_front_as_data_is_json() -> None:
    report = report_of()
    data = json.loads(json.dumps(report.to_dict()))["front"]
    assert data == json.loads(json.dumps([each.to_dict() for each in report.front]))
    assert [row["is_chosen"] for row in data].count(True) == 1
    assert data[0]["schedule"]["steps"] == T


def test_the_front_as_text() -> None:
    points = (
        point(0.0100, 4 * 2**20, 16),
        point(0.0125, 2**20, 4, is_chosen=True),
        point(0.0405, 2**18, 1),
    )
    assert render_front(points) == [
        "time-memory front (* chosen; time is estimated, peak predicted)",
        "   time      peak       chunks",
        "   10.00 ms  4.0 MiB    16",
        "*  12.50 ms  1.0 MiB    4",
        "   40.50 ms  256.0 KiB  1",
        "next faster: 2.50 ms less, 3.0 MiB more",
        "next leaner: 28.00 ms more, 768.0 KiB less",
    ]
    assert render_front(points[1:])[-2] == "next faster: none, this is the fastest"
    assert render_front(points[:2])[-1] == "next leaner: none, this is the leanest"


def test_a_long_front_is_shown_around_the_chosen_point() -> None:
    points = [point(0.001 * (n + 1), 2**20 - 1000 * n, 1, is_chosen=n == 20) for n in range(40)]
    lines = render_front(points)
    assert lines[0].startswith("time-memory front, 9 of 40 points")
    times = [line.lstrip("* ").split(" ms")[0] for line in lines[2:-2]]
    assert times == ["1.00", "18.00", "19.00", "20.00", "21.00", "22.00", "23.00", "24.00", "40.00"]


def test_neighbours_at_one_chunk_are_named_once() -> None:
    body = (Segment(("a",)), Loop(2, (Segment(("b",)),)), Loop(2, (Segment(("c",)),)), Segment(("d",)))
    assert FrontPoint(0.1, 1, Schedule(T, Loop(8, body)), is_chosen=False).chunks == (8, 2, 8)


@pytest.mark.parametrize("name", ["front.png", "front.svg"])
def test_the_front_as_a_picture(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    report_of(10**6).save(path)
    assert path.read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_without_matplotlib_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="install it with pip install matplotlib"):
        report_of().save(tmp_path / "front.png")
    report_of().save(tmp_path / "front.txt")


def test_a_picture_of_no_front_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no time-memory front"):
        report_of(schedule=2).save(tmp_path / "front.png")
