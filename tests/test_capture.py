"""What one step of a network becomes: leaves and operations, names and scopes, states, types and effects."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from snncompile import neuron, surrogate
from snncompile.capture import capture, check_output
from snncompile.errors import CaptureError
from snncompile.ir import Edge, EdgeKind, Effects, OpKind, Ref, StepGraph, TensorType, tensor_types

from .capturing import (
    Block,
    Forward,
    LoudNeuron,
    Plain,
    StepTotal,
    hooked,
    operations,
    typed,
    with_own_forward,
)


def names(graph: StepGraph) -> list[str]:
    return [node.name for node in graph]


# What becomes a leaf, and what is traced through


class ScaledLinear(nn.Linear):
    """A layer with arithmetic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class RenamedLinear(nn.Linear):
    """A layer that computes what its base computes."""


class ScaledBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


MODULE, STATEFUL, OPAQUE = OpKind.MODULE, OpKind.STATEFUL, OpKind.OPAQUE
LEAVES: dict[str, tuple[Callable[[], nn.Module], OpKind]] = {
    "a layer of torch": (lambda: nn.Linear(6, 6), MODULE),
    "an activation of torch": (nn.ReLU, MODULE),
    "a layer that inherits its forward": (lambda: RenamedLinear(6, 6), MODULE),
    "a batch norm with a forward of its own": (lambda: ScaledBatchNorm(6), MODULE),
    "a parametrised layer": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), MODULE),
    "a neuron": (neuron.LIFNode, STATEFUL),
    "a readout": (neuron.NonSpikingIFNode, STATEFUL),
    "a neuron with a forward of its own": (LoudNeuron, OPAQUE),
    "a module with a forward hook": (lambda: hooked(nn.Linear(6, 6), "register_forward_hook"), OPAQUE),
    "a module with a forward pre-hook": (lambda: hooked(nn.Linear(6, 6), "register_forward_pre_hook"), OPAQUE),
    "a module with a backward hook": (lambda: hooked(nn.Linear(6, 6), "register_full_backward_hook"), OPAQUE),
    "a container with a hook": (lambda: hooked(nn.Sequential(nn.ReLU()), "register_forward_hook"), OPAQUE),
    "a module whose forward was replaced": (lambda: with_own_forward(nn.Linear(6, 6)), OPAQUE),
}


@pytest.mark.parametrize("what", LEAVES)
def test_what_becomes_a_leaf(what: str) -> None:
    make, kind = LEAVES[what]
    captured = capture(nn.Sequential(make()))
    assert operations(captured.graph) == [(kind.value, "0")]
    assert {name: leaf.kind for name, leaf in captured.leaves.items()} == {"0": kind}
    assert captured.traced == ("",)


@pytest.mark.parametrize("what", LEAVES)
def test_a_network_may_be_a_leaf_itself(what: str) -> None:
    make, kind = LEAVES[what]
    captured = capture(make())
    assert operations(captured.graph) == [(kind.value, "")]
    assert set(captured.leaves) == {""}
    assert captured.traced == ()


def test_containers_and_modules_of_the_users_are_traced_through() -> None:
    net = nn.Sequential(nn.ModuleDict({"block": Block()})["block"], nn.Sequential(nn.ReLU(), Block()))
    captured = capture(net)
    assert captured.traced == ("", "0", "1", "1.1")
    assert set(captured.leaves) == {"0.fc", "0.fire", "1.0", "1.1.fc", "1.1.fire"}
    assert captured.decisions == ()


def test_a_layer_with_arithmetic_of_its_own_is_traced_into_functions_of_its_parameters() -> None:
    captured = capture(nn.Sequential(ScaledLinear(6, 6)))
    assert operations(captured.graph) == [
        ("constant", "0.weight"),
        ("constant", "0.bias"),
        ("function", F.linear),
        ("function", operator.mul),
    ]
    assert captured.traced == ("", "0")


