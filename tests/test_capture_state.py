"""What capture never makes of a step: a constant of what changes from step to step, or a change in the network."""

from __future__ import annotations

import itertools
import operator
import pickle
import random
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snncompile
from snncompile import functional, neuron, surrogate
from snncompile.capture import Captured, RandomState, capture
from snncompile.errors import CaptureError
from snncompile.ir import Edge, EdgeKind, OpKind, Verdict

from .capturing import (
    Block,
    Forward,
    LoudNeuron,
    Plain,
    StepTotal,
    hooked,
    keeps_output,
    operations,
    typed,
    with_own_forward,
    zeros,
)
from .contract import step_loop


@pytest.fixture(autouse=True)
def in_finite_time() -> Iterator[None]:
    """Capture repeats the trace until there is nothing left to find, so a mistake may be an endless loop."""

    def stop(*_: Any) -> None:
        pytest.fail("no end after 20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def said(captured: Captured) -> dict[str, str]:
    """Qualified module name -> why it is kept as it is; every decision is of that form."""
    head = "kept as it is and run step by step: "
    for decision in captured.decisions:
        assert (decision.pass_name, decision.verdict) == ("capture", Verdict.NOTE)
        assert decision.reason.startswith(head)
    return {decision.node: decision.reason.removeprefix(head) for decision in captured.decisions}


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def assert_same_as_step_loop(make: Callable[[], nn.Module], *, gradients: bool = False) -> None:
    """Outputs, and gradients where asked for, over five steps; `make` builds the same network twice."""
    x_seq = torch.randn(5, 4, 6)
    results: list[tuple[Tensor, list[Tensor | None]]] = []
    for run in (step_loop, optimised):
        seed_all(1)
        net = make()
        seed_all(2)
        with torch.set_grad_enabled(gradients):
            y = run(net, x_seq)
        if gradients:
            y.sum().backward()
        results.append((y.detach(), [parameter.grad for parameter in net.parameters()]))
    (expected, expected_gradients), (got, got_gradients) = results
    assert not torch.equal(expected[0], expected[1]), "steps are alike, so this test shows nothing"
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_gradients, expected_gradients)


def optimised(net: nn.Module, x_seq: Tensor) -> Tensor:
    y: Tensor = snncompile.optimize(net, x_seq.shape[0], schedule="breadth-first")(x_seq)
    return y


def assert_same_or_refused(make: Callable[[], nn.Module], *, gradients: bool = False) -> None:
    """Nothing is guessed: the step loop's result, or an error that says why not."""
    with suppress(CaptureError):
        assert_same_as_step_loop(make, gradients=gradients)


# Modules that are kept as they are, with the reason


