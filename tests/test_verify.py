"""`verify` fails where it should, reports say what was decided, and `profile` says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import ParityError, neuron, surrogate
from snncompile.report import Comparison
from snncompile.report.parity import compare
from snncompile.runtime.states import StateSlot

from .contract import SCHEDULES, Snapshot, assert_same_states, conv_net, dense_net, step_loop, twin

T = 4


def conv_input() -> Tensor:
    return torch.rand(T, 5, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def dense_input() -> Tensor:
    return torch.randn(T, 5, 6, generator=torch.Generator().manual_seed(0))


def failed(parity: snncompile.Parity) -> dict[str, list[str]]:
    """Names of what is out of tolerance, by group; groups without failures are left out."""
    groups = ("outputs", "states", "buffers", "gradients")
    found = {group: [c.name for c in getattr(parity, group) if not c.close] for group in groups}
    return {group: names for group, names in found.items() if names}


# verify succeeds


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [False, True])
def test_verify_passes_and_changes_nothing(schedule: str | int, training: bool) -> None:
    net = conv_net().train(training)
    opt = snncompile.optimize(net, T, schedule=schedule)
    opt(conv_input()).sum().backward()  # a state with a graph behind it, and gradients
    x_seq = conv_input().requires_grad_()
    before, rng = Snapshot(net), torch.get_rng_state()
    gradients = [p.grad.clone() for p in net.parameters()]

    parity = snncompile.verify(net, opt, x_seq)

    parity.check()
    assert parity
    assert parity.ok
    assert parity.spike_mismatch_rate == 0.0
    assert parity.max_state_error == 0.0
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} == {c.name for c in parity.buffers}
    assert len(parity.states) == 2
    names = {c.name for c in parity.gradients}
    expected = {f"gradient of {name}" for name, _ in net.named_parameters()} | {"gradient of input 0"}
    assert names == (expected if training else set())
    if schedule == "depth-first":
        assert parity.exact
        assert str(parity).startswith("parity ok (bit for bit)")
    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), rng)
    assert x_seq.grad is None
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))


def test_verify_accepts_an_equal_network_and_an_opt_that_never_ran() -> None:
    net = dense_net()
    assert snncompile.verify(dense_net(), snncompile.optimize(net, T), dense_input())
    assert net[1].v == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("net", [nn.Identity(), nn.Flatten(2), nn.Sequential()], ids=["identity", "flatten", "empty"])
def test_verify_passes_for_networks_that_compute_nothing(net: nn.Module, schedule: str | int) -> None:
    assert snncompile.verify(net, snncompile.optimize(net, T, schedule=schedule), conv_input()).exact


@pytest.mark.parametrize("readout", ["sum", "mean", "last"])
def test_verify_compares_with_the_readout_of_the_step_loop(readout: str) -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T, readout=readout, schedule=3)
    parity = snncompile.verify(net, opt, dense_input())
    parity.check()
    assert len(parity.outputs) == 1


def test_verify_with_a_static_input() -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T, static_input=True)
    assert snncompile.verify(net, opt, dense_input()[0]).ok


def test_verify_gives_both_sides_the_same_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), neuron.IFNode(0.3)).train()
    assert snncompile.verify(net, snncompile.optimize(net, T, schedule="breadth-first"), dense_input()).ok


def test_verify_wants_an_optimised_module() -> None:
    net: Any = dense_net()
    with pytest.raises(TypeError, match=r"from optimize\(\), got Sequential"):
        snncompile.verify(net, net, dense_input())
    for wrong in (dense_input()[:3], torch.zeros(T + 1, 5, 6)):
        with pytest.raises(ValueError, match="T = 4"):
            snncompile.verify(net, snncompile.optimize(net, T), wrong)


# verify fails


def test_another_weight_fails_in_outputs_states_and_gradients() -> None:
    net, other = dense_net().train(), dense_net().train()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    parity = snncompile.verify(net, snncompile.optimize(other, T), dense_input())
    assert not parity
    assert failed(parity).keys() == {"outputs", "states", "gradients"}
    assert 0 < parity.spike_mismatch_rate < 1
    assert parity.max_state_error > 0.01
    with pytest.raises(ParityError, match="departs from the step loop") as caught:
        parity.check()
    assert "FAILED output 0" in str(caught.value)


def test_a_flipped_spike_is_counted() -> None:
    net, other = nn.Sequential(neuron.IFNode()), nn.Sequential(neuron.IFNode())
    other[0].v_threshold = 1.5
    x_seq = torch.zeros(T, 2, 5)
    x_seq[2, 0, 0] = 1.2
    parity = snncompile.verify(net, snncompile.optimize(other, T), x_seq)
    assert parity.spike_mismatch_rate == pytest.approx(1 / 40)
    assert parity.outputs[0].max_error == 1.0
    assert not parity.ok


def test_another_state_fails_in_states_alone_where_it_flips_no_spike() -> None:
    net = dense_net().eval()
    net[1].v, net[3].v = torch.zeros(5, 16), torch.zeros(5, 3)
    other = twin(net)
    other[3].v = other[3].v - 1e-4
    parity = snncompile.verify(net, snncompile.optimize(other, T), dense_input())
    assert failed(parity) == {"states": ["3._states.0"]}
    assert parity.max_state_error == pytest.approx(1e-4, rel=0.01)
    assert parity.spike_mismatch_rate == 0.0


def test_a_state_on_one_side_only_fails() -> None:
    net, other = dense_net().eval(), dense_net().eval()
    opt = snncompile.optimize(other, T)
    other[1].extra = torch.ones(3)
    assert "1.extra.0" in failed(snncompile.verify(net, opt, dense_input()))["states"]


def test_other_running_statistics_fail_in_buffers_alone() -> None:
    net, other = conv_net().train(), conv_net().train()
    other[1].running_mean.add_(1e-3)
    assert failed(snncompile.verify(net, snncompile.optimize(other, T), conv_input())) == {
        "buffers": ["1.running_mean"]
    }
    other = conv_net().train()
    other[1].num_batches_tracked.add_(1)
    assert failed(snncompile.verify(net, snncompile.optimize(other, T), conv_input())) == {
        "buffers": ["1.num_batches_tracked"]
    }


def test_another_surrogate_fails_in_gradients_alone() -> None:
    net, other = dense_net().train(), dense_net().train()
    other[1].surrogate_function = surrogate.Sigmoid(alpha=2.0)
    opt = snncompile.optimize(other, T)
    parity = snncompile.verify(net, opt, dense_input())
    assert failed(parity) == {"gradients": ["gradient of 0.bias", "gradient of 0.weight"]}
    with torch.no_grad():
        parity = snncompile.verify(net, opt, dense_input())
    assert parity.gradients == ()
    assert parity.ok


def test_a_gradient_on_one_side_only_fails() -> None:
    net, other = dense_net().train(), dense_net().train()
    other[0].weight.requires_grad_(False)
    assert failed(snncompile.verify(net, snncompile.optimize(other, T), dense_input())) == {
        "gradients": ["gradient of 0.weight"]
    }


class _BiasBeforeBatchNorm(nn.Module):
    """The gradient of the bias cancels: batch norm takes a constant away.

    Args:
        leak: Added to the gradient of each term of the bias.
    """

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        bias = self.conv.bias
        shift = (self.leak * (bias - bias.detach())).reshape(-1, 1, 1)
        return 50.0 * self.lif(self.norm(self.conv(x))) + shift


@pytest.mark.parametrize(("leak", "ok"), [(0.0, True), (1e-3, False)])
def test_what_rounding_leaves_of_a_gradient_that_cancels_is_within_tolerance(leak: float, ok: bool) -> None:
    def network(leak: float) -> nn.Module:
        torch.manual_seed(0)
        return _BiasBeforeBatchNorm(leak).train()

    opt = snncompile.optimize(network(leak), 16, schedule="breadth-first", backend="eager")
    parity = snncompile.verify(network(0.0), opt, torch.rand(16, 8, 1, 18, 18))
    bias = next(comparison for comparison in parity.gradients if comparison.name == "gradient of conv.bias")
    assert bias.close is ok
    assert bias.max_error > 1e-5


def test_another_dtype_fails() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32)

    net, other = nn.Sequential(Halved()), nn.Sequential(nn.Identity())
    parity = snncompile.verify(net, snncompile.optimize(other, T), dense_input().double())
    assert failed(parity) == {"outputs": ["output 0"]}


def _backwards(self: StateSlot, steps: int, *inputs: Any) -> Any:
    return torch.stack([self.step(*(x[t] for x in inputs)) for t in reversed(range(steps))])


def _forgetful(self: StateSlot) -> None:
    """Leaves the modules' states as they were."""