@pytest.mark.parametrize(
    ("module", "acts_like"),
    [
        (nn.Linear(6, 6), nn.Linear),
        (RenamedLinear(6, 6), nn.Linear),
        (ScaledBatchNorm(6), None),
        (parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_leaf_without_state_knows_whose_treatment_of_a_batch_it_shares(module: nn.Module, acts_like: Any) -> None:
    assert capture(module).leaves[""].acts_like is acts_like


def test_a_stateful_module_is_called_by_position() -> None:
    with pytest.raises(CaptureError, match="keyword arguments inputs; pass them by position") as caught:
        capture(Plain(lambda self, x: self.fire(inputs=x), fire=neuron.IFNode()))
    assert caught.value.where == "fire"


# Functions, methods and attributes


def test_calls_operators_methods_and_attributes_are_operations_of_their_own() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = F.relu(x) + torch.add(x, 1, alpha=2)
        return y.view(x.shape[0], -1)[:, 1:]

    graph = capture(Plain(forward)).graph
    assert operations(graph) == [
        ("function", F.relu),
        ("function", torch.add),
        ("function", operator.add),
        ("function", getattr),
        ("function", operator.getitem),
        ("method", "view"),
        ("function", operator.getitem),
    ]
    assert graph["add"].args == (Ref("x"), 1)
    assert graph["add"].kwargs == {"alpha": 2}
    assert graph["add_1"].args == (Ref("relu"), Ref("add"))
    assert graph["view"].args == (Ref("add_1"), Ref("getitem"), -1)
    assert graph["getitem_1"].args == (Ref("view"), (slice(None), slice(1, None)))


def test_a_loop_over_python_values_is_unrolled() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        for gain in self.gains:
            x = x * gain
        return x

    graph = capture(Plain(forward, gains=[2.0, 3.0])).graph
    assert [(node.target, node.args[1]) for node in graph.scheduled] == [(operator.mul, 2.0), (operator.mul, 3.0)]


def test_an_assignment_in_place_is_the_write_that_it_is() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = x * 2.0
        alias = y
        y += 1.0
        return alias * y

    graph = capture(Plain(forward)).graph
    assert operations(graph) == [("function", operator.mul), ("function", operator.iadd), ("function", operator.mul)]
    assert graph["mul_1"].args == (Ref("mul"), Ref("iadd"))


# Names and scopes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Block, ["x", "fc", "fire", "add", "output"]),
        (
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(Block())),
            ["input_1", "linear_0", "linear_1_0_fc", "lifnode_1_0_fire", "add", "output"],
        ),
        (neuron.LIFNode, ["x", "lifnode", "output"]),
        (lambda: Plain(lambda self, x: self.x(x), x=nn.ReLU()), ["x", "x_1", "output"]),
        (lambda: Plain(lambda self, x: x.add_(1).add(1) + 1), ["x", "add", "add_1", "add_2", "output"]),
        (
            lambda: Plain(lambda self, x: self.x_1(self.x(x)), x=nn.ReLU(), x_1=nn.ReLU()),
            ["x", "x_1", "x_1_1", "output"],
        ),
        (lambda: ScaledLinear(6, 6), ["x", "weight", "bias", "linear", "mul", "output"]),
        (
            lambda: nn.Sequential(ScaledLinear(6, 6)),
            ["input_1", "constant_0_weight", "constant_0_bias", "linear", "mul", "output"],
        ),
    ],
    ids=[
        "attributes",
        "numbers",
        "the network itself",
        "taken by the input",
        "methods and operators",
        "taken by a made-up name",
        "parameters",
        "parameters of a numbered module",
    ],
)
def test_names_are_those_of_the_network_and_unique(make: Callable[[], nn.Module], expected: list[str]) -> None:
    assert names(capture(make()).graph) == expected


@pytest.mark.parametrize("name", ["lambda", "a-b", "a b", "1st", "\u00e9tage", "layer\u00b2", "match", "None"])
def test_a_submodule_of_any_name_gives_an_identifier(name: str) -> None:
    net = Plain(lambda self, x: getattr(self, name)(x))
    net.add_module(name, nn.ReLU())
    graph = capture(net).graph
    assert operations(graph) == [("module", name)]
    (node,) = graph.scheduled
    compile(f"{node.name} = 0", "<identifier>", "exec")


