"""The records of the folded graph, how chunks lie in memory, and the unrolled view against one drawn by hand."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import networkx as nx
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from snncompile.ir import (
    Cell,
    Edge,
    EdgeKind,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    chunk_like,
    chunk_strides,
    contiguous_chunk,
    map_refs,
    print_graph,
    refs_in,
    tensor_types,
    unroll,
)
from snncompile.ir.graph import renamed_args

CPU = torch.device("cpu")


def of_shape(*shape: int) -> TensorType:
    return TensorType.of(torch.empty(shape))


def feedback_graph() -> StepGraph:
    """A linear layer whose input is joined with what its neuron did a step and two steps ago."""
    return StepGraph(
        [
            Node("x", OpKind.INPUT, 0),
            Node("gain", OpKind.CONSTANT, "gain"),
            Node("scaled", OpKind.FUNCTION, operator.mul, (Ref("x"), Ref("gain"))),
            Node("fc", OpKind.MODULE, "body.fc", (Ref("scaled"),), scope="body"),
            Node("lif", OpKind.STATEFUL, "body.lif", (Ref("fc"),), scope="body"),
            Node("residual", OpKind.FUNCTION, operator.add, (Ref("lif"), Ref("x"))),
            Node("output", OpKind.OUTPUT, None, ({"spikes": Ref("lif"), "sum": [Ref("residual")]},)),
        ],
        [
            Edge("lif", "lif", 1, EdgeKind.STATE),
            Edge("residual", "fc", 2, EdgeKind.ORDER),
        ],
        frozenset({"drawn"}),
    )


# Nodes


def test_refs_name_each_node_that_is_read_once_in_order_of_appearance() -> None:
    node = Node(
        "join",
        OpKind.FUNCTION,
        torch.cat,
        ((Ref("c"), [Ref("a"), {"deep": Ref("b")}]), Ref("a")),
        {"index": slice(Ref("d"), None, Ref("c")), "dim": 1},
    )
    assert node.refs == ("c", "a", "b", "d")


def test_a_node_cannot_be_changed() -> None:
    node: Any = Node("x", OpKind.INPUT, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.name = "y"


@pytest.mark.parametrize(
    ("node", "where"),
    [
        (Node("fc", OpKind.MODULE, "body.fc", scope="body"), "body.fc"),
        (Node("lif", OpKind.STATEFUL, "body.lif", scope="body"), "body.lif"),
        (Node("counter", OpKind.OPAQUE, "counter"), "counter"),
        (Node("add", OpKind.FUNCTION, operator.add, scope="body"), "body"),
        (Node("view", OpKind.METHOD, "view", scope="body"), "body"),
        (Node("weight", OpKind.CONSTANT, "body.weight", scope="body"), "body"),
        (Node("add", OpKind.FUNCTION, operator.add), "add"),
        (Node("lifnode", OpKind.STATEFUL, ""), "lifnode"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind.value,
)
def test_where_is_the_module_or_the_module_around_it_or_the_node(node: Node, where: str) -> None:
    assert node.where == where


def test_renaming_what_a_node_reads_reaches_every_argument() -> None:
    node = Node("f", OpKind.FUNCTION, torch.cat, ([Ref("a"), Ref("b")],), {"like": {"k": Ref("a")}, "dim": 1})
    renamed = renamed_args(node, {"a": "z"})
    assert renamed.args == ([Ref("z"), Ref("b")],)
    assert renamed.kwargs == {"like": {"k": Ref("z")}, "dim": 1}
    assert renamed.refs == ("z", "b")
    assert node.refs == ("a", "b")


def test_renaming_what_a_node_does_not_read_gives_the_node_itself() -> None:
    node = Node("f", OpKind.FUNCTION, torch.relu, (Ref("a"),))
    assert renamed_args(node, {"b": "z", "f": "g"}) is node


# Graphs


def test_a_graph_lists_its_nodes_in_program_order() -> None:
    graph = feedback_graph()
    assert [node.name for node in graph] == ["x", "gain", "scaled", "fc", "lif", "residual", "output"]
    assert len(graph) == 7
    assert graph["fc"].target == "body.fc"
    assert [node.name for node in graph.inputs] == ["x"]
    assert graph.output.name == "output"


def test_a_name_that_only_an_edge_or_an_argument_mentions_is_not_in_the_graph() -> None:
    graph = StepGraph(
        [Node("f", OpKind.FUNCTION, torch.relu, (Ref("read"),))], [Edge("f", "waited", 1, EdgeKind.ORDER)]
    )
    assert [name in graph for name in ("f", "read", "waited", "unheard")] == [True, False, False, False]
    assert [node.name for node in graph] == ["f"]
    assert len(graph) == 1


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two nodes are named x"):
        StepGraph([Node("x", OpKind.INPUT, 0), Node("x", OpKind.INPUT, 1)])


def test_consumers_are_those_that_read_the_value_in_the_same_step_each_once_in_program_order() -> None:
    graph = feedback_graph()
    assert graph.consumers == {
        "x": ("scaled", "residual"),
        "gain": ("scaled",),
        "scaled": ("fc",),
        "fc": ("lif",),
        "lif": ("residual", "output"),
        "residual": ("output",),
        "output": (),
    }
    square = StepGraph([Node("x", OpKind.INPUT, 0), Node("f", OpKind.FUNCTION, operator.mul, (Ref("x"), Ref("x")))])
    assert square.consumers["x"] == ("f",)


def test_edges_are_the_arguments_without_delay_and_what_is_carried_with_its_own() -> None:
    assert set(feedback_graph().edges) == {
        Edge("x", "scaled", 0, EdgeKind.DATA),
        Edge("gain", "scaled", 0, EdgeKind.DATA),
        Edge("scaled", "fc", 0, EdgeKind.DATA),
        Edge("fc", "lif", 0, EdgeKind.DATA),
        Edge("lif", "residual", 0, EdgeKind.DATA),
        Edge("x", "residual", 0, EdgeKind.DATA),
        Edge("lif", "output", 0, EdgeKind.DATA),
        Edge("residual", "output", 0, EdgeKind.DATA),
        Edge("lif", "lif", 1, EdgeKind.STATE),
        Edge("residual", "fc", 2, EdgeKind.ORDER),
    }


def test_two_nodes_may_be_tied_by_several_edges() -> None:
    calls = [
        Node("x", OpKind.INPUT, 0),
        Node("lif", OpKind.STATEFUL, "lif", (Ref("x"),)),
        Node("lif_1", OpKind.STATEFUL, "lif", (Ref("lif"),)),
    ]
    carried = [Edge("lif", "lif_1", 0, EdgeKind.STATE), Edge("lif_1", "lif", 1, EdgeKind.STATE)]
    between = [edge for edge in StepGraph(calls, carried).edges if edge.source == "lif"]
    assert sorted(between, key=lambda edge: edge.kind.value) == [
        Edge("lif", "lif_1", 0, EdgeKind.DATA),
        Edge("lif", "lif_1", 0, EdgeKind.STATE),
    ]


def test_a_schedule_places_all_but_inputs_constants_the_output_and_what_is_hoisted() -> None:
    graph = feedback_graph()
    assert [node.name for node in graph.scheduled] == ["scaled", "fc", "lif", "residual"]
    hoisted = graph.with_nodes({"scaled": dataclasses.replace(graph["scaled"], invariant=True)})
    assert [node.name for node in hoisted.scheduled] == ["fc", "lif", "residual"]


def test_regions_are_listed_by_number_with_their_nodes_in_program_order() -> None:
    graph = feedback_graph()
    numbers = {"residual": 0, "fc": 1, "lif": 0, "scaled": 1}
    numbered = graph.with_nodes({name: dataclasses.replace(graph[name], region=n) for name, n in numbers.items()})
    assert numbered.regions == (("lif", "residual"), ("scaled", "fc"))
    assert graph.regions == ()


def test_with_nodes_replaces_nodes_in_place_and_leaves_the_input_untouched() -> None:
    graph = feedback_graph()
    before, nodes = print_graph(graph), list(graph)
    other = Node("scaled", OpKind.FUNCTION, operator.sub, (Ref("x"), Ref("gain")))
    changed = graph.with_nodes({"scaled": other}, facts={"changed"})
    assert [node.name for node in changed] == [node.name for node in graph]
    assert changed["scaled"] is other
    assert all(changed[node.name] is node for node in nodes if node.name != "scaled")
    assert changed.carried == graph.carried
    assert changed.facts == {"drawn", "changed"}
    assert print_graph(graph) == before
    assert all(node is old for node, old in zip(graph, nodes, strict=True))
    assert graph.facts == {"drawn"}


def test_a_replaced_node_brings_its_own_data_edges() -> None:
    graph = feedback_graph()
    assert graph.consumers["gain"] == ("scaled",)
    changed = graph.with_nodes({"scaled": Node("scaled", OpKind.FUNCTION, torch.relu, (Ref("x"),))})
    assert changed.consumers["gain"] == ()
    assert Edge("gain", "scaled", 0, EdgeKind.DATA) not in changed.edges
    assert graph.consumers["gain"] == ("scaled",)


def test_with_nodes_can_carry_other_edges() -> None:
    graph = feedback_graph()
    carried = (Edge("lif", "lif", 1, EdgeKind.STATE),)
    assert graph.with_nodes({}, carried=carried).carried == carried
    assert graph.with_nodes({}, carried=()).carried == ()
    assert len(graph.carried) == 2


def test_without_removes_nodes_with_the_edges_at_both_ends() -> None:
    graph = feedback_graph()
    less = graph.without(["residual", "output"])
    assert [node.name for node in less] == ["x", "gain", "scaled", "fc", "lif"]
    assert less.carried == (Edge("lif", "lif", 1, EdgeKind.STATE),)
    assert graph.without(["fc", "lif", "residual", "output"]).carried == ()
    assert less.facts == graph.facts
    assert len(graph) == 7


def test_facts_add_up() -> None:
    graph = feedback_graph()
    assert graph.with_facts({"a", "drawn"}).with_facts({"b"}).facts == {"a", "b", "drawn"}
    assert graph.facts == {"drawn"}


# References in nested structures


class Pair(NamedTuple):
    first: Any
    second: Any


NESTED = (
    Ref("a"),
    [1, Ref("b"), "a"],
    {"key": Ref("c"), "plain": None},
    Pair(Ref("d"), (Ref("a"),)),
    slice(Ref("e"), 4, Ref("f")),
    torch.Size([2, 3]),
)


def test_references_are_found_in_order_with_repeats() -> None:
    assert refs_in(NESTED) == ["a", "b", "c", "d", "a", "e", "f"]
    assert refs_in((1, "a", None, slice(None), torch.float32)) == []


def test_references_are_changed_wherever_they_stand_and_nothing_else_is() -> None:
    changed = map_refs(NESTED, lambda ref: ref.name.upper())
    assert changed == (
        "A",
        [1, "B", "a"],
        {"key": "C", "plain": None},
        Pair("D", ("A",)),
        slice("E", 4, "F"),
        torch.Size([2, 3]),
    )
    assert [type(item) for item in changed] == [str, list, dict, Pair, slice, torch.Size]
    assert refs_in(NESTED) == ["a", "b", "c", "d", "a", "e", "f"]


def test_a_reference_may_become_a_structure() -> None:
    assert map_refs([Ref("a"), Ref("b")], lambda ref: (ref, 1)) == [(Ref("a"), 1), (Ref("b"), 1)]


_leaves = st.one_of(st.builds(Ref, st.sampled_from("abcd")), st.integers(), st.text(max_size=2), st.none())
_structures = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(slice, inner, inner, inner),
    ),
    max_leaves=12,
)


@given(structure=_structures)
def test_renaming_references_renames_what_is_found_and_the_identity_changes_nothing(structure: Any) -> None:
    assert map_refs(structure, lambda ref: ref) == structure
    renamed = map_refs(structure, lambda ref: Ref(ref.name + "_"))
    assert refs_in(renamed) == [name + "_" for name in refs_in(structure)]
    assert map_refs(renamed, lambda ref: Ref(ref.name[:-1])) == structure


# Types


def test_a_tensor_type_is_shape_strides_dtype_and_device() -> None:
    tensor = torch.empty(2, 3, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    found = TensorType.of(tensor)
    assert found == TensorType((2, 3, 4, 5), (60, 1, 15, 3), torch.float16, CPU)
    assert str(found) == "float16[2, 3, 4, 5]"
    assert found.nbytes == 240
    assert str(TensorType.of(torch.tensor(True))) == "bool[]"


def test_types_that_differ_in_strides_differ() -> None:
    assert TensorType.of(torch.empty(3, 3)) != TensorType.of(torch.empty(3, 3).T)


def test_tensor_types_are_found_in_order_in_any_structure_of_values() -> None:
    a, b, c = of_shape(1), of_shape(2), of_shape(3)
    assert tensor_types(a) == [a]
    assert tensor_types((a, [b, None, 4], OrderedDict(x=c, y=Pair(a, "text")))) == [a, b, c, a]
    assert tensor_types(None) == tensor_types(7) == tensor_types(()) == []


def test_a_gathered_step_takes_its_gaps_along_and_an_empty_one_takes_nothing() -> None:
    channels = torch.empty(4, 8, 3, 3)[:, :2]
    found = TensorType.of(channels)
    assert (found.nbytes, found.gathered_bytes) == (4 * 2 * 9 * 4, 4 * 8 * 9 * 4)
    assert TensorType.of(torch.empty(5, 4).expand(3, 5, 4)).gathered_bytes == 3 * 5 * 4 * 4
    assert TensorType.of(torch.empty(4, 0)).gathered_bytes == 0
    assert TensorType.of(torch.tensor(1.0)).gathered_bytes == 4


# Chunks of steps in memory


@pytest.mark.parametrize(
    ("step", "strides"),
    [
        (torch.empty(4, 6), (24, 6, 1)),
        (torch.empty(6, 4).T, (24, 1, 4)),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), (120, 60, 1, 15, 3)),
        (torch.empty(4, 8, 3, 3)[:, :2], (288, 72, 9, 3, 1)),
        (torch.empty(4, 8, 3, 3)[:, 1::4], (288, 72, 36, 3, 1)),
        (torch.empty(4, 6)[::2], (24, 12, 1)),
        (torch.empty(4, 6)[:, ::2], (24, 6, 2)),
        (torch.empty(4, 5)[:, ::2], (20, 5, 2)),
        (torch.empty(4, 6)[:, :1], (24, 6, 1)),
        (torch.empty(6).expand(4, 6), (24, 6, 1)),
        (torch.empty(4, 1).expand(4, 6), (24, 6, 1)),
        (torch.empty(8).unfold(0, 4, 2), (12, 4, 1)),
        (torch.tensor(1.0), (1,)),
        (torch.empty(0, 3), (3, 3, 1)),
        (torch.empty(2, 0, 3).transpose(0, 2), (6, 2, 2, 1)),
    ],
    ids=[
        "contiguous",
        "transposed",
        "channels-last",
        "first channels",
        "every fourth channel",
        "every other row",
        "every other column",
        "every other column of an odd number",
        "one column",
        "expanded rows",
        "expanded columns",
        "overlapping windows",
        "scalar",
        "empty",
        "empty, transposed",
    ],
)
def test_a_chunk_keeps_the_strides_and_gaps_of_its_steps(step: Tensor, strides: tuple[int, ...]) -> None:
    assert chunk_strides(step.shape, step.stride()) == strides
    assert TensorType.of(step).of_chunk(5) == TensorType((5, *step.shape), strides, step.dtype, CPU)


@st.composite
def laid_out_tensors(draw: st.DrawFn, min_size: int = 2) -> Tensor:
    """Tensors as networks make them: dimensions in any order, slices, expanded dimensions."""
    shape = draw(st.lists(st.integers(min_size, 4), max_size=4))
    slices = [draw(st.sampled_from([slice(None), slice(1, None), slice(None, None, 2)])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]))
    wide = [
        max(0, 2 * size - draw(st.integers(0, 1))) if cut.step == 2 else size + (cut.start or 0)
        for size, cut in zip(shape, slices, strict=True)
    ]
    tensor = torch.arange(torch.Size(wide).numel()).reshape(wide).to(dtype)[tuple(slices)].permute(order)
    return tensor.expand(draw(st.integers(2, 3)), *tensor.shape) if draw(st.booleans()) else tensor


def overlaps(tensor: Tensor) -> bool:
    return 0 in [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@given(step=laid_out_tensors(), length=st.integers(1, 4))
@example(step=torch.arange(10.0).reshape(2, 5)[:, ::2], length=2)
@example(step=torch.arange(6.0).expand(2, 6), length=2)
def test_a_chunk_filled_step_by_step_is_the_stack_and_each_step_lies_as_it_did(step: Tensor, length: int) -> None:
    steps = [step + number if step.dtype != torch.bool else step for number in range(length)]
    chunk = chunk_like(step, length)
    for number, one in enumerate(steps):
        chunk[number] = one
    assert torch.equal(chunk, torch.stack(steps))
    assert (chunk.shape, chunk.dtype) == ((length, *step.shape), step.dtype)
    expected = step.contiguous().stride() if overlaps(step) else step.stride()
    assert {chunk[number].stride() for number in range(length)} == {expected}


@given(step=laid_out_tensors(), length=st.integers(1, 4))
def test_the_bytes_of_a_chunk_are_those_of_its_gathered_steps(step: Tensor, length: int) -> None:
    predicted = TensorType.of(step).gathered_bytes * length
    used = chunk_like(step, length).untyped_storage().nbytes()
    # The gap behind the last element of the last step is not allocated.
    assert predicted - TensorType.of(step).gathered_bytes < used <= predicted


@given(step=laid_out_tensors(min_size=0), length=st.integers(0, 3))
@example(step=torch.empty(4, 1, 3, 3).to(memory_format=torch.channels_last), length=2)
def test_the_type_of_a_chunk_is_that_of_the_tensor_that_holds_it(step: Tensor, length: int) -> None:
    assert TensorType.of(step).of_chunk(length) == TensorType.of(chunk_like(step, length))


def test_an_image_of_one_channel_keeps_its_channels_last_strides() -> None:
    step = torch.empty(4, 1, 3, 3).to(memory_format=torch.channels_last)
    assert step.stride() == (9, 1, 3, 1)
    assert chunk_like(step, 5)[0].stride() == (9, 1, 3, 1)


def test_a_contiguous_chunk_is_contiguous_whatever_its_steps_are() -> None:
    step = torch.empty(6, 4, dtype=torch.int64).T
    chunk = contiguous_chunk(step, 5)
    assert (chunk.shape, chunk.stride(), chunk.dtype) == ((5, 4, 6), (24, 6, 1), torch.int64)


# The unrolled view


def test_the_unrolled_view_is_the_one_drawn_by_hand() -> None:
    graph = StepGraph(
        [
            Node("x", OpKind.INPUT, 0),
            Node("fc", OpKind.MODULE, "fc", (Ref("x"),)),
            Node("lif", OpKind.STATEFUL, "lif", (Ref("fc"),)),
            Node("output", OpKind.OUTPUT, None, (Ref("lif"),)),
        ],
        [Edge("lif", "lif", 1, EdgeKind.STATE), Edge("lif", "fc", 2, EdgeKind.ORDER)],
    )
    drawn = """
        x0 -> fc0     x1 -> fc1     x2 -> fc2     x3 -> fc3
        fc0 -> lif0   fc1 -> lif1   fc2 -> lif2   fc3 -> lif3
        lif0 -> output0   lif1 -> output1   lif2 -> output2   lif3 -> output3
        lif0 -> lif1  lif1 -> lif2  lif2 -> lif3
        lif0 -> fc2   lif1 -> fc3
    """
    assert set(unroll(graph, 4).edges) == set(_drawn_edges(drawn))


def _drawn_edges(text: str) -> Iterator[tuple[Cell, Cell]]:
    words = text.split()
    for source, target in zip(words[0::3], words[2::3], strict=True):
        yield Cell(source[:-1], int(source[-1])), Cell(target[:-1], int(target[-1]))


def test_every_node_has_a_cell_at_every_step_edges_or_not() -> None:
    graph = StepGraph([Node("x", OpKind.INPUT, 0), Node("output", OpKind.OUTPUT, None, ())])
    cells = unroll(graph, 2)
    assert set(cells.nodes) == {Cell("x", 0), Cell("x", 1), Cell("output", 0), Cell("output", 1)}
    assert cells.nodes[Cell("x", 1)]["node"] is graph["x"]


def test_over_fewer_steps_than_its_delay_an_edge_is_not_there() -> None:
    graph = feedback_graph()
    assert not any(source.step != target.step for source, target in unroll(graph, 1).edges)
    assert (Cell("residual", 0), Cell("fc", 2)) not in unroll(graph, 2).edges
    assert (Cell("residual", 0), Cell("fc", 2)) in unroll(graph, 3).edges
    assert len(unroll(graph, 0)) == 0


@given(
    forward=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda ends: ends[0] < ends[1])),
    delayed=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4))),
    steps=st.integers(1, 6),
)
def test_where_every_cycle_has_a_delay_the_unrolled_view_has_no_cycle(
    forward: set[tuple[int, int]], delayed: set[tuple[int, int, int]], steps: int
) -> None:
    nodes = [
        Node(f"n{target}", OpKind.FUNCTION, max, tuple(Ref(f"n{source}") for source, t in forward if t == target))
        for target in range(6)
    ]
    carried = [Edge(f"n{source}", f"n{target}", delay, EdgeKind.ORDER) for source, target, delay in delayed]
    cells = unroll(StepGraph(nodes, carried), steps)
    assert nx.is_directed_acyclic_graph(cells)
    assert len(cells) == 6 * steps
    spans = [0] * len(forward) + [delay for _, _, delay in delayed]
    assert cells.number_of_edges() == sum(max(0, steps - span) for span in spans)