def _off_by_little(self: StateSlot) -> None:
    self.adapter.write(self.module, tuple(v + 1e-3 for v in self.states))


@pytest.mark.parametrize(
    ("method", "wrong", "groups"),
    [
        ("scan", _backwards, {"outputs", "states"}),
        ("commit", _forgetful, {"states"}),
        ("commit", _off_by_little, {"states"}),
    ],
)
def test_a_wrong_runtime_is_caught(
    monkeypatch: pytest.MonkeyPatch, method: str, wrong: Callable[..., Any], groups: set[str]
) -> None:
    net = dense_net().eval()
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    assert snncompile.verify(net, opt, dense_input()).ok
    monkeypatch.setattr(StateSlot, method, wrong)
    with torch.no_grad():
        parity = snncompile.verify(net, opt, dense_input())
    assert failed(parity).keys() == groups


@pytest.mark.parametrize(
    ("left", "right", "close", "rate"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, 0.0),
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], True, 0.5),
        ([1.0, 2.0], [1.0, 2.1], False, 0.5),
        ([float("nan"), 2.0], [float("nan"), 2.0], True, 0.0),
        ([float("nan"), 2.0], [1.0, 2.0], False, 0.5),
        ([float("inf"), 2.0], [float("inf"), 2.0], True, 0.0),
        ([float("inf"), 2.0], [-float("inf"), 2.0], False, 0.5),
        ([float("inf"), 2.0], [1e38, 2.0], False, 0.5),
        ([1.0, 2.0], [1.0], False, 1.0),
        ([], [], True, 0.0),
        ([1.0], None, False, 1.0),
        (None, None, True, 0.0),
    ],
)
def test_comparison_of_two_tensors(left: Any, right: Any, close: bool, rate: float) -> None:
    tensors = [None if side is None else torch.tensor(side, dtype=torch.float64) for side in (left, right)]
    comparison = compare("x", *tensors)
    assert (comparison.close, comparison.mismatch_rate) == (close, rate)
    assert comparison.max_error >= 0.0
    assert (comparison.max_error == 0.0) == (rate == 0.0)


