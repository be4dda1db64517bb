"""Neuron chains where gradients are recorded: forward and backward in one pass, with the step loop's gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron, surrogate
from snncompile.passes.fuse_neuron_chains import FuseNeuronChains
from snncompile.passes.infra import PassResult
from snncompile.runtime import cpp_build
from snncompile.runtime.training import backward_from_ones

from .graphs import Calls
from .test_pass_fuse_neuron_chains import normalised
from .test_scan_gradients import assert_close

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

STEPS = 7

# The network, and the members of its chains.
CHAINS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a residual addition of spikes": (
        lambda x, a, b, first, second: second(b(second(y := a(first(x)))) + y),
        ["parts_1 -> add"],
    ),
    "several neurons in a row": (
        lambda x, a, b, first, second: second(b(a(first(x)) * 0.5)),
        ["parts_0 -> mul -> parts_1"],
    ),
    "two branches that meet": (
        lambda x, a, b, first, second: first(a(y := second(x)) + b(-y)),
        ["parts_0 -> neg -> parts_1 -> add"],
    ),
    "several results": (
        lambda x, a, b, first, second: first(b(y := a(second(x)) * 0.5)) + second(y),
        ["parts_0 -> mul -> parts_1"],
    ),
    "a product": (lambda x, a, b, first, second: second(first(x) * a(b(second(x)))), ["parts_1 -> parts_0 -> mul"]),
    "what is scaled and shifted": (
        lambda x, a, b, first, second: second(2.0 * a(0.5 * first(x) - 0.1)),
        ["mul -> sub -> parts_0 -> mul_1"],
    ),
    "a comparison lets no gradient through": (
        lambda x, a, b, first, second: second(a(first(x)) * (y := b(second(x))).ge(0.5).float()) + y,
        [],
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    neurons = neuron.LIFNode(1.5, v_threshold=0.2), neuron.ParametricLIFNode(v_threshold=0.3)
    return Calls(CHAINS[name][0], *neurons, nn.Linear(6, 6), nn.Linear(6, 6)).train()


def vectors(steps: int = STEPS) -> Tensor:
    return 3.0 * torch.rand(steps, 4, 6, generator=torch.Generator().manual_seed(1))


def joined(opt: Any) -> list[str]:
    """The members of each chain, as the report says."""
    decisions = [d for d in opt.report.decisions if d.pass_name == "fuse-neuron-chains" and "in one pass" in d.reason]
    return [d.reason.removesuffix(" in one pass over memory") for d in decisions]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*itertools.product(CHAINS, ("depth-first", 3)), ("several results", "auto"), ("several results", "breadth-first")],
)
def test_a_chain_has_the_gradients_of_the_step_loop(name: str, schedule: Any) -> None:
    for steps in (1, STEPS):
        net, x = made(name), vectors(steps).requires_grad_()
        opt = snncompile.optimize(net, steps, schedule=schedule, example_input=x)
        assert opt.report.mode == "training"
        if CHAINS[name][1]:
            assert joined(opt) == CHAINS[name][1]
        assert snncompile.verify(net, opt, x).ok
        opt.reset()

        def train(opt: Any = opt, x: Tensor = x) -> None:
            x.grad = None
            opt(x).sum().backward()

        train()
        opt.reset()
        peak = snncompile.measure_peak(train)
        assert peak <= opt.report.predicted_peak_bytes


def frozen(affine: bool = True) -> nn.Sequential:
    """Batch norm by running statistics, as in fine-tuning, between layers that learn."""
    net = normalised(affine).train()
    for part in net:
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.eval()
    return net


def images(steps: int = STEPS) -> Tensor:
    return torch.rand(steps, 4, 2, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("affine", "schedule"), [(False, 3), (True, "depth-first"), (True, "auto")])
def test_batch_norm_by_running_statistics_learns_in_a_chain(affine: bool, schedule: Any) -> None:
    net, x = frozen(affine), images().requires_grad_()
    opt = snncompile.optimize(net, STEPS, schedule=schedule, example_input=x)
    assert joined(opt) == ["batchnorm2d_1 -> ifnode_2", "batchnorm1d_5 -> lifnode_6"]
    assert snncompile.verify(net, opt, x).ok
    opt(x).sum().backward()
    if affine:
        assert all(float(net[place].weight.grad.abs().sum()) > 0 for place in (1, 5))


def test_a_frozen_batch_norm_of_which_parts_learn() -> None:
    for learns in ("weight", "bias"):
        net, x = frozen(), images()
        for place in (1, 5):
            for name, parameter in net[place].named_parameters():
                parameter.requires_grad_(name == learns)
        opt = snncompile.optimize(net, STEPS, schedule=3, example_input=x)
        assert len(joined(opt)) == 2
        assert snncompile.verify(net, opt, x).ok


class Block(nn.Module):
    """Residual additions of spikes, as in SEW-ResNet, between layers of images."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.3))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), neuron.LIFNode(v_threshold=0.2)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        for stage in self.stages:
            y = stage(y) + y
        return y


