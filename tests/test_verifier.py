"""The invariants of a graph: a graph that breaks one rule is refused by that rule's name, with the node at fault."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from snncompile.errors import VerifyError
from snncompile.ir import (
    RULES,
    Batching,
    Chain,
    Edge,
    EdgeKind,
    Effects,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    TimeCoupling,
    verify_graph,
)

FACTS = frozenset().union(*(rule.needs for rule in RULES))
ROW = TensorType.of(torch.empty(4, 6))


def pointwise(name: str, kind: OpKind, target: Any, *reads: str, **fields: Any) -> Node:
    return Node(
        name,
        kind,
        target,
        tuple(Ref(read) for read in reads),
        value=ROW,
        coupling=TimeCoupling.POINTWISE,
        batching=Batching.ELEMENTWISE,
        **fields,
    )


def scan(name: str, target: str, read: str, kind: OpKind = OpKind.STATEFUL, **fields: Any) -> Node:
    batching = Batching.SCAN if kind is OpKind.STATEFUL else Batching.PER_STEP
    return Node(
        name, kind, target, (Ref(read),), value=ROW, coupling=TimeCoupling.STATEFUL, batching=batching, **fields
    )


def sound_graph() -> StepGraph:
    """A hoisted gate, a layer, two neurons of which one is called twice, and a module that keeps its own state."""
    nodes = [
        Node("x", OpKind.INPUT, 0, value=ROW),
        Node("gate", OpKind.CONSTANT, "gate", value=ROW, invariant=True),
        pointwise("sigmoid", OpKind.FUNCTION, torch.sigmoid, "gate", invariant=True),
        pointwise("scaled", OpKind.FUNCTION, operator.mul, "x", "sigmoid"),
        pointwise("fc", OpKind.MODULE, "fc", "scaled"),
        scan("lif", "lif", "fc"),
        scan("twice", "twice", "lif", region=0),
        pointwise("between", OpKind.METHOD, "neg", "twice", region=0),
        scan("twice_1", "twice", "between", region=0),
        scan("counter", "counter", "twice_1", OpKind.OPAQUE),
        pointwise("residual", OpKind.FUNCTION, operator.add, "counter", "x"),
        Node("output", OpKind.OUTPUT, None, (Ref("residual"),), value=ROW),
    ]
    carried = [
        Edge("lif", "lif", 1, EdgeKind.STATE),
        Edge("twice", "twice_1", 0, EdgeKind.STATE),
        Edge("twice_1", "twice", 1, EdgeKind.STATE),
        Edge("counter", "counter", 1, EdgeKind.STATE),
    ]
    return StepGraph(nodes, carried, FACTS)


Change = Callable[[StepGraph], StepGraph]


def changed(name: str, **fields: Any) -> Change:
    """The sound graph with other fields in one node."""
    return lambda graph: graph.with_nodes({name: replace(graph[name], **fields)})


def tied(*edges: Edge) -> Change:
    """The sound graph with more edges."""
    return lambda graph: graph.with_nodes({}, carried=(*graph.carried, *edges))


def untied(*targets: str) -> Change:
    """The sound graph without the carried edges into some nodes."""
    return lambda graph: graph.with_nodes({}, carried=[edge for edge in graph.carried if edge.target not in targets])


def ordered(*names: str) -> Change:
    """The sound graph with some nodes, all that stood between the first and the last of them, in another order."""

    def reorder(graph: StepGraph) -> StepGraph:
        queue = iter(names)
        return StepGraph(
            (graph[next(queue)] if node.name in names else node for node in graph), graph.carried, graph.facts
        )

    return reorder


def grown(*nodes: Node) -> Change:
    return lambda graph: StepGraph([*graph, *nodes], graph.carried, graph.facts)


LIF = scan("v", "lif", "in")


def chained(part: Node, operands: tuple[str, ...] = ("in",), results: tuple[str, ...] = ("v",)) -> Change:
    """The sound graph with a chain in the place of a neuron."""
    return changed("lif", chain=Chain((part,), operands, results))


@dataclass(frozen=True)
class Case:
    """A change that breaks one rule.

    Attributes:
        rule: The rule's name.
        what: How it is broken.
        change: Makes the broken graph from the sound one.
        names: What the error must name.
        also: Rules that no graph can keep that breaks this one.
    """

    rule: str
    what: str
    change: Change
    names: tuple[str, ...]
    also: tuple[str, ...] = ()


REFERENCES = "references resolve"
OUTPUT = "one output, at the end"
DELAY = "every cycle has a delay"
ORDER = "program order is topological"
STATES = "states are carried"
VALUES = "values are known"
COUPLINGS = "couplings are marked"
REGIONS = "regions are the cycles"
INVARIANTS = "invariants are pure"
TIMELESS = "timeless values only leave"
OUTPUTS = "written into outputs"
CHAINS = "chains are closed"

CASES = (
    Case(REFERENCES, "an argument", changed("fc", args=(Ref("ghost"),)), ("fc", "ghost")),
    Case(REFERENCES, "deep in an argument", changed("fc", kwargs={"k": [{"v": Ref("ghost")}]}), ("fc", "ghost")),
    Case(REFERENCES, "the source of an edge", tied(Edge("ghost", "fc", 1, EdgeKind.ORDER)), ("ghost", "fc")),
    Case(REFERENCES, "the target of an edge", tied(Edge("fc", "ghost", 1, EdgeKind.ORDER)), ("ghost", "fc")),
    Case(OUTPUT, "none", lambda graph: graph.without(["output"]), ("found 0",)),
    Case(OUTPUT, "two", grown(Node("output_1", OpKind.OUTPUT, None, (Ref("x"),), value=ROW)), ("found 2",)),
    Case(OUTPUT, "not the last", grown(pointwise("late", OpKind.METHOD, "neg", "x")), ("output",)),
    Case(
        DELAY,
        "two nodes that wait for each other",
        tied(Edge("residual", "counter", 0, EdgeKind.ORDER)),
        ("counter", "residual"),
        also=(ORDER, REGIONS),
    ),
    Case(DELAY, "a node that waits for itself", tied(Edge("fc", "fc", 0, EdgeKind.ORDER)), ("fc",), also=(ORDER,)),
    Case(ORDER, "a reader before what it reads", ordered("fc", "scaled"), ("fc", "scaled")),
    Case(ORDER, "a neuron's second call before its first", ordered("between", "twice"), ("twice", "between")),
    Case(ORDER, "an edge backwards", tied(Edge("sigmoid", "x", 0, EdgeKind.ORDER)), ("x", "sigmoid")),
    Case(ORDER, "a negative delay", tied(Edge("x", "fc", -1, EdgeKind.ORDER)), ("x", "fc", "-1")),
    Case(STATES, "a neuron without a state edge", untied("lif"), ("lif",)),
    Case(STATES, "an opaque module without a state edge", untied("counter"), ("counter",)),
    Case(
        STATES,
        "an edge that carries no state",
        lambda graph: tied(Edge("lif", "lif", 1, EdgeKind.ORDER))(untied("lif")(graph)),
        ("lif",),
    ),
    Case(TIMELESS, "a value without time that another node reads", changed("fc", timeless=True), ("lif", "fc")),
    Case(VALUES, "an operation", changed("fc", value=None), ("fc",)),
    Case(VALUES, "an input", changed("x", value=None), ("x",)),
    Case(COUPLINGS, "no coupling", changed("fc", coupling=None), ("fc",)),
    Case(COUPLINGS, "no batching", changed("fc", batching=None), ("fc",)),
    Case(COUPLINGS, "a neuron that is not scanned", changed("lif", batching=Batching.PER_STEP), ("lif", "per-step")),
    *(
        Case(COUPLINGS, f"{coupling.value} in one go", changed("fc", coupling=coupling), ("fc", coupling.value))
        for coupling in TimeCoupling
        if coupling is not TimeCoupling.POINTWISE
    ),
    Case(COUPLINGS, "a step alone given all steps", changed("fc", batching=Batching.WHOLE), ("fc", "whole")),
    Case(REGIONS, "a cycle without a number", changed("between", region=None), ("twice, twice_1",)),
    Case(REGIONS, "a number without a cycle", changed("fc", region=1), ("fc",)),
    Case(REGIONS, "a node too many", changed("lif", region=0), ("lif",)),
    Case(REGIONS, "two numbers in one cycle", changed("between", region=1), ("between",)),
    Case(REGIONS, "a cycle through an order", tied(Edge("residual", "fc", 2, EdgeKind.ORDER)), ("fc", "residual")),
    Case(
        INVARIANTS,
        "hoisted but changing",
        changed("scaled", invariant=True),
        ("scaled", "x"),
    ),
    Case(
        INVARIANTS,
        "hoisted but random",
        changed("sigmoid", coupling=TimeCoupling.RANDOM, batching=Batching.PER_STEP, effects=Effects(random=True)),
        ("sigmoid", "random"),
    ),
    Case(
        INVARIANTS,
        "a hoisted neuron",
        changed("lif", invariant=True, args=(Ref("sigmoid"),)),
        ("lif", "stateful"),
    ),
    Case(
        INVARIANTS,
        "a hoisted module with state of its own",
        changed("counter", invariant=True, args=(Ref("sigmoid"),)),
        ("counter", "stateful"),
    ),
    Case(CHAINS, "reads what is not there", chained(scan("v", "lif", "ghost")), ("v", "ghost")),
    Case(CHAINS, "hands on what it does not compute", chained(LIF, results=("ghost",)), ("lif", "ghost")),
    Case(CHAINS, "has no neuron", chained(pointwise("v", OpKind.METHOD, "neg", "in")), ("lif", "without a neuron")),
    Case(CHAINS, "takes more than it reads", chained(LIF, operands=("in", "too")), ("lif", "2 operands", "1 values")),
    Case(OUTPUTS, "read elsewhere", changed("lif", output_slot=0), ("lif", "not all that reads it")),
    Case(OUTPUTS, "computed by no kernel", changed("residual", output_slot=0), ("residual", "not one that a kernel")),
    Case(INVARIANTS, "a hoisted output", changed("output", invariant=True, args=(Ref("sigmoid"),)), ("output",)),
)
RULE = {rule.name: rule for rule in RULES}


def by_what(case: Case) -> str:
    return f"{case.rule}: {case.what}"


def test_a_sound_graph_passes_with_every_fact_established() -> None:
    verify_graph(sound_graph())


@pytest.mark.parametrize("case", CASES, ids=by_what)
def test_a_graph_that_breaks_a_rule_is_refused_by_its_name_and_the_node(case: Case) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_graph(case.change(sound_graph()))
    assert str(caught.value).startswith(f"the graph breaks the rule '{case.rule}': ")
    for name in case.names:
        assert name in str(caught.value).partition("': ")[2]


@pytest.mark.parametrize("case", [case for case in CASES if case.rule != REFERENCES], ids=by_what)
def test_each_case_breaks_its_rule_and_no_other(case: Case) -> None:
    graph = case.change(sound_graph())
    assert [rule.name for rule in RULES if list(rule.breaches(graph))] == [case.rule, *case.also]


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    assert {case.rule for case in CASES} == set(RULE)
    assert len(RULE) == len(RULES)


@pytest.mark.parametrize("case", [case for case in CASES if RULE[case.rule].needs], ids=by_what)
def test_a_rule_waits_until_its_fact_is_established(case: Case) -> None:
    broken = case.change(sound_graph())
    verify_graph(StepGraph(broken, broken.carried, FACTS - RULE[case.rule].needs))


def test_what_holds_before_any_pass_is_checked_before_any_pass() -> None:
    assert {rule.name for rule in RULES if not rule.needs} == {
        REFERENCES,
        OUTPUT,
        DELAY,
        ORDER,
        STATES,
        TIMELESS,
        CHAINS,
    }


def test_all_breaches_of_a_rule_are_listed() -> None:
    graph = sound_graph()
    broken = graph.with_nodes({name: replace(graph[name], value=None) for name in ("fc", "between")})
    with pytest.raises(VerifyError, match="fc has no type; between has no type"):
        verify_graph(broken)


def test_the_first_broken_rule_ends_the_check() -> None:
    graph = changed("fc", value=None)(untied("lif")(sound_graph()))
    with pytest.raises(VerifyError) as caught:
        verify_graph(graph)
    assert STATES in str(caught.value)
    assert VALUES not in str(caught.value)


def chain(*delays: int) -> StepGraph:
    """A ring of operations with the given delays between neighbours."""
    names = [f"n{number}" for number in range(len(delays))]
    nodes: Iterable[Node] = (Node(name, OpKind.FUNCTION, torch.relu) for name in names)
    ring = zip(names, [*names[1:], names[0]], delays, strict=True)
    carried = [Edge(source, target, delay, EdgeKind.ORDER) for source, target, delay in ring]
    return StepGraph([*nodes, Node("output", OpKind.OUTPUT, None)], carried)


def test_a_cycle_without_delay_is_refused() -> None:
    with pytest.raises(VerifyError, match="n0 -> n1 -> n2 has no delay"):
        verify_graph(chain(0, 0, 0))


@pytest.mark.parametrize("delays", [(0, 0, 1), (0, 0, 7), (1, 1, 1), (0, 2, 1)])
def test_a_cycle_with_a_delay_is_none_within_the_step(delays: tuple[int, ...]) -> None:
    verify_graph(chain(*delays))


def test_of_several_calls_that_share_a_state_only_the_first_waits_for_an_earlier_step() -> None:
    graph = sound_graph()
    reached = {(edge.target, edge.delay) for edge in graph.carried if edge.target.startswith("twice")}
    assert reached == {("twice", 1), ("twice_1", 0)}
    verify_graph(graph)


def test_a_value_that_is_nothing_is_known() -> None:
    verify_graph(changed("fc", value=())(sound_graph()))


def test_the_network_may_be_a_function_of_constants_alone() -> None:
    constant = Node("gate", OpKind.CONSTANT, "gate", value=ROW, invariant=True)
    output = Node("output", OpKind.OUTPUT, None, (Ref("gate"),), value=ROW)
    verify_graph(StepGraph([Node("x", OpKind.INPUT, 0, value=ROW), constant, output], facts=FACTS))


@pytest.mark.parametrize("what", ["a hoisted input", "a hoisted operation of it"])
def test_an_input_that_every_step_sees_may_be_hoisted_with_what_depends_on_it(what: str) -> None:
    graph = sound_graph()
    names = ["x"] if what == "a hoisted input" else ["x", "scaled", "fc"]
    verify_graph(graph.with_nodes({name: replace(graph[name], invariant=True) for name in names}))
