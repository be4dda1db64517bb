"""Fuse neuron chains: neurons and the pointwise operations around them as one node, one kernel, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.ir import Node, StepGraph
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.eliminate_dead import EliminateDead
from snncompile.passes.find_recurrent_regions import FindRecurrentRegions
from snncompile.passes.fuse_neuron_chains import FuseNeuronChains
from snncompile.passes.hoist_static import HoistStatic
from snncompile.passes.mark_time_coupling import MarkTimeCoupling
from snncompile.runtime import cpp_build
from snncompile.schedule import Loop, Schedule, Segment

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
from .networks import Feedback

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

SCHEDULES: tuple[Any, ...] = ("depth-first", "breadth-first", 1, 3, T - 1)


class Residual(nn.Module):
    """A converted residual block: scalers around the neurons, a bias for each channel, an addition before the last."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.first, self.second = neuron.IFNode(v_threshold=0.5, v_reset=None), neuron.LIFNode(v_threshold=0.3)
        self.register_buffer("scale", torch.tensor(0.7))
        self.register_buffer("gain", torch.rand(2, 1, 1, generator=generator) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, 2, 1, 1, generator=generator))

    def forward(self, x: Tensor) -> Any:
        y = self.first(self.conv1(x) * self.scale) * self.gain
        return self.second(self.conv2(y) + self.bias + x) / self.scale


def ready(net: nn.Module, *x_seq: Tensor, **options: Any) -> Stage:
    """Everything before the pass has run."""
    passes = Canonicalise(), EliminateDead(), MarkTimeCoupling(), FindRecurrentRegions(), HoistStatic()
    return first_stage(net.eval(), *x_seq, **options).after(*passes)


def fused(net: nn.Module, *x_seq: Tensor, **options: Any) -> StepGraph:
    return ready(net, *x_seq, **options).run(FuseNeuronChains()).graph


def chains(graph: StepGraph) -> list[list[str]]:
    """What each chain is made of."""
    return [[part.name for part in node.chain.nodes] for node in graph if node.chain is not None]


def test_what_stands_around_a_neuron_becomes_one_node_with_it(golden: Callable[[str], None]) -> None:
    golden(text_of(ready(Residual(), images()).run(FuseNeuronChains())))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_chain_gives_what_the_step_loop_gives(schedule: Any, layout: str) -> None:
    x = images() if layout == "contiguous" else images().transpose(2, 4).contiguous().transpose(2, 4)
    assert_step_loop(Residual().eval(), x, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_chain_that_reads_what_is_computed_once_gives_what_the_step_loop_gives(schedule: Any) -> None:
    assert_step_loop(Residual().eval(), images()[0], schedule=schedule, static_input=True)


def test_a_second_run_changes_nothing() -> None:
    assert_idempotent(FuseNeuronChains(), ready(Residual(), images()))


def test_a_neuron_between_matrix_products_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 3))
    assert_nothing_matches(FuseNeuronChains(), ready(net))


def test_without_kernels_nothing_is_fused() -> None:
    net = Calls(lambda x, site: site(x * 2.0), neuron.IFNode())
    assert_nothing_matches(FuseNeuronChains(), ready(net, backend="eager"))


def test_where_gradients_are_recorded_what_is_broadcast_stays_apart() -> None:
    net = Calls(lambda x, site, layer: site(layer(x) * 2.0 + x.mean(1, keepdim=True)), neuron.IFNode(), nn.Linear(6, 6))
    assert chains(fused(net)) == [["mul", "add", "parts_0"]]
    assert chains(fused(net, needs_grad=True)) == []


# What is joined, and what is not

