"""Tensors that a forward keeps in an attribute: feedback across layers, delays, recorders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.ir import OpKind

from .capturing import Plain

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 3, "auto")


class TenLayers(nn.Module):
    """Ten layers of neurons; what the sixth fires goes back into the fifth one step later."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(v_threshold=0.2)) for _ in range(10)]
        )
        self.back = nn.Linear(6, 6)
        self.fed_back: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == 4 and self.fed_back is not None:
                x = x + self.back(self.fed_back)
            x = layer(x)
            if number == 5:
                fires = x
        self.fed_back = fires
        return x


def decays(self: Any, x: Tensor) -> Tensor:
    """A leaky integrator that starts from nothing."""
    self.v = x if self.v is None else 0.5 * self.v + x
    result: Tensor = torch.tanh(self.v)
    return result


def starts_from_a_number(self: Any, x: Tensor) -> Tensor:
    """Starts with a tensor that the first step spreads over the batch."""
    self.v = 0.5 * self.v + x
    result: Tensor = self.v * 2.0
    return result


def delays_by_two(self: Any, x: Tensor) -> Tensor:
    """What came in two steps ago, zero at first."""
    if self.last is None:
        self.last, self.before = torch.zeros_like(x), torch.zeros_like(x)
    y: Tensor = self.before
    self.before, self.last = self.last, x
    return y + x


def records(self: Any, x: Tensor) -> Tensor:
    """Keeps its output for others to look at."""
    self.seen = torch.relu(x)
    result: Tensor = self.seen
    return result


def grows(self: Any, x: Tensor) -> Tensor:
    """Keeps all that it has seen."""
    self.past = x if self.past is None else torch.cat([self.past, x])
    result: Tensor = x + self.past.mean()
    return result


MODULES: dict[str, Callable[[], nn.Module]] = {
    "a leaky integrator": lambda: Plain(decays, v=None),
    "a first value of another shape": lambda: Plain(starts_from_a_number, v=torch.zeros(1)),
    "a buffer": lambda: Plain(starts_from_a_number, v=nn.Buffer(torch.zeros(4, 6))),
    "a delay of two steps": lambda: Plain(delays_by_two, last=None, before=None),
    "a recorder": lambda: Plain(records, seen=None),
    "a growing past": lambda: Plain(grows, past=None),
}


