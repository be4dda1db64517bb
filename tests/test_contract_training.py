"""Training through an optimised network is training through the step loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import functional, neuron, surrogate

from .contract import SCHEDULES, assert_same_states, conv_net, dense_net, step_loop, twin

T = 4

NEURONS: dict[str, Callable[[], nn.Module]] = {
    "IF hard ATan": lambda: neuron.IFNode(0.3, surrogate_function=surrogate.ATan()),
    "IF soft Sigmoid": lambda: neuron.IFNode(0.3, v_reset=None, surrogate_function=surrogate.Sigmoid()),
    "LIF Sigmoid": lambda: neuron.LIFNode(v_threshold=0.3, surrogate_function=surrogate.Sigmoid()),
    "LIF ATan detached": lambda: neuron.LIFNode(
        v_threshold=0.3, decay_input=False, surrogate_function=surrogate.ATan(), detach_reset=True
    ),
    "PLIF ATan": lambda: neuron.ParametricLIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()),
    "PLIF Sigmoid": lambda: neuron.ParametricLIFNode(v_threshold=0.3, surrogate_function=surrogate.Sigmoid()),
}


def conv_input(seed: int = 0, steps: int = T) -> Tensor:
    return torch.rand(steps, 5, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def dense_input(seed: int = 0, steps: int = T) -> Tensor:
    return torch.randn(steps, 5, 6, generator=torch.Generator().manual_seed(seed))


def weighted(output: Tensor, seed: int = 7) -> Tensor:
    """A scalar in which every element of the output counts differently."""
    return (output * torch.rand(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)).sum()


def optimize(net: nn.Module, steps: int, *, schedule: Any, **options: Any) -> Any:
    """Depth-first by eager steps, whose gradients have the step loop's bits; kernels add up in another order."""
    backend = "eager" if schedule == "depth-first" else "auto"
    return snncompile.optimize(net, steps, schedule=schedule, backend=backend, **options)


def assert_same_gradients(net: nn.Module, reference: nn.Module, *, exact: bool) -> None:
    """Equal bits, or within 1e-5; and not trivially so."""
    pairs = list(zip(net.named_parameters(), reference.parameters(), strict=True))
    assert any(q.grad is not None and q.grad.abs().sum() > 0 for _, q in pairs)
    for (name, p), q in pairs:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and exact:
            assert torch.equal(p.grad, q.grad), name
        elif p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
            )


def assert_same_buffers(net: nn.Module, reference: nn.Module) -> None:
    for (name, got), expected in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", NEURONS)
def test_gradients_and_statistics_equal_the_step_loops(kind: str, schedule: str | int) -> None:
    net = conv_net(make_neuron=NEURONS[kind]).train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    x_seq, x_reference = conv_input().requires_grad_(), conv_input().requires_grad_()

    got, expected = opt(x_seq), step_loop(reference, x_reference)
    assert 0 < expected.mean() < 1
    assert torch.equal(got, expected)
    weighted(got).backward()
    weighted(expected).backward()

    exact = schedule == "depth-first"
    assert_same_gradients(net, reference, exact=exact)
    assert x_seq.grad is not None
    assert x_reference.grad is not None
    torch.testing.assert_close(x_seq.grad, x_reference.grad, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    assert_same_states(net, reference)
    assert_same_buffers(net, reference)
    assert net[1].num_batches_tracked == T


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradients_at_lengths_around_the_chunk(schedule: str | int, steps: int) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, steps, schedule=schedule)
    weighted(opt(dense_input(steps=steps))).backward()
    weighted(step_loop(reference, dense_input(steps=steps))).backward()
    assert_same_gradients(net, reference, exact=schedule == "depth-first")