def counts_calls(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return x if self.calls % 2 else -x


def appends(self: Any, x: Tensor) -> Any:
    self.seen.append(x)
    return x + sum(self.seen)


def writes_attribute(self: Any, x: Tensor) -> Any:
    self.trace.mul_(0.5).add_(x.mean(0))
    return x + self.trace


def adds_to_attribute(self: Any, x: Tensor) -> Any:
    self.trace += 1.0
    return x + self.trace


def writes_with_out(self: Any, x: Tensor) -> Any:
    torch.add(x[0], 1.0, out=self.trace)
    return x + self.trace


def assigns_attribute(self: Any, x: Tensor) -> Any:
    self.trace = self.trace * 0.5 + x.mean(0)
    return x + self.trace


def assigns_item(self: Any, x: Tensor) -> Any:
    self.trace[0] = x.mean()
    return x + self.trace


def changes_child(self: Any, x: Tensor) -> Any:
    self.fc.calls = getattr(self.fc, "calls", 0) + 1
    return self.fc(x) * self.fc.calls


def reads_state(self: Any, x: Tensor) -> Any:
    return self.fire(x) + self.fire.v


def leaks(self: Any, x: Tensor) -> Any:
    y = self.fire(x)
    self.fire.v = self.fire.v * 0.5
    return y


def resets_child(self: Any, x: Tensor) -> Any:
    self.fire.reset()
    return self.fire(x)


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a hook": (lambda: hooked(nn.ReLU(), "register_forward_hook"), "it has hooks, which must see every step"),
    "a forward of the instance": (lambda: with_own_forward(nn.ReLU()), "its forward was replaced on the instance"),
    "a neuron's own forward": (LoudNeuron, "LoudNeuron overrides forward, so its step function may differ"),
    "a counter": (lambda: Plain(counts_calls, calls=0), "'calls' of 1 changes at every step"),
    "a list that grows": (lambda: Plain(appends, seen=[]), "'seen' of 1 changes at every step"),
    "an attribute of a child": (
        lambda: Plain(changes_child, fc=nn.Linear(6, 6)),
        "'calls' of 1.fc changes at every step",
    ),
    "a tensor attribute, written": (
        lambda: Plain(writes_attribute, trace=zeros()),
        "it writes into '1.trace' at every step",
    ),
    "a tensor attribute, added to": (
        lambda: Plain(adds_to_attribute, trace=zeros()),
        "'trace' of 1 changes at every step",
    ),
    "a buffer, written": (
        lambda: Plain(writes_attribute, trace=nn.Buffer(zeros())),
        "it writes into '1.trace' at every step",
    ),
    "a buffer, added to": (
        lambda: Plain(adds_to_attribute, trace=nn.Buffer(zeros())),
        "it writes into '1.trace' at every step",
    ),
    "a buffer, as out=": (
        lambda: Plain(writes_with_out, trace=nn.Buffer(zeros())),
        "it writes into '1.trace' at every step",
    ),
    "a buffer, item by item": (
        lambda: Plain(assigns_item, trace=nn.Buffer(zeros())),
        "it writes into '1.trace' at every step",
    ),
    "random numbers of torch": (
        lambda: Plain(lambda self, x: x + torch.rand(6)),
        "it draws random numbers from no input",
    ),
    "random numbers of Python": (
        lambda: Plain(lambda self, x: x * random.random()),
        "it draws random numbers from no input",
    ),
    "random numbers of NumPy": (
        lambda: Plain(lambda self, x: x * np.random.rand()),
        "it draws random numbers from no input",
    ),
    "a state read": (
        lambda: Plain(reads_state, fire=neuron.IFNode()),
        "it reads 'v' of 1.fire, which changes from step to step",
    ),
    "a state changed": (
        lambda: Plain(leaks, fire=neuron.IFNode()),
        "it reads 'v' of 1.fire, which changes from step to step",
    ),
    "a state reset": (
        lambda: Plain(resets_child, fire=neuron.IFNode()),
        "'_states' of 1.fire changes at every step",
    ),
}


# Modules that keep a tensor from step to step, in an attribute or a buffer that they assign

CARRIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a kept output": (lambda: Plain(keeps_output, previous=None), "1.previous"),
    "a tensor attribute, assigned": (lambda: Plain(assigns_attribute, trace=zeros()), "1.trace"),
    "a buffer, assigned": (lambda: Plain(assigns_attribute, trace=nn.Buffer(zeros())), "1.trace"),
}


def around(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), module, neuron.IFNode(v_threshold=0.5))


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_as_it_is_and_said_so(what: str) -> None:
    make, reason = KEPT[what]
    captured = capture(around(make()))
    assert operations(captured.graph) == [("module", "0"), ("opaque", "1"), ("stateful", "2")]
    assert said(captured) == {"1": reason}
    assert captured.leaves["1"].reason == reason
    kept = captured.graph.scheduled[1].name
    assert Edge(kept, kept, 1, EdgeKind.STATE) in captured.graph.carried


@pytest.mark.parametrize("what", CARRIED)
def test_a_tensor_kept_from_step_to_step_is_loaded_and_stored(what: str) -> None:
    make, path = CARRIED[what]
    captured = capture(around(make()))
    load, store = (next(n for n in captured.graph if n.kind is kind) for kind in (OpKind.LOAD, OpKind.STORE))
    assert (load.target, store.target) == (path, path)
    assert captured.registers == {path}
    assert said(captured) == {}
    assert Edge(load.name, store.name, 0, EdgeKind.STATE) in captured.graph.carried
    assert Edge(store.name, load.name, 1, EdgeKind.STATE) in captured.graph.carried


@pytest.mark.parametrize("what", CARRIED)
def test_what_is_carried_computes_what_the_step_loop_computes(what: str) -> None:
    make, _ = CARRIED[what]
    assert_same_as_step_loop(lambda: around(make()))
    assert_same_as_step_loop(lambda: around(make()), gradients=True)


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_computes_what_the_step_loop_computes(what: str) -> None:
    make, _ = KEPT[what]
    assert_same_as_step_loop(lambda: around(make()))