def test_parity_as_text() -> None:
    good = Comparison("output 0", 0.0, 0.0, True)
    bad = Comparison("1.v", 0.25, 0.5, False)
    assert str(snncompile.Parity((good,), (good, bad), (), ())) == (
        "parity FAILED\n"
        "  outputs: 1 of 1 within tolerance, largest error 0 (output 0), largest mismatch rate 0\n"
        "  states: 1 of 2 within tolerance, largest error 0.25 (1.v), largest mismatch rate 0.5\n"
        "  FAILED 1.v: error 0.25"
    )


# report


def planned(schedule: str | int = "depth-first", **arguments: Any) -> Any:
    net = conv_net().eval().requires_grad_(False)
    return snncompile.optimize(net, T, schedule=schedule, example_input=conv_input(), **arguments)


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
def test_report_as_text(golden: Callable[[str], None], schedule: str | int) -> None:
    # Whether a kernel rounds differently over a chunk is the machine's affair.
    text = str(planned(schedule, memory_budget="1MiB", readout="sum").report)
    golden("\n".join(line for line in text.splitlines() if "rounds differently" not in line))


def test_report_before_planning_says_so() -> None:
    opt = snncompile.optimize(conv_net(), T, "2MiB", static_input=True, readout="last")
    text = str(opt.report)
    assert text.splitlines()[:2] == [
        "snncompile: T = 4, budget 2.0 MiB, readout last, static input",
        "not planned yet: call the module, or pass example_input to optimize()",
    ]
    assert opt.report.predicted_peak_bytes is None
    assert opt.code.startswith("# not planned yet")
    assert json.loads(json.dumps(opt.report.to_dict()))["schedule"] is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_report_as_data_is_json_and_complete(schedule: str | int) -> None:
    opt = planned(schedule)
    data = json.loads(json.dumps(opt.report.to_dict()))
    assert data["options"]["steps"] == T
    assert data["mode"] == "inference"
    assert data["inputs"] == ["float32[4, 5, 2, 6, 6]"]
    assert data["predicted_peak_bytes"] == opt.report.predicted_peak_bytes > 0
    assert data["measured_peak_bytes"] is None
    nodes = [name for row in data["segments"] for name in row["nodes"]]
    assert nodes == [node.name for node in opt.latest_program.graph.scheduled]
    assert all(row["predicted_bytes"] <= data["predicted_peak_bytes"] for row in data["segments"])
    assert max(row["predicted_bytes"] for row in data["segments"]) == data["predicted_peak_bytes"]
    assert "choose-schedule" in data["pass_seconds"]


