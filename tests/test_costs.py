"""Costs on disk: measured once on a machine, whole or absent, and nobody else's."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snncompile
from snncompile import neuron
from snncompile.ir import Batching, OpKind
from snncompile.passes.mark_time_coupling import MarkTimeCoupling
from snncompile.runtime import costs as costs_module
from snncompile.runtime import timing
from snncompile.runtime.cache_directory import write_whole
from snncompile.runtime.cost_key import CostKey, cost_key
from snncompile.runtime.cost_store import CostStore, cost_store

from .graphs import first_stage

KEY = CostKey("an operation")
T = 8


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNNCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


def stored(directory: Path, key: CostKey, **numbers: float) -> Path:
    store = CostStore(directory)
    for name, value in numbers.items():
        store.put(key, name, value)
    store.flush()
    return directory / f"{key.digest}.json"


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), neuron.LIFNode(), nn.Linear(16, 4), neuron.IFNode()).eval()


# The store


def test_what_one_store_writes_another_reads(tmp_path: Path) -> None:
    stored(tmp_path, KEY, a=0.25)
    stored(tmp_path, KEY, b=0.5)
    store = CostStore(tmp_path)
    assert (store.get(KEY, "a"), store.get(KEY, "b"), store.get(KEY, "c")) == (0.25, 0.5, None)
    assert store.get(CostKey("another operation"), "a") is None


def test_what_only_this_process_knows_is_not_written(tmp_path: Path) -> None:
    store = CostStore(tmp_path)
    key = CostKey("an operation at 0x7f", is_lasting=False)
    store.put(key, "a", 0.25)
    store.flush()
    assert store.get(key, "a") == 0.25
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"key": "an operation", "measured": {"a": 0.2',
        b"\xff\xfe",
        b"[]",
        b'{"key": "an operation"}',
        b'{"key": "an operation", "measured": [0.5]}',
        b'{"key": "an operation", "measured": {"a": "fast", "b": -1.0, "c": NaN}}',
        b'{"key": "a foreign operation", "measured": {"a": 0.125}}',
    ],
)
def test_a_corrupt_or_foreign_entry_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"{KEY.digest}.json"
    path.write_bytes(content)
    assert [CostStore(tmp_path).get(KEY, name) for name in "abc"] == [None] * 3
    stored(tmp_path, KEY, a=0.5)
    assert json.loads(path.read_bytes()) == {"key": KEY.text, "measured": {"a": 0.5}}


def test_an_entry_keeps_what_another_process_wrote_meanwhile(tmp_path: Path) -> None:
    first, second = CostStore(tmp_path), CostStore(tmp_path)
    assert first.get(KEY, "a") is second.get(KEY, "a") is None
    first.put(KEY, "a", 0.25)
    second.put(KEY, "b", 0.5)
    first.flush()
    second.flush()
    store = CostStore(tmp_path)
    assert (store.get(KEY, "a"), store.get(KEY, "b")) == (0.25, 0.5)


def test_a_directory_that_cannot_be_written_costs_nothing_but_the_memory_of_it(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    opt = snncompile.optimize(small_net(), T, example_input=torch.rand(T, 4, 6))
    (said,) = [d for d in opt.report.decisions if d.pass_name == "costs"]
    assert "kept in this process only" in said.reason


def test_a_directory_that_others_can_write_is_not_read(cache: Path) -> None:
    path = stored(_made(cache), KEY, a=0.25)
    path.parent.chmod(0o777)
    assert "can be written by others" in cost_store().obstacle
    assert cost_store().get(KEY, "a") is None


def test_what_a_killed_process_left_half_written_is_removed_in_time(tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_text("half")
    os.utime(old, (time.time() - 10**5,) * 2)
    CostStore(tmp_path)
    assert [*tmp_path.iterdir()] == [new]


def test_a_file_whose_writing_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "entry.json", b"{}")
    assert [*tmp_path.iterdir()] == []
    store = CostStore(tmp_path)
    store.put(KEY, "a", 0.5)
    store.flush()
    assert "No space left" in store.obstacle
    assert store.get(KEY, "a") == 0.5


def _write_for_ever(directory: Path) -> None:
    store, number = CostStore(directory), 0
    while True:
        number += 1
        for key in LONG_KEYS:
            store.put(key, "seconds", number)
        store.flush()


LONG_KEYS = [CostKey("x" * 200_000 + str(number)) for number in range(4)]  # so long that a write takes a while


def test_processes_that_write_at_once_and_are_killed_leave_whole_entries(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for delay in (0.05, 0.083, 0.127, 0.2):
        writers = [fork.Process(target=_write_for_ever, args=(tmp_path,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        while not any(tmp_path.glob("*.json")):
            time.sleep(0.01)
        time.sleep(delay)
        for writer in writers:
            writer.kill()
            writer.join()
        for path in tmp_path.glob("*.json"):
            entry = json.loads(path.read_bytes())
            assert entry["key"] in [key.text for key in LONG_KEYS]
            assert entry["measured"]["seconds"] >= 1
    store = CostStore(tmp_path)
    store.put(LONG_KEYS[0], "seconds", 0.5)
    store.flush()
    assert CostStore(tmp_path).get(LONG_KEYS[0], "seconds") == 0.5


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


# Keys


def keys_of(net: nn.Module, x: torch.Tensor, *, kernel: str = "") -> list[CostKey]:
    """The keys of the operations of a network, in order."""
    stage = first_stage(net, x)
    inputs = tuple(snncompile.ir.TensorType.of(value) for value in (x,))
    kinds = (OpKind.MODULE, OpKind.STATEFUL, OpKind.FUNCTION, OpKind.OPAQUE)
    return [
        cost_key(stage.context.net, stage.graph, node, inputs, is_static=False, kernel=kernel)
        for node in stage.graph
        if node.kind in kinds
    ]


class Own(nn.Module):
    """A class of the user's that is kept as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_equal_operations_have_equal_keys_wherever_they_stand() -> None:
    x = torch.rand(5, 4, 6)
    first, second = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Sequential(nn.Identity(), nn.Linear(6, 6))
    inner = keys_of(first, x)[1]
    assert inner != keys_of(first, x)[0]  # which reads the caller's sequence
    assert inner == keys_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), x)[2]
    assert inner.is_lasting
    assert keys_of(second, x)[-1].is_lasting


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Conv2d(3, 5, 3),
        lambda: nn.Conv2d(3, 4, 3, stride=2),
        lambda: nn.Conv2d(3, 4, 3, bias=False),
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    ],
)
def test_another_operation_has_another_key(other: Any) -> None:
    x = torch.rand(5, 4, 3, 8, 8)
    assert keys_of(nn.Sequential(other()), x) != keys_of(nn.Sequential(nn.Conv2d(3, 4, 3)), x)


