"""What the tests of the passes share: a network as the first pass meets it, and passes run as the manager runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile.ir import StepGraph, TensorType, print_graph, verify_graph
from snncompile.options import Environment, Options
from snncompile.passes.infra import Pass, PassContext, PassResult
from snncompile.passes.manager import PassManager, PipelineResult
from snncompile.pipeline import DefaultCompiler
from snncompile.runtime import Request

T = 5
N = 4  # from here on, batching over time keeps the bits of the layers used here


class Calls(nn.Module):
    """A network written as a function of its input and its parts."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


@dataclass(frozen=True)
class Stage:
    """A graph between two passes, and what passes may know besides."""

    graph: StepGraph
    context: PassContext

    def run(self, one: Pass) -> PassResult:
        """The pass's result with the facts that it provides; keeps the rules that the manager checks."""
        before, nodes, facts = print_graph(self.graph), list(self.graph), self.graph.facts
        result = one.run(self.graph, self.context)
        assert print_graph(self.graph) == before, "the input graph was changed"
        assert all(now is then for now, then in zip(self.graph, nodes, strict=True)), "the input graph was changed"
        assert self.graph.facts == facts, "the input graph was changed"
        graph = result.graph.with_facts(one.provides)
        verify_graph(graph)
        return replace(result, graph=graph)

    def after(self, *passes: Pass) -> Stage:
        """The stage that some passes leave."""
        stage = self
        for one in passes:
            stage = replace(stage, graph=stage.run(one).graph)
        return stage


class _Reached(Exception):
    """The compiler has come to its first pass."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage


def _reach(self: PassManager, graph: StepGraph, context: PassContext, environment: Environment) -> PipelineResult:
    raise _Reached(Stage(graph, context))


def first_stage(net: nn.Module, *x_seq: Tensor, needs_grad: bool = False, **options: Any) -> Stage:
    """What the first pass of the pipeline is given when a network is compiled for T steps.

    Args:
        x_seq: `[T, N, *]` for each input, or `[N, *]` if static; vectors of 6 features if left out.
    """
    parsed = Options.parse(T, **options)
    inputs = tuple(TensorType.of(value) for value in x_seq or _default_inputs(parsed.static_input))
    request = Request(inputs, needs_grad, input_gradients=False)
    with patch.object(PassManager, "run", _reach), pytest.raises(_Reached) as reached:
        DefaultCompiler().compile(net, parsed, request)
    return reached.value.stage


def text_of(result: PassResult) -> str:
    """A result as text: the graph, what was decided, and the schedule if one was chosen."""
    lines = [print_graph(result.graph), *(f"# {decision}\n" for decision in result.decisions)]
    return "".join([*lines, f"{result.schedule}\n" if result.schedule is not None else ""])


def said_of(result: PassResult, node: str) -> list[str]:
    """Verdict and reason of what was decided about a node or module."""
    return [f"{each.verdict.value}: {each.reason}" for each in result.decisions if each.node == node]


def operations_of(graph: StepGraph) -> list[str]:
    """Names of the nodes that compute something, in program order."""
    return [node.name for node in graph.scheduled]


def assert_nothing_matches(one: Pass, stage: Stage) -> None:
    """The pass leaves the very graph, changes and decides nothing."""
    result = one.run(stage.graph, stage.context)
    assert result.graph is stage.graph
    assert not result.changed
    assert result.decisions == ()


def assert_idempotent(one: Pass, stage: Stage) -> None:
    """The pass changes the graph, and nothing when it is run on its own result."""
    once = stage.run(one)
    assert once.changed
    again = replace(stage, graph=once.graph).run(one)
    assert not again.changed
    assert again.decisions == ()
    assert print_graph(again.graph) == print_graph(once.graph)


def assert_step_loop(net: nn.Module, *x_seq: Tensor, **options: Any) -> None:
    """Compile a network and compare it with the step loop: bit for bit, and in train mode within rounding of gradients.

    Args:
        x_seq: As for `first_stage`.
        options: Of `optimize`.
    """
    inputs = x_seq or _default_inputs(bool(options.get("static_input")))
    with torch.set_grad_enabled(net.training):
        parity = snncompile.verify(net, snncompile.optimize(net, T, **options), *inputs)
    parity.check()
    # Over a chunk, the gradient of a weight is summed in another order.
    compared = (*parity.outputs, *parity.states, *parity.buffers)
    assert all(comparison.mismatch_rate == 0.0 for comparison in compared), parity


def vectors(features: int = 6) -> Tensor:
    """`[T, N, features]` of unit variance, the same at every call."""
    return torch.randn(T, N, features, generator=torch.Generator().manual_seed(0))


def images(channels: int = 2) -> Tensor:
    """`[T, N, channels, 6, 6]` between 0 and 1, the same at every call."""
    return torch.rand(T, N, channels, 6, 6, generator=torch.Generator().manual_seed(0))


def _default_inputs(static: bool) -> tuple[Tensor, ...]:
    return (vectors()[0] if static else vectors(),)
