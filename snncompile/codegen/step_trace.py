"""What a step does to tensors, operation by operation, written down by `make_fx` on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..torch_private import make_fx


@dataclass(frozen=True)
class StepTrace:
    """ATen operations of a step.

    Attributes:
        graph: The operations; its `get_attr` nodes name constants.
        constants: The tensors that the step reads beside its arguments, such as parameters.
    """

    graph: fx.Graph
    constants: Mapping[str, Any]

    def with_tensors(self, others: Mapping[int, Tensor]) -> StepTrace:
        """The same operations on other tensors.

        Args:
            others: What takes a tensor's place, by the `id` of the tensor.
        """
        return replace(self, constants={name: others.get(id(value), value) for name, value in self.constants.items()})


def trace_step(step: Callable[..., Any], *arguments: Any) -> StepTrace:
    """The trace of a step.

    Args:
        step: Any function of these arguments.
        arguments: Examples; only their types are looked at.

    Raises:
        Exception: Whatever a step raises that looks at values.
    """

    def plain(*given: Any) -> Any:
        return step(*given)  # make_fx counts the arguments of a bound method wrongly

    with torch.no_grad():
        traced = make_fx(plain, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    return StepTrace(traced.graph, {name: getattr(traced, name) for name in names})