def test_every_operation_knows_in_whose_forward_it_stands() -> None:
    graph = capture(Plain(lambda self, x: self.block(x * 2.0) - x, block=Block())).graph
    assert {node.name: node.scope for node in graph if node.kind is not OpKind.INPUT} == {
        "mul": "",
        "block_fc": "block.fc",
        "block_fire": "block.fire",
        "add": "block",
        "sub": "",
        "output": "",
    }


# Inputs and outputs


class TwoInputs(nn.Module):
    def __init__(self, *, returns: Callable[[Tensor, Tensor], Any] = lambda x, y: x + y) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, image: Tensor, mask: Tensor, gain: float = 3.0) -> Any:
        return self.returns(image * gain, mask)


def test_every_required_argument_is_an_input_and_a_default_is_a_constant() -> None:
    graph = capture(TwoInputs()).graph
    assert [(node.name, node.target) for node in graph.inputs] == [("image", 0), ("mask", 1)]
    assert graph["mul"].args == (Ref("image"), 3.0)
    assert graph["add"].args == (Ref("mul"), Ref("mask"))


class AnyInputs(nn.Module):
    def forward(self, *images: Tensor) -> Tensor:
        return images[0] * 2.0


def test_a_network_of_any_number_of_arguments_is_called_with_one() -> None:
    assert [node.name for node in capture(AnyInputs()).graph.inputs] == ["x"]


class Outputs(NamedTuple):
    spikes: Tensor
    rest: list[Tensor]


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (lambda x, y: x, Ref("mul")),
        (lambda x, y: (x, y), (Ref("mul"), Ref("mask"))),
        (lambda x, y: [x, (y,)], [Ref("mul"), (Ref("mask"),)]),
        (lambda x, y: {"spikes": x, "rest": [y, y]}, {"spikes": Ref("mul"), "rest": [Ref("mask"), Ref("mask")]}),
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_a_step_returns_what_forward_returns(returns: Any, expected: Any) -> None:
    graph = capture(TwoInputs(returns=returns)).graph
    assert graph.output.args == (expected,)
    check_output(graph)


def test_a_named_tuple_keeps_its_class() -> None:
    graph = typed(TwoInputs(returns=lambda x, y: Outputs(x, [y])), torch.zeros(4, 6), torch.zeros(4, 6))
    value = graph.output.value
    assert type(value) is Outputs
    assert value.spikes == value.rest[0] == TensorType.of(torch.zeros(4, 6))


@pytest.mark.parametrize("extra", [None, 3, "spikes", torch.float32], ids=repr)
def test_a_step_that_returns_something_else_than_tensors_is_refused(extra: Any) -> None:
    graph = capture(TwoInputs(returns=lambda x, y: {"a": x, "b": (y, extra)})).graph
    with pytest.raises(CaptureError, match="expected tensors, or tuples, lists and dicts of tensors") as caught:
        check_output(graph)
    assert repr(extra) in str(caught.value)


# Constants


def test_parameters_buffers_and_tensor_attributes_are_constants_under_their_paths() -> None:
    net = Plain(
        lambda self, x: x * self.gain + self.offset - self.table + F.linear(x, self.fc.weight),
        gain=nn.Parameter(torch.ones(6)),
        offset=nn.Buffer(torch.ones(6)),
        table=torch.ones(6),
        fc=nn.Linear(6, 6),
    )
    graph = capture(nn.Sequential(net)).graph
    constants = {node.name: node.target for node in graph if node.kind is OpKind.CONSTANT}
    assert constants == {
        "constant_0_gain": "0.gain",
        "constant_0_offset": "0.offset",
        "constant_0_table": "0.table",
        "constant_0_fc_weight": "0.fc.weight",
    }


