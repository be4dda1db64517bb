"""Networks that pass their states through `forward`: handed in, threaded through T steps, handed out."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, with_states

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 3, "auto")


class State(NamedTuple):
    v: Tensor
    i: Tensor


class Cell(nn.Module):
    """A current-based neuron in plain operations; its state is a named tuple, None at first."""

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = State(torch.zeros_like(x), torch.zeros_like(x))
        i = 0.8 * state.i + x
        v = 0.9 * state.v + i
        spike = torch.sigmoid(5.0 * (v - 1.0))
        return spike, State(v - spike, i)


class TwoLayers(nn.Module):
    """States as two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mem1 = 0.9 * mem1 + self.first(x)
        spike = torch.sigmoid(4.0 * (mem1 - 0.5))
        mem2 = 0.8 * mem2 + self.second(spike)
        return mem2.tanh(), mem1 - spike, mem2


class Nested(nn.Module):
    """One state: a list with a None, a named tuple and a dict in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cell = nn.Linear(6, 4), Cell()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        cell, trace = (None, None) if state is None else (state[1], state[2]["trace"])
        spike, cell = self.cell(self.linear(x), cell)
        trace = spike if trace is None else 0.5 * trace + spike
        return spike, trace.mean(-1), [None, cell, {"trace": trace}]


def step_loop(net: nn.Module, x_seq: Tensor, *states: Any) -> tuple[Any, ...]:
    steps = []
    for x in x_seq:
        result = net(x, *states)
        states = result[-len(states) :]
        steps.append(result[: -len(states)])
    return (*(torch.stack(column) for column in zip(*steps, strict=True)), *states)


CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "two tensors": (TwoLayers, (torch.zeros(4, 5), torch.zeros(4, 3))),
    "tensors that broadcast": (TwoLayers, (torch.zeros(1), torch.zeros(1))),
    "nested, from None": (Nested, (None,)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_what_comes_out_is_what_the_step_loop_hands_on(name: str, schedule: Any, training: bool) -> None:
    make, states = CASES[name]
    torch.manual_seed(0)
    net = make().train(training)
    for steps in (1, 5):
        x = torch.randn(steps, 4, 6)
        opt = snncompile.optimize(with_states(net, len(states)), steps, schedule=schedule)
        with torch.set_grad_enabled(training):
            expected, got = step_loop(net, x, *states), opt(x, *states)
            torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
            again = opt(x, *got[-len(states) :])  # carried on
            torch.testing.assert_close(again, step_loop(net, x, *expected[-len(states) :]), rtol=0.0, atol=0.0)
            parity = snncompile.verify(with_states(net, len(states)), opt, x, *states)
        assert parity.ok, str(parity)
        assert bool(parity.gradients) is training


def test_layers_without_state_are_batched() -> None:
    net = TwoLayers().eval()
    opt = snncompile.optimize(with_states(net, 2), 5, schedule="breadth-first")
    with torch.no_grad():
        opt(torch.randn(5, 4, 6), torch.zeros(4, 5), torch.zeros(4, 3))
    assert "batched(net['first']" in opt.code
    assert "batched(net['second']" in opt.code


def test_a_plan_serves_calls_with_other_states() -> None:
    opt = snncompile.optimize(with_states(TwoLayers().eval(), 2), 5)
    x = torch.randn(5, 4, 6)
    with torch.no_grad():
        opt(x, torch.zeros(4, 5), torch.zeros(4, 3))
        first = opt.latest_program
        opt(x, torch.ones(4, 5), torch.ones(4, 3))
    assert opt.latest_program is first


def test_parameters_and_checkpoints_are_the_networks_own() -> None:
    net = TwoLayers()
    opt = snncompile.optimize(with_states(net, 2), 5)
    assert opt.state_dict().keys() == net.state_dict().keys()
    assert opt.first.weight is net.first.weight


def test_nothing_is_kept_between_calls() -> None:
    opt = snncompile.optimize(with_states(TwoLayers().eval(), 2), 5)
    x, states = torch.randn(5, 4, 6), (torch.zeros(4, 5), torch.zeros(4, 3))
    with torch.no_grad():
        torch.testing.assert_close(opt(x, *states), opt(x, *states), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("net", "count", "error"),
    [(None, 1, TypeError), (nn.ReLU(), 1.5, TypeError), (nn.ReLU(), True, TypeError), (nn.ReLU(), 0, ValueError)],
)
def test_wrong_arguments(net: Any, count: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        with_states(net, count)


@pytest.mark.parametrize("count", [1, 2])
def test_a_forward_without_room_for_inputs_and_states(count: int) -> None:
    with pytest.raises(ValueError, match=rf"at least one input and then {count} states"):
        with_states(nn.ReLU(), count)


def test_too_many_states() -> None:
    opt = snncompile.optimize(with_states(Nested(), 1), 5)
    with pytest.raises(TypeError, match="takes 1 states after its inputs, got 2"):
        opt(torch.randn(5, 4, 6), None, None)


def test_snntorch_and_norse() -> None:
    snntorch = pytest.importorskip("snntorch")
    norse = pytest.importorskip("norse.torch")

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(6, 5), snntorch.Leaky(beta=0.9)
            self.fc2, self.lif2 = nn.Linear(5, 3), snntorch.Leaky(beta=0.8, learn_beta=True)

        def forward(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> Any:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            return spk2, mem1, mem2

    leaky = Leaky()
    starts = (leaky.lif1.init_leaky(), leaky.lif2.init_leaky())
    cells = norse.SequentialState(nn.Linear(6, 5), norse.LIFCell(), nn.Linear(5, 3), norse.LICell())
    for net, states in ((leaky, starts), (cells, (None,))):
        for steps in (1, 5, 16):
            x = 3.0 * torch.rand(steps, 4, 6)
            opt = snncompile.optimize(with_states(net, len(states)), steps, schedule="breadth-first")
            expected, got = step_loop(net, x, *states), opt(x, *states)
            torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
            assert snncompile.verify(with_states(net, len(states)), opt, x, *states).ok


class Listed(nn.Module):
    """Writes its new state into the list that it is given, as Norse's `SequentialState` does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = [None, None] if state is None else state
        v = torch.zeros(x.shape[0], 5) if state[0] is None else state[0]
        state[0], state[1] = 0.9 * v + self.linear(x), None
        return state[0].tanh(), state


