"""Chunks that are recorded once a call and replayed: what CUDA graphs do, by a recorder for the CPU.

As a CUDA graph's, its recording changes nothing, and its replays read and write the memory that was recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snncompile
from snncompile import neuron
from snncompile.ir import TensorType
from snncompile.neuron import StatefulModule
from snncompile.runtime import chunk_replays, replay_bytes, replay_chunks, replay_trials
from snncompile.runtime.chunk_replays import FEWEST_CHUNKS, CudaRecorder
from snncompile.torch_private import storage_key, tree_leaves

from .networks import Feedback


class Log(TorchDispatchMode):
    """Runs operations and writes them down, with what they wrote over."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any], list[bool]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        result = func(*args, **kwargs)
        places = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [isinstance(x, Tensor) and storage_key(x) not in places for x in tree_leaves(result)]
        self.calls.append((func, args, kwargs, tree_leaves(result), fresh))
        return result


class LoggingRecorder:
    """Stands for CUDA: eager operations only, as what kernels do is not seen."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with Log() as log:
            result = body()
        for value, before in reversed(log.before):
            value.copy_(before)

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, results, fresh in log.calls:
                for value, again, is_fresh in zip(results, tree_leaves(func(*args, **kwargs)), fresh, strict=True):
                    if is_fresh:  # others lie where their operands do
                        value.copy_(again)

        return replay, result


class Swapped(StatefulModule):
    """Two states that change places, and an output that is the state before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("a", 0.0)
        self.register_state("b", 1.0)

    def step(self, inputs: Any, states: Any) -> Any:
        a, b = states
        return (a,), (b, a * 0.5 + inputs[0])


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), neuron.LIFNode(v_threshold=0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(108, 5), neuron.ParametricLIFNode(v_threshold=0.2)).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutional, (4, 2, 6, 6)),
    "states that change places": (lambda: nn.Sequential(Swapped(), neuron.LIFNode(v_threshold=0.3)), (4, 6)),
    "the input is an output": (nn.Identity, (4, 6)),
}