@pytest.mark.parametrize(
    "net",
    [
        Plain(lambda self, x: x + torch.arange(6.0)),
        Plain(lambda self, x: x + self.tables[0], tables=[torch.arange(6.0)]),
    ],
    ids=["made in forward", "held in a list"],
)
def test_a_tensor_that_the_network_does_not_hold_by_name_is_copied_at_every_step(net: nn.Module) -> None:
    (made, add) = capture(net).graph.scheduled
    assert (made.kind, made.target) == (OpKind.FUNCTION, torch.clone)
    assert torch.equal(made.args[0], torch.arange(6.0))
    assert add.args == (Ref("x"), Ref(made.name))


def test_a_trainable_tensor_that_is_not_registered_is_refused_by_the_module() -> None:
    net = nn.Sequential(nn.ReLU(), Plain(lambda self, x: x * self.gains[0], gains=[torch.ones(6, requires_grad=True)]))
    with pytest.raises(CaptureError, match=r"register it as an nn\.Parameter") as caught:
        capture(net)
    assert caught.value.where == "1"


# Modules that are called several times, and states


def test_a_layer_called_twice_is_one_leaf_and_two_operations() -> None:
    captured = capture(Plain(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(6, 6)))
    assert operations(captured.graph) == [("module", "fc"), ("module", "fc")]
    assert names(captured.graph) == ["x", "fc", "fc_1", "output"]
    assert set(captured.leaves) == {"fc"}
    assert captured.graph.carried == ()


def test_a_state_is_carried_to_the_next_step() -> None:
    carried = capture(nn.Sequential(neuron.IFNode(), nn.ReLU(), neuron.LIFNode())).graph.carried
    assert set(carried) == {
        Edge("ifnode_0", "ifnode_0", 1, EdgeKind.STATE),
        Edge("lifnode_2", "lifnode_2", 1, EdgeKind.STATE),
    }


def test_calls_of_one_neuron_hand_its_state_on_within_the_step() -> None:
    graph = capture(Plain(lambda self, x: self.fire(self.fire(self.fire(x))), fire=neuron.IFNode())).graph
    assert set(graph.carried) == {
        Edge("fire", "fire_1", 0, EdgeKind.STATE),
        Edge("fire_1", "fire_2", 0, EdgeKind.STATE),
        Edge("fire_2", "fire", 1, EdgeKind.STATE),
    }


def test_a_neuron_under_two_names_is_one_neuron() -> None:
    fire = neuron.IFNode()
    graph = capture(nn.Sequential(fire, nn.ReLU(), fire)).graph
    assert operations(graph) == [("stateful", "0"), ("module", "1"), ("stateful", "0")]
    assert Edge("ifnode_0_1", "ifnode_0", 1, EdgeKind.STATE) in graph.carried


def test_neurons_that_share_a_surrogate_function_stay_independent() -> None:
    shared = surrogate.ATan()
    net = nn.Sequential(neuron.IFNode(surrogate_function=shared), neuron.IFNode(surrogate_function=shared))
    assert all(edge.source == edge.target for edge in capture(net).graph.carried)


def test_a_neuron_that_a_kept_module_contains_too_is_kept_with_it() -> None:
    fire = neuron.IFNode()
    inner = hooked(nn.Sequential(nn.Linear(6, 6), fire), "register_forward_hook")
    captured = capture(Plain(lambda self, x: self.fire(self.inner(x)), inner=inner, fire=fire))
    assert {name: leaf.kind for name, leaf in captured.leaves.items()} == {"inner": OPAQUE, "inner.1": OPAQUE}
    assert captured.leaves["inner.1"].reason == "it is a part of inner too"
    assert set(captured.graph.carried) >= {
        Edge("inner", "inner_1", 0, EdgeKind.STATE),
        Edge("inner_1", "inner", 1, EdgeKind.STATE),
    }


# What cannot be traced


def branches(self: Any, x: Tensor) -> Any:
    if x.sum() > 0:  # the line to be named
        return x
    return -x


def loops_while(self: Any, x: Tensor) -> Any:
    while x.max() > 1.0:  # the line to be named
        x = x * 0.5
    return x


