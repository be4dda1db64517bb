"""The text form of a graph: what a reader sees, and that equal networks give equal texts."""

from __future__ import annotations

import copy
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron
from snncompile.capture import FakeNetwork, capture, propagate_shapes
from snncompile.ir import Edge, EdgeKind, Effects, Node, OpKind, Ref, StepGraph, TensorType, print_graph
from snncompile.runtime import run_first_step

from .networks import random_network


class Network(nn.Module):
    """A residual around a neuron, a gate that no step changes, and a neuron that feeds back into itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), neuron.LIFNode())
        self.gate = nn.Parameter(torch.zeros(6))
        self.recurrent = nn.Linear(6, 6, bias=False)
        self.loop = neuron.IFNode(v_reset=None)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + x
        y = y * torch.sigmoid(self.gate)
        y = self.loop(self.recurrent(self.loop(y)))
        spikes: Tensor = self.drop(y).view(x.shape[0], -1)
        return spikes


def planned_graph(net: nn.Module) -> StepGraph:
    opt = snncompile.optimize(net, 3, schedule="depth-first")
    with torch.no_grad():
        opt.plan(torch.zeros(3, 4, 6))
    program = opt.latest_program
    assert program is not None
    return program.graph


def typed_graph(net: nn.Module, step: Tensor) -> StepGraph:
    fakes = FakeNetwork(net)
    graph, steps = capture(net).graph, (fakes.twin(step),)
    return propagate_shapes(graph, fakes, steps, net, run_first_step(graph, net, steps).registers)


def printed(node: Node) -> str:
    """The line of a node."""
    return print_graph(StepGraph([node])).splitlines()[1].strip()


def test_a_captured_network(golden: Callable[[str], None]) -> None:
    golden(print_graph(capture(Network()).graph))


def test_a_network_with_shapes(golden: Callable[[str], None]) -> None:
    golden(print_graph(typed_graph(Network(), torch.zeros(4, 6))))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_planned_network(golden: Callable[[str], None], mode: str) -> None:
    golden(print_graph(planned_graph(Network().train(mode == "train"))))


def test_two_captures_of_a_network_print_alike() -> None:
    net = Network()
    assert print_graph(capture(net).graph) == print_graph(capture(net).graph)


@pytest.mark.parametrize("seed", range(8))
def test_equal_networks_print_alike(seed: int) -> None:
    net, shape = random_network(seed)
    first, second = (print_graph(typed_graph(copy.deepcopy(net), torch.zeros(shape))) for _ in range(2))
    assert first == second


PRINT_IN_A_PROCESS = """
import torch
from snncompile.capture import capture
from snncompile.ir import print_graph

class Counters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = self.third = self.fourth = self.fifth = 0

    def forward(self, x):
        for name in ("first", "second", "third", "fourth", "fifth"):
            setattr(self, name, getattr(self, name) + 1)
        return x * self.first