def explicit(net: nn.Module, count: int = 1, **options: Any) -> Any:
    return snncompile.optimize(with_states(net, count), 5, **options)


@pytest.mark.parametrize("start", [None, [None, None], [torch.ones(4, 5), None], [torch.ones(5), None]])
def test_what_is_handed_in_stays_as_it_is(start: Any) -> None:
    x, net = torch.randn(5, 4, 6), Listed()
    handed_in, before = copy.copy(start), copy.deepcopy(start)
    got = explicit(net)(x, handed_in)
    torch.testing.assert_close(got, step_loop(net, x, copy.copy(start)), rtol=0.0, atol=0.0)
    assert repr(handed_in) == repr(before)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(4, 5), "x", [], [None], [(torch.zeros(4, 5),), None], [torch.zeros(4, 4), None]],
    ids=["tensor", "text", "empty", "short", "nested", "shape"],
)
def test_states_that_the_network_does_not_take(wrong: Any, is_first: bool) -> None:
    opt, x = explicit(Listed()), torch.randn(5, 4, 6)
    if not is_first:
        opt(x)
    with pytest.raises(CaptureError, match=r"one step fails on inputs \(float32\[4, 6\]\) with states") as caught:
        opt(x, wrong)
    assert ("it returns states ([tensor, None])" in str(caught.value)) is not is_first
    with torch.no_grad():
        torch.testing.assert_close(opt(x), step_loop(opt._net.wrapped, x, None), rtol=0.0, atol=0.0)


def test_a_network_may_take_states_of_several_forms() -> None:
    net, x = Listed(), torch.randn(5, 4, 6)
    opt = explicit(net)
    for start in (None, {0: None}, [torch.ones(4, 5), None, None], {0: torch.ones(4, 5)}, [None, None]):
        got = opt(x, start)
        torch.testing.assert_close(got, step_loop(net, x, copy.copy(start)), rtol=0.0, atol=0.0)