def test_report_of_a_given_schedule_is_json_too() -> None:
    schedule = planned(2).report.schedule
    opt = planned(schedule)
    assert json.loads(json.dumps(opt.report.to_dict()))["options"]["schedule"] == schedule.to_dict()
    assert str(opt.report)


def test_report_of_training_predicts_one_number_for_the_whole_call() -> None:
    net = conv_net().train()
    opt = snncompile.optimize(net, T, example_input=conv_input(), schedule=2)
    assert opt.report.mode == "training"
    assert opt.report.predicted_peak_bytes > planned(2).report.predicted_peak_bytes
    assert all(row.predicted_bytes is None for row in opt.report.segments)
    reasons = [decision.reason for decision in opt.report.decisions if decision.node == "1"]
    assert any("statistics of each step" in reason for reason in reasons)


def test_every_decision_has_a_pass_and_a_reason_that_is_a_sentence() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    net = nn.Sequential(nn.Linear(6, 6), Opaque(), nn.Dropout(), neuron.IFNode())
    opt = snncompile.optimize(net, T, example_input=dense_input())
    decisions = opt.report.decisions
    assert len(decisions) >= 4
    for decision in decisions:
        assert decision.pass_name
        assert len(decision.reason.split()) >= 3, decision
        assert str(decision) in str(opt.report)
    assert any(d.node == "1" and "calls" in d.reason and "step by step" in d.reason for d in decisions)
    assert any(d.pass_name == "backend" and "forward and backward" in d.reason for d in decisions)
    assert any(d.pass_name == "choose-schedule" and "fastest" in d.reason for d in decisions)


def test_report_and_code_follow_the_latest_plan() -> None:
    net = conv_net().eval()
    opt = snncompile.optimize(net, T, schedule=2)
    with torch.no_grad():
        opt(conv_input())
        assert opt.report.mode == "inference"
        opt.reset()
        opt(conv_input()[:, :3])
        assert opt.report.inputs == ("float32[4, 3, 2, 6, 6]",)
    opt.reset()
    opt(conv_input())
    assert opt.report.mode == "training"
    compile(opt.code, "<code>", "exec")
    assert "def run(" in opt.code


