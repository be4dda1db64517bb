"""States carry over from call to call until reset, and live where the step loop would leave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import functional, neuron

from .contract import SCHEDULES, Snapshot, assert_same_states, conv_net, dense_net, states_of, step_loop, twin


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [8, 4, 1])
def test_one_call_equals_several_shorter_ones(schedule: str | int, steps: int) -> None:
    net, x_seq = dense_net(), torch.randn(8, 5, 6)
    reference = twin(net)
    expected = step_loop(reference, x_seq)
    assert 0 < expected.mean() < 1

    opt = snncompile.optimize(net, steps, schedule=schedule)
    got = torch.cat([opt(part) for part in x_seq.split(steps)])

    assert torch.equal(got, expected)
    assert_same_states(net, reference)


def test_one_network_can_be_compiled_for_several_lengths_that_share_its_states() -> None:
    net, x_seq = dense_net(), torch.randn(8, 5, 6)
    expected = step_loop(twin(net), x_seq)
    five, three = snncompile.optimize(net, 5), snncompile.optimize(net, 3)
    assert torch.equal(torch.cat([five(x_seq[:5]), three(x_seq[5:])]), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_step_loop_and_compiled_calls_interleave(schedule: str | int) -> None:
    net, x_seq = dense_net(), torch.randn(12, 5, 6)
    expected = step_loop(twin(net), x_seq)
    opt = snncompile.optimize(net, 4, schedule=schedule)
    got = [opt(x_seq[:4]), step_loop(net, x_seq[4:7]), opt(x_seq[7:11]), net(x_seq[11]).unsqueeze(0)]
    assert torch.equal(torch.cat(got), expected)


def test_state_is_a_number_before_the_first_call_and_a_tensor_of_one_step_after() -> None:
    net = dense_net()
    opt = snncompile.optimize(net, 4, example_input=torch.randn(4, 5, 6))
    assert net[1].v == 0.0
    opt(torch.randn(4, 5, 6))
    assert isinstance(net[1].v, Tensor)
    assert net[1].v.shape == (5, 16)
    assert not net[1].v.is_inference()


def test_a_state_written_by_hand_is_where_the_next_call_starts() -> None:
    net, x_seq = dense_net(), torch.randn(4, 5, 6)
    reference = twin(net)
    opt = snncompile.optimize(net, 4)
    for each in (net, reference):
        each[1].v = torch.full((5, 16), 0.3)
        each[3].v = torch.full((5, 3), -0.2)
    assert torch.equal(opt(x_seq), step_loop(reference, x_seq))
    assert_same_states(net, reference)


def _sj_reset(module: nn.Module) -> None:
    pytest.importorskip("spikingjelly.activation_based.functional").reset_net(module)


RESETS: dict[str, Callable[[Any, Any], None]] = {
    "opt.reset()": lambda opt, net: opt.reset(),
    "functional.reset_net(opt)": lambda opt, net: functional.reset_net(opt),
    "functional.reset_net(net)": lambda opt, net: functional.reset_net(net),
    "functional.reset_net(parent)": lambda opt, net: functional.reset_net(nn.Sequential(opt)),
    "spikingjelly reset_net(opt)": lambda opt, net: _sj_reset(opt),
    "spikingjelly reset_net(net)": lambda opt, net: _sj_reset(net),
}


@pytest.mark.parametrize("how", RESETS)
def test_every_way_to_reset_starts_again_from_the_reset_values(how: str) -> None:
    net, x_seq = dense_net(), torch.randn(4, 5, 6)
    opt = snncompile.optimize(net, 4)
    first, second = opt(x_seq), opt(x_seq)
    assert not torch.equal(first, second)
    RESETS[how](opt, net)
    assert states_of(net) == {"1": 0.0, "3": 0.0}
    assert torch.equal(opt(x_seq), first)


@pytest.mark.parametrize("how", RESETS)
def test_reset_reaches_a_network_that_is_a_single_neuron(how: str) -> None:
    net, x_seq = neuron.LIFNode(), torch.rand(4, 5, 6)
    opt = snncompile.optimize(net, 4)
    opt(x_seq)
    assert isinstance(net.v, Tensor)
    RESETS[how](opt, net)
    assert net.v == 0.0


def test_reset_runs_a_reset_that_the_network_itself_defines() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.node = neuron.IFNode()
            self.resets = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.node(x)

        def reset(self) -> None:
            self.resets += 1

    net = Counted()
    opt = snncompile.optimize(net, 2)
    opt(torch.rand(2, 3))
    opt.reset()
    assert net.resets == 1
    assert net.node.v == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [False, True])
def test_a_new_batch_shape_without_reset_is_an_error_before_any_work(schedule: str | int, training: bool) -> None:
    net = conv_net().train(training)
    opt = snncompile.optimize(net, 4, schedule=schedule)
    opt(torch.rand(4, 5, 2, 6, 6))
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"LIFNode.*\(5, 4, 6, 6\).*\(7, 4, 6, 6\).*reset\(\)"):
        opt(torch.rand(4, 7, 2, 6, 6))
    before.assert_unchanged()
    assert opt(torch.rand(4, 5, 2, 6, 6)).shape == (4, 5, 3)


def test_a_state_of_a_late_layer_that_does_not_fit_is_found_before_the_first_layer_runs() -> None:
    net = conv_net().train()
    opt = snncompile.optimize(net, 4, schedule="depth-first")
    net[6].v = torch.zeros(9, 3)
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"reset\(\)"):
        opt(torch.rand(4, 5, 2, 6, 6))
    before.assert_unchanged()


def test_a_new_batch_shape_after_reset_is_planned_anew() -> None:
    net = conv_net().eval()
    opt = snncompile.optimize(net, 4)
    for batch in (5, 7, 5, 1):
        x_seq = torch.rand(4, batch, 2, 6, 6)
        opt.reset()
        reference = twin(net)
        assert torch.allclose(opt(x_seq), step_loop(reference, x_seq))
        assert f"[4, {batch}, 2, 6, 6]" in str(opt.report)


class FailsAt(nn.Module):
    """Raises at one of its calls; keeps its own count, so it runs as it is, step by step."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.fail_at = [call]

    def forward(self, x: Tensor) -> Tensor:
        self.fail_at[0] -= 1
        if self.fail_at[0] == 0:
            raise ZeroDivisionError("planned failure")
        return x * 1.0


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 2])
def test_an_exception_in_the_middle_leaves_the_states_as_they_were(schedule: str | int) -> None:
    torch.manual_seed(0)
    fails = FailsAt(10**6)  # more calls than planning and the first run make
    net = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(v_threshold=0.3), fails, neuron.IFNode()).eval()
    opt = snncompile.optimize(net, 4, schedule=schedule)
    x_seq = torch.randn(4, 5, 6)
    opt(x_seq)
    before = Snapshot(net)
    fails.fail_at[0] = 3
    with pytest.raises(ZeroDivisionError, match="planned failure"):
        opt(x_seq)
    before.assert_unchanged()
    reference = twin(net)
    assert torch.equal(opt(x_seq), step_loop(reference, x_seq))
    assert_same_states(net, reference)


