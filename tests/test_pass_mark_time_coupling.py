"""Mark time coupling: how each node is tied to time, how it takes several steps at once, and what keeps its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import snncompile
from snncompile import CaptureError, neuron
from snncompile.ir import Batching, Edge, EdgeKind, Node, OpKind, StepGraph, TimeCoupling
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.infra import PassResult
from snncompile.passes.mark_time_coupling import MarkTimeCoupling

from .graphs import (
    Calls,
    N,
    Stage,
    T,
    assert_idempotent,
    assert_nothing_matches,
    assert_step_loop,
    first_stage,
    images,
    said_of,
    text_of,
    vectors,
)
from .networks import CurrentLIF, FunctionalDropout, SelfAttention, StepCounter

RANDOM = "note: it draws random numbers at each step, in order"
NO_RULE = "note: no rule says how it takes several steps at once, so it runs one call a step"
ROUNDS = "note: over a chunk its kernel rounds differently than step by step"


@fx.wrap
def doubled(x: Tensor) -> Tensor:
    """A function that tracing does not look into."""
    return x * 2.0


class Everything(nn.Module):
    """One node of every coupling: `[N, 2, 6, 6]` -> `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.site = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), neuron.LIFNode()
        self.attention, self.counter = SelfAttention(36), StepCounter()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Any:
        features = self.site(self.norm(self.conv(x)))
        tokens = self.attention(features.flatten(2))
        first, second = self.counter(doubled(tokens)).chunk(2, 1)
        return self.head(self.drop(torch.cat([first, second], dim=1).flatten(1)))


class Hooked(nn.Linear):
    """A layer with a hook, which must see every step."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.register_forward_hook(lambda module, args, output: None)


def canonical(net: nn.Module, *x_seq: Tensor, **options: Any) -> Stage:
    return first_stage(net, *x_seq, **options).after(Canonicalise())


def marked(net: nn.Module, *x_seq: Tensor, **options: Any) -> PassResult:
    return canonical(net, *x_seq, **options).run(MarkTimeCoupling())


def last_of(graph: StepGraph) -> Node:
    """The node that computes the output."""
    return graph[graph.output.refs[0]]


def order_of(graph: StepGraph) -> list[tuple[str, str, int]]:
    """Source, target and delay of the edges that only keep an order."""
    return [(edge.source, edge.target, edge.delay) for edge in graph.carried if edge.kind is EdgeKind.ORDER]


# The whole


@pytest.mark.parametrize("training", [False, True])
def test_every_node_is_marked_and_explained(golden: Callable[[str], None], training: bool) -> None:
    golden(text_of(marked(Everything().train(training), images())))


@pytest.mark.parametrize(
    ("schedule", "training"), [("depth-first", False), ("breadth-first", False), (3, False), (3, True)]
)
def test_a_network_of_all_couplings_computes_what_the_step_loop_computes(schedule: str | int, training: bool) -> None:
    assert_step_loop(Everything().train(training), images(), schedule=schedule)


@pytest.mark.parametrize("training", [False, True])
def test_a_second_run_changes_nothing(training: bool) -> None:
    assert_idempotent(MarkTimeCoupling(), canonical(Everything().train(training), images()))


def test_a_marked_graph_is_left_as_it_is() -> None:
    assert_nothing_matches(MarkTimeCoupling(), canonical(nn.Linear(6, 6)).after(MarkTimeCoupling()))


def test_inputs_constants_and_outputs_are_tied_to_no_time() -> None:
    graph = marked(Calls(lambda x, layer: F.linear(x, layer.weight), nn.Linear(6, 6))).graph
    unmarked = [node.kind for node in graph if node.coupling is None]
    assert unmarked == [OpKind.INPUT, OpKind.CONSTANT, OpKind.OUTPUT]


# Batch norm


def test_a_batch_norm_in_train_mode_sees_one_step_at_a_time() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    result = marked(net.train())
    assert last_of(result.graph).coupling is TimeCoupling.STEP_STATISTICS
    assert last_of(result.graph).batching is not Batching.FOLD
    assert "statistics of" in said_of(result, "1")[0]
    assert order_of(result.graph) == []


def test_a_batch_norm_in_eval_mode_is_batched() -> None:
    result = marked(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval())
    assert (last_of(result.graph).coupling, last_of(result.graph).batching) == (TimeCoupling.POINTWISE, Batching.FOLD)
    assert result.decisions == ()


def test_a_batch_norm_without_running_statistics_sees_one_step_at_a_time_even_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval()
    assert last_of(marked(net).graph).coupling is TimeCoupling.STEP_STATISTICS
    assert_step_loop(net, schedule="breadth-first")


def test_an_instance_norm_sees_one_image_at_a_time_and_is_batched() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2)).eval()
    result = marked(net, images())
    assert last_of(result.graph).batching is Batching.FOLD
    assert result.decisions == ()
    assert_step_loop(net, images(), schedule="breadth-first")


def test_a_shared_batch_norm_in_train_mode_updates_its_statistics_in_the_order_of_its_calls() -> None:
    def forward(x: Tensor, norm: nn.Module, layer: nn.Module) -> Any:
        return norm(layer(norm(x)))

    net = Calls(forward, nn.BatchNorm1d(6), nn.Linear(6, 6)).train()
    result = marked(net)
    assert order_of(result.graph) == [("parts_0", "parts_0_1", 0), ("parts_0_1", "parts_0", 1)]
    assert said_of(result, "") == [
        "note: parts_0_1, parts_0 keep their order at every step, and so does all that lies between them"
    ]
    assert_step_loop(net, schedule=3)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_that_share_nothing_need_no_order(training: bool) -> None:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)).train(training)
    assert order_of(marked(net).graph) == []
    assert_step_loop(net, schedule="breadth-first")


def test_a_shared_batch_norm_in_eval_mode_needs_no_order() -> None:
    net = Calls(lambda x, norm: norm(norm(x) + x), nn.BatchNorm1d(6)).eval()
    result = marked(net)
    assert order_of(result.graph) == []
    assert result.decisions == ()


# Randomness


@pytest.mark.parametrize("make", [nn.Dropout, FunctionalDropout, nn.RReLU])
def test_what_draws_random_numbers_draws_them_step_by_step(make: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(6, 6), make()).train()
    result = marked(net)
    node = last_of(result.graph)
    assert (node.coupling, node.batching) == (TimeCoupling.RANDOM, Batching.PER_STEP)
    assert said_of(result, node.where) == [RANDOM]
    assert order_of(result.graph) == []
    assert_step_loop(net, schedule="breadth-first")


def test_a_dropout_function_that_draws_nothing_in_eval_mode_is_batched_there() -> None:
    net = nn.Sequential(nn.Linear(6, 6), FunctionalDropout()).eval()
    result = marked(net)
    assert last_of(result.graph).batching is Batching.ELEMENTWISE
    assert result.decisions == ()
    assert_step_loop(net, schedule="breadth-first")


def test_several_draws_keep_their_order_at_every_step() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.5)).train()
    result = marked(net)
    assert order_of(result.graph) == [
        ("dropout_0", "dropout_2", 0),
        ("dropout_2", "dropout_4", 0),
        ("dropout_4", "dropout_0", 1),
    ]
    assert len(said_of(result, "")) == 1
    assert_step_loop(net, schedule=3)


def test_a_neuron_that_draws_random_numbers_keeps_its_order_with_others_that_do() -> None:
    class Noisy(neuron.IFNode):
        def charge(self, x: Tensor, v: Tensor) -> Tensor:
            return v + x + 0.1 * torch.randn_like(x)

    net = nn.Sequential(nn.Dropout(0.5), Noisy()).train()
    result = marked(net)
    node = last_of(result.graph)
    assert (node.coupling, node.batching) == (TimeCoupling.RANDOM, Batching.SCAN)
    assert order_of(result.graph) == [("dropout_0", "noisy_1", 0), ("noisy_1", "dropout_0", 1)]
    assert_step_loop(net, schedule=3)


# State, and what is not understood


def test_a_neuron_is_a_scan() -> None:
    result = marked(nn.Sequential(nn.Linear(6, 6), neuron.IFNode()))
    assert (last_of(result.graph).coupling, last_of(result.graph).batching) == (TimeCoupling.STATEFUL, Batching.SCAN)
    assert result.decisions == ()


def test_an_opaque_module_runs_step_by_step_and_says_why() -> None:
    net = nn.Sequential(nn.Linear(6, 6), StepCounter()).eval()
    result = marked(net)
    node = last_of(result.graph)
    assert (node.coupling, node.batching) == (TimeCoupling.STATEFUL, Batching.PER_STEP)
    assert said_of(result, "1") == ["note: it writes into '1.calls' at every step"]
    assert order_of(result.graph) == []
    assert_step_loop(net, schedule="breadth-first")


def test_modules_with_hooks_keep_their_order_with_everything_that_has_one() -> None:
    net = nn.Sequential(Hooked(6), nn.ReLU(), nn.Dropout(0.5), Hooked(6)).train()
    result = marked(net)
    assert [node.coupling for node in result.graph.scheduled] == [
        TimeCoupling.UNKNOWN,
        TimeCoupling.POINTWISE,
        TimeCoupling.RANDOM,
        TimeCoupling.UNKNOWN,
    ]
    assert said_of(result, "0") == ["note: it has hooks, which must see every step"]
    assert order_of(result.graph) == [
        ("hooked_0", "dropout_2", 0),
        ("dropout_2", "hooked_3", 0),
        ("hooked_3", "hooked_0", 1),
    ]


def test_hooks_see_the_steps_in_the_order_of_the_step_loop() -> None:
    seen: list[tuple[nn.Module, list[float]]] = []
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    for layer in (net[0], net[2]):
        layer.register_forward_hook(lambda module, args, output: seen.append((module, output.flatten().tolist())))
    with torch.no_grad():
        for x in vectors():
            net(x)
        expected = seen.copy()
        seen.clear()
        snncompile.optimize(net, T, schedule="breadth-first")(vectors())
    assert seen == expected


def test_an_unknown_function_is_kept_in_order() -> None:
    net = Calls(lambda x: doubled(doubled(x)))
    result = marked(net)
    assert [node.coupling for node in result.graph.scheduled] == [TimeCoupling.UNKNOWN] * 2
    assert said_of(result, "doubled") == ["note: an unknown function, kept in order"]
    assert order_of(result.graph) == [("doubled", "doubled_1", 0), ("doubled_1", "doubled", 1)]
    assert_step_loop(net.eval(), schedule="breadth-first")


def test_a_write_into_an_operand_is_refused() -> None:
    stage = canonical(Calls(lambda x, layer: torch.add(x, 1.0, out=layer(x)), nn.Linear(6, 6)))
    with pytest.raises(CaptureError, match=r"add writes in place into a value it reads, .* write it out of place"):
        stage.run(MarkTimeCoupling())


# How several steps are taken at once

BATCHINGS: dict[str, tuple[Callable[..., Any], Batching]] = {
    "a layer": (lambda x, layer, w: layer(x), Batching.FOLD),
    "a layer's function with weights": (lambda x, layer, w: F.linear(x, layer.weight, layer.bias), Batching.FOLD),
    "a layer's function without weights": (lambda x, layer, w: F.linear(x, x), Batching.PER_STEP),
    "a sum of equal ranks": (lambda x, layer, w: x + layer(x), Batching.ELEMENTWISE),
    "a sum with a lower rank": (lambda x, layer, w: x.t() + x.mean(1), Batching.ELEMENTWISE),
    "a product with a weight": (lambda x, layer, w: x * w, Batching.ELEMENTWISE),
    "a sum with a weight of higher rank": (lambda x, layer, w: x + w.view(1, 1, 6), Batching.ELEMENTWISE),
    "a sum with as many steps of weights": (lambda x, layer, w: x + w.expand(T, N, 6), Batching.ELEMENTWISE),
    "flatten": (lambda x, layer, w: x.view(N, 3, 2).flatten(1), Batching.SHIFT_DIMS),
    "flatten everything": (lambda x, layer, w: x.flatten(), Batching.SHIFT_DIMS),
    "view": (lambda x, layer, w: x.view(x.size(0), 3, -1), Batching.SHIFT_DIMS),
    "view as one row": (lambda x, layer, w: x.view(-1), Batching.SHIFT_DIMS),
    "permute": (lambda x, layer, w: x.view(N, 3, 2).permute(0, 2, 1), Batching.SHIFT_DIMS),
    "transpose": (lambda x, layer, w: x.transpose(0, 1), Batching.SHIFT_DIMS),
    "unsqueeze": (lambda x, layer, w: x.unsqueeze(0), Batching.SHIFT_DIMS),
    "unsqueeze from the end": (lambda x, layer, w: x.unsqueeze(-3), Batching.SHIFT_DIMS),
    "squeeze a dimension": (lambda x, layer, w: x[:, :1].squeeze(1), Batching.SHIFT_DIMS),
    "squeeze whatever there is": (lambda x, layer, w: x[:, :1].squeeze(), Batching.PER_STEP),
    "expand": (lambda x, layer, w: x[:, :1].expand(-1, 3), Batching.SHIFT_DIMS),
    "expand to a higher rank": (lambda x, layer, w: x.expand(2, N, 6), Batching.PER_STEP),
    "slice": (lambda x, layer, w: x[1:, :3], Batching.SHIFT_DIMS),
    "slice of the last dimension": (lambda x, layer, w: x[..., ::2], Batching.SHIFT_DIMS),
    "index with None": (lambda x, layer, w: x[:, None, 2], Batching.SHIFT_DIMS),
    "index with a list": (lambda x, layer, w: x[:, [0, 2]], Batching.PER_STEP),
    "sum over features": (lambda x, layer, w: x.sum(1), Batching.SHIFT_DIMS),
    "sum over the batch": (lambda x, layer, w: x.sum(0, keepdim=True), Batching.SHIFT_DIMS),
    "mean over everything": (lambda x, layer, w: x.mean(), Batching.PER_STEP),
    "maximum of each row": (lambda x, layer, w: x.max(1)[0], Batching.SELECT),
    "half of a chunk": (lambda x, layer, w: x.chunk(2, dim=1)[1], Batching.SELECT),
    "softmax over the last dimension": (lambda x, layer, w: x.softmax(-1), Batching.SHIFT_DIMS),
    "softmax over the batch": (lambda x, layer, w: x.softmax(0), Batching.PER_STEP),
    "concatenation": (lambda x, layer, w: torch.cat([x, layer(x)], 1), Batching.SHIFT_DIMS),
    "concatenation with a weight": (lambda x, layer, w: torch.cat([x, w.view(1, 6)], 0), Batching.SHIFT_DIMS),
    "stack": (lambda x, layer, w: torch.stack((x, x * 2.0)), Batching.SHIFT_DIMS),
    "matrix product": (lambda x, layer, w: x @ x.t(), Batching.PER_STEP),
    "a power that is a product": (lambda x, layer, w: x**2, Batching.ELEMENTWISE),
    "a power that is none": (lambda x, layer, w: x.abs() ** 1.5, Batching.PER_STEP),
    "sigmoid": (lambda x, layer, w: torch.sigmoid(x), Batching.PER_STEP),
}


class Weighted(nn.Module):
    """A function of the input, a layer and a weight vector."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.w, self.function = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer, self.w)


@pytest.mark.parametrize("name", BATCHINGS)
def test_how_a_node_takes_several_steps_at_once(name: str) -> None:
    function, batching = BATCHINGS[name]
    result = marked(Weighted(function))
    node = last_of(result.graph)
    assert (node.coupling, node.batching) == (TimeCoupling.POINTWISE, batching)
    assert bool(said_of(result, node.where)) == (batching is Batching.PER_STEP)


@pytest.mark.parametrize("name", BATCHINGS)
def test_a_chunk_of_steps_gives_what_the_steps_give(name: str) -> None:
    assert_step_loop(Weighted(BATCHINGS[name][0]).eval(), schedule="breadth-first")


def test_outputs_of_a_step_function_are_selected_without_work() -> None:
    result = marked(Calls(lambda x, site: site(x)[1], CurrentLIF(0.5)))
    assert last_of(result.graph).batching is Batching.SELECT
    assert result.decisions == ()


def test_a_node_without_a_rule_says_so() -> None:
    result = marked(Calls(F.normalize))
    assert said_of(result, "normalize") == [NO_RULE]


def test_weights_that_change_from_step_to_step_have_no_rule() -> None:
    net = Calls(lambda x, layer: F.linear(x, layer(x)), nn.Linear(6, 6)).eval()
    assert said_of(marked(net), "linear") == [NO_RULE]
    assert_step_loop(net, schedule="breadth-first")


def test_an_unbatched_convolution_takes_time_as_its_batch() -> None:
    net, x_seq = nn.Conv2d(2, 3, 3).eval(), images()[:, 0]
    assert last_of(marked(net, x_seq).graph).batching is Batching.ELEMENTWISE
    # A convolution rounds one image otherwise than several.
    snncompile.verify(net, snncompile.optimize(net, T, schedule="breadth-first"), x_seq).check()


@pytest.mark.parametrize("function", [torch.sigmoid, F.gelu, lambda x: x**1.5], ids=["sigmoid", "gelu", "power"])
def test_a_kernel_that_rounds_by_position_is_batched_where_rounding_may_change(
    function: Callable[[Tensor], Tensor],
) -> None:
    result = marked(Calls(function))
    assert last_of(result.graph).batching is Batching.PER_STEP
    assert [decision.reason for decision in result.decisions] == [ROUNDS.removeprefix("note: ")]
    result = marked(Calls(function), reassociate=True)
    assert last_of(result.graph).batching is Batching.ELEMENTWISE
    assert result.decisions == ()


def test_a_batching_that_comes_out_wrong_is_refused() -> None:
    class Doubtful:
        """Finds a fault with every operation that is no module."""

        def batching_error(self, graph: StepGraph, node: Node) -> str | None:
            return None if node.kind is OpKind.MODULE else "expected a fish, got a bird"

    net = Calls(lambda x, layer: layer(x) + 1.0, nn.Linear(6, 6))
    stage = canonical(net)
    result = replace(stage, context=replace(stage.context, probe=Doubtful())).run(MarkTimeCoupling())
    assert [node.batching for node in result.graph.scheduled] == [Batching.FOLD, Batching.PER_STEP]
    assert said_of(result, "add") == [
        "note: run over a chunk as elementwise it gives another result: expected a fish, got a bird"
    ]


def test_carried_edges_stay() -> None:
    net = nn.Sequential(neuron.IFNode(), nn.Dropout(0.5), nn.Dropout(0.5)).train()
    graph = marked(net).graph
    assert Edge("ifnode_0", "ifnode_0", 1, EdgeKind.STATE) in graph.carried
    assert len(order_of(graph)) == 2
