"""Bad input: a clear error before any work, and everything as usable afterwards as it was before."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import errors, neuron
from snncompile.errors import (
    CaptureError,
    InfeasibleBudgetError,
    ParityError,
    PassError,
    ScheduleError,
    SnnCompileError,
    VerifyError,
)

from .contract import SCHEDULES, Snapshot, conv_net, dense_net, step_loop, twin

T = 4
WRONG = (TypeError, ValueError)


def conv_input(batch: int = 5) -> Tensor:
    return torch.rand(T, batch, 2, 6, 6, generator=torch.Generator().manual_seed(0))


# Arguments of optimize


@pytest.mark.parametrize(
    ("steps", "error", "says"),
    [
        (0, ValueError, "T must be at least 1, got 0"),
        (-1, ValueError, "T must be at least 1, got -1"),
        (2.5, TypeError, "T must be an int, got 2.5"),
        (4.0, TypeError, "T must be an int, got 4.0"),
        (True, TypeError, "T must be an int, got True"),
        ("4", TypeError, "T must be an int, got '4'"),
        (None, TypeError, "T must be an int, got None"),
        (torch.tensor(2.5), WRONG, "T"),
    ],
    ids=repr,
)
def test_wrong_number_of_steps(steps: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        snncompile.optimize(dense_net(), steps)


@pytest.mark.parametrize("steps", [np.int64(4), np.int32(4), np.uint8(4)], ids=lambda value: type(value).__name__)
def test_integers_of_numpy_are_integers(steps: Any) -> None:
    net = dense_net()
    opt = snncompile.optimize(net, steps, np.int64(10**6), schedule=np.int32(2))
    assert opt(torch.randn(4, 5, 6)).shape == (4, 5, 3)
    assert opt.options.memory_budget == 10**6
    assert type(opt.options.steps) is int


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        ("64 parsecs", ValueError, '"64MiB"'),
        ("MiB", ValueError, "'MiB'"),
        ("64", ValueError, "unit"),
        ("", ValueError, "unit"),
        ("-1MiB", ValueError, "'-1MiB'"),
        ("1e3MiB", ValueError, "'1e3MiB'"),
        ("nanMiB", ValueError, "'nanMiB'"),
        ("0MiB", ValueError, "memory_budget must be at least 1"),
        ("0.1B", ValueError, "memory_budget must be at least 1"),
        (-1, ValueError, "memory_budget must be at least 1, got -1"),
        (0, ValueError, "memory_budget must be at least 1, got 0"),
        (1.5, TypeError, "1.5"),
        (float("inf"), TypeError, "inf"),
        (True, TypeError, "True"),
        ([1], TypeError, "list"),
        (b"64MiB", TypeError, "bytes"),
    ],
    ids=repr,
)
def test_wrong_memory_budget(budget: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        snncompile.optimize(dense_net(), T, budget)


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("64MiB", 64 * 2**20),
        ("64 MiB", 64 * 2**20),
        (" 64 mib ", 64 * 2**20),
        ("1.5GB", 15 * 10**8),
        (".5KiB", 512),
        ("100000 B", 10**5),
        (1, 1),
        (None, None),
    ],
)
def test_ways_to_write_a_memory_budget(budget: Any, size: int | None) -> None:
    assert snncompile.optimize(dense_net(), T, budget).options.memory_budget == size


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"schedule": "widest-first"}, ValueError, "auto, depth-first, breadth-first, got 'widest-first'"),
        ({"schedule": 0}, ValueError, "at least 1, got 0"),
        ({"schedule": -3}, ValueError, "at least 1, got -3"),
        ({"schedule": 1.5}, TypeError, "1.5"),
        ({"schedule": True}, TypeError, "True"),
        ({"schedule": None}, TypeError, "NoneType"),
        ({"schedule": [1]}, TypeError, "list"),
        ({"readout": "max"}, ValueError, "sequence, sum, mean, last, got 'max'"),
        ({"readout": None}, TypeError, "None"),
        ({"backend": "opencl"}, ValueError, "auto, eager, cpp, triton, got 'opencl'"),
        ({"backend": 1}, TypeError, "1"),
        *([] if torch.cuda.is_available() else [({"backend": "triton"}, SnnCompileError, "'triton'")]),
        ({"static_input": 1}, TypeError, "static_input must be True or False, got 1"),
        ({"static_input": "no"}, TypeError, "'no'"),
        ({"reassociate": None}, TypeError, "reassociate must be True or False"),
        ({"example_input": [1.0]}, TypeError, "example_input must be a tensor or a tuple of tensors, got list"),
        ({"example_input": (torch.zeros(T, 5, 6), 2)}, TypeError, "got int"),
        ({"example_input": np.zeros((T, 5, 6))}, TypeError, "got ndarray"),
        ({"example_input": ()}, TypeError, "1 inputs"),
        ({"example_input": torch.zeros(T + 1, 5, 6)}, ValueError, "T = 4"),
        ({"example_input": torch.zeros(T, 5, 7)}, CaptureError, "0 fails"),
    ],
    ids=str,
)
def test_wrong_option(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    net = dense_net()
    before = Snapshot(net)
    with pytest.raises(error, match=re.escape(says)):
        snncompile.optimize(net, T, **arguments)
    before.assert_unchanged()


@pytest.mark.parametrize(
    "net", [None, torch.relu, nn.Linear, [nn.Linear(6, 3)]], ids=["None", "function", "class", "list"]
)
def test_what_is_no_module(net: Any) -> None:
    with pytest.raises(TypeError, match=r"expects an nn\.Module, got "):
        snncompile.optimize(net, T)


def test_a_chunk_longer_than_the_run_is_the_whole_run() -> None:
    net, x_seq = dense_net(), torch.randn(T, 5, 6)
    expected = step_loop(twin(net), x_seq)
    assert torch.equal(snncompile.optimize(net, T, schedule=1000)(x_seq), expected)


# Inputs of a call

BAD_INPUTS: dict[str, tuple[Callable[[], tuple[Any, ...]], type[Exception], str]] = {
    "shorter": (lambda: (conv_input()[:3],), ValueError, r"T = 4, got shape \(3, 5, 2, 6, 6\)"),
    "longer": (lambda: (torch.rand(5, 5, 2, 6, 6),), ValueError, r"T = 4, got shape \(5, 5, 2, 6, 6\)"),
    "no time": (lambda: (conv_input()[0],), ValueError, r"\[T, N, \*\] with T = 4, got shape \(5, 2, 6, 6\)"),
    "a number": (lambda: (torch.tensor(1.0),), ValueError, r"got shape \(\)"),
    "channels": (lambda: (torch.rand(T, 5, 3, 6, 6),), CaptureError, r"(?s)0 fails on inputs float32\[5, 3, 6, 6\]"),
    "size": (lambda: (torch.rand(T, 5, 2, 8, 8),), CaptureError, r"(?s)5 fails on inputs float32\[5, 64\]"),
    "rank": (lambda: (torch.rand(T, 6),), CaptureError, r"(?s)0 fails on inputs float32\[6\]"),
    "nothing": (lambda: (), TypeError, r"takes 1 inputs \(input\), got 0"),
    "two": (lambda: (conv_input(), conv_input()), TypeError, r"takes 1 inputs \(input\), got 2"),
    "a list": (lambda: ([1.0] * T,), TypeError, "input must be a tensor, got list"),
    "an array": (lambda: (conv_input().numpy(),), TypeError, "input must be a tensor, got ndarray"),
    "None": (lambda: (None,), TypeError, "input must be a tensor, got NoneType"),
    "integers": (lambda: (torch.ones(T, 5, 2, 6, 6, dtype=torch.int64),), CaptureError, r"(?s)0 fails on inputs int64"),
    "doubles": (lambda: (conv_input().double(),), CaptureError, r"(?s)0 fails on inputs float64"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_wrong_input(kind: str, warm: bool) -> None:
    make, error, says = BAD_INPUTS[kind]
    net = conv_net().train()
    reference = twin(net)
    opt = snncompile.optimize(net, T)
    if warm:
        opt(conv_input())
        step_loop(reference, conv_input())
    before = Snapshot(net)
    with pytest.raises(error, match=says):
        opt(*make())
    before.assert_unchanged()
    assert torch.equal(opt(conv_input()), step_loop(reference, conv_input()))


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", "auto"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_wrong_dtype_is_refused_by_name_in_every_order(schedule: str, dtype: torch.dtype) -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T, schedule=schedule)
    before = Snapshot(net)
    with pytest.raises(CaptureError, match=f"0 fails on inputs {str(dtype).removeprefix('torch.')}") as caught:
        opt(torch.ones(T, 5, 6, dtype=dtype))
    assert caught.value.where == "0"
    before.assert_unchanged()


def test_integers_into_a_neuron_name_the_neuron() -> None:
    net = nn.Sequential(nn.Identity(), neuron.LIFNode())
    with pytest.raises(CaptureError, match=r"LIFNode takes floating-point tensors, got torch\.int64") as caught:
        snncompile.optimize(net, T)(torch.ones(T, 5, dtype=torch.int64))
    assert caught.value.where == "1"
    assert net[1].v == 0.0


def test_a_wrong_input_logs_nothing_of_torchs_own(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CaptureError):
        snncompile.optimize(dense_net(), T)(torch.zeros(T, 5, 7))
    assert caplog.records == []


def test_compiling_and_running_prints_nothing() -> None:
    code = (
        "import torch, snncompile; from snncompile import neuron; "
        "snncompile.optimize(torch.nn.Sequential(torch.nn.Linear(6, 3), neuron.IFNode()), 4)(torch.zeros(4, 5, 6))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_empty_batch_is_what_the_step_loop_makes_of_it() -> None:
    net = conv_net().eval()
    for schedule in SCHEDULES:
        net_copy = twin(net)
        got = snncompile.optimize(net_copy, T, schedule=schedule)(conv_input(0))
        assert got.shape == step_loop(twin(net), conv_input(0)).shape == (T, 0, 3)
        assert net_copy[2].v.shape == (0, 4, 6, 6)


# Networks that cannot be traced


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node = neuron.IFNode()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            return self.node(x)
        return x


class Looping(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for row in x:  # the line to be named
            x = x + row
        return self.node(x)


class ReadingNumbers(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.node(x * float(x.max()))  # the line to be named


class Raising(Branching):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not written yet")  # the line to be named


@pytest.mark.parametrize("cls", [Branching, Looping, ReadingNumbers, Raising])
def test_a_forward_that_cannot_be_traced_names_module_and_line(cls: type[Branching]) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"inner": cls()})["inner"])
    before = Snapshot(net)
    with pytest.raises(CaptureError) as caught:
        snncompile.optimize(net, T)
    lines, first = inspect.getsourcelines(cls)
    named = first + next(number for number, line in enumerate(lines) if "line to be named" in line)
    assert f"test_contract_errors.py:{named}" in str(caught.value)
    assert caught.value.where == "1"
    before.assert_unchanged()
    if cls is not Raising:
        with torch.no_grad():
            assert net(torch.ones(5, 6)).shape == (5, 6)


def test_a_step_that_returns_something_else_than_tensors() -> None:
    class Talking(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, "spikes"

    opt = snncompile.optimize(Talking(), T)
    with pytest.raises(CaptureError, match=r"'spikes'.*expected tensors"):
        opt(torch.zeros(T, 5))


# Budgets


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_smallest_feasible_budget_that_an_error_names_is_feasible(schedule: str | int, grad: bool) -> None:
    net = conv_net().train(grad)
    x_seq = conv_input()
    with torch.set_grad_enabled(grad):
        opt = snncompile.optimize(net, T, 1, schedule=schedule)
        before = Snapshot(net)
        with pytest.raises(InfeasibleBudgetError) as caught:
            opt(x_seq)
        before.assert_unchanged()
        minimum = caught.value.minimum_bytes
        assert str(minimum) in str(caught.value)
        assert caught.value.where
        if not grad:
            assert re.search(r"segment \d+, chunk \d+", str(caught.value))
        assert minimum > 1

        fits = snncompile.optimize(net, T, minimum, schedule=schedule)
        expected = step_loop(twin(net), x_seq)
        torch.testing.assert_close(fits(x_seq), expected)
        assert fits.report.predicted_peak_bytes <= minimum
        with pytest.raises(InfeasibleBudgetError):
            snncompile.optimize(net, T, minimum - 1, schedule=schedule)(x_seq)


def test_an_infeasible_budget_with_an_example_input_is_said_at_once() -> None:
    net = conv_net().eval().requires_grad_(False)
    before = Snapshot(net)
    with pytest.raises(InfeasibleBudgetError, match="raise memory_budget or lower N"):
        snncompile.optimize(net, T, "1KiB", example_input=conv_input())
    before.assert_unchanged()


def test_a_smaller_batch_may_fit_after_a_larger_one_did_not() -> None:
    net = conv_net().eval().requires_grad_(False)
    small = snncompile.optimize(net, T, example_input=conv_input(1)).report.predicted_peak_bytes
    opt = snncompile.optimize(net, T, 2 * small)
    with pytest.raises(InfeasibleBudgetError):
        opt(conv_input(50))
    assert net[2].v == 0.0
    assert opt(conv_input(1)).shape == (T, 1, 3)


# Not a number


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("where", ["weight", "input", "bias", "state", "infinite input"])
def test_nan_passes_through_as_in_the_step_loop(schedule: str | int, where: str) -> None:
    net, x_seq = dense_net(), torch.randn(T, 5, 6)
    with torch.no_grad():
        if where == "weight":
            net[0].weight[0, 0] = float("nan")
        elif where == "bias":
            net[2].bias[1] = float("nan")
        elif where == "state":
            net[1].v = torch.full((5, 16), float("nan"))
        else:
            x_seq[1, 2, 3] = float("nan") if where == "input" else float("inf")
    reference = twin(net)
    got = snncompile.optimize(net, T, schedule=schedule)(x_seq)
    torch.testing.assert_close(got, step_loop(reference, x_seq), rtol=0, atol=0, equal_nan=True)
    for index in (1, 3):
        torch.testing.assert_close(net[index].v, reference[index].v, rtol=0, atol=0, equal_nan=True)
    assert net[3].v.isnan().any() or net[1].v.isnan().any() or net[1].v.isinf().any()


# The errors themselves

EXAMPLES: list[SnnCompileError] = [
    SnnCompileError("fact; remedy"),
    SnnCompileError("fact; remedy", where="layer1.0"),
    CaptureError("cannot trace", where="body"),
    VerifyError("cycle without delay", where="node"),
    PassError("pass x failed"),
    ScheduleError("the schedule runs some node twice"),
    InfeasibleBudgetError("too small", minimum_bytes=123, where="segment 3"),
    ParityError("departs"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: SnnCompileError) -> None:
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_every_error_class_of_ours_is_among_the_examples() -> None:
    ours = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, SnnCompileError)}
    assert {type(error) for error in EXAMPLES} == ours
    assert ours <= {value for value in vars(snncompile).values() if isinstance(value, type)}


def test_a_raised_error_survives_pickling_with_what_it_knows() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        snncompile.optimize(conv_net(), T, 1, example_input=conv_input())
    other = pickle.loads(pickle.dumps(caught.value))
    assert (other.minimum_bytes, other.where, str(other)) == (
        caught.value.minimum_bytes,
        caught.value.where,
        str(caught.value),
    )