@pytest.mark.parametrize("readout", ["sum", "mean", "last"])
@pytest.mark.parametrize("schedule", ["depth-first", 3])
def test_gradients_through_a_readout(readout: str, schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    weighted(optimize(net, T, schedule=schedule, readout=readout)(dense_input())).backward()
    expected = step_loop(reference, dense_input())
    weighted({"sum": expected.sum(0), "mean": expected.mean(0), "last": expected[-1]}[readout]).backward()
    assert_same_gradients(net, reference, exact=False)


@pytest.mark.parametrize("schedule", ["depth-first", 3])
def test_gradients_with_a_static_input(schedule: str | int) -> None:
    net = conv_net().train()
    reference = twin(net)
    still = conv_input()[0].requires_grad_()
    still_reference = still.detach().clone().requires_grad_()
    weighted(optimize(net, T, schedule=schedule, static_input=True)(still)).backward()
    weighted(torch.stack([reference(still_reference) for _ in range(T)])).backward()
    assert_same_gradients(net, reference, exact=False)
    assert_same_buffers(net, reference)
    torch.testing.assert_close(still.grad, still_reference.grad, rtol=1e-5, atol=1e-5)


# Several calls


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_truncated_backpropagation_with_carried_states(schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    for window in range(3):
        weighted(opt(dense_input(window))).backward()
        weighted(step_loop(reference, dense_input(window))).backward()
        functional.detach_net(opt)
        functional.detach_net(reference)
    assert_same_gradients(net, reference, exact=schedule == "depth-first")
    assert_same_states(net, reference)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_backpropagation_reaches_through_states_into_an_earlier_call(schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    first, reference_first = dense_input(0).requires_grad_(), dense_input(0).requires_grad_()
    opt(first)
    step_loop(reference, reference_first)
    weighted(opt(dense_input(1))).backward()
    weighted(step_loop(reference, dense_input(1))).backward()
    assert_same_gradients(net, reference, exact=schedule == "depth-first")
    assert reference_first.grad is not None
    assert reference_first.grad.abs().sum() > 0
    torch.testing.assert_close(first.grad, reference_first.grad, rtol=1e-5, atol=1e-5)


def test_backward_twice_through_carried_states_is_the_step_loops_error() -> None:
    net = dense_net().train()
    opt = snncompile.optimize(net, T)
    opt(dense_input(0)).sum().backward()
    second = opt(dense_input(1)).sum()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        second.backward()


def test_frozen_weights_still_carry_gradients_through_states() -> None:
    net = dense_net().train()
    opt = snncompile.optimize(net, T)
    opt(dense_input(0))
    net.requires_grad_(False)
    loss = weighted(opt(dense_input(1)))
    assert loss.requires_grad
    loss.backward()
    assert net[0].weight.grad is None  # frozen when backward ran, as for any graph of torch's
    assert not dense_input(1).requires_grad


# What one may do with an output


@pytest.mark.parametrize("schedule", ["depth-first", 3])
def test_an_output_used_twice_and_gradients_accumulated(schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    for call, each in ((opt, net), (lambda x: step_loop(reference, x), reference)):
        for seed in range(2):
            output = call(dense_input(seed))
            loss = weighted(output) + (output.sum(0) ** 2).mean()
            loss.backward(retain_graph=True)
            weighted(output, seed=11).backward()
            functional.reset_net(each)
    assert_same_gradients(net, reference, exact=False)


def test_an_output_changed_in_place_before_backward() -> None:
    net = dense_net().train()
    reference = twin(net)
    for output in (snncompile.optimize(net, T, schedule=2)(dense_input()), step_loop(reference, dense_input())):
        output.mul_(torch.arange(3.0))
        weighted(output).backward()
    assert_same_gradients(net, reference, exact=False)


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
def test_second_order_gradients(schedule: str) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    for call, each in ((opt, net), (lambda x: step_loop(reference, x), reference)):
        weights = [each[0].weight, each[2].weight]
        first = torch.autograd.grad(weighted(call(dense_input())), weights, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert_same_gradients(net, reference, exact=False)


# Training runs


def toy_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (24,), generator=generator)
    means = torch.randn(3, 6, generator=generator)
    noise = torch.randn(T, 24, 6, generator=generator)
    return means[labels] + 0.3 * noise, labels


def train(call: Callable[[Tensor], Tensor], net: nn.Module, steps: int = 10) -> list[float]:
    x_seq, labels = toy_data()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        functional.reset_net(net)
        loss = nn.functional.cross_entropy(call(x_seq).mean(0), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_short_training_run_has_the_step_loops_losses(schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    expected = train(lambda x: step_loop(reference, x), reference)
    got = train(optimize(net, T, schedule=schedule), net)
    assert expected[-1] < 0.9 * expected[0]
    if schedule == "depth-first":
        assert got == expected
    else:
        assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("where", ["module", "module in place", "function"])
def test_dropout_draws_the_step_loops_numbers_from_the_first_call_on(schedule: str | int, where: str) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.node, self.head = nn.Linear(6, 16), neuron.IFNode(0.3), nn.Linear(16, 3)
            self.drop = nn.Dropout(0.5, inplace=where == "module in place") if where != "function" else None

        def forward(self, x: Tensor) -> Tensor:
            x = self.node(self.fc(x))
            x = self.drop(x) if self.drop is not None else nn.functional.dropout(x, 0.3, self.training)
            return nn.functional.dropout(self.head(x), 0.2, self.training)

    net = Dropped().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    for seed in range(2):
        torch.manual_seed(seed)
        got = opt(dense_input(seed))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = step_loop(reference, dense_input(seed))
        assert torch.equal(got, expected)
        assert torch.equal(after, torch.get_rng_state())
        weighted(got).backward()
        weighted(expected).backward()
        functional.detach_net(net)
        functional.detach_net(reference)
    assert_same_gradients(net, reference, exact=schedule == "depth-first")
    opt.eval()
    reference.eval()
    assert torch.equal(opt(dense_input()), step_loop(reference, dense_input()))


# Modes of torch


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_without_gradients(mode: Any, training: bool) -> None:
    net = conv_net().train(training)
    reference = twin(net)
    opt = snncompile.optimize(net, T, schedule=3)
    with mode():
        got, expected = opt(conv_input()), step_loop(reference, conv_input())
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert not net[2].v.requires_grad
    assert_same_states(net, reference)
    assert_same_buffers(net, reference)

    functional.reset_net(net)
    functional.reset_net(reference)
    weighted(opt(conv_input())).backward()
    weighted(step_loop(reference, conv_input())).backward()
    assert_same_gradients(net, reference, exact=False)


def test_a_parameter_made_in_inference_mode_serves() -> None:
    with torch.inference_mode():
        net = dense_net()
        opt = snncompile.optimize(net, T)
        assert torch.equal(opt(dense_input()), step_loop(twin(dense_net()), dense_input()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_gives_what_the_step_loop_gives_under_autocast(schedule: str | int) -> None:
    net = dense_net().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = opt(dense_input()), step_loop(reference, dense_input())
    assert got.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(got, expected)
    assert_same_states(net, reference)
    weighted(got).backward()
    weighted(expected).backward()
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2, msg=name)

    functional.reset_net(net)
    functional.reset_net(reference)
    with torch.no_grad():
        assert torch.equal(opt(dense_input()), step_loop(reference, dense_input()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float64(schedule: str | int) -> None:
    net = conv_net().double().train()
    reference = twin(net)
    opt = optimize(net, T, schedule=schedule)
    got, expected = opt(conv_input().double()), step_loop(reference, conv_input().double())
    assert got.dtype is torch.float64
    assert torch.equal(got, expected)
    weighted(got).backward()
    weighted(expected).backward()
    assert_same_gradients(net, reference, exact=schedule == "depth-first")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eval_mode_with_gradients_gives_the_step_loops_gradients(schedule: str | int) -> None:
    net = conv_net().eval()
    reference = twin(net)
    weighted(optimize(net, T, schedule=schedule)(conv_input())).backward()
    weighted(step_loop(reference, conv_input())).backward()
    assert_same_gradients(net, reference, exact=schedule == "depth-first")
    assert_same_buffers(net, reference)


@pytest.mark.parametrize(
    "make_norm",
    [
        lambda: nn.BatchNorm1d(6, momentum=None),
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        lambda: nn.BatchNorm1d(6, affine=False),
        lambda: nn.LayerNorm(6),
    ],
    ids=["cumulative average", "no running statistics", "no affine", "layer norm"],
)
@pytest.mark.parametrize("training", [True, False])
def test_norms_see_one_step_at_a_time(make_norm: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 6), make_norm(), neuron.LIFNode(v_threshold=0.3)).train(training)
    reference = copy.deepcopy(net)
    got = snncompile.optimize(net, T, schedule="breadth-first")(dense_input())
    expected = step_loop(reference, dense_input())
    assert torch.equal(got, expected)
    weighted(got).backward()
    weighted(expected).backward()
    assert_same_gradients(net, reference, exact=False)
    assert_same_buffers(net, reference)


@pytest.mark.parametrize(
    ("schedule", "way"),
    [("depth-first", "UnbindBackward0"), (3, "SplitBackward0"), ("breadth-first", "_ScanBackward")],
)
def test_no_slice_of_the_input_fills_a_whole_sequence_with_zeros_backward(schedule: str | int, way: str) -> None:
    net, steps = nn.Sequential(neuron.LIFNode(), nn.Linear(6, 3)).train(), 7
    x_seq = torch.rand(steps, 2, 6, requires_grad=True)
    opt = snncompile.optimize(net, steps, schedule=schedule)
    waiting, seen = [opt(x_seq).grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    leaves = [
        node
        for node in seen
        if any(
            type(before).__name__ == "AccumulateGrad" and before.variable is x_seq
            for before, _ in node.next_functions
            if before is not None
        )
    ]
    assert [type(node).__name__ for node in leaves] == [way]