@pytest.mark.parametrize(
    ("schedule", "layout"),
    [("breadth-first", "channels last"), ("depth-first", "contiguous"), (4, "contiguous")],
)
def test_residual_additions_keep_no_more_than_apart(
    schedule: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 3.0 * torch.rand(STEPS, 4, 2, 16, 16, generator=torch.Generator().manual_seed(3))
    if layout == "channels last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (STEPS, 4))
    gradients, peaks = [], []
    for number in range(2):
        torch.manual_seed(0)
        net = Block(3).train()
        opt = snncompile.optimize(net, STEPS, schedule=schedule, example_input=x)
        assert len(joined(opt)) == (3 if number == 0 else 0)
        assert snncompile.verify(net, opt, x).ok
        opt(x).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        opt.reset()

        def train(opt: Any = opt) -> None:
            backward_from_ones(opt(x))

        peaks.append(snncompile.measure_peak(train))
        assert peaks[-1] <= opt.report.predicted_peak_bytes <= 1.05 * peaks[-1]
        monkeypatch.setattr(FuseNeuronChains, "run", lambda self, graph, context: PassResult(graph, False))
    assert_close(*gradients)
    assert peaks[0] <= peaks[1]


def test_what_is_only_added_gets_the_gradient_of_the_sum() -> None:
    net = Calls(lambda x, a, first: a(x[:, :, 0] * 1.0) + x[:, :, 1] * 1.0, neuron.LIFNode(), nn.Identity())
    x = torch.rand(STEPS, 4, 6, 2)
    found = []
    for schedule in ("breadth-first", 3):
        leaf = x.clone().requires_grad_()
        opt = snncompile.optimize(net.train(), STEPS, schedule=schedule, example_input=leaf)
        assert joined(opt)
        opt(leaf).square().sum().backward()
        found.append(leaf.grad)
        opt.reset()
        assert snncompile.verify(net, opt, leaf).ok
    torch.testing.assert_close(*found)


def test_gradients_of_gradients_through_a_chain() -> None:
    def penalty(call: Callable[[Tensor], Tensor], net: nn.Module) -> list[Tensor | None]:
        x = vectors().requires_grad_()
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in net.parameters())]

    def network() -> nn.Module:
        torch.manual_seed(0)
        smooth = surrogate.ATan()
        neurons = neuron.LIFNode(1.5, v_threshold=0.2, surrogate_function=smooth), neuron.IFNode(0.3)
        function = CHAINS["a residual addition of spikes"][0]
        return Calls(function, *neurons, nn.Linear(6, 6), nn.Linear(6, 6)).train()

    loop, net = network(), network()
    opt = snncompile.optimize(net, STEPS, schedule=3, example_input=vectors())
    assert joined(opt)
    assert_close(penalty(opt, net), penalty(lambda x: torch.stack([loop(step) for step in x]), loop))
