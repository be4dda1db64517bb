"""Batch tiling: where not even single steps of the whole batch fit into the budget, parts of it run in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import InfeasibleBudgetError, functional, neuron
from snncompile.runtime import TiledProgram

T, N = 5, 24


def network() -> nn.Sequential:
    """`[N, 2, 6, 6]` -> `[N, 5]`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        neuron.IFNode(0.3),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        neuron.LIFNode(v_threshold=0.05),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 5),
    ).eval()


def images(*, static: bool = False, n: int = N) -> Tensor:
    shape = (n, 2, 6, 6) if static else (T, n, 2, 6, 6)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def smallest(net: nn.Module, x: Tensor, **options: Any) -> int:
    """The smallest budget that does, in parts or not."""
    with pytest.raises(InfeasibleBudgetError) as raised:
        snncompile.optimize(net, T, 1, example_input=x, **options)
    return raised.value.minimum_bytes


def tiled(net: nn.Module, x: Tensor, share: float, **options: Any) -> Any:
    """Compiled for a budget between the smallest with the batch in parts and the smallest for it as a whole."""
    whole = snncompile.optimize(net, T, example_input=x, schedule="depth-first", **options)
    least, most = smallest(net, x, **options), whole.report.predicted_peak_bytes
    budget = int(least + share * (most - least) * 0.9)
    opt = snncompile.optimize(net, T, budget, example_input=x, **options)
    assert isinstance(opt.latest_program, TiledProgram)
    assert opt.report.predicted_peak_bytes <= budget
    return opt


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("readout", "static", "share"),
    [("sequence", False, 0.0), ("sequence", True, 1.0), ("sum", True, 0.5), ("mean", False, 1.0), ("last", False, 0.0)],
)
def test_results_and_states_are_those_of_the_whole_batch(readout: str, static: bool, share: float) -> None:
    net, x = network(), images(static=static)
    opt = tiled(net, x, share, readout=readout, static_input=static)
    parity = snncompile.verify(net, opt, x)
    assert parity.ok, parity
    # States carry over from call to call.
    first, second = opt(x), opt(x)
    states = [net[2].v.clone(), net[4].v.clone()]
    functional.reset_net(net)
    plain = snncompile.optimize(net, T, readout=readout, static_input=static)
    torch.testing.assert_close((first, second), (plain(x), plain(x)))
    torch.testing.assert_close(states, [net[2].v, net[4].v])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_measured_peaks_are_within_what_is_predicted(share: float) -> None:
    net, x = network(), images()
    opt = tiled(net, x, share)
    opt(x)
    measured = snncompile.measure_peak(lambda: opt(x))
    assert 0.9 * opt.report.predicted_peak_bytes <= measured <= opt.report.predicted_peak_bytes


def test_a_neuron_that_is_called_twice_has_one_state() -> None:
    fires = neuron.LIFNode(v_threshold=0.05)
    net, x = (
        nn.Sequential(nn.Conv2d(2, 32, 3, padding=1), fires, fires, nn.Flatten(), nn.Linear(1152, 5)).eval(),
        images(),
    )
    opt = tiled(net, x, 0.0)
    opt(x)
    measured = snncompile.measure_peak(lambda: opt(x))
    assert 0.95 * opt.report.predicted_peak_bytes <= measured <= opt.report.predicted_peak_bytes


def test_the_report_says_so_and_speaks_of_the_whole_batch() -> None:
    net, x = network(), images()
    opt = tiled(net, x, 1.0)
    (decision,) = [d for d in opt.report.decisions if d.pass_name == "tile-batch"]
    assert str(decision) == "tile-batch: network: done: the batch runs in 2 parts of 12 samples, one after the other"
    assert opt.report.inputs == (f"float32[{T}, {N}, 2, 6, 6]",)
    assert max(row.predicted_bytes for row in opt.report.segments) == opt.report.predicted_peak_bytes
    profiled = opt.profile(x)
    assert profiled.measured_peak_bytes <= opt.report.predicted_peak_bytes
    assert 0 < dict(rate for row in profiled.segments for rate in row.spikes_per_step)["ifnode_2"] < 1


def test_an_error_in_the_middle_leaves_the_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), images()
    opt = tiled(net, x, 1.0)
    opt(x)
    before = net[2].v.clone()
    compute, calls = TiledProgram.compute, []

    def fails(self: TiledProgram, *inputs: Tensor) -> Any:
        calls.append(inputs)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return compute(self, *inputs)

    monkeypatch.setattr(TiledProgram, "compute", fails)
    with pytest.raises(RuntimeError, match="no more"):
        opt(x)
    assert torch.equal(net[2].v, before)


def test_a_state_of_another_batch_is_refused() -> None:
    net, x = network(), images()
    opt = tiled(net, x, 1.0)
    net[2].v = torch.zeros(N // 2, 6, 6, 6)
    with pytest.raises(ValueError, match="shape"):
        opt(x)


class Centred(nn.Module):
    """Sees all samples at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Adaptive(neuron.StatefulModule):
    """A neuron whose threshold follows the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)

    def step(self, inputs: Any, states: Any) -> Any:
        v = states[0] + inputs[0]
        spike = (v > v.mean()).to(v)
        return (spike,), (v - spike,)


@pytest.mark.parametrize(
    ("part", "options", "reason"),
    [
        (Centred, {}, "computes something that is not one row for each sample"),
        (Adaptive, {}, "has no kernel, so it may look at several samples at once"),
        (neuron.IFNode, {"backend": "eager"}, "has no kernel"),
    ],
)
def test_what_may_couple_samples_is_not_cut(part: Callable[[], nn.Module], options: Any, reason: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), part())
    with pytest.raises(InfeasibleBudgetError, match=f"the batch cannot run in parts: .*{reason}"):
        snncompile.optimize(net, T, 1500, example_input=images(), readout="last", **options)


def test_a_stream_is_not_cut() -> None:
    net, x = network(), images()
    opt = tiled(net, x, 1.0)
    with pytest.raises(InfeasibleBudgetError):
        next(opt.stream([x]))


def test_a_schedule_that_was_asked_for_is_not_cut() -> None:
    net, x = network(), images()
    budget = tiled(net, x, 1.0).report.predicted_peak_bytes
    with pytest.raises(InfeasibleBudgetError):
        snncompile.optimize(net, T, budget, example_input=x, schedule="depth-first")
