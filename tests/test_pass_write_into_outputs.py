"""Write into outputs: what a kernel computes for the output alone is written there, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.passes.write_into_outputs import WriteIntoOutputs
from snncompile.pipeline import default_passes
from snncompile.runtime import cpp_build

from .graphs import (
    Calls,
    Stage,
    T,
    assert_idempotent,
    assert_nothing_matches,
    assert_step_loop,
    first_stage,
    images,
    said_of,
    text_of,
    vectors,
)

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 1, 3, T - 1)


def network() -> nn.Sequential:
    """`[N, 6]` -> `[N, 8]`, spikes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(v_threshold=0.2)).eval()


def ready(net: nn.Module, *x_seq: Tensor, **options: Any) -> Stage:
    """Everything before the pass has run."""
    names = [one.name for one in default_passes()]
    before = default_passes()[: names.index("write-into-outputs")]
    allowed = [one for one in before if one.name not in ("choose-layout", "drive-by-events")]
    return first_stage(net, *x_seq, **options).after(*allowed)


def refusals(net: nn.Module, *x_seq: Tensor) -> list[str]:
    result = ready(net.eval(), *x_seq).run(WriteIntoOutputs())
    assert not result.changed
    return [str(decision).partition("refused: ")[2] for decision in result.decisions]


def test_a_neuron_at_the_end_is_marked(golden: Callable[[str], None]) -> None:
    golden(text_of(ready(network()).run(WriteIntoOutputs())))


def test_idempotent() -> None:
    assert_idempotent(WriteIntoOutputs(), ready(network()))


def test_each_output_has_its_own() -> None:
    def both(x: Tensor, one: nn.Module, other: nn.Module) -> Any:
        return {"a": other(x), "b": x * 2.0, "c": one(x)}

    result = ready(Calls(both, neuron.IFNode(), neuron.LIFNode()).eval()).run(WriteIntoOutputs())
    assert said_of(result, "parts.1") == ["done: its kernel writes into output 0"]
    assert said_of(result, "parts.0") == ["done: its kernel writes into output 2"]


@pytest.mark.parametrize("options", [{"readout": "sum"}, {"readout": "last"}, {"backend": "eager"}])
def test_nothing_matches_where_there_is_no_sequence_or_no_kernel(options: dict[str, Any]) -> None:
    assert_nothing_matches(WriteIntoOutputs(), ready(network(), **options))


def test_a_value_that_is_read_elsewhere_is_put() -> None:
    net = Calls(lambda x, fire, fc: (y := fire(x), fc(y)), neuron.IFNode(), nn.Linear(6, 3))
    assert refusals(net) == ["other nodes read its value"]


def test_a_value_laid_out_otherwise_is_put() -> None:
    net = Calls(lambda x, fire: fire(x.transpose(1, 2)), neuron.IFNode())
    assert refusals(net, torch.randn(T, 4, 3, 6)) == ["its input does not lie as the output does"]


def test_a_value_that_leaves_twice_is_put() -> None:
    assert refusals(Calls(lambda x, fire: (y := fire(x), y), neuron.IFNode())) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("static", [False, True])
def test_outputs_and_states_are_those_of_the_step_loop(schedule: Any, static: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), neuron.LIFNode(v_threshold=0.2), neuron.IFNode(0.4)).eval()
    x = images()[0] if static else images()
    assert_step_loop(net, x, schedule=schedule, static_input=static)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_peak_is_that_of_the_output_and_no_copy_of_it(schedule: Any) -> None:
    net, x = network(), torch.randn(T, 4096, 6)
    opt = snncompile.optimize(net, T, schedule=schedule)
    with torch.no_grad():
        opt(x)
        opt.reset()
        measured = snncompile.measure_peak(lambda: opt(x))
    assert "state['1'].s" in opt.code
    assert "_into(out[0], t0" in opt.code
    assert measured <= opt.report.predicted_peak_bytes <= 1.01 * measured


def test_a_state_of_another_type_is_carried_by_eager_steps_and_put() -> None:
    net, x = network(), vectors()
    opt = snncompile.optimize(net, T, schedule=3)
    with torch.no_grad():
        opt(x)
        net[1].v = net[1].v.double()
        expected_net = network()
        expected_net[1].v = net[1].v.clone()
        expected = torch.stack([expected_net(step) for step in x])
        torch.testing.assert_close(opt(x), expected, rtol=0.0, atol=0.0)


def test_outputs_of_two_calls_are_two_tensors() -> None:
    net, x = network(), vectors()
    opt = snncompile.optimize(net, T)
    with torch.no_grad():
        first = opt(x)
        kept = first.clone()
        opt(2.0 * x)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_those_of_the_step_loop(schedule: Any) -> None:
    assert_step_loop(network().train(), schedule=schedule)


def test_in_training_a_chunk_of_all_steps_is_the_output() -> None:
    net, x = nn.Sequential(neuron.LIFNode(v_threshold=0.2)).train(), torch.randn(T, 2**16, requires_grad=True)
    opt = snncompile.optimize(net, T, schedule="breadth-first")

    def call() -> Tensor:
        opt.reset()
        spikes: Tensor = opt(x)
        return spikes

    call().sum().backward()
    x.grad = None
    sequence = x.numel() * 4
    assert snncompile.measure_peak(call) < 1.5 * sequence  # spikes and a state, no copy of the spikes

    def forth_and_back() -> None:
        spikes = call()
        spikes.backward(torch.ones_like(spikes))

    measured = snncompile.measure_peak(forth_and_back)
    assert measured <= opt.report.predicted_peak_bytes <= 1.05 * measured
    # What backward needs does not change with the output.
    spikes = call()
    x.grad = None
    spikes.detach().zero_()
    spikes.sum().backward()
    changed = x.grad.clone()
    x.grad = None
    call().sum().backward()
    assert torch.equal(changed, x.grad)