JOINED: dict[str, tuple[Callable[..., Any], list[list[str]]]] = {
    "several neurons in a row": (lambda x, a, b, layer: layer(b(a(x) * 0.5)), [["parts_0", "mul", "parts_1"]]),
    "two branches that meet": (lambda x, a, b, layer: layer(a(x) + b(-x)), [["parts_0", "neg", "parts_1", "add"]]),
    "several results": (
        lambda x, a, b, layer: layer(b(y := a(x) * 0.5)) + layer(y),
        [["parts_0", "mul", "parts_1"]],
    ),
    "several results, the first that of the neuron": (
        lambda x, a, b, layer: layer(y := a(x)) + layer(b(y)),
        [["parts_0", "parts_1"]],
    ),
    "a neuron whose output nobody reads": (
        lambda x, a, b, layer: (b(y := a(x)), layer(y))[1],
        [["parts_0", "parts_1"]],
    ),
    "not around a matrix product": (
        lambda x, a, b, layer: b(layer(y := a(x) * 0.5) + y),
        [["parts_0", "mul"], ["add", "parts_1"]],
    ),
    "not what kernels cannot round alike": (lambda x, a, b, layer: b(layer(a(x))).exp() + b.v_threshold, []),
    "not what has another shape": (
        lambda x, a, b, layer: b(layer(a(x)) * 2.0).sum(1, keepdim=True) * 2.0,
        [["mul", "parts_1"]],
    ),
    "a number for each sample": (
        lambda x, a, b, layer: b(layer(a(x)) * x.mean(1, keepdim=True)),
        [["mul", "parts_1"]],
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Calls(JOINED[name][0], neuron.IFNode(0.4), neuron.LIFNode(1.5, v_threshold=0.2), nn.Linear(6, 6))


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined(name: str) -> None:
    assert chains(fused(made(name))) == JOINED[name][1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_gives_what_the_step_loop_gives(name: str, schedule: Any) -> None:
    assert_step_loop(made(name).eval(), schedule=schedule)


def normalised(affine: bool = True) -> nn.Sequential:
    """Two layers with batch norm by running statistics before their neurons."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(3, affine=affine), nn.BatchNorm1d(5, affine=affine)
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2.0)
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    head = nn.Flatten(), nn.Linear(48, 5), norms[1], neuron.LIFNode(v_threshold=0.2)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norms[0], neuron.IFNode(0.4), *head).eval()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_by_running_statistics_is_joined(affine: bool, schedule: Any) -> None:
    net = normalised(affine)
    graph = fused(net, images())
    assert chains(graph) == [["batchnorm2d_1", "ifnode_2"], ["batchnorm1d_5", "lifnode_6"]]
    assert_step_loop(net, images(), schedule=schedule)


def test_changed_statistics_and_parameters_of_a_joined_batch_norm_are_seen() -> None:
    net = normalised()
    opt = snncompile.optimize(net, T, schedule=3)
    with torch.no_grad():
        opt(images())
        net[1].running_mean.add_(0.5)
        net[1].weight.mul_(-2.0)
        net[5].running_var.add_(1.0)
        net[5].bias = nn.Parameter(torch.randn(5))
        opt.reset()
        parity = snncompile.verify(net, opt, images())
    assert parity.ok
    assert parity.outputs[0].mismatch_rate == 0.0


def test_what_a_batch_norm_takes_for_a_moment_is_predicted() -> None:
    net, x = normalised(), images()
    for schedule in ("depth-first", "breadth-first"):
        opt = snncompile.optimize(net, T, schedule=schedule, example_input=x)
        with torch.no_grad():
            measured = snncompile.measure_peak(lambda opt=opt: opt(x))  # type: ignore[misc]
        opt.reset()
        assert measured <= opt.report.predicted_peak_bytes


def test_a_neuron_called_twice_in_a_step_is_not_joined() -> None:
    def forward(x: Tensor, site: nn.Module, layer: nn.Module) -> Any:
        return site(layer(site(x * 2.0)) * 0.5)

    net = Calls(forward, neuron.IFNode(0.4), nn.Linear(6, 6))
    assert chains(fused(net)) == []
    assert_step_loop(net.eval(), schedule=3)


def test_operations_in_a_recurrent_region_are_joined_among_themselves() -> None:
    def forward(x: Tensor, loop: nn.Module, site: nn.Module) -> Any:
        return site(loop(x) * 2.0)

    net = Calls(forward, Feedback(), neuron.LIFNode())
    graph = fused(net)
    for node in graph:
        if node.chain is not None:
            assert {part.region for part in node.chain.nodes} <= {node.region, None}
    assert_step_loop(net.eval(), schedule=3)


def test_a_module_with_a_hook_is_not_joined() -> None:
    seen: list[Tensor] = []
    net = nn.Sequential(nn.Linear(6, 6), neuron.IFNode(0.3), nn.ReLU())
    net[2].register_forward_hook(lambda module, args, result: seen.append(result))
    assert chains(fused(net)) == []


def test_a_chain_of_too_many_operands_is_refused_with_its_reason() -> None:
    stage = ready(Residual(), images())
    result = stage.run(FuseNeuronChains(max_operands=2))
    assert said_of(result, "first") == [
        "refused: mul -> first -> mul_1 stay apart: it would read 3 values, more than 2",
    ]
    assert chains(result.graph) == []


def test_a_chain_is_no_longer_than_allowed() -> None:
    graph = ready(Residual(), images()).run(FuseNeuronChains(max_nodes=2)).graph
    assert {len(chain) for chain in chains(graph)} == {2}


def test_a_kernel_that_cannot_be_built_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(Residual(), images())

    def fail(source: str) -> Any:
        raise cpp_build.BuildError("the compiler is on strike")

    monkeypatch.setattr("snncompile.runtime.cpp_scan._compiled", fail)
    result = stage.run(FuseNeuronChains())
    assert not result.changed
    assert said_of(result, "first") == ["refused: mul -> first -> mul_1 stay apart: the compiler is on strike"]


# What users see


def test_states_live_where_the_step_loop_would_leave_them() -> None:
    net = Residual().eval()
    opt = snncompile.optimize(net, T, schedule=2)
    with torch.no_grad():
        opt(images())
        got = net.first.v.clone(), net.second.v.clone()
        opt.reset()
        for x in images():
            net(x)
    assert torch.equal(got[0], net.first.v)
    assert torch.equal(got[1], net.second.v)


def test_several_calls_carry_states_on_and_changed_operands_are_seen() -> None:
    net, twin = Residual().eval(), Residual().eval()
    twin.load_state_dict(net.state_dict())
    opt = snncompile.optimize(net, T, schedule=3)
    with torch.no_grad():
        for call in range(3):
            got = opt(images())
            assert torch.equal(got, torch.stack([twin(x) for x in images()]))
            for each in (net, twin):
                each.gain.mul_(1.5)
                each.bias.add_(0.25)
                each.scale = torch.tensor(0.5 + call)
                each.first.v_threshold += 0.125


def test_a_state_that_lies_otherwise_in_memory_is_taken() -> None:
    net, twin = Residual().eval(), Residual().eval()
    twin.load_state_dict(net.state_dict())
    for each in (net, twin):
        state = torch.rand(4, 6, 6, 2, generator=torch.Generator().manual_seed(3)).permute(0, 3, 1, 2)
        each.first.v = state
    opt = snncompile.optimize(net, T, schedule=3)
    with torch.no_grad():
        assert torch.equal(opt(images()), torch.stack([twin(x) for x in images()]))


def test_a_schedule_that_names_what_would_be_joined_keeps_it_apart() -> None:
    net = Residual().eval()
    names = tuple(node.name for node in ready(net, images()).graph.scheduled)
    alone = Schedule(T, Loop(2, (Segment(names),)), "mine")
    opt = snncompile.optimize(net, T, schedule=alone, example_input=images())
    assert [name for _, segment in opt.report.schedule.segments() for name in segment.nodes] == list(names)
    snncompile.verify(net, opt, images()).check()
    joined = snncompile.optimize(net, T, schedule=2, example_input=images()).report.schedule
    again = snncompile.optimize(net, T, schedule=joined, example_input=images())
    assert again.report.schedule == joined
    snncompile.verify(net, again, images()).check()


def test_the_code_says_what_is_computed_together() -> None:
    opt = snncompile.optimize(Residual().eval(), T, schedule=2, example_input=images())
    assert "  # mul, first, mul_1" in opt.code


def test_a_chain_needs_no_memory_for_what_it_does_not_hand_on() -> None:
    net = Residual().eval()
    x, peaks = images(), {}
    for backend in ("eager", "cpp"):
        opt = snncompile.optimize(net, T, schedule="breadth-first", backend=backend, example_input=x)
        with torch.no_grad():
            peaks[backend] = snncompile.measure_peak(lambda opt=opt: opt(x))  # type: ignore[misc]
        opt.reset()
        assert peaks[backend] <= opt.report.predicted_peak_bytes
    assert peaks["cpp"] <= peaks["eager"]


def test_a_chain_of_the_graph_is_a_node_of_its_neuron() -> None:
    node: Node = next(node for node in fused(Residual(), images()) if node.chain is not None)
    assert node.where == "first"
    assert [part.name for part in node.chain.neurons] == ["first"]
    assert node.refs[0] == "conv1"


def test_vectors_join_as_images_do() -> None:
    net = Calls(lambda x, site: site(x * 2.0 + 0.5) - x, neuron.LIFNode())
    assert chains(fused(net, vectors())) == [["mul", "add", "parts_0", "sub"]]
    for schedule in SCHEDULES:
        assert_step_loop(net.eval(), schedule=schedule)