def test_a_module_that_counts_its_calls_is_not_planned_anew_at_every_call() -> None:
    net, x_seq = nn.Sequential(nn.Linear(6, 8), FailsAt(10**6), neuron.IFNode()).eval(), torch.randn(4, 5, 6)
    opt = snncompile.optimize(net, 4)
    opt(x_seq)
    program = opt.latest_program
    opt(x_seq)
    assert opt.latest_program is program


def test_planning_ahead_changes_nothing_and_draws_nothing() -> None:
    net = conv_net().train()
    opt = snncompile.optimize(net, 4)
    opt(torch.rand(4, 5, 2, 6, 6))
    before, wider, other = Snapshot(net), torch.zeros(4, 9, 2, 6, 6), torch.zeros(3, 5, 2, 6, 6)
    rng = torch.get_rng_state()
    opt.plan(wider)
    snncompile.optimize(net, 3, example_input=other)
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("readout", ["sequence", "last", "sum", "mean"])
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_output_shares_memory_with_neither_states_nor_input(
    readout: str, schedule: str | int, steps: int, grad: bool
) -> None:
    net = nn.Sequential(nn.Linear(6, 6), neuron.NonSpikingIFNode())
    opt = snncompile.optimize(net, steps, schedule=schedule, readout=readout)
    plain = snncompile.optimize(nn.Sequential(nn.Flatten()), steps, schedule=schedule, readout=readout)
    x_seq = torch.randn(steps, 5, 6)
    untouched, reference = x_seq.clone(), twin(net)
    with torch.set_grad_enabled(grad):
        opt(x_seq).data.fill_(100.0)
        plain(x_seq).data.fill_(100.0)
        step_loop(reference, x_seq)
    torch.testing.assert_close(net[1].v, reference[1].v)
    assert torch.equal(x_seq, untouched)


def test_the_callers_input_may_change_after_the_call() -> None:
    net, x_seq = dense_net(), torch.randn(4, 5, 6)
    reference = twin(net)
    opt = snncompile.optimize(net, 4)
    got, expected = opt(x_seq), step_loop(reference, x_seq)
    x_seq.fill_(float("nan"))
    assert torch.equal(got, expected)
    assert_same_states(net, reference)


def test_states_follow_a_change_of_dtype_and_detach_net_cuts_their_history() -> None:
    net = dense_net().train()
    opt = snncompile.optimize(net, 4)
    opt(torch.randn(4, 5, 6))
    assert net[1].v.requires_grad
    functional.detach_net(opt)
    assert not net[1].v.requires_grad
    reference = twin(net).double()
    opt.to(torch.float64)
    assert net[1].v.dtype == torch.float64
    x_seq = torch.randn(4, 5, 6, dtype=torch.float64)
    assert torch.equal(opt(x_seq), step_loop(reference, x_seq))
