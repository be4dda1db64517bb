"""Functions on whole networks: ours, SpikingJelly's, and mixtures of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from snncompile.functional import detach_net, multi_step_forward, reset_net, set_step_mode
from snncompile.neuron import IFNode, LIFNode


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), LIFNode(), nn.Sequential(nn.Linear(6, 3), IFNode(v_reset=None)))


class SingleStepOnly(nn.Module):
    """A module of another framework, which refuses "m"."""

    @property
    def step_mode(self) -> str:
        return "s"

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value != "s":
            raise ValueError("single-step only")


def test_reset_net_reaches_nested_modules() -> None:
    net = network()
    x = torch.randn(2, 4)
    first = net(x)
    assert net[1].v.shape == (2, 6)
    reset_net(net)
    assert (net[1].v, net[2][1].v) == (0.0, 0.0)
    assert torch.equal(net(x), first)


def test_reset_net_and_detach_net_on_spikingjelly() -> None:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    net = nn.Sequential(nn.Linear(4, 4), neuron.IFNode(), LIFNode())
    net(torch.randn(2, 4))
    assert net[1].v.requires_grad
    assert net[2].v.requires_grad
    detach_net(net)
    assert not net[1].v.requires_grad
    assert not net[2].v.requires_grad
    reset_net(net)
    assert (net[1].v, net[2].v) == (0.0, 0.0)


def test_detach_net_keeps_the_values_and_cuts_the_history() -> None:
    net = network()
    net(torch.randn(2, 4))
    before = net[1].v
    detach_net(net)
    assert torch.equal(net[1].v, before)
    assert before.requires_grad
    assert not net[1].v.requires_grad
    net(torch.randn(2, 4)).sum().backward()


def test_set_step_mode_sets_every_module() -> None:
    net = network()
    set_step_mode(net, "m")
    assert (net[1].step_mode, net[2][1].step_mode) == ("m", "m")
    assert net(torch.randn(5, 2, 4)).shape == (5, 2, 3)


def test_set_step_mode_is_all_or_nothing() -> None:
    net = nn.Sequential(LIFNode(), SingleStepOnly(), IFNode())
    with pytest.raises(ValueError, match='step_mode must be "s" or "m", got \'x\''):
        set_step_mode(net, "x")
    with pytest.raises(ValueError, match="single-step only"):
        set_step_mode(net, "m")
    assert [module.step_mode for module in net] == ["s", "s", "s"]


@pytest.mark.parametrize("T", [1, 2, 7])
def test_multi_step_forward_is_the_step_loop(T: int) -> None:
    net = network()
    x_seq = torch.randn(T, 2, 4)
    outputs = multi_step_forward(x_seq, net)
    states = (net[1].v, net[2][1].v)
    reset_net(net)
    expected = []
    for t in range(T):
        expected.append(net(x_seq[t]))
    assert torch.equal(outputs, torch.stack(expected))
    assert all(torch.equal(ours, loop) for ours, loop in zip(states, (net[1].v, net[2][1].v), strict=True))


def test_multi_step_forward_agrees_with_step_mode_m() -> None:
    net = nn.Sequential(IFNode(), LIFNode(v_reset=None))
    x_seq = torch.randn(7, 2, 4)
    outputs = multi_step_forward(x_seq, net)
    reset_net(net)
    set_step_mode(net, "m")
    assert torch.equal(net(x_seq), outputs)


@pytest.mark.parametrize("shape", [(), (0, 2, 4)])
def test_multi_step_forward_needs_a_step(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="T >= 1, got shape"):
        multi_step_forward(torch.zeros(shape), network())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="x_seq must be a tensor"):
        multi_step_forward([torch.zeros(2, 4)], network())
    net: Tensor = torch.zeros(1)
    for call in (reset_net, detach_net, lambda net: set_step_mode(net, "s")):
        with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got Tensor"):
            call(net)
