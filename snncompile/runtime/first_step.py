"""The first step of a network with registers, which it runs itself: what it leaves in them, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..capture import FakeNetwork, copy_network, without_hooks
from ..functional import reset_net
from ..ir import OpKind, StepGraph, TensorType
from ..torch_private import no_modes
from .memory import MemoryTracker


@dataclass(frozen=True)
class FirstStep:
    """What one step from reset states leaves and holds.

    Attributes:
        registers: Dotted path of each register that holds a tensor after the step -> its type.
        peak_bytes: The most that the step holds.
    """

    registers: Mapping[str, TensorType] = field(default_factory=dict)
    peak_bytes: int = 0


def run_first_step(graph: StepGraph, net: nn.Module, inputs: tuple[Tensor, ...]) -> FirstStep:
    """Run one step of a copy from reset states: on data-less tensors or, where the network needs data, on zeros.

    Args:
        graph: From `capture`.
        net: The network.
        inputs: One step `[N, *]` for each input; without data.
    """
    paths = {node.target for node in graph if node.kind in (OpKind.LOAD, OpKind.STORE)}
    if not paths:
        return FirstStep()
    fakes = FakeNetwork(net)
    twin = fakes.net
    with torch.no_grad():
        try:
            reset_net(twin)
            with fakes.mode:
                operands = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
                with MemoryTracker() as tracker:
                    twin(*operands)
        except Exception:  # whatever a network raises that needs data
            twin = without_hooks(copy_network(net, {}))
            reset_net(twin)
            with no_modes():
                operands = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
                with MemoryTracker() as tracker:
                    twin(*operands)
    held = {path: _held(twin, path) for path in paths}
    types = {path: TensorType.of(value) for path, value in held.items() if isinstance(value, Tensor)}
    return FirstStep(types, tracker.peak_bytes)


def _held(net: nn.Module, path: str) -> object:
    owner, _, attribute = path.rpartition(".")
    return getattr(net.get_submodule(owner), attribute, None)