@pytest.mark.parametrize(
    ("what", "ordered"),
    [
        ("a hook", True),
        ("a forward of the instance", True),
        ("random numbers of torch", True),
        ("a counter", False),
        ("a buffer, written", False),
        ("a state read", False),
    ],
)
def test_what_others_may_notice_also_keeps_its_order_among_others(what: str, ordered: bool) -> None:
    make, _ = KEPT[what]
    assert capture(make()).leaves[""].ordered is ordered


def test_a_reason_names_what_the_user_wrote() -> None:
    net = Plain(lambda self, x: self.traces[0].mul_(0.5).add_(x.mean(0)) + x, traces=[zeros()])
    assert "traces" in said(capture(net))[""]


def test_random_numbers_are_blamed_on_the_innermost_module_that_draws_them() -> None:
    draws = Plain(lambda self, x: x + torch.rand(6))
    captured = capture(Plain(lambda self, x: self.fc(self.draws(x)), draws=draws, fc=nn.Linear(6, 6)))
    assert said(captured) == {"draws": "it draws random numbers from no input"}
    assert captured.traced == ("",)


def test_a_module_that_reads_the_state_of_one_elsewhere_keeps_it_too_and_both_keep_their_order() -> None:
    fire = neuron.IFNode()
    reader = Plain(lambda self, x: x + self.other[0].v, other=(fire,))
    captured = capture(nn.Sequential(fire, reader))
    assert said(captured) == {
        "0": "its state is read by 1",
        "1": "it reads 'v' of 0, which changes from step to step",
    }
    assert captured.leaves["0"].ordered
    assert captured.leaves["1"].ordered


def test_a_module_that_changes_one_elsewhere_is_kept_with_all_around_both() -> None:
    counted = nn.Linear(6, 6)

    def counts(self: Any, x: Tensor) -> Any:
        self.other[0].calls = getattr(self.other[0], "calls", 0) + 1
        return x

    net = nn.Sequential(nn.ReLU(), nn.Sequential(counted, Plain(counts, other=(counted,))))
    assert said(capture(net)) == {"1": "'calls' of 1.0 changes at every step"}


def test_random_numbers_drawn_for_an_input_are_an_operation() -> None:
    captured = capture(Plain(lambda self, x: torch.bernoulli(torch.rand_like(x))))
    assert operations(captured.graph) == [("function", torch.rand_like), ("function", torch.bernoulli)]
    assert captured.decisions == ()


# Python state that changes from step to step never becomes a constant


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class CountsOnTheClass(nn.Module):
    calls: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        type(self).calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * self.calls


def counter(step: Callable[[Any], Any], **attributes: Any) -> Callable[[], nn.Module]:
    """A module that multiplies by what `step` of it gives at each call."""
    return lambda: Plain(lambda self, x: x * step(self), **{name: make() for name, make in attributes.items()})


def count_up(held: Any, key: Any) -> Any:
    held[key] += 1
    return held[key]


def set_up(held: Any, name: str) -> Any:
    setattr(held, name, getattr(held, name) + 1)
    return getattr(held, name)