def test_what_is_no_tensor_must_stay_the_same() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            v, steps = (torch.zeros_like(x), 0) if state is None else state
            return x * steps, (v + x, steps + 1)

    class Growing(nn.Module):
        def forward(self, x: Tensor, state: Any = ()) -> Any:
            return x, (*(state or ()), x)

    for net in (Counting(), Growing()):
        with pytest.raises(CaptureError, match="only the tensors may change from step to step"):
            explicit(net)(torch.randn(5, 4, 6))


def test_a_start_that_differs_in_what_is_no_tensor_is_used_as_it_is() -> None:
    class Flagged(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Any:
            v, is_first = state
            return (x if is_first else x + v), (v + x, False)

    net, x = Flagged(), torch.randn(5, 4, 6)
    opt = explicit(net)
    for is_first in (True, False, True):
        start = (torch.ones(4, 6), is_first)
        torch.testing.assert_close(opt(x, start), step_loop(net, x, start), rtol=0.0, atol=0.0)


def test_an_attribute_that_the_network_itself_changes_is_not_frozen() -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.trace, self.calls = nn.Linear(6, 5), torch.zeros(5), 0

        def forward(self, x: Tensor, v: Any = None) -> Any:
            v = self.linear(x) if v is None else 0.9 * v + self.linear(x)
            self.trace, self.calls = 0.5 * self.trace + v.mean(0), self.calls + 1
            return v + self.calls * self.trace, v

    net, x = Traced(), torch.randn(5, 4, 6)
    reference, opt = copy.deepcopy(net), explicit(net)
    for _ in range(2):
        torch.testing.assert_close(opt(x, None), step_loop(reference, x, None), rtol=0.0, atol=0.0)
    assert torch.equal(net.trace, reference.trace)
    assert net.calls == reference.calls == 10
    assert any("'calls', 'trace' of the network" in str(decision) for decision in opt.report.decisions)
    assert snncompile.verify(with_states(net), opt, x).ok


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 5), nn.Dropout()

    def forward(self, x: Tensor, v: Any = None) -> Any:
        v = self.dropout(self.linear(x)) + (0.0 if v is None else 0.9 * v)
        return nn.functional.dropout(v, training=self.training), v


def test_finding_out_what_the_states_are_draws_no_random_numbers_and_runs_no_hooks() -> None:
    net, x, calls = Dropping(), torch.randn(5, 4, 6), []
    net.linear.register_forward_hook(lambda *_: calls.append(1))
    opt = explicit(net)
    torch.manual_seed(1)
    got = opt(x, None)
    assert len(calls) == 5
    torch.manual_seed(1)
    torch.testing.assert_close(got, step_loop(net, x, None), rtol=0.0, atol=0.0)


def test_the_mode_is_the_networks_own() -> None:
    net, x = Dropping(), torch.randn(5, 4, 6)
    opt = explicit(net)
    opt.eval()
    assert not net.training
    torch.testing.assert_close(opt(x), step_loop(net, x, None), rtol=0.0, atol=0.0)
    net.train()
    assert opt.training


def test_hooks_of_the_network_itself_are_refused() -> None:
    net = Dropping()
    net.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="has hooks of its own"):
        explicit(net)(torch.randn(5, 4, 6))


def test_states_in_a_variable_argument_list() -> None:
    class Listing(nn.Module):
        def forward(self, x: Tensor, *states: Any) -> Any:
            first, second = states
            first = 0.9 * first + x
            return first.tanh() + second, first, second + first

    x, start = torch.randn(5, 4, 6), (torch.zeros(4, 6), torch.ones(4, 6))
    got = explicit(Listing(), 2)(x, *start)
    torch.testing.assert_close(got, step_loop(Listing(), x, *start), rtol=0.0, atol=0.0)