def test_save_writes_json_or_text_by_the_name(tmp_path: Path) -> None:
    report = planned().report
    report.save(tmp_path / "report.json")
    report.save(str(tmp_path / "report.txt"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(report.to_dict())
    )
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == f"{report}\n"
    with pytest.raises(FileNotFoundError):
        report.save(tmp_path / "missing" / "report.txt")


# profile


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [False, True])
def test_profile_measures_and_changes_nothing(schedule: str | int, training: bool) -> None:
    net = conv_net().train(training)
    reference = twin(net)
    opt = snncompile.optimize(net, T, schedule=schedule)
    opt(conv_input())
    step_loop(reference, conv_input())
    before, rng = Snapshot(net), torch.get_rng_state()

    report = opt.profile(conv_input())

    before.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in net.parameters())
    assert report.measured_peak_bytes > 0
    assert 0 < report.measured_seconds < 10
    assert report.predicted_peak_bytes > 0
    assert opt.report.measured_peak_bytes is None
    assert sum(row.measured_seconds for row in report.segments) > 0
    assert all(row.measured_seconds >= 0 for row in report.segments)
    rates = [rate for row in report.segments for _, rate in row.spikes_per_step]
    assert len(rates) == 2
    assert all(0 < rate < 1 for rate in rates)
    assert "measured peak" in str(report)
    assert "measured time" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["measured_peak_bytes"] == report.measured_peak_bytes
    assert torch.equal(opt(conv_input()), step_loop(reference, conv_input()))
    assert_same_states(net, reference)


def test_profile_counts_spikes_from_the_current_states() -> None:
    net = nn.Sequential(neuron.IFNode(1.0, v_reset=None))
    opt = snncompile.optimize(net, T)
    quarter = torch.full((T, 1, 3), 0.25)
    (row,) = opt.profile(quarter).segments
    assert row.spikes_per_step == ((row.nodes[0], 0.25),)
    net[0].v = torch.full((1, 3), -10.0)
    (row,) = opt.profile(quarter).segments
    assert row.spikes_per_step == ((row.nodes[0], 0.0),)


def test_measured_peak_stays_below_the_predicted_one_in_inference() -> None:
    for schedule in SCHEDULES:
        report = planned(schedule).profile(conv_input())
        assert report.measured_peak_bytes <= report.predicted_peak_bytes


def test_profile_counts_the_spikes_of_each_neuron_of_a_chain() -> None:
    """What a chain hands on is no spike: it is scaled, and something is added."""

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = neuron.IFNode(0.5), neuron.IFNode(1.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(x * 2.0) + self.b(x) + 1.0
            return y

    x = torch.full((4, 1, 8), 0.25)
    rates = {}
    for backend in ("auto", "eager"):
        opt = snncompile.optimize(Chained().eval(), 4, schedule="breadth-first", backend=backend)
        with torch.no_grad():
            rows = opt.profile(x).segments
        rates[backend] = dict(rate for row in rows for rate in row.spikes_per_step)
    assert rates["auto"] == rates["eager"] == {"a": 1.0, "b": 0.0}


def test_profile_checks_its_input() -> None:
    with pytest.raises(ValueError, match="T = 4"):
        planned().profile(conv_input()[:2])


# measure_peak


def test_measure_peak_counts_what_lives_at_once() -> None:
    def call() -> Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    assert snncompile.measure_peak(call) == 8000
    kept = torch.zeros(1000)
    assert snncompile.measure_peak(lambda: kept.view(10, 100)) == 0
    assert snncompile.measure_peak(lambda: None) == 0
    with pytest.raises(TypeError, match="callable without arguments, got Tensor"):
        snncompile.measure_peak(kept)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        snncompile.measure_peak(lambda: 1 // 0)