def asserts(self: Any, x: Tensor) -> Any:
    assert x.min() >= 0.0  # the line to be named
    return x


def iterates(self: Any, x: Tensor) -> Any:
    return sum(row for row in x)  # the line to be named


def reads_a_float(self: Any, x: Tensor) -> Any:
    return x * float(x.max())  # the line to be named


def reads_an_int(self: Any, x: Tensor) -> Any:
    return x[:, : int(x.argmax())]  # the line to be named


def helper(x: Tensor) -> bool:
    return not x.any()  # the line to be named


def branches_in_a_helper(self: Any, x: Tensor) -> Any:
    return x if helper(x) else -x


UNTRACEABLE: dict[Forward, Callable[..., Any]] = {
    forward: forward for forward in (branches, loops_while, asserts, iterates, reads_a_float, reads_an_int)
} | {branches_in_a_helper: helper}


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda forward: forward.__name__)
def test_what_depends_on_data_is_refused_by_module_and_line(forward: Forward) -> None:
    lines, first = inspect.getsourcelines(UNTRACEABLE[forward])
    line = first + next(number for number, text in enumerate(lines) if "the line to be named" in text)
    body = nn.ModuleDict({"fc": nn.Linear(6, 6), "inner": Plain(forward)})
    with pytest.raises(CaptureError, match=r"cannot trace one step of body\.inner") as caught:
        capture(Plain(lambda self, x: self.body["inner"](self.body["fc"](x)), body=body))
    assert caught.value.where == "body.inner"
    assert f"{Path(__file__).name}:{line}: " in str(caught.value)


def test_the_network_itself_is_named_as_such() -> None:
    with pytest.raises(CaptureError, match="cannot trace one step of the network itself") as caught:
        capture(Plain(branches))
    assert caught.value.where is None
    assert Path(__file__).name in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        Path("/home/user/networks/vgg.py"),
        Path(inspect.__file__).parent / "site-packages" / "networks" / "vgg.py",
        Path(torch.__file__).parent.with_name("torchvision") / "vgg.py",
    ],
    ids=["a script", "an installed package", "a package named like torch"],
)
def test_the_line_is_named_wherever_the_network_was_written(file: Path) -> None:
    source = """
from torch import nn
class Net(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x
"""
    defined: dict[str, Any] = {"__name__": "written_elsewhere"}
    exec(compile(source, str(file), "exec"), defined)
    with pytest.raises(CaptureError) as caught:
        capture(defined["Net"]())
    assert f"at {file}:5: " in str(caught.value)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x * x.max().item(),
        lambda self, x: x * x.max().tolist(),
        lambda self, x: x[x > 0.0].sum() * x,
        lambda self, x: x.nonzero().sum() * x,
    ],
    ids=["item", "tolist", "a mask as an index", "nonzero"],
)
def test_a_number_or_size_that_depends_on_data_is_refused_by_module(forward: Forward) -> None:
    with pytest.raises(CaptureError) as caught:
        typed(nn.Sequential(nn.ReLU(), Plain(forward)))
    assert caught.value.where == "1"


# Shapes, dtypes and effects by propagation


def test_every_node_gets_the_type_of_what_it_yields() -> None:
    graph = typed(Plain(lambda self, x: (self.fc(x) > 0.0).argmax(1), fc=nn.Linear(6, 3)))
    assert graph.facts == {"shapes"}
    assert {node.name: str(node.value) for node in graph} == {
        "x": "float32[4, 6]",
        "fc": "float32[4, 3]",
        "gt": "bool[4, 3]",
        "argmax": "int64[4]",
        "output": "int64[4]",
    }


def test_strides_are_those_that_torch_gives() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    net.to(memory_format=torch.channels_last)
    image = torch.zeros(4, 3, 9, 9)
    expected = [TensorType.of(value) for value in (image, net[0](image), net(image), net(image))]
    assert expected[1].stride == (392, 1, 56, 8)
    assert [node.value for node in typed(net, image)] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_of_another_dtype_has_values_and_states_of_that_dtype(dtype: torch.dtype) -> None:
    graph = typed(nn.Sequential(nn.Linear(6, 3), neuron.LIFNode()).to(dtype), torch.zeros(4, 6, dtype=dtype))
    expected = TensorType.of(torch.zeros(4, 3, dtype=dtype))
    assert graph["lifnode_1"].value == expected
    assert graph["lifnode_1"].state == (expected,)


