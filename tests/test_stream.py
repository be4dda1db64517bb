"""Streams of chunks: the bits of one call over all steps, at constant memory; what does not fit is said at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import ScheduleError, neuron
from snncompile.functional import reset_net

from .networks import Feedback

LENGTHS = (4, 7, 1, 4, 3)
T = sum(LENGTHS)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(3, 5)
        self.fire = neuron.LIFNode()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fire(self.first(x) + self.second(y))


def dense_net(feedback: bool = False) -> nn.Module:
    middle = [Feedback()] if feedback else []
    return nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), *middle, nn.Linear(8, 5), neuron.IFNode()).eval()


def sequence(steps: int = T) -> Tensor:
    return torch.rand(steps, 4, 6, generator=torch.Generator().manual_seed(0))


def step_loop(net: nn.Module, *x: Tensor) -> Tensor:
    reset_net(net)
    with torch.no_grad():
        return torch.stack([net(*step) for step in zip(*x, strict=True)])


def states_of(net: nn.Module) -> list[Tensor]:
    return [module.v.clone() for module in net.modules() if isinstance(module, neuron.IFNode | neuron.LIFNode)]


@pytest.mark.parametrize("schedule", ["auto", "depth-first", "breadth-first", 3])
@pytest.mark.parametrize("feedback", [False, True])
def test_chunks_of_any_length_give_the_step_loops_outputs_and_states(schedule: Any, feedback: bool) -> None:
    net, x = dense_net(feedback), sequence()
    expected = step_loop(net, x)
    final = states_of(net)
    reset_net(net)
    opt = snncompile.optimize(net, 4, schedule=schedule)
    outputs = list(opt.stream(x.split(LENGTHS)))
    assert [len(chunk) for chunk in outputs] == [*LENGTHS]
    assert torch.equal(torch.cat(outputs), expected)
    assert all(map(torch.equal, states_of(net), final))


@pytest.mark.parametrize("readout", ["sum", "mean", "last"])
def test_a_readout_is_that_of_one_call_over_all_steps(readout: str) -> None:
    net, x = dense_net(), sequence()
    whole = snncompile.optimize(net, T, readout=readout)
    with torch.no_grad():
        expected = whole(x)
    reset_net(net)
    opt = snncompile.optimize(net, 4, readout=readout)
    (got,) = opt.stream(x.split(LENGTHS))
    assert torch.equal(got, expected)
    reset_net(net)
    assert torch.equal(next(opt.stream(x.split(LENGTHS))), expected)  # a second stream begins a readout of its own


def test_static_inputs_are_shown_for_T_steps_each() -> None:
    net, x = dense_net(), sequence(3)
    expected = step_loop(net, x.repeat_interleave(5, 0))
    reset_net(net)
    opt = snncompile.optimize(net, 5, static_input=True)
    assert torch.equal(torch.cat(list(opt.stream(iter(x)))), expected)
    reset_net(net)
    (mean,) = snncompile.optimize(net, 5, static_input=True, readout="mean").stream(iter(x))
    assert torch.allclose(mean, expected.mean(0))


def test_several_inputs_come_as_tuples() -> None:
    net = TwoInputs().eval()
    x, y = sequence(), torch.rand(T, 4, 3)
    expected = step_loop(net, x, y)
    reset_net(net)
    opt = snncompile.optimize(net, 4)
    chunks = zip(x.split(LENGTHS), y.split(LENGTHS), strict=True)
    assert torch.equal(torch.cat(list(opt.stream(chunks))), expected)


def test_a_stream_goes_on_where_a_call_has_ended_and_a_call_where_a_stream_has() -> None:
    net, x = dense_net(), sequence(12)
    expected = step_loop(net, x)
    reset_net(net)
    opt = snncompile.optimize(net, 4)
    with torch.no_grad():
        parts = [opt(x[:4]), *opt.stream([x[4:8]]), opt(x[8:])]
    assert torch.equal(torch.cat(parts), expected)


def test_a_chunk_is_run_when_it_is_taken_and_not_before() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Tensor]:
        for number in itertools.count():
            taken.append(number)
            yield sequence(4)

    stream = snncompile.optimize(dense_net(), 4).stream(endless())
    assert taken == []
    for count in (1, 2, 3):
        next(stream)
        assert len(taken) == count


def test_each_length_is_planned_for_once() -> None:
    opt = snncompile.optimize(dense_net(), 4)
    list(opt.stream(sequence().split(LENGTHS)))
    assert len(opt._plans) == len(set(LENGTHS))


def test_nothing_is_recorded_for_backward_and_the_callers_mode_stays() -> None:
    net = dense_net().train()
    for output in snncompile.optimize(net, 4).stream(sequence(8).split(4)):
        assert not output.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("readout", "options"), [("sequence", {}), ("sum", {"memory_budget": 100_000}), ("last", {"schedule": 16})]
)
def test_4096_steps_hold_no_more_than_128(readout: str, options: dict[str, Any]) -> None:
    net, chunk = dense_net(), sequence(64)
    opt = snncompile.optimize(net, 64, readout=readout, **options)

    def run(chunks: int) -> int:
        reset_net(net)

        def consume() -> None:
            for output in opt.stream(itertools.repeat(chunk, chunks)):
                del output

        return snncompile.measure_peak(consume)

    run(1)
    one, two, many = run(1), run(2), run(64)
    assert one <= opt.report.predicted_peak_bytes
    # From the second chunk on there are states carried in, which a call does not count and the stream holds.
    assert two <= opt.report.predicted_peak_bytes + sum(state.nbytes for state in states_of(net))
    assert many == two


# What does not fit


def test_a_tensor_is_no_stream_of_chunks() -> None:
    opt = snncompile.optimize(dense_net(), 4)
    with pytest.raises(TypeError, match=r"x_seq.split\(C\)"):
        opt.stream(sequence())
    with pytest.raises(TypeError, match="iterable"):
        opt.stream(3)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("x", TypeError, "chunk 2 of the stream: input input must be a tensor, got str"),
        ((sequence(4), sequence(4)), TypeError, "takes 1 inputs"),
        (sequence(4)[:, :3], ValueError, r"must be \[C, 4, 6\].*got \(4, 3, 6\)"),
        (sequence(4).double(), ValueError, "float32.*float64"),
        (sequence(4)[..., :5], ValueError, r"must be \[C, 4, 6\]"),
        (sequence(4)[0], ValueError, r"must be \[C, 4, 6\]"),
        (sequence(4)[:0], ValueError, "at least 1"),
        (torch.tensor(1.0), ValueError, "must be"),
    ],
)
def test_a_bad_chunk_is_an_error_that_leaves_the_states(bad: Any, error: type[Exception], message: str) -> None:
    net, x = dense_net(), sequence(8)
    stream = snncompile.optimize(net, 4).stream([*x.split(4), bad])
    outputs = [next(stream), next(stream)]
    states = states_of(net)
    with pytest.raises(error, match=message):
        next(stream)
    assert all(map(torch.equal, states_of(net), states))
    assert torch.equal(torch.cat(outputs), step_loop(net, x))


def test_a_first_chunk_that_the_network_does_not_take_is_an_error() -> None:
    opt = snncompile.optimize(dense_net(), 4)
    with pytest.raises(snncompile.CaptureError):
        next(opt.stream([torch.rand(4, 4, 7)]))
    with pytest.raises(ValueError, match="without dimensions"):
        next(opt.stream([torch.tensor(1.0)]))


def test_a_readout_of_no_chunks_is_an_error_and_a_sequence_of_none_is_empty() -> None:
    assert list(snncompile.optimize(dense_net(), 4).stream([])) == []
    with pytest.raises(ValueError, match="no chunks"):
        next(snncompile.optimize(dense_net(), 4, readout="sum").stream([]))


def test_a_given_schedule_takes_chunks_of_its_length() -> None:
    x = sequence(8)
    schedule = snncompile.optimize(dense_net(), 4, schedule=2, example_input=x[:4]).report.schedule
    opt = snncompile.optimize(dense_net(), 4, schedule=schedule)
    stream = opt.stream([x[:4], x[:3]])
    next(stream)
    with pytest.raises(ScheduleError, match="chunk 1 of the stream has 3 steps"):
        next(stream)


def test_a_network_with_explicit_states_cannot_be_streamed() -> None:
    class Explicit(nn.Module):
        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return x + v, 0.5 * v

    opt = snncompile.optimize(snncompile.with_states(Explicit()), 4)
    with pytest.raises(ValueError, match="states as arguments"):
        opt.stream([sequence(4)])


def test_a_network_that_takes_whole_sequences_cannot_be_streamed() -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer
    from spikingjelly.activation_based import neuron as sj

    net = nn.Sequential(layer.Linear(6, 5), sj.PSN(4))
    functional.set_step_mode(net, "m")
    with pytest.raises(ValueError, match="takes all steps of a sequence at once"):
        next(snncompile.optimize(net, 4).stream([sequence(4)]))
