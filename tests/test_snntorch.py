"""snnTorch's neurons with hidden state: kept as they are, step by step, with the layers around them in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import snncompile

snntorch = pytest.importorskip("snntorch")

NEURONS: dict[str, dict[str, Any]] = {
    "Leaky": {"beta": 0.9},
    "Synaptic": {"alpha": 0.9, "beta": 0.8},
    "Alpha": {"alpha": 0.9, "beta": 0.8},
    "Lapicque": {"beta": 0.9},
    "RLeaky": {"beta": 0.9, "linear_features": 6},
    "RSynaptic": {"alpha": 0.9, "beta": 0.8, "linear_features": 6},
}


def network(name: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    site = getattr(snntorch, name)(init_hidden=True, **NEURONS[name], **options)
    return nn.Sequential(nn.Linear(6, 6), site, nn.Linear(6, 3))


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
@pytest.mark.parametrize("name", NEURONS)
def test_outputs_states_and_gradients_are_those_of_the_step_loop(name: str, schedule: Any) -> None:
    for steps in (1, 5, 16):
        net, x = network(name), 3.0 * torch.rand(steps, 4, 6)
        parity = snncompile.verify(net, snncompile.optimize(net, steps, schedule=schedule), x)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
def test_every_reset_mechanism_and_learnable_parameters(mechanism: str) -> None:
    net = network("Leaky", reset_mechanism=mechanism, learn_beta=True, learn_threshold=True)
    x = 3.0 * torch.rand(5, 4, 6)
    assert snncompile.verify(net, snncompile.optimize(net, 5, schedule="breadth-first"), x).ok


def test_the_layers_around_are_batched_and_the_report_says_why_the_neuron_is_not() -> None:
    opt = snncompile.optimize(network("Leaky"), 5, schedule="breadth-first", example_input=torch.rand(5, 4, 6))
    assert "batched(net['0']" in opt.code
    assert "batched(net['2']" in opt.code
    reasons = [decision.reason for decision in opt.report.decisions if decision.node == "1"]
    assert any("it branches on the shape" in reason for reason in reasons)


def test_reset_puts_the_hidden_state_back() -> None:
    opt = snncompile.optimize(network("Leaky"), 5)
    x = 3.0 * torch.rand(5, 4, 6)
    with torch.no_grad():
        first = opt(x)
        assert not torch.equal(opt(x), first)
        opt.reset()
        assert torch.equal(opt(x), first)
