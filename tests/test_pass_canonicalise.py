"""Canonicalise: sizes become constants, in-place becomes out-of-place, identities go, outputs are unpacked."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, neuron
from snncompile.ir import Ref, TensorType
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.mark_time_coupling import MarkTimeCoupling
from snncompile.torch_private import tree_flatten

from .graphs import (
    Calls,
    N,
    T,
    assert_idempotent,
    assert_nothing_matches,
    assert_step_loop,
    first_stage,
    images,
    operations_of,
    said_of,
    text_of,
    vectors,
)
from .networks import CurrentLIF, StepCounter

IN_PLACE = "done: written in place; now out of place"
REMOVED = "done: does nothing here and was removed"


class Pair(NamedTuple):
    first: Any
    second: Any


class Block(nn.Module):
    """A residual block written as carelessly as blocks are: `[N, 2, 6, 6]` -> `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.relu, self.skip = nn.ReLU(inplace=True), nn.Identity()
        self.neuron = neuron.LIFNode(v_threshold=0.2)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        y += self.skip(x)
        spikes = self.neuron(self.relu(y))
        return self.head(self.drop(spikes.view(spikes.size(0), -1)))


class Hidden(nn.Module):
    """Returns what `make` makes of its input, in a module that capture cannot see into."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make, self.calls = make, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.make(x)


class KeepsInput(nn.Module):
    """A delay of one step in plain Python: holds on to its very input."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        delayed = torch.zeros_like(x) if self.last is None else self.last * 1.0
        self.last = x
        return delayed


class CarriesInput(neuron.StatefulModule):
    """A delay of one step as a step function: the new state is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("last", 0.0)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (states[0] * 1.0,), (inputs[0],)


class Accumulator(nn.Module):
    """Returns the very buffer in which it adds up its input."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(N, 6))

    def forward(self, x: Tensor) -> Any:
        return self.total.add_(x)


class Table(nn.Module):
    """A network with a buffer, written as a function of its input, the buffer and its parts."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(6))
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.table, *self.parts)


def attend(x: Tensor, attention: nn.Module) -> Any:
    tokens = x.unsqueeze(1)
    return attention(tokens, tokens, tokens, need_weights=False)


def linear() -> nn.Module:
    return nn.Linear(6, 6)


def after_linear(function: Callable[[Tensor], Any]) -> nn.Module:
    """A network that applies a function to a fresh tensor, `[N, 6]`."""
    return Calls(lambda x, layer: function(layer(x)), linear())


# What becomes of a graph


@pytest.mark.parametrize("training", [False, True])
def test_one_spelling_for_each_operation(golden: Callable[[str], None], training: bool) -> None:
    golden(text_of(first_stage(Block().train(training), images()).run(Canonicalise())))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
def test_the_block_computes_what_the_step_loop_computes(schedule: str | int, training: bool) -> None:
    assert_step_loop(Block().train(training), images(), schedule=schedule)


def test_a_canonical_network_is_left_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), neuron.IFNode(), nn.Linear(6, 3), neuron.LIFNode())
    assert_nothing_matches(Canonicalise(), first_stage(net))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Block().eval(),
        lambda: Calls(lambda x: x.view(x.size(0), x.shape[1] // 2, -1).relu_()),
        lambda: CurrentLIF(0.5),
        lambda: Hidden(lambda x: {"a": x * 2.0, "b": (x, None)}),
        lambda: Calls(lambda x: Pair(x * 2.0, Pair(x, x + 1.0))),
    ],
    ids=["block", "sizes", "two outputs", "dict", "named tuple"],
)
def test_a_second_run_changes_nothing(make: Callable[[], nn.Module]) -> None:
    net = make()
    assert_idempotent(Canonicalise(), first_stage(net, images() if isinstance(net, Block) else vectors()))


# Writes in place


def augmented(write: Callable[[Any, float], Any], by: float) -> Callable[[Tensor], Any]:
    """An augmented assignment by a number."""
    return lambda y: write(y, by)


WRITES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "+=": (augmented(operator.iadd, 2.0), "function add(%parts_0, 2.0)"),
    "-=": (augmented(operator.isub, 2.0), "function sub(%parts_0, 2.0)"),
    "*=": (augmented(operator.imul, 2.0), "function mul(%parts_0, 2.0)"),
    "/=": (augmented(operator.itruediv, 3.0), "function truediv(%parts_0, 3.0)"),
    "//=": (augmented(operator.ifloordiv, 0.3), "function floordiv(%parts_0, 0.3)"),
    "%=": (augmented(operator.imod, 0.3), "function mod(%parts_0, 0.3)"),
    "**=": (augmented(operator.ipow, 2.0), "function pow(%parts_0, 2.0)"),
    "method": (lambda y: y.add_(1.0, alpha=2.0), "method add(%parts_0, 1.0, alpha=2.0)"),
    "method of two tensors": (lambda y: y.masked_fill_(y > 0.1, 0.1), "method masked_fill(%parts_0, %gt, 0.1)"),
    "method that changes the shape": (lambda y: y.unsqueeze_(1), "method unsqueeze(%parts_0, 1)"),
    "function": (torch.relu_, "function relu(%parts_0)"),
    "function of a keyword": (lambda y: torch.relu_(input=y), "function relu(input=%parts_0)"),
    "function of nn.functional": (lambda y: F.leaky_relu_(y, 0.1), "function leaky_relu(%parts_0, 0.1)"),
    "inplace=True": (lambda y: F.relu(y, inplace=True), "function relu(%parts_0, inplace=False)"),
    "inplace by position": (lambda y: F.relu(y, True), "function relu(%parts_0, inplace=False)"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_place_becomes_an_operation_out_of_place(name: str) -> None:
    write, written = WRITES[name]
    net = after_linear(write).eval()
    result = first_stage(net).run(Canonicalise())
    assert result.changed
    assert [decision.reason for decision in result.decisions] == ["written in place; now out of place"]
    assert written in text_of(result)
    assert not any(node.effects.mutates or node.effects.writes_operand for node in result.graph)
    assert_step_loop(net, schedule="breadth-first")


@pytest.mark.parametrize(
    "kind", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.Dropout], ids=lambda kind: kind.__name__
)
def test_a_module_that_writes_in_place_no_longer_does(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(6, 6), kind(inplace=True), nn.Linear(6, 3)).train()
    result = first_stage(net).run(Canonicalise())
    (name,) = (node.name for node in result.graph if node.target == "1")
    assert said_of(result, name) == [IN_PLACE]
    assert not result.graph[name].effects.writes_operand
    assert_step_loop(net, schedule="breadth-first")
    assert net.get_submodule("1").inplace


def test_whoever_reads_a_written_tensor_afterwards_reads_the_result(golden: Callable[[str], None]) -> None:
    def forward(x: Tensor, layer: nn.Module) -> Any:
        y = layer(x)
        before = y + 1.0
        y.mul_(2.0)
        y -= before
        return y, layer(y)

    net = Calls(forward, linear()).eval()
    golden(text_of(first_stage(net).run(Canonicalise())))
    assert_step_loop(net, schedule="breadth-first")


READERS: dict[str, Callable[..., Any]] = {
    "an identity of it": lambda x, layer, same: _after(same(y := layer(x)), y.mul_(2.0)),
    "the tensor an identity was of": lambda x, layer, same: _after(y := layer(x), same(y).mul_(2.0)),
    "the result of another write": lambda x, layer, same: _after((y := layer(x)).relu_(), y.mul_(2.0)),
    "the output, though named before the write": lambda x, layer, same: (y := layer(x), y.mul_(2.0)),
    "a view made after the write": lambda x, layer, same: (y := layer(x).mul_(2.0), y[:, :2]),
    "a write into a view that alone is read": lambda x, layer, same: layer(x)[:, :2].mul_(2.0),
    "the input": lambda x, layer, same: _after(x, x.relu_()),
}


def _after(first: Tensor, _: Tensor) -> Tensor:
    return first * 1.0


@pytest.mark.parametrize("name", READERS)
def test_every_name_of_a_written_tensor_follows_it(name: str) -> None:
    net = Calls(READERS[name], linear(), nn.Identity()).eval()
    assert first_stage(net).run(Canonicalise()).changed
    assert_step_loop(net, schedule="breadth-first")


def test_gradients_flow_through_what_was_written_in_place() -> None:
    def forward(x: Tensor, first: nn.Module, second: nn.Module, site: nn.Module) -> Any:
        y = first(x)
        y += x
        return site(second(F.relu(y, inplace=True)).mul_(3.0))

    net = Calls(forward, linear(), linear(), neuron.LIFNode(v_threshold=0.3)).train()
    for schedule in ("depth-first", 3):
        assert_step_loop(net, schedule=schedule)


@pytest.mark.parametrize("join", [operator.ior, operator.iand, operator.ixor], ids=["|=", "&=", "^="])
def test_a_mask_is_written_under_all_its_names(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Calls(lambda x: _after(mask := x > 0.0, join(mask, x < 1.0))).eval()
    assert_step_loop(net, schedule="depth-first")


def test_a_strided_tensor_keeps_its_strides_when_it_is_written() -> None:
    # A linear layer rounds a slice of features otherwise than a contiguous copy of it.
    net = Calls(lambda x, layer: layer(torch.relu(x)[:, :30].mul_(2.0)), nn.Linear(30, 5)).eval()
    for schedule in ("depth-first", "breadth-first"):
        assert_step_loop(net, vectors(60), schedule=schedule)


# Refusals

UNSEEN: dict[str, tuple[Callable[..., Any], str]] = {
    "a view is written and the whole read": (
        lambda x, layer: _after(y := layer(x), y[:, :2].mul_(2.0)),
        "mul writes in place into getitem, and parts_0, which shares its memory, is read afterwards",
    ),
    "the whole is written and a view read": (
        lambda x, layer: ((y := layer(x)).view(-1), y.mul_(2.0)),
        "mul writes in place into parts_0, and view, which shares its memory, is read afterwards",
    ),
    "a view of a view is written": (
        lambda x, layer: _after(y := layer(x), y.view(-1)[:7].mul_(2.0)),
        "mul writes in place into getitem, and parts_0, which shares its memory, is read afterwards",
    ),
    "a view of the input is written": (
        lambda x, layer: _after(x, x[:, :2].mul_(2.0)),
        "mul writes in place into getitem, and x, which shares its memory, is read afterwards",
    ),
    "one of several views is written": (
        lambda x, layer: (halves := layer(x).chunk(2, 1), halves[0].mul_(2.0), halves[1])[1:],
        "mul writes in place into getitem, and chunk, which shares its memory, is read afterwards",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_write_through_a_view_is_refused(name: str) -> None:
    function, says = UNSEEN[name]
    with pytest.raises(CaptureError, match=f"{says}; write it out of place"):
        first_stage(Calls(function, linear())).run(Canonicalise())


@pytest.mark.parametrize("site", [neuron.NonSpikingIFNode, Accumulator], ids=["step function", "opaque"])
@pytest.mark.parametrize("view", [lambda v: v, lambda v: v[:, :2]], ids=["itself", "a view of it"])
def test_a_write_into_a_state_is_refused(site: type[nn.Module], view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="into memory of parts_0, which is its state; write it out of place"):
        first_stage(Calls(lambda x, site: view(site(x)).mul_(2.0), site())).run(Canonicalise())


@pytest.mark.parametrize(
    "write",
    [
        lambda x, same: x.mul_(2.0),
        lambda x, same: same(x).mul_(2.0),
        lambda x, same: x[:, :2].mul_(2.0),
        lambda x, same: F.relu(x.view(-1), inplace=True),
    ],
    ids=["itself", "through an identity", "a slice", "a reshaped view"],
)
def test_a_write_into_a_static_input_is_refused(write: Callable[..., Tensor]) -> None:
    net = Calls(write, nn.Identity())
    with pytest.raises(CaptureError, match="into memory of x, the static input that every later step sees"):
        first_stage(net, static_input=True).run(Canonicalise())
    assert first_stage(net).run(Canonicalise()).changed


def test_a_write_into_a_view_of_a_buffer_is_refused() -> None:
    net = Table(lambda x, table: x + table.view(2, 3).mul_(2.0).view(-1))
    with pytest.raises(CaptureError, match="into memory of table, which belongs to the network"):
        first_stage(net).run(Canonicalise())


@pytest.mark.parametrize(
    ("net", "reader"),
    [
        (Calls(lambda x, norm: norm(x) + norm.running_mean, nn.BatchNorm1d(6)), "add"),
        (Table(lambda x, table: F.batch_norm(F.batch_norm(x, table, None, training=True), table, table)), "batch_norm"),
    ],
    ids=["module", "function"],
)
def test_a_write_into_a_tensor_of_the_network_that_others_read_is_refused(net: nn.Module, reader: str) -> None:
    with pytest.raises(CaptureError, match=f"writes into a tensor of the network that {reader}"):
        first_stage(net.train()).run(Canonicalise())


def written_behind(x: Tensor, layer: nn.Module, site: nn.Module) -> Any:
    y = layer(x)
    delayed = site(y)
    return delayed + y.relu_()


HIDDEN_WRITES: dict[str, Callable[[], nn.Module]] = {
    "into what a step function took as its state": lambda: Calls(written_behind, linear(), CarriesInput()),
    "into what a module keeps in an attribute": lambda: Calls(written_behind, linear(), KeepsInput()),
    "into a buffer that is read outside its module": lambda: Calls(lambda x, c: c(x) + c.calls, StepCounter()),
}


@pytest.mark.parametrize("name", HIDDEN_WRITES)
def test_a_write_that_no_operand_shows_is_refused_or_seen(name: str) -> None:
    net = HIDDEN_WRITES[name]().eval()
    for schedule in ("depth-first", "breadth-first"):
        with suppress(CaptureError):
            assert_step_loop(net, schedule=schedule)


def test_statistics_that_nobody_writes_may_be_read() -> None:
    net = Calls(lambda x, norm: norm(x) + norm.running_mean, nn.BatchNorm1d(6)).eval()
    assert_nothing_matches(Canonicalise(), first_stage(net))
    assert_step_loop(net, schedule="breadth-first")


def test_a_write_that_would_change_the_dtype_out_of_place_is_refused() -> None:
    net = after_linear(lambda y: y.mul_(torch.ones(6, dtype=torch.float64)))
    with pytest.raises(CaptureError, match=r"writes a result of torch\.float64 in place into one of torch\.float32"):
        first_stage(net).run(Canonicalise())


def test_a_method_that_exists_in_place_only_is_refused() -> None:
    with pytest.raises(CaptureError, match="the in-place method copy_ has no out-of-place form"):
        first_stage(Calls(lambda x, layer: layer(x).copy_(x), linear())).run(Canonicalise())


def test_an_out_argument_is_left_for_the_next_pass_to_refuse() -> None:
    stage = first_stage(Calls(lambda x, layer: torch.add(x, 1.0, out=layer(x)), linear()))
    assert_nothing_matches(Canonicalise(), stage)
    with pytest.raises(CaptureError, match="add writes in place into a value it reads"):
        stage.after(Canonicalise()).run(MarkTimeCoupling())


# Identities

IDENTITIES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Identity: (6,),
    nn.Dropout: (6,),
    nn.AlphaDropout: (6,),
    nn.Dropout1d: (3, 6),
    nn.Dropout2d: (2, 6, 6),
    nn.Dropout3d: (2, 3, 4, 4),
}


@pytest.mark.parametrize("kind", IDENTITIES, ids=lambda kind: kind.__name__)
def test_an_identity_is_removed(kind: type[nn.Module]) -> None:
    net, x_seq = nn.Sequential(nn.Tanh(), kind(), nn.ReLU()).eval(), torch.randn(T, N, *IDENTITIES[kind])
    result = first_stage(net, x_seq).run(Canonicalise())
    assert operations_of(result.graph) == ["tanh_0", "relu_2"]
    assert [decision.reason for decision in result.decisions] == ["does nothing here and was removed"]
    assert_step_loop(net, x_seq, schedule="breadth-first")


def test_identities_in_a_row_are_removed_up_to_the_input() -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Dropout()).eval()
    result = first_stage(net).run(Canonicalise())
    assert operations_of(result.graph) == []
    assert said_of(result, "identity_1") == [REMOVED]
    assert_step_loop(net, schedule="breadth-first")


def test_an_identity_that_is_not_idle_stays() -> None:
    class Doubles(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    hooked = nn.Identity()
    hooked.register_forward_hook(lambda module, args, output: output * 3.0)
    dropout = nn.Dropout(0.5).train()
    for module in (Doubles(), hooked, dropout):
        net = nn.Sequential(nn.Linear(6, 6), module)
        result = first_stage(net).run(Canonicalise())
        assert result.decisions == ()
        assert len(operations_of(result.graph)) > 1
        assert_step_loop(net, schedule="breadth-first")


# Sizes and other values that are no tensors


def test_sizes_become_constants(golden: Callable[[str], None]) -> None:
    def forward(x: Tensor) -> Any:
        features = x.shape[1]
        pairs = x.view(x.size(0), features // 2, -1) * x.size(-1) ** -0.5
        bias = torch.ones(features, dtype=x.dtype, device=x.device)
        return pairs.to(x.dtype).flatten(x.dim() - 1) + bias

    net = Calls(forward).eval()
    golden(text_of(first_stage(net).run(Canonicalise())))
    assert_step_loop(net, schedule="breadth-first")


@pytest.mark.parametrize("result", [lambda x: 3, lambda x: (x, 0.5), lambda x: {"rate": "low"}])
def test_what_an_opaque_module_returns_besides_tensors_is_refused(result: Callable[[Tensor], Any]) -> None:
    net = nn.Sequential(Hidden(result), nn.Identity())
    with pytest.raises(CaptureError, match="which may differ from step to step and is no tensor"):
        first_stage(net).run(Canonicalise())


# Named tuples, dicts and None


OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "tuple of a step function": lambda: CurrentLIF(0.5),
    "list": lambda: Calls(lambda x: [x * 2.0, (x + 1.0,)]),
    "dict": lambda: Hidden(lambda x: {"a": x * 2.0, "b": {"c": x + 1.0}}),
    "named tuple": lambda: Calls(lambda x: Pair(x * 2.0, x + 1.0)),
    "named tuples of named tuples": lambda: Calls(lambda x: {"pairs": (Pair(x, Pair(x * 2.0, x + 1.0)),)}),
    "named tuple of an opaque module": lambda: Hidden(lambda x: Pair(x * 2.0, x + 1.0)),
    "named tuple of torch": lambda: Calls(lambda x: x.max(1)),
    "None": lambda: Hidden(lambda x: (x * 2.0, None)),
    "None inside": lambda: Hidden(lambda x: {"a": Pair(x * 2.0, None), "b": None}),
    "None of a library module": lambda: Calls(attend, nn.MultiheadAttention(6, 2, batch_first=True)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_has_one_node_for_each_of_its_tensors(name: str) -> None:
    graph = first_stage(OUTPUTS[name]().eval()).run(Canonicalise()).graph
    nodes = [graph[source] for source in graph.output.refs]
    assert nodes
    assert all(isinstance(node.value, TensorType) for node in nodes)


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_has_the_structure_and_the_values_of_the_step_loop(name: str) -> None:
    net, x_seq = OUTPUTS[name]().eval(), vectors()
    opt = snncompile.optimize(copy.deepcopy(net), T, schedule="breadth-first")
    with torch.no_grad():
        got, structure = tree_flatten(opt(x_seq))
        steps = [tree_flatten(net(x)) for x in x_seq]
    assert structure == steps[0][1]
    for column, value in zip(zip(*(leaves for leaves, _ in steps), strict=True), got, strict=True):
        assert value is None if column[0] is None else torch.equal(value, torch.stack(column))


def test_verify_compares_networks_that_return_none_beside_tensors() -> None:
    net = Hidden(lambda x: (x * 2.0, None)).eval()
    assert snncompile.verify(net, snncompile.optimize(net, T), vectors()).exact


def test_a_dict_is_unpacked_by_its_keys() -> None:
    graph = first_stage(Hidden(lambda x: {"a": x * 2.0, "b": (x, None)})).run(Canonicalise()).graph
    assert operations_of(graph) == ["hidden", "hidden_a", "hidden_b", "hidden_b_0"]
    assert graph["hidden_a"].args == (Ref("hidden"), "a")
    assert graph["hidden_b_0"].args == (Ref("hidden_b"), 0)
    assert graph.output.args == ({"a": Ref("hidden_a"), "b": (Ref("hidden_b_0"), None)},)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: Pair(x * 2.0, Pair(x + 1.0, x)),
        lambda x: torch.cat(Pair(x * 2.0, x + 1.0), 1),
        lambda x: operator.sub(*Pair(x * 2.0, x + 1.0)),
    ],
    ids=["returned", "handed on", "taken apart"],
)
def test_a_named_tuple_made_in_forward_needs_no_node(function: Callable[[Tensor], Any]) -> None:
    net = Calls(function).eval()
    operations = operations_of(first_stage(net).run(Canonicalise()).graph)
    assert operations[:2] == ["mul", "add"]
    assert set(operations) <= {"mul", "add", "cat", "sub"}
    assert_step_loop(net, schedule="breadth-first")


def test_a_result_that_is_none_may_be_left_unread() -> None:
    def forward(x: Tensor, attention: nn.Module) -> Any:
        attended, _ = attend(x, attention)
        return attended + x.unsqueeze(1)

    net = Calls(forward, nn.MultiheadAttention(6, 2, batch_first=True))
    graph = first_stage(net).run(Canonicalise()).graph
    assert operations_of(graph) == ["unsqueeze", "parts_0", "getitem", "unsqueeze_1", "add"]
    assert_step_loop(net.eval(), schedule="depth-first")
