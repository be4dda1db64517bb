"""`opt(x_seq, out=y)`: results in memory of the caller's, the same bits as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.runtime import TiledProgram

from .contract import SCHEDULES, Snapshot, assert_same_states, conv_net, dense_net, step_loop, twin

T, N = 7, 4


class TwoOutputs(nn.Module):
    """`[N, 6]` -> spikes `[N, 5]` and, under another name, how many there are of them, `[N]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.neuron = neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        spikes = self.neuron(self.layer(x))
        return {"spikes": spikes, "count": spikes.bool().sum(-1)}


class Fed(nn.Module):
    """Feeds its last output back, and holds none before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.layer(x if self.last is None else x + self.last))
        return self.last

    def reset(self) -> None:
        self.last = None


def dense_input(seed: int = 0) -> Tensor:
    return torch.randn(T, N, 6, generator=torch.Generator().manual_seed(seed))


def stale(like: Tensor) -> Tensor:
    """Memory of the same type with something else in it."""
    return torch.full_like(like, 77)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("schedule", "backend"), [*((schedule, "auto") for schedule in SCHEDULES), (3, "eager")])
@pytest.mark.parametrize(
    ("build", "shape"), [(dense_net, (6,)), (conv_net, (2, 6, 6)), (Fed, (6,))], ids=["dense", "conv", "fed"]
)
def test_results_go_where_they_should(
    build: Callable[[], nn.Module], shape: tuple[int, ...], schedule: Any, backend: str
) -> None:
    net = build().eval()
    loop = twin(net)
    opt = snncompile.optimize(net, T, schedule=schedule, backend=backend)
    out = torch.full((T, N, *loop_shape(loop, shape)), 77.0)
    for seed in range(3):  # states carry over, and so must nothing else
        x = torch.randn(T, N, *shape, generator=torch.Generator().manual_seed(seed))
        y = opt(x, out=out)
        assert y is out
        torch.testing.assert_close(y, step_loop(loop, x), rtol=0, atol=0)
    if not isinstance(net, Fed):
        assert_same_states(loop, net)


def loop_shape(loop: nn.Module, shape: tuple[int, ...]) -> torch.Size:
    return twin(loop)(torch.zeros(N, *shape)).shape[1:]


@pytest.mark.parametrize("readout", ["sequence", "sum", "mean", "last"])
def test_every_readout(readout: str) -> None:
    net = TwoOutputs()
    opt = snncompile.optimize(net, T, readout=readout)
    expected = opt(dense_input())
    opt.reset()
    out = {name: stale(value) for name, value in expected.items()}
    got = opt(dense_input(), out=out)
    assert list(got) == ["spikes", "count"]
    for name, value in got.items():
        assert value is out[name]
        assert torch.equal(value, expected[name])


def test_an_output_that_is_the_same_at_every_step() -> None:
    opt = snncompile.optimize(nn.Sequential(nn.Linear(6, 3)), T, static_input=True)
    x = dense_input()[0]
    expected = opt(x)
    out = stale(expected.contiguous())
    assert opt(x, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("readout", ["sequence", "sum"])
def test_a_batch_in_parts(readout: str) -> None:
    net = conv_net().eval()
    x = torch.randn(T, 24, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(snncompile.InfeasibleBudgetError) as raised:
        snncompile.optimize(net, T, 1, example_input=x, readout=readout)
    opt = snncompile.optimize(net, T, raised.value.minimum_bytes, example_input=x, readout=readout)
    assert isinstance(opt.latest_program, TiledProgram)
    expected = opt(x)
    opt.reset()
    out = stale(expected)
    assert opt(x, out=out) is out
    assert torch.equal(out, expected)


def test_explicit_states_are_returned_anew() -> None:
    class Explicit(nn.Module):
        def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
            v = x if v is None else 0.5 * v + x
            return (v > 0.4).float(), v

    opt = snncompile.optimize(snncompile.with_states(Explicit()), T)
    spikes, v = opt(dense_input())
    out = stale(spikes)
    again, w = opt(dense_input(), None, out=out)
    assert again is out
    assert torch.equal(out, spikes)
    assert torch.equal(w, v)


def test_the_memory_of_a_result_is_not_taken_again() -> None:
    opt = snncompile.optimize(neuron.IFNode(), T)
    out = opt(dense_input())
    opt.reset()
    without = snncompile.measure_peak(lambda: opt(dense_input()))
    opt.reset()
    within = snncompile.measure_peak(lambda: opt(dense_input(), out=out))
    assert within <= without - out.nbytes


def first_of(memory: Tensor, like: Tensor) -> Tensor:
    """A part of other memory that looks like an output."""
    return memory.detach().view(-1)[: like.numel()].view_as(like)


# What each gives for an output `y` of `net(x)`.
BAD: dict[str, tuple[Callable[[Tensor, Tensor, nn.Sequential], Any], type[Exception], str]] = {
    "shape": (lambda y, x, net: y[:-1], ValueError, r"must be \[2, 4, 3\] of torch.float32 on cpu, got \[1, 4, 3\]"),
    "dtype": (lambda y, x, net: y.double(), ValueError, "torch.float64"),
    "layout": (lambda y, x, net: y.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "contiguous"),
    "number": (lambda y, x, net: 3, TypeError, "a tensor for each output"),
    "structure": (lambda y, x, net: (y, y), TypeError, r"a tensor; got \(a tensor, a tensor\)"),
    "input": (lambda y, x, net: first_of(x, y), ValueError, "shares memory"),
    "weight": (lambda y, x, net: first_of(net[0].weight, y), ValueError, "shares memory"),
    "state": (lambda y, x, net: first_of(net[1].v, y), ValueError, "shares memory"),
    "gradient": (lambda y, x, net: y.requires_grad_(), ValueError, "must not require gradients"),
}


@pytest.mark.parametrize("case", BAD)
def test_memory_that_does_not_fit_is_refused_before_anything_runs(case: str) -> None:
    make, error, message = BAD[case]
    net = dense_net().eval()
    x = dense_input()[:2]
    opt = snncompile.optimize(net, 2)
    out = make(opt(x), x, net)
    before = Snapshot(net)
    with pytest.raises(error, match=message):
        opt(x, out=out)
    before.assert_unchanged()


def test_two_outputs_may_not_share_memory() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    opt = snncompile.optimize(Twice(), T)
    x = dense_input()
    room = torch.empty(2 * T + 1, N, 6)
    with pytest.raises(ValueError, match="another output"):
        opt(x, out=(room[:T], room[T - 1 : 2 * T - 1]))
    one, two = opt(x, out=(room[:T], room[T : 2 * T]))
    assert torch.equal(one, x + 1)
    assert torch.equal(two, x + 2)


def test_gradients_are_not_recorded_into_given_memory() -> None:
    opt = snncompile.optimize(dense_net(), T)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        opt(dense_input(), out=torch.empty(T, N, 3))
