"""Traces a network in multi-step mode: one call, which takes all T steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .leaves import ADAPTERS
from .step_modes import in_multi_step_mode
from .tracer import StepTracer, strip_root


class SequenceTracer(StepTracer):
    """As `StepTracer`, on values of all steps.

    What a module keeps from call to call is kept from sequence to sequence here, which no step sees; and what cannot be
    traced can still be called with the whole sequence. Values inside a container that runs its parts step by step are
    those of one step, and their nodes are marked so (`meta["by_step"]`).
    """

    carries_tensors = False
    keeps_what_fails = True
    _by_step = False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._by_step or not isinstance(m, nn.Sequential) or not self._runs_by_step(m):
            return super().call_module(m, forward, args, kwargs)
        self._by_step = True
        try:
            return super().call_module(m, _in_a_row(m), args, kwargs)
        finally:
            self._by_step = False

    def _runs_by_step(self, module: nn.Module) -> bool:
        is_container = in_multi_step_mode(module) and any(adapter.runs_parts_by_step(module) for adapter in ADAPTERS)
        return is_container and strip_root(self.path_of_module(module)) not in self.forced

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["by_step"] = self._by_step
        return node


def _in_a_row(parts: nn.Sequential) -> Callable[[Any], Any]:
    """What a sequential container does to one step."""

    def forward(x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    return forward