captured = capture(torch.nn.Sequential(torch.nn.Linear(6, 6), Counters()))
print(print_graph(captured.graph), *captured.decisions, sep="\\n")
"""


@pytest.mark.slow
def test_what_capture_says_is_the_same_in_every_process() -> None:
    texts = [
        subprocess.run(
            [sys.executable, "-c", PRINT_IN_A_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert "counters_1" in texts[0]
    assert texts[0] == texts[1]


def test_every_line_of_a_text_is_a_node_or_a_carried_edge() -> None:
    graph = planned_graph(Network())
    head, *lines = print_graph(graph).splitlines()
    assert head == f"graph [{', '.join(sorted(graph.facts))}]"
    parts = [line for line in lines if line.startswith("    ")]  # of chains
    own = [line for line in lines if line not in parts]
    assert [line.split()[0].strip("%:") for line in own[: len(graph)]] == [node.name for node in graph]
    assert len(own) == len(graph) + len(graph.carried)
    assert len(parts) == sum(len(node.chain.nodes) + 1 for node in graph if node.chain is not None)


def test_carried_edges_print_in_an_order_of_their_own() -> None:
    nodes = [Node(name, OpKind.STATEFUL, name) for name in "ab"]
    edges = [
        Edge("b", "a", 1, EdgeKind.STATE),
        Edge("a", "b", 2, EdgeKind.ORDER),
        Edge("a", "b", 0, EdgeKind.STATE),
        Edge("a", "b", 0, EdgeKind.ORDER),
    ]
    text = print_graph(StepGraph(nodes, edges))
    assert text == print_graph(StepGraph(nodes, reversed(edges)))
    assert text.splitlines()[3:] == [
        "  a -> b (order, delay 0)",
        "  a -> b (state, delay 0)",
        "  a -> b (order, delay 2)",
        "  b -> a (state, delay 1)",
    ]


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (Node("x", OpKind.INPUT, 0), "%x = input 0()"),
        (Node("w", OpKind.CONSTANT, "fc.weight"), "%w = constant fc.weight()"),
        (Node("net", OpKind.STATEFUL, "", (Ref("x"),)), "%net = stateful (%x)"),
        (Node("f", OpKind.FUNCTION, operator.add, (Ref("x"), 1.5)), "%f = function add(%x, 1.5)"),
        (Node("m", OpKind.METHOD, "view", (Ref("x"), 4, -1)), "%m = method view(%x, 4, -1)"),
        (
            Node("f", OpKind.FUNCTION, torch.cat, ([Ref("x"), Ref("y")],), {"dim": 1}),
            "%f = function cat([%x, %y], dim=1)",
        ),
        (
            Node("f", OpKind.FUNCTION, operator.getitem, (Ref("x"), (slice(None, Ref("n")), None, ...))),
            "%f = function getitem(%x, (slice(None, %n, None), None, Ellipsis))",
        ),
        (Node("o", OpKind.OUTPUT, None, ({"a": Ref("x"), "b": (Ref("y"),)},)), "%o = output ({'a': %x, 'b': (%y,)})"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_a_node_prints(node: Node, line: str) -> None:
    assert printed(node) == line


def test_a_reference_differs_from_a_text_of_the_same_letters() -> None:
    reference, text = (printed(Node("f", OpKind.FUNCTION, getattr, (argument,))) for argument in (Ref("x"), "%x"))
    assert (reference, text) == ("%f = function getattr(%x)", "%f = function getattr('%x')")


@pytest.mark.parametrize(
    "argument",
    [torch.arange(9000), [torch.arange(9000)], (torch.arange(9000), 1), {"table": torch.arange(9000)}],
    ids=["itself", "in a list", "in a tuple", "in a dict"],
)
def test_a_tensor_among_the_arguments_prints_as_its_type(argument: object) -> None:
    line = printed(Node("f", OpKind.FUNCTION, torch.clone, (argument,)))
    assert "<int64[9000]>" in line
    assert "tensor(" not in line


ROW = TensorType.of(torch.empty(4, 6))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ROW, "float32[4, 6]"),
        (TensorType.of(torch.tensor(1)), "int64[]"),
        ((ROW, (ROW, None)), "(float32[4, 6], (float32[4, 6], None))"),
        (4, "4"),
        ((4, 6), "(4, 6)"),
        ((), "()"),
        ({"spikes": ROW, "rest": (ROW, 2)}, "{'spikes': float32[4, 6], 'rest': (float32[4, 6], 2)}"),
    ],
    ids=["tensor", "scalar", "tuple", "number", "sizes", "nothing", "dict"],
)
def test_what_a_node_yields_prints_as_types(value: object, text: str) -> None:
    assert printed(Node("f", OpKind.FUNCTION, torch.relu, value=value)) == f"%f: {text} = function relu()"


def test_a_type_that_is_not_known_is_left_out() -> None:
    assert printed(Node("f", OpKind.FUNCTION, torch.relu, value=None)) == "%f = function relu()"


def test_what_the_compiler_only_remembers_is_not_printed() -> None:
    node = Node("f", OpKind.FUNCTION, torch.relu, (Ref("x"),), scope="body")
    same = replace(node, scope="elsewhere", reason="because", effects=Effects(random=True), shares=("x",))
    assert printed(node) == printed(same)


def test_no_text_holds_an_address_in_memory() -> None:
    for seed in range(8):
        net, shape = random_network(seed)
        assert " at 0x" not in print_graph(typed_graph(net, torch.zeros(shape)))