def steps_of(shape: tuple[int, ...], steps: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.rand(steps, *shape, generator=torch.Generator().manual_seed(seed)) - 0.3


def replayed(net: nn.Module, steps: int, x: Tensor, **options: Any) -> tuple[Any, LoggingRecorder]:
    """A compiled network that replays its chunks."""
    opt = snncompile.optimize(net, steps, backend="eager", example_input=x, **options)
    recorder = LoggingRecorder()
    opt.latest_program.replay_chunks(recorder)
    return opt, recorder


@pytest.mark.parametrize("readout", ["sequence", "sum", "mean", "last"])
@pytest.mark.parametrize(("schedule", "steps"), [("depth-first", 9), (2, 11), (3, 12)])
@pytest.mark.parametrize("name", NETWORKS)
def test_two_calls_give_the_step_loops_outputs_and_states(name: str, schedule: Any, steps: int, readout: Any) -> None:
    make, shape = NETWORKS[name]
    net, twin = make(), make()
    x, y = steps_of(shape, steps), steps_of(shape, steps, seed=1)
    plain = snncompile.optimize(twin, steps, backend="eager", schedule=schedule, readout=readout)
    with torch.no_grad():
        opt, recorder = replayed(net, steps, x, schedule=schedule, readout=readout)
        for given in (x, y):
            assert torch.equal(opt(given), plain(given))
            for part, other in zip(net.modules(), twin.modules(), strict=True):
                if isinstance(part, StatefulModule):
                    assert all(map(torch.equal, part._states.values(), other._states.values()))
    chunk = 1 if schedule == "depth-first" else schedule
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * (steps // chunk - 1)


def test_a_static_input() -> None:
    net, shape = convolutional(), (4, 2, 6, 6)
    x = steps_of(shape, 13)
    with torch.no_grad():
        opt, recorder = replayed(net, 13, x[0], static_input=True, schedule=4, readout="sum")
        got = opt(x[0])
        snncompile.functional.reset_net(net)
        expected = torch.stack([net(x[0]) for _ in range(13)]).sum(0)
    assert torch.equal(got, expected)
    assert recorder.replayed == 2


def test_changed_weights_are_honoured() -> None:
    net, x = convolutional(), steps_of((4, 2, 6, 6), 9)
    with torch.no_grad():
        opt, recorder = replayed(net, 9, x, schedule="depth-first")
        before = opt(x)
        net[0].weight.mul_(1.5)
        opt.reset()
        after = opt(x)
        opt.reset()
        assert torch.equal(after, torch.stack([net(step) for step in x]))
    assert recorder.replayed == 2 * 8
    assert not torch.equal(after, before)


# What is decided


def decided(net: nn.Module, x: Tensor, *, room: float = 1e9, **options: Any) -> Any:
    """The decision, and whether chunks are replayed."""
    opt = snncompile.optimize(net, len(x), backend="eager", example_input=x, **options)
    program = opt.latest_program
    (decision,) = replay_chunks(program, [TensorType.of(x)], room, LoggingRecorder())
    return decision.reason, program.is_replayed


def test_on_the_cpu_nothing_is_decided() -> None:
    opt = snncompile.optimize(convolutional(), 9, example_input=steps_of((4, 2, 6, 6), 9))
    assert not any(decision.pass_name == "cuda-graphs" for decision in opt.report.decisions)
    assert not opt.latest_program.is_replayed


@pytest.mark.parametrize(("seconds", "replays"), [((1e-3, 1e-4), True), ((1e-4, 1e-4), False)])
def test_replays_must_be_faster(seconds: Any, replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    race = replay_trials._race

    def raced(*given: Any) -> Any:
        race(*given)  # it would raise
        return seconds

    monkeypatch.setattr(replay_trials, "_race", raced)
    x = steps_of((4, 2, 6, 6), 9)
    with torch.no_grad():
        reason, is_replayed = decided(convolutional(), x, schedule="depth-first")
    assert is_replayed == replays
    assert "us a chunk, launched operation by operation" in reason


def test_other_bits_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(LoggingRecorder):
        def record(self, body: Any) -> Any:
            replay, result = super().record(body)
            return lambda: (replay(), result[0].add_(1e-3)), result

    x = steps_of((4, 2, 6, 6), 9)
    with torch.no_grad():
        opt = snncompile.optimize(convolutional(), 9, backend="eager", schedule="depth-first", example_input=x)
        (decision,) = replay_chunks(opt.latest_program, [TensorType.of(x)], recorder=Wrong())
    assert "it rounds differently" in decision.reason
    assert not opt.latest_program.is_replayed


@pytest.mark.parametrize(
    ("make", "shape", "options", "reason"),
    [
        (convolutional, (4, 2, 6, 6), {"schedule": 2}, f"4 whole chunks are fewer than the {FEWEST_CHUNKS}"),
        (Feedback, (4, 6), {"schedule": 1}, "keeps a tensor in an attribute"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout()).train(), (4, 6), {"schedule": 1}, "does more than"),
    ],
)
def test_what_is_refused(make: Any, shape: Any, options: Any, reason: str) -> None:
    with torch.no_grad():
        said, is_replayed = decided(make(), steps_of(shape, 9), **options)
    assert reason in said
    assert not is_replayed


def test_a_budget_has_room_for_what_replays_hold() -> None:
    net, x = convolutional(), steps_of((4, 2, 6, 6), 18)
    with torch.no_grad():
        opt = snncompile.optimize(net, 18, backend="eager", schedule=2, example_input=x)
        program = opt.latest_program
        held = replay_bytes(program.graph, program.schedule, [TensorType.of(x)], is_static=False)
        # Two steps of inputs and outputs, and both neurons' states twice.
        assert held == 2 * 4 * (4 * 72 + 4 * 5 + 4 * 108 + 4 * 5)
        said, is_replayed = decided(net, x, schedule=2, room=held - 1)
    assert said == f"replays hold {held} bytes more than the budget leaves"
    assert not is_replayed


class FakeGraph:
    """A CUDA graph that says what is asked of it."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def pool(self) -> str:
        return "its memory"

    def capture_begin(self, pool: str = "own memory", capture_error_mode: str = "global") -> None:
        self.said.append(f"begin, {pool}, {capture_error_mode}")

    def capture_end(self) -> None:
        self.said.append("end")

    def replay(self) -> None:
        self.said.append("replay")


class FakeStream:
    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def wait_stream(self, other: FakeStream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_a_graph_takes_the_memory_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    streams = {"current": FakeStream(said, "current"), "own": FakeStream(said, "own")}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(said))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams["current"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(chunk_replays, "_stream_to_record", lambda device: streams["own"])
    recorder = CudaRecorder(torch.device("cuda", 0))
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 / 0)
    assert said == ["own waits for current", "begin, own memory, thread_local", "end"]
    for memory in ("own memory", "its memory"):
        said.clear()
        replay, result = recorder.record(lambda: 3)
        replay()
        assert result == 3
        recorded = ["own waits for current", f"begin, {memory}, thread_local", "end", "current waits for own", "replay"]
        assert said[-5:] == recorded
    assert said[0] == "current waits for current"  # whose work may still be in that memory


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("readout", ["sequence", "sum", "last"])
@pytest.mark.parametrize("schedule", ["depth-first", 2])
def test_on_cuda_replays_give_the_bits_of_launches(schedule: Any, readout: Any) -> None:
    net, x = convolutional().cuda(), steps_of((4, 2, 6, 6), 33).cuda()
    with torch.no_grad():
        opt = snncompile.optimize(net, 33, schedule=schedule, readout=readout, example_input=x)
        program = opt.latest_program
        expected = program.of_steps(net, 33)(x)
        program.replay_chunks(CudaRecorder(x.device))
        for _ in range(3):
            opt.reset()
            assert torch.equal(opt(x), expected)
        opt.reset()
        held = replay_bytes(program.graph, program.schedule, [TensorType.of(x)], is_static=False)
        assert snncompile.measure_peak(lambda: opt(x)) <= opt.report.predicted_peak_bytes + held


@pytest.mark.gpu
def test_on_cuda_the_report_says_what_was_decided() -> None:
    net, x = convolutional().cuda(), steps_of((4, 2, 6, 6), 64).cuda()
    with torch.no_grad():
        opt = snncompile.optimize(net, 64, schedule="depth-first", example_input=x)
    assert sum(decision.pass_name == "cuda-graphs" for decision in opt.report.decisions) == 1