class TwoStates(neuron.StatefulModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_state("a", 0.0)
        self.register_state("b", 1.0)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (inputs[0], states[0] + states[1]), (states[1], inputs[0])


def test_several_outputs_are_a_tuple_and_states_stand_in_their_order() -> None:
    graph = typed(TwoStates())
    one = TensorType.of(torch.zeros(4, 6))
    assert (graph["twostates"].value, graph["twostates"].state) == ((one, one), (one, one))


def test_values_keep_their_structure_and_numbers_stay_numbers() -> None:
    graph = typed(Plain(lambda self, x: (x.shape, x.size(0), x.chunk(2, 1), x.max(1)[1], x.dtype)))
    assert graph["getattr"].value == (4, 6)
    assert graph["size"].value == 4
    assert graph["chunk"].value == (TensorType((4, 3), (6, 1), torch.float32, torch.device("cpu")),) * 2
    assert [str(leaf) for leaf in tensor_types(graph["max"].value)] == ["float32[4]", "int64[4]"]
    assert graph["getattr_1"].value is torch.float32


def test_a_call_that_yields_nothing_has_the_value_of_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.log(x)
        return x

    graph = typed(Plain(forward, log=hooked(Plain(lambda self, x: None), "register_forward_hook")))
    assert graph["log"].value == ()


def test_a_kept_modules_state_is_what_it_holds_beside_parameters_and_buffers() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.kept = [x + self.kept[0]]
        return self.kept[0]

    graph = typed(Plain(forward, kept=[torch.zeros(4, 6)]))
    assert graph["plain"].state == [TensorType.of(torch.zeros(4, 6))]


def test_what_shares_memory_with_what_it_reads_or_with_its_state_is_known() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        view = x.view(-1)
        return view.clone(), x[0], torch.relu(view), self.integrate(x), self.fire(x)

    graph = typed(Plain(forward, integrate=neuron.NonSpikingIFNode(), fire=neuron.IFNode()))
    assert {node.name: node.shares for node in graph if node.shares} == {
        "view": ("x",),
        "getitem": ("x",),
        "integrate": ("integrate",),
    }


def fails_on(net: nn.Module, *inputs: Tensor) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        typed(net, *inputs)
    return caught.value


def test_inputs_that_do_not_fit_are_refused_by_the_first_module_that_they_do_not_fit() -> None:
    error = fails_on(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(7, 3))))
    assert error.where == "1.0"
    assert "1.0 fails on inputs float32[4, 6]: " in str(error)