def test_a_part_that_is_called_as_it_is_may_hand_on_outputs_and_states() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            v = x if state is None else 0.9 * state["v"] + x
            return (v if v.shape[0] > 2 else -v), {"v": v}

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.part = nn.Linear(6, 5), Opaque()
            self.part.register_forward_hook(lambda *_: None)  # so that it is

        def forward(self, x: Tensor, state: Any = None) -> Any:
            return self.part(self.linear(x), state)

    net, x = Around(), torch.randn(5, 4, 6)
    opt = explicit(net, schedule="breadth-first")
    torch.testing.assert_close(opt(x), step_loop(net, x, None), rtol=0.0, atol=0.0)
    assert "batched(net['linear']" in opt.code


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_flow_into_states_handed_in_and_out_of_states_handed_out(schedule: Any) -> None:
    torch.manual_seed(0)
    net, x = TwoLayers(), torch.randn(5, 4, 6)
    opt = explicit(net, 2, schedule=schedule)
    found = []
    for run in (lambda *states: opt(x, *states), lambda *states: step_loop(net, x, *states)):
        states = [torch.ones(4, 5, requires_grad=True), torch.ones(4, 3, requires_grad=True)]
        net.zero_grad()
        again = run(*run(*states)[1:])  # carried over with its history
        (again[1].square().sum() + again[2].sum()).backward()  # of the final states alone
        found.append([value.grad for value in (*states, *net.parameters())])
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_convolutional_network_of_norse_cells(schedule: Any, training: bool) -> None:
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(0)
    cells = norse.SequentialState(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), norse.LIFCell(norse.LIFParameters(alpha=torch.tensor(2.0)))),
        *(nn.Flatten(), nn.Linear(48, 6), norse.LIFRefracCell(), norse.LSNNRecurrentCell(6, 5)),
        *(norse.IzhikevichCell(norse.tonic_spiking), nn.Dropout(0.2), nn.Linear(5, 3), norse.LICell()),
    ).train(training)
    reference, opt = copy.deepcopy(cells), explicit(cells, schedule=schedule)
    got = expected = (None, None)
    with torch.set_grad_enabled(training):
        for window in range(3):
            x = 9.0 * torch.rand(5, 4, 2, 6, 6)
            torch.manual_seed(window)
            got = opt(x, got[1])
            torch.manual_seed(window)
            expected = step_loop(reference, x, expected[1])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert [type(state) for state in got[1]] == [type(state) for state in expected[1]]
    if schedule == "breadth-first":
        assert "batched(net['0']" in opt.code


# verify


def test_verify_compares_final_states_and_the_gradients_of_states() -> None:
    net = Nested()
    opt, x = explicit(net), torch.randn(5, 4, 6)
    start = [None, State(torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)), {"trace": torch.ones(4, 4)}]
    parity = snncompile.verify(with_states(net), opt, x, start)
    parity.check()
    assert [comparison.name for comparison in parity.outputs] == ["output 0", "output 1"]
    assert [comparison.name for comparison in parity.states] == ["final state 1", "final state 2", "final state 3"]
    assert "gradient of input 1" in [comparison.name for comparison in parity.gradients]


def test_verify_fails_in_the_states_alone_where_only_they_differ() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor, v: Any = None) -> Any:
            return x, x * self.scale

    parity = snncompile.verify(with_states(Scaled(1.0)), explicit(Scaled(1.5)), torch.ones(5, 4, 6))
    assert [comparison.name for comparison in parity.all() if not comparison.close] == ["final state 0"]
    assert parity.spike_mismatch_rate == 0.0
    assert parity.max_state_error == 0.5


def test_verify_wants_both_sides_with_states_or_neither() -> None:
    net, x = Nested(), torch.randn(5, 4, 6)
    with pytest.raises(TypeError, match="both networks to be made by with_states"):
        snncompile.verify(net, explicit(net), x)


def test_a_failure_as_text_says_what_was_compared_and_what_differs_where() -> None:
    net = TwoLayers()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.second.bias[2] += 1.0
        parity = snncompile.verify(
            with_states(net, 2),
            explicit(other, 2, schedule=3),
            torch.ones(5, 4, 6),
            torch.zeros(4, 5),
            torch.zeros(4, 3),
        )
    text = str(parity).splitlines()
    assert text[0] == "parity FAILED"
    assert text[1].startswith(f"  snncompile {snncompile.__version__}, torch {torch.__version__}, Python 3.")
    assert text[2] == "  TwoLayers, training mode, T = 5, schedule 3 in chunks of 1, 3, readout sequence"
    assert text[3] == "  inputs (float32[5, 4, 6]), states (float32[4, 5], float32[4, 3]) on cpu"
    failed = [line for line in text if line.startswith("  FAILED")]
    assert len(failed) == 2
    assert "  FAILED output 0: error " in failed[0]
    assert "20 of 60 elements, the first at [0, 0, 2]: " in failed[0]
    assert "4 of 12 elements, the first at [0, 2]: " in failed[1]
