"""Adapter for SpikingJelly 2.0, through its functional contract: no list of blessed neurons.

A module that implements `single_step_functional_forward` and leaves the inherited forward alone runs by that contract;
any other module with memories is called as it is, step by step. Nothing is imported: where SpikingJelly has not been
imported, none of its modules can exist.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

from torch import nn

from ..ir import OpKind
from .adapter import Adapter, Leaf, States, Tensors

_PACKAGE = "spikingjelly.activation_based"


class SpikingJellyAdapter(Adapter):
    """Stateful modules by `materialize_states` and `single_step_functional_forward`; `layer` wrappers as leaves."""

    def leaf(self, module: nn.Module) -> Leaf | None:
        base = sys.modules.get(f"{_PACKAGE}.base")
        if base is None or not isinstance(module, base.StepModule):
            return None
        if not isinstance(module, base.MemoryModule):
            return _stateless_leaf(module)
        if reason := self._departs_from_contract(module, base):
            return Leaf(OpKind.OPAQUE, reason)
        return Leaf(OpKind.STATEFUL)

    def runs_parts_by_step(self, module: nn.Module) -> bool:
        container = sys.modules.get(f"{_PACKAGE}.layer.container")
        if container is None:
            return False
        if type(module) is container.StepModeContainer:
            return bool(module.stateful)
        return type(module) is container.MultiStepContainer

    def is_stateless(self, module: nn.Module) -> bool:
        surrogate = sys.modules.get(f"{_PACKAGE}.surrogate")
        return surrogate is not None and isinstance(module, surrogate.SurrogateFunctionBase)

    @staticmethod
    def _departs_from_contract(module: Any, base: Any) -> str:
        cls, name = type(module), type(module).__name__
        neurons = sys.modules.get(f"{_PACKAGE}.neuron.base_node")
        bases = (base.MemoryModule, neurons.BaseNode) if neurons is not None else (base.MemoryModule,)
        if any(cls.single_step_functional_forward is parent.single_step_functional_forward for parent in bases):
            return f"{name} has no single_step_functional_forward"
        if cls.forward is not base.MemoryModule.forward:
            return f"{name} overrides forward"
        if all(cls.single_step_forward is not parent.single_step_forward for parent in bases):
            return f"{name} overrides single_step_forward"
        if getattr(module, "store_v_seq", False):
            return f"{name} stores v of every step (store_v_seq=True)"
        if any(isinstance(child, base.MemoryModule) for child in module.modules() if child is not module):
            return f"{name} contains other modules with memories"
        return ""

    def state_store(self, module: nn.Module) -> MutableMapping[str, Any]:
        base = sys.modules.get(f"{_PACKAGE}.base")
        return vars(module)["_memories"] if base is not None and isinstance(module, base.MemoryModule) else {}

    def reset_values(self, module: nn.Module) -> States:
        net: Any = module
        return tuple(net.get_reset_value(name) for name, _ in net.named_memories())

    def read(self, module: nn.Module) -> States:
        net: Any = module
        return tuple(net.memories())

    def write(self, module: nn.Module, states: States) -> None:
        net: Any = module
        for (name, _), value in zip(list(net.named_memories()), states, strict=True):
            setattr(net, name, value)

    def check(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        """SpikingJelly resets a state that does not fit; so does `materialize`."""

    def materialize(self, module: nn.Module, inputs: Tensors, states: States) -> States:
        net: Any = module
        return tuple(net.materialize_states(inputs, states, "s"))

    def step(self, module: nn.Module, inputs: Tensors, states: States) -> tuple[Tensors, States]:
        net: Any = module
        outputs, updated = net.single_step_functional_forward(inputs, states)
        return tuple(outputs), tuple(updated)


def _stateless_leaf(module: nn.Module) -> Leaf | None:
    """Wrappers of torch's layers, and neurons that take the whole sequence at once; containers are traced through."""
    home = type(module).__module__
    if home.startswith(f"{_PACKAGE}.neuron"):
        return Leaf(OpKind.MODULE)
    wrapped = _wrapped_class(module) if home.startswith(f"{_PACKAGE}.layer") else None
    return Leaf(OpKind.MODULE, acts_like=wrapped) if wrapped not in (None, nn.Sequential) else None


def _wrapped_class(module: nn.Module) -> type[nn.Module] | None:
    """The torch class that a stateless wrapper of SpikingJelly's `layer` package extends."""
    return next((cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules")), None)
