"""Adapter for the embedded substrate, `snncompile.neuron`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, cast

from torch import nn

from ..ir import OpKind
from ..neuron import StatefulModule
from .adapter import Adapter, Leaf, States, Tensors


class NativeAdapter(Adapter):
    """Every `StatefulModule` whose forward is the inherited one runs by its `step`."""

    def leaf(self, module: nn.Module) -> Leaf | None:
        if not isinstance(module, StatefulModule):
            return None
        if type(module).forward is not StatefulModule.forward:
            return Leaf(OpKind.OPAQUE, f"{type(module).__name__} overrides forward, so its step function may differ")
        return Leaf(OpKind.STATEFUL)

    def state_store(self, module: nn.Module) -> MutableMapping[str, Any]:
        return module._states if isinstance(module, StatefulModule) else {}

    def reset_values(self, module: nn.Module) -> States:
        return cast(StatefulModule, module).reset_values

    def read(self, module: nn.Module) -> States:
        return cast(StatefulModule, module).states

    def write(self, module: nn.Module, states: States) -> None:
        for name, value in zip(cast(StatefulModule, module).state_names, states, strict=True):
            setattr(module, name, value)

    def check(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        cast(StatefulModule, module).check_states(input_shape)

    def materialize(self, module: nn.Module, inputs: Tensors, states: States) -> States:
        return cast(StatefulModule, module).materialize_states(inputs, states)

    def step(self, module: nn.Module, inputs: Tensors, states: States) -> tuple[Tensors, States]:
        return cast(StatefulModule, module).step(inputs, states)