def closure() -> nn.Module:
    calls = 0

    def forward(self: Any, x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return x * calls

    return Plain(forward)


COUNTERS: dict[str, Callable[[], nn.Module]] = {
    "an attribute": counter(lambda self: set_up(self, "calls"), calls=int),
    "an attribute that forward makes": counter(
        lambda self: self.__dict__.setdefault("calls", []).append(0) or len(self.calls)
    ),
    "an item of a list": counter(lambda self: count_up(self.held, 0), held=lambda: [0]),
    "an item of a dict": counter(lambda self: count_up(self.held, "calls"), held=lambda: {"calls": 0}),
    "deep inside": counter(
        lambda self: count_up(self.held["a"][1].b, 0), held=lambda: {"a": (1, SimpleNamespace(b=[0]))}
    ),
    "a growing set": counter(lambda self: self.held.add(len(self.held)) or len(self.held), held=set),
    "an object": counter(lambda self: set_up(self.held, "calls"), held=lambda: SimpleNamespace(calls=0)),
    "an object with slots": counter(lambda self: set_up(self.held, "calls"), held=Slotted),
    "an array of NumPy": counter(lambda self: float(count_up(self.held, 0)), held=lambda: np.zeros(1)),
    "a byte array": counter(lambda self: count_up(self.held, 0), held=lambda: bytearray(1)),
    "an iterator": counter(lambda self: next(self.held), held=lambda: itertools.count(1)),
    "the class": CountsOnTheClass,
    "a closure": closure,
    "a generator of Python's": counter(lambda self: self.held.random(), held=lambda: random.Random(0)),
    "a generator of NumPy's": counter(lambda self: self.held.random(), held=lambda: np.random.default_rng(0)),
    "a generator of torch's": counter(
        lambda self: torch.rand(6, generator=self.held), held=lambda: torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("where", COUNTERS)
def test_a_count_of_calls_is_never_traced_into_a_constant(where: str) -> None:
    assert_same_or_refused(COUNTERS[where])


def test_a_branch_on_a_count_of_calls_is_never_traced_into_one_side() -> None:
    assert_same_as_step_loop(lambda: nn.Sequential(Plain(counts_calls, calls=0)))


@pytest.mark.parametrize("write", ["view", "slice", "data", "foreach", "data assigned"])
def test_a_buffer_written_in_a_roundabout_way_is_never_taken_for_a_constant(write: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        if write == "view":
            self.trace.view(2, 3).add_(1.0)
        elif write == "slice":
            self.trace[:3].add_(1.0)
        elif write == "data":
            self.trace.data.add_(1.0)
        elif write == "foreach":
            torch._foreach_add_([self.trace], 1.0)
        else:
            self.trace.data = self.trace.data + 1.0
        return x + self.trace

    assert_same_or_refused(lambda: Plain(forward, trace=nn.Buffer(zeros())))


@pytest.mark.parametrize("write", [operator.iand, operator.ior, operator.ixor], ids=lambda write: write.__name__)
def test_a_mask_changed_in_place_changes_under_every_name(write: Callable[[Any, Any], Any]) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        mask = x > 0.0
        alias = mask
        mask = write(mask, x[:, :1] > 0.5)
        return alias.float() + mask.float()

    assert_same_or_refused(lambda: Plain(forward))


# What surrounds an operation is part of it


class Rectangle(torch.autograd.Function):
    """A step with the gradient of a box."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return grad * (x.abs() < 0.5).to(x.dtype)


def without_gradient(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        gate = torch.sigmoid(x @ self.fc.weight)
    return self.fc(x) * gate


def gates_without_gradient(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        gate = self.gate(x)
    return self.fc(x) * gate


def in_lower_precision(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.fc(x)
    return y.float()


SURROUNDED: dict[str, Callable[[], nn.Module]] = {
    "a surrogate function of ours": lambda: Plain(
        lambda self, x: self.spike(self.fc(x)), fc=nn.Linear(6, 6), spike=surrogate.ATan()
    ),
    "an autograd function of the user's": lambda: Plain(
        lambda self, x: Rectangle.apply(self.fc(x)),  # type: ignore[no-untyped-call]
        fc=nn.Linear(6, 6),
    ),
    "no_grad": lambda: Plain(without_gradient, fc=nn.Linear(6, 6)),
    "no_grad around a layer": lambda: Plain(gates_without_gradient, gate=nn.Linear(6, 6), fc=nn.Linear(6, 6)),
    "autocast": lambda: Plain(in_lower_precision, fc=nn.Linear(6, 6)),
    "detach": lambda: Plain(lambda self, x: self.fc(x) * self.fc(x).detach(), fc=nn.Linear(6, 6)),
}


@pytest.mark.parametrize("what", SURROUNDED)
def test_gradients_are_those_that_forward_asks_for(what: str) -> None:
    assert_same_or_refused(SURROUNDED[what], gradients=True)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x * 2.0 if isinstance(x, Tensor) else x * 3.0,
        lambda self, x: x * 2.0 if torch.is_tensor(x) else x * 3.0,
    ],
    ids=["isinstance", "is_tensor"],
)
def test_a_forward_that_asks_whether_its_input_is_a_tensor_hears_the_truth(forward: Forward) -> None:
    assert_same_or_refused(lambda: Plain(forward))


# Capture changes nothing


HELD: dict[type, Callable[[Any], Any]] = {
    SimpleNamespace: vars,
    Slotted: lambda value: value.calls,
    random.Random: lambda value: value.getstate(),
    np.random.Generator: lambda value: value.bit_generator.state,
    torch.Generator: lambda value: value.get_state().tolist(),
    np.ndarray: lambda value: value.tolist(),
}


def picture(value: Any) -> Any:
    """A value with all that it holds, to compare with a later one."""
    if isinstance(value, Tensor):
        grad = None if not value.is_leaf or value.grad is None else id(value.grad)
        return id(value), value.requires_grad, grad, value.dtype, value.detach().tolist()
    if isinstance(value, (nn.Module, type)):
        return id(value)
    if isinstance(value, Mapping):
        return {key: picture(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return type(value), [picture(item) for item in value]
    for cls, held in HELD.items():
        if isinstance(value, cls):
            return id(value), picture(held(value))
    return repr(value)


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Nothing in the network, and no generator of random numbers, may differ afterwards."""

    def everything() -> dict[tuple[str, str], Any]:
        held = {(name, key): picture(value) for name, part in net.named_modules() for key, value in vars(part).items()}
        generators = {
            ("random numbers", "torch"): torch.get_rng_state().tolist(),
            ("random numbers", "Python"): random.getstate(),
            ("random numbers", "NumPy"): pickle.dumps(np.random.get_state()),
        }
        return held | generators

    before = everything()
    yield
    after = everything()
    differing = [place for place in before.keys() | after.keys() if before.get(place) != after.get(place)]
    assert differing == []


def freezes_batch_norm(self: Any, x: Tensor) -> Any:
    self.norm.eval()
    return self.norm(x)


UNTOUCHED: dict[str, Callable[[], nn.Module]] = {
    **{what: make for what, (make, _) in (KEPT | CARRIED).items()},
    **{f"a count in {where}": make for where, make in COUNTERS.items()},
    "a block": Block,
    "a surrogate function": surrogate.Sigmoid,
    "dropout": lambda: nn.Dropout(0.5),
    "numbers like the input's": lambda: Plain(lambda self, x: torch.rand_like(x)),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm that forward freezes": lambda: Plain(freezes_batch_norm, norm=nn.BatchNorm1d(6)),
    "a spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "an activation in place": lambda: nn.ReLU(inplace=True),
    "a tensor made in forward": lambda: Plain(lambda self, x: x + torch.arange(6.0)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", UNTOUCHED)
def test_capture_and_propagation_leave_the_network_untouched(what: str, mode: str) -> None:
    net = nn.Sequential(nn.Linear(6, 6), UNTOUCHED[what](), neuron.LIFNode()).train(mode == "train")
    with untouched(net), suppress(CaptureError):
        capture(net)
    with untouched(net), suppress(CaptureError), RandomState():
        typed(net)


def test_states_and_gradients_of_a_network_in_use_stay_where_they_are() -> None:
    net: Any = nn.Sequential(Block(), Plain(keeps_output, previous=None), Plain(reads_state, fire=neuron.IFNode()))
    functional.multi_step_forward(torch.randn(3, 4, 6), net).sum().backward()
    assert net[0].fire.v.grad_fn is not None
    with untouched(net):
        typed(net)


def test_a_capture_that_fails_leaves_the_network_untouched() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.calls += 1
        self.seen.append(x)
        self.trace.add_(torch.rand(6))
        y = self.fire(x) * random.random()
        return y if y.sum() > 0 else x

    net = nn.Sequential(Plain(forward, calls=0, seen=[], trace=zeros(), fire=neuron.IFNode()))
    with untouched(net), pytest.raises(CaptureError):
        capture(net)


def test_a_network_that_is_refused_for_its_inputs_is_left_untouched() -> None:
    net = nn.Sequential(StepTotal(), nn.Dropout(0.5), nn.Linear(7, 3), neuron.IFNode())
    with untouched(net), pytest.raises(CaptureError):
        typed(net)


def test_hooks_see_nothing_of_a_capture() -> None:
    calls: list[Any] = []
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), neuron.IFNode()))
    for module in net.modules():
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    with untouched(net):
        typed(net)
    assert calls == []


def test_a_captured_network_still_runs() -> None:
    net: Any = around(Plain(counts_calls, calls=0))
    expected = step_loop(around(Plain(counts_calls, calls=0)), torch.zeros(1, 4, 6))
    capture(net)
    assert step_loop(net, torch.zeros(1, 4, 6)).shape == expected.shape
    assert net[1].calls == 1