def network(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), module, neuron.IFNode(v_threshold=0.3), nn.Linear(6, 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_states_and_gradients_are_those_of_the_step_loop(name: str, steps: int, training: bool) -> None:
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        net = network(MODULES[name]()).train(training)
        x = torch.randn(steps, 4, 6)
        opt = snncompile.optimize(net, steps, schedule=schedule)
        with torch.set_grad_enabled(training):
            parity = snncompile.verify(net, opt, x)
            assert parity.ok, f"{schedule}: {parity}"
            if not training:
                assert parity.exact, f"{schedule}: {parity}"
            if schedule == 3:
                with torch.no_grad():
                    opt(x)
                carried = snncompile.verify(net, opt, x)
                assert carried.ok, f"{schedule}, with states carried in: {carried}"


@pytest.mark.parametrize("options", [{"static_input": True}, {"readout": "sum"}, {"readout": "last"}])
@pytest.mark.parametrize("name", MODULES)
def test_static_inputs_and_readouts(name: str, options: dict[str, Any]) -> None:
    net = network(MODULES[name]()).eval()
    x = torch.randn(4, 6) if options.get("static_input") else torch.randn(7, 4, 6)
    opt = snncompile.optimize(net, 7, schedule=3, **options)
    with torch.no_grad():
        assert snncompile.verify(net, opt, x).ok


def test_only_the_layers_of_a_feedback_loop_run_step_by_step() -> None:
    net, x = TenLayers().eval(), torch.randn(8, 4, 6)
    opt = snncompile.optimize(net, 8, schedule="breadth-first")
    with torch.no_grad():
        assert snncompile.verify(net, opt, x).exact
        opt(x)
    chunks = {name: chunk for chunk, segment in opt.report.schedule.segments() for name in segment.nodes}
    stepwise = {name for name, chunk in chunks.items() if chunk == 1}
    assert stepwise == {"fed_back", "back", "add", "next_fed_back"} | {
        f"layers_{n}_{m}" for n in (4, 5) for m in (0, 1)
    }
    assert set(chunks.values()) == {1, 8}
    assert net.fed_back is not None


def test_eight_steps_are_four_and_four() -> None:
    x = torch.randn(8, 4, 6)
    net = TenLayers().eval()
    twin = copy.deepcopy(net)
    whole, half = snncompile.optimize(net, 8), snncompile.optimize(twin, 4)
    with torch.no_grad():
        assert torch.equal(whole(x), torch.cat([half(x[:4]), half(x[4:])]))
    assert torch.equal(net.fed_back, twin.fed_back)  # type: ignore[arg-type]


def test_what_only_records_is_batched_and_holds_the_last_step() -> None:
    net = network(Plain(records, seen=None)).eval()
    opt = snncompile.optimize(net, 5, schedule="breadth-first")
    x = torch.randn(5, 4, 6)
    with torch.no_grad():
        opt(x)
        assert torch.equal(net[1].seen, torch.relu(net[0](x[4])))
    assert "for t1" not in opt.code


def test_a_past_that_grows_is_kept_as_it_is_and_the_report_says_so() -> None:
    opt = snncompile.optimize(network(Plain(grows, past=None)), 5, example_input=torch.randn(5, 4, 6))
    reasons = [decision.reason for decision in opt.report.decisions if decision.node == "1"]
    assert "kept as it is and run step by step: 'past' of 1 changes at every step" in reasons


def test_a_plan_is_kept_from_call_to_call() -> None:
    opt = snncompile.optimize(TenLayers().eval(), 4)
    with torch.no_grad():
        opt(torch.randn(4, 4, 6))
        first = opt.latest_program
        opt(torch.randn(4, 4, 6))
    assert opt.latest_program is first


def test_setting_the_attribute_by_hand_is_a_reset() -> None:
    net, x = TenLayers().eval(), torch.randn(4, 4, 6)
    opt = snncompile.optimize(net, 4)
    with torch.no_grad():
        first = opt(x)
        opt.reset()
        net.fed_back = None
        assert torch.equal(opt(x), first)


def test_an_error_in_the_middle_leaves_all_states_as_they_were() -> None:
    net = nn.Sequential(FailsAtOnes(), Plain(decays, v=None), neuron.IFNode()).eval()
    opt = snncompile.optimize(net, 4, schedule="depth-first")
    x = torch.zeros(4, 2, 3)
    x[2] = 1.0
    with torch.no_grad(), pytest.raises(RuntimeError, match="ones"):
        opt(x)
    assert net[1].v is None
    assert net[2].v == 0.0


class FailsAtOnes(neuron.NonSpikingIFNode):
    """Looks at its data, and so can neither be traced nor run without any; its own forward makes it opaque."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().min()) == 1.0:
            raise RuntimeError("ones")
        return x


@pytest.mark.parametrize("training", [False, True])
def test_an_opaque_module_that_looks_at_its_data_can_be_planned(training: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), FailsAtOnes(), neuron.IFNode()).train(training)
    opt = snncompile.optimize(net, 9, "1MiB")
    x = torch.randn(9, 2, 3)
    with torch.set_grad_enabled(training):
        assert snncompile.verify(net, opt, x).ok
        measured = snncompile.measure_peak(lambda: opt(x))
    assert measured <= opt.report.predicted_peak_bytes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_call_holds_what_is_predicted(schedule: Any) -> None:
    net, x = TenLayers().eval(), torch.randn(12, 64, 6)
    opt = snncompile.optimize(net, 12, schedule=schedule)
    with torch.no_grad():
        measured = [snncompile.measure_peak(lambda: opt(x)) for _ in range(2)]
    predicted = opt.report.predicted_peak_bytes
    assert max(measured) <= predicted <= 1.05 * max(measured)


def test_an_unread_register_is_no_cycle() -> None:
    opt = snncompile.optimize(network(Plain(records, seen=None)), 5, example_input=torch.randn(5, 4, 6))
    assert opt.latest_program is not None
    graph = opt.latest_program.graph
    assert graph.regions == ()
    assert [node.target for node in graph if node.kind is OpKind.STORE] == ["1.seen"]