def test_an_operation_that_fails_is_refused_by_the_module_in_whose_forward_it_stands() -> None:
    error = fails_on(nn.Sequential(nn.ReLU(), Plain(lambda self, x: x @ x)))
    assert error.where == "1"
    assert "fails on inputs float32[4, 6], float32[4, 6]: " in str(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_a_layer_of_another_dtype_than_its_input_is_refused(dtype: torch.dtype) -> None:
    assert fails_on(nn.Sequential(nn.Linear(6, 3)), torch.zeros(4, 6, dtype=dtype)).where == "0"


def test_a_neuron_that_gets_integers_is_refused_by_name() -> None:
    error = fails_on(nn.Sequential(nn.Identity(), neuron.LIFNode()), torch.zeros(4, 6, dtype=torch.int64))
    assert error.where == "1"


def test_a_kept_module_that_needs_data_is_run_on_zeros() -> None:
    net = hooked(Plain(lambda self, x: x * 2.0 if x.sum() >= 0.0 else x[:1]), "register_forward_hook")
    assert typed(net)["plain"].value == TensorType.of(torch.zeros(4, 6))


def test_a_kept_module_that_fails_on_zeros_is_refused_by_name() -> None:
    net = hooked(Plain(lambda self, x: x * 2.0 if x.sum() > 0.0 else x @ x), "register_forward_hook")
    assert "1 fails on zeros of its input's shape" in str(fails_on(nn.Sequential(nn.ReLU(), net)))


def test_a_network_that_cannot_be_copied_is_captured_or_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with self.lock:
            return x * 2.0

    with suppress(CaptureError):
        assert typed(Plain(forward, lock=threading.Lock())).output.value == TensorType.of(torch.zeros(4, 6))


NOTHING = Effects()
RANDOM = Effects(random=True)
MUTATES = Effects(mutates=True)
WRITES = Effects(mutates=True, writes_operand=True)
STATISTICS = Effects(statistics=True)
TRACKED = Effects(mutates=True, statistics=True)
EFFECTS: dict[str, tuple[Callable[[], nn.Module], Effects]] = {
    "a layer": (lambda: nn.Linear(6, 6), NOTHING),
    "a neuron": (neuron.LIFNode, NOTHING),
    "dropout": (lambda: nn.Dropout(0.5), RANDOM),
    "dropout in eval mode": (lambda: nn.Dropout(0.5).eval(), NOTHING),
    "dropout of nothing": (lambda: nn.Dropout(0.0), NOTHING),
    "functional dropout": (lambda: Plain(lambda self, x: F.dropout(x, 0.5, self.training)), RANDOM),
    "functional dropout in eval mode": (
        lambda: Plain(lambda self, x: F.dropout(x, 0.5, self.training)).eval(),
        NOTHING,
    ),
    "numbers like the input's": (lambda: Plain(lambda self, x: torch.rand_like(x)), RANDOM),
    "a drawn spike": (lambda: Plain(lambda self, x: x.bernoulli()), RANDOM),
    "noise in place": (lambda: Plain(lambda self, x: x.normal_()), Effects(True, True, True)),
    "batch norm": (lambda: nn.BatchNorm1d(6), TRACKED),
    "batch norm with a cumulative average": (lambda: nn.BatchNorm1d(6, momentum=None), TRACKED),
    "batch norm in eval mode": (lambda: nn.BatchNorm1d(6).eval(), NOTHING),
    "batch norm that tracks nothing": (lambda: nn.BatchNorm1d(6, track_running_stats=False), STATISTICS),
    "batch norm that tracks nothing in eval mode": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(),
        STATISTICS,
    ),
    "functional batch norm": (lambda: Plain(lambda self, x: F.batch_norm(x, None, None, training=True)), STATISTICS),
    "an activation in place": (lambda: nn.ReLU(inplace=True), WRITES),
    "a method in place": (lambda: Plain(lambda self, x: x.relu_()), WRITES),
    "a function in place": (lambda: Plain(lambda self, x: F.relu(x, inplace=True)), WRITES),
    "a spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), MUTATES),
    "a spectral norm in eval mode": (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)).eval(), NOTHING),
    "a kept module that writes its buffer": (StepTotal, MUTATES),
    "a kept module that writes its input": (
        lambda: hooked(Plain(lambda self, x: x.add_(1.0)), "register_forward_hook"),
        WRITES,
    ),
    "a kept module that writes what it made itself": (
        lambda: hooked(Plain(lambda self, x: x.clone().add_(1.0)), "register_forward_hook"),
        NOTHING,
    ),
    "a kept module that draws": (lambda: Plain(lambda self, x: x + torch.rand(6)), RANDOM),
    "a kept module that draws and needs data": (
        lambda: hooked(Plain(lambda self, x: x + torch.rand(6) if x.sum() >= 0.0 else x), "register_forward_hook"),
        RANDOM,
    ),
}


@pytest.mark.parametrize("what", EFFECTS)
def test_effects_are_what_a_step_was_seen_to_do(what: str) -> None:
    make, effects = EFFECTS[what]
    (node,) = (node for node in typed(make()) if node.kind not in (OpKind.INPUT, OpKind.OUTPUT))
    assert node.effects == effects
