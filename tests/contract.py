"""Networks and the reference run that the tests of the semantic contract share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snncompile import neuron, surrogate

SCHEDULES = ("depth-first", "breadth-first", 3, "auto")


def step_loop(net: Callable[..., Tensor], x_seq: Tensor) -> Tensor:
    """The definition of what an optimised network computes."""
    return torch.stack([net(x) for x in x_seq])


def twin(net: Any) -> Any:
    """An independent copy with equal weights and states."""
    return copy.deepcopy(net)


def dense_net(seed: int = 1) -> nn.Sequential:
    """Two neuron layers behind linear ones; spikes at every layer for inputs of unit variance. `[N, 6]` -> `[N, 3]`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16),
        neuron.LIFNode(v_threshold=0.4),
        nn.Linear(16, 3),
        neuron.IFNode(v_threshold=0.5, v_reset=None),
    )


def conv_net(seed: int = 1, make_neuron: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    """Convolution, batch norm, neurons, pooling, classifier, with spikes everywhere. `[N, 2, 6, 6]` -> `[N, 3]`."""
    make_neuron = make_neuron or (lambda: neuron.LIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()))
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        make_neuron(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
        make_neuron(),
    )
    with torch.no_grad():
        for scaled in (net[0], net[5]):
            scaled.weight.mul_(4.0)
        net[1].bias.uniform_(-0.2, 0.2)
        net[1].running_mean.uniform_(-0.1, 0.1)
    return net


def states_of(net: nn.Module) -> dict[str, Any]:
    """Membrane potentials by qualified name."""
    return {name: module.v for name, module in net.named_modules() if hasattr(module, "v")}


def assert_same_states(left: nn.Module, right: nn.Module) -> None:
    """Equal bits of every membrane potential."""
    expected, got = states_of(left), states_of(right)
    assert expected.keys() == got.keys()
    assert expected, "the networks have no states to compare"
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, got[name]), f"state of {name} differs"
        else:
            assert value == got[name], f"state of {name} differs"


class Snapshot:
    """What a network holds now: parameters, buffers, gradients, states, mode."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._tensors = {name: value.detach().clone() for name, value in net.state_dict(keep_vars=True).items()}
        self._states = {
            name: (value.detach().clone() if isinstance(value, Tensor) else value)
            for name, value in states_of(net).items()
        }
        self._modes = [module.training for module in net.modules()]

    def assert_unchanged(self) -> None:
        """Fail where anything differs from what it was."""
        for name, value in self._net.state_dict().items():
            assert torch.equal(value, self._tensors[name]), f"{name} changed"
        for name, state in states_of(self._net).items():
            before = self._states[name]
            assert isinstance(state, Tensor) == isinstance(before, Tensor), f"the state of {name} changed"
            assert torch.equal(state, before) if isinstance(state, Tensor) else state == before, f"{name} changed"
        assert [module.training for module in self._net.modules()] == self._modes