def test_operand_types_threads_and_kernels_are_part_of_a_key() -> None:
    net, x = nn.Sequential(neuron.IFNode()), torch.rand(5, 4, 6, 8)
    key = keys_of(net, x)
    assert key == keys_of(net, x)
    assert key != keys_of(net, torch.rand(5, 4, 6, 9))
    assert key != keys_of(net, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    assert key != keys_of(net, x, kernel="cpp")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert key != keys_of(net, x)
    finally:
        torch.set_num_threads(threads)


def test_numbers_of_neurons_are_no_part_of_a_key_but_for_nothing_and_one() -> None:
    x = torch.rand(5, 4, 6)

    def key(**options: Any) -> list[CostKey]:
        return keys_of(nn.Sequential(neuron.LIFNode(**options)), x)

    assert key(tau=2.5, v_threshold=0.7) == key(tau=3.25, v_threshold=0.31)
    assert key(tau=2.5, v_reset=None) != key(tau=2.5, v_reset=0.5)
    assert key(tau=2.5, v_reset=0.0) != key(tau=2.5, v_reset=0.5)
    powers = [keys_of(nn.Sequential(_Power(exponent)), x) for exponent in (2.5, 3.5)]
    assert powers[0] != powers[1]


class _Power(nn.Module):
    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() ** self.exponent


def test_a_class_made_by_a_function_is_known_to_this_process_only() -> None:
    def make(gain: float) -> nn.Module:
        class Local(Own):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return gain * x

        return Local()

    x = torch.rand(5, 4, 6)
    assert all(key.is_lasting for key in keys_of(nn.Sequential(Own()), x))
    assert not all(key.is_lasting for key in keys_of(nn.Sequential(make(2.0)), x))


# Measuring


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was timed: one number each."""
    found: list[float] = []

    def counted(*args: Any, **options: Any) -> list[float]:
        seconds = timing.best_seconds(*args, **options)
        found.extend(seconds)
        return seconds

    monkeypatch.setattr(costs_module, "best_seconds", counted)
    return found


def test_a_second_process_measures_nothing(cache: Path, timings: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(T, 4, 6)
    first = snncompile.optimize(small_net(), T, example_input=x)
    assert timings
    assert list(cache.glob("*.json"))
    timings.clear()
    monkeypatch.setattr("snncompile.runtime.costs.cost_store", lambda: CostStore(cache))  # as a new process would
    second = snncompile.optimize(small_net(), T, example_input=x)
    assert timings == []
    assert second.report.schedule == first.report.schedule


def test_when_measuring_took_too_long_long_chunks_are_estimated(
    cache: Path, timings: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs_module, "LIMIT_SECONDS", -1.0)
    opt = snncompile.optimize(small_net(), 64, example_input=torch.rand(64, 4, 6), backend="eager")
    (said,) = [d for d in opt.report.decisions if d.pass_name == "costs"]
    assert "estimated from those of shorter chunks" in said.reason
    measured = [
        name for path in cache.glob("*.json") for name in json.loads(path.read_bytes())["measured"] if "over" in name
    ]
    assert {name for name in measured if name.startswith("seconds")} == {"seconds over 1 steps"}


def test_short_operations_are_repeated_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run_for(seconds: float) -> int:
        calls = 0

        def run() -> None:
            nonlocal now, calls
            now += seconds
            calls += 1

        assert timing.best_seconds([(run, lambda: None)], on_cuda=False) == [pytest.approx(seconds)]
        return calls

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert run_for(10.0) == 1
    assert run_for(0.3) == 1 + 1
    assert run_for(0.1) == 1 + 2
    assert run_for(0.007) == 1 + 2
    assert run_for(0.0031) == 1 + 2 * 2
    assert run_for(1e-6) == 1 + 2 * 20


def test_what_is_compared_is_timed_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes twice as slow halfway does so for all lengths."""
    now, calls = 0.0, 0

    def taking(seconds: float) -> timing.Timed:
        def run() -> None:
            nonlocal now, calls
            calls += 1
            now += seconds * (1.0 if calls <= 3 + 11 else 2.0)

        return run, lambda: None

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.best_seconds([taking(n * 1.1e-3) for n in (1, 2, 4)], on_cuda=False) == [
        pytest.approx(n * 1.1e-3) for n in (1, 2, 4)
    ]


def test_longer_chunks_are_timed_with_one_that_shorter_ones_were_timed_with(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the machine slower from the one to the other is taken out."""
    asked: list[int] = []

    def made_up(runs: Sequence[timing.Timed], *, on_cuda: bool) -> list[float]:
        asked.append(len(runs))
        return [1.0, 2.0, 4.0, 8.0] if len(asked) == 1 else [24.0, 48.0, 96.0, 192.0]

    monkeypatch.setattr(costs_module, "best_seconds", made_up)
    stage = first_stage(nn.Sequential(nn.Linear(6, 6))).after(MarkTimeCoupling())
    (node,) = stage.graph.scheduled
    assert node.batching is Batching.FOLD
    measurements: Any = stage.context.measurements
    costs = measurements.costs
    costs.options = replace(costs.options, steps=64)
    assert [costs.seconds(stage.graph, node, n) for n in (1, 2, 8, 64, 32, 16)] == [1.0, 2.0, 8.0, 64.0, 32.0, 16.0]
    assert asked == [4, 4]


def test_rounding_over_a_chunk_is_tried_where_the_budget_holds_hardly_a_step() -> None:
    """A chosen chunk may hold less than the sum of what a node reads and gives: here that is a view."""
    x = torch.rand(8, 64, 4096)
    with torch.no_grad():
        stage = first_stage(nn.Sequential(nn.Flatten(), neuron.IFNode()), x, memory_budget=1).after(MarkTimeCoupling())
    (layer,) = (node for node in stage.graph if node.target == "0")
    assert stage.context.measurements.rounds_differently(stage.graph, layer, 5) is False
