"""States during a call: read from the modules when it starts, held by the program, written back when it ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..capture import Adapter, adapter_of
from ..codegen import collect_steps, step_of


class StateSlot:
    """The step function of one stateful module and its state during one call.

    Args:
        module: The module.
        adapter: Knows its step function.
    """

    __slots__ = ("adapter", "module", "states", "touched")

    def __init__(self, module: nn.Module, adapter: Adapter | None = None) -> None:
        self.module = module
        self.adapter = adapter or adapter_of(module)
        self.states = self.adapter.read(module)
        self.touched = False

    def step(self, *inputs: Tensor) -> Any:
        """One time step on `[N, *]`."""
        adapter, module = self.adapter, self.module
        self.states = adapter.materialize(module, inputs, self.states)
        outputs, self.states = adapter.step(module, inputs, self.states)
        self.touched = True
        return outputs[0] if len(outputs) == 1 else outputs

    def scan(self, steps: int, *inputs: Any) -> Any:
        """A chunk of time steps, in order: `[C, N, *]` to `[C, N, *]`."""
        return collect_steps(steps, lambda step: self.step(*(step_of(value, step) for value in inputs)))

    def commit(self) -> None:
        """Leave the state where the step loop would leave it."""
        if self.touched:
            self.adapter.write(self.module, self.states)
