"""Threads: calls of one network take turns, planning disturbs no other thread, and what cannot work is an error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.functional import reset_net
from snncompile.runtime.locks import _Gate, call_lock

T = 6


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 5), neuron.IFNode()).eval()


def sequence(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.rand(T, batch, 6, generator=torch.Generator().manual_seed(seed))


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that begin at the same time, each in a thread of its own."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        ready.wait()
        with torch.no_grad():
            return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, call) for call in calls]]


def step_loop(net: nn.Module, x: Tensor) -> Tensor:
    reset_net(net)
    with torch.no_grad():
        return torch.stack([net(step) for step in x])


def test_calls_of_one_module_from_two_threads_take_turns() -> None:
    # Each thread calls again and again; a call's result is that of the loop from some state that a call has left.
    net, x = dense_net(), sequence()
    calls = 20
    expected = step_loop(net, x.repeat(2 * calls, 1, 1)).split(T)
    reset_net(net)
    opt = snncompile.optimize(net, T)
    first, second = together(*[lambda: [opt(x) for _ in range(calls)]] * 2)
    left = list(expected)
    for output in (*first, *second):
        match = next((n for n, each in enumerate(left) if torch.equal(each, output)), None)
        assert match is not None, "an output is not that of any call in a row of calls"
        del left[match]
    assert left == []


def test_the_first_calls_may_come_at_once_and_plan_once() -> None:
    net, x = dense_net(), sequence()
    expected = step_loop(net, torch.cat([x, x])).split(T)
    reset_net(net)
    opt = snncompile.optimize(net, T)
    outputs = together(lambda: opt(x), lambda: opt(x))
    assert len(opt._plans) == 1
    in_order = [torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)]
    reversed_ = [torch.equal(a, b) for a, b in zip(outputs[::-1], expected, strict=True)]
    assert all(in_order) or all(reversed_)


def test_two_modules_of_one_network_take_turns_too() -> None:
    net = dense_net()
    assert snncompile.optimize(net, T).lock is snncompile.optimize(net, 2 * T).lock is call_lock(net)
    assert snncompile.optimize(copy.deepcopy(net), T).lock is not call_lock(net)


def test_planning_in_one_thread_disturbs_no_other() -> None:
    # torch.fx replaces methods of every module while it traces.
    planned, running, plain = dense_net(), dense_net(), dense_net()
    opt, x = snncompile.optimize(running, T), sequence()
    expected, loop = step_loop(running, x), step_loop(plain, x)
    stop = threading.Event()
    call, attribute = nn.Module.__call__, nn.Module.__getattr__

    def plan() -> int:
        try:
            for batch in range(4, 8):
                snncompile.optimize(copy.deepcopy(planned), T)(sequence(batch=batch))
        finally:
            stop.set()
        return 4

    def run(call: Callable[[], Tensor], correct: Tensor) -> int:
        count = 0
        while not stop.is_set():
            assert torch.equal(call(), correct)
            count += 1
        return count

    def optimised() -> Tensor:
        opt.reset()
        return opt(x)

    counts = together(plan, plan, lambda: run(optimised, expected), lambda: run(lambda: step_loop(plain, x), loop))
    assert counts[:2] == [4, 4]
    assert counts[3] > 0
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, attribute)


def test_streams_of_one_network_take_turns_chunk_by_chunk() -> None:
    net, x = dense_net(), sequence()
    opt = snncompile.optimize(net, 2)

    def consume() -> int:
        return sum(len(chunk) for chunk in opt.stream(x.split(2)))

    assert together(consume, consume) == [T, T]


def test_a_call_from_within_a_call_is_an_error_and_not_a_deadlock() -> None:
    net, x = dense_net(), sequence()
    opt = snncompile.optimize(net, T)
    handle = net[2].register_forward_hook(lambda *_: opt(x))
    with torch.no_grad(), pytest.raises(RuntimeError, match="from within its own call"):
        opt(x)
    handle.remove()
    reset_net(net)
    expected = step_loop(net, x)
    opt.reset()
    with torch.no_grad():
        assert torch.equal(opt(x), expected)


def test_a_lock_is_free_again_after_an_error() -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T)
    with pytest.raises(ValueError, match="T = 6"):
        opt(sequence()[:3])
    assert len(together(lambda: opt(sequence()))) == 1


def test_a_thread_that_runs_may_plan_and_two_of_them_do_not_wait_for_each_other() -> None:
    gate = _Gate()
    both_run = threading.Barrier(2)
    planning: list[int] = []

    def run(number: int) -> None:
        with gate.running():
            both_run.wait(10)
            with gate.planning():
                planning.append(number)
                assert len(planning) == 1
                with gate.running(), gate.planning():
                    pass
                planning.remove(number)
            with gate.running():
                pass

    together(lambda: run(0), lambda: run(1))
    with gate.planning():
        pass


def test_who_plans_waits_for_those_who_run_and_keeps_others_out() -> None:
    gate = _Gate()
    order: list[str] = []
    runs, plans = threading.Event(), threading.Event()

    def runner() -> None:
        with gate.running():
            runs.set()
            assert not plans.wait(0.2)
            order.append("ran")

    def planner() -> None:
        runs.wait(10)
        with gate.planning():
            plans.set()
            order.append("planned")

    together(runner, planner)
    assert order == ["ran", "planned"]
