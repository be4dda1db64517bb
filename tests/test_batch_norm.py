"""Batch norm in train mode over a chunk of steps is batch norm called once a step.

`per_step` is the naive twin: it calls the module on one step after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import VerifyError, neuron
from snncompile.codegen.batch_norm import _updated_at_once, _updated_in_order, batch_norm_by_step
from snncompile.codegen.kernels import per_step
from snncompile.ir import Batching, TensorType, TimeCoupling, verify_graph
from snncompile.ir.step_statistics import fold_channels_obstacle
from snncompile.torch_private import TorchDispatchMode

from .contract import step_loop, twin

LENGTHS = (1, 2, 3, 7)
AT_ONCE = "note: statistics of each step, computed for the whole chunk at once"

# Shapes of one step, `[N, ch, *]`. Vectors of 8 or 16 floats leave a rest in most of them.
SHAPES: dict[str, tuple[int, ...]] = {
    "vectors": (5, 17),
    "one feature": (5, 1),
    "many features": (3, 200),
    "sequences": (3, 5, 9),
    "sequences of one": (4, 6, 1),
    "images": (4, 3, 5, 7),
    "wide images": (2, 20, 16, 16),
    "one image": (1, 3, 4, 5),
    "one channel": (4, 1, 5, 7),
    "one pixel": (4, 19, 1, 1),
    "one image of one channel": (1, 1, 5, 7),
    "volumes": (2, 3, 3, 4, 5),
}


def make_norm(shape: tuple[int, ...], **options: Any) -> Any:
    """A batch norm for such steps, in train mode, with nothing left at its default."""
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = cls(shape[1], **options)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.1, 3.0)
    return norm


def make_chunk(shape: tuple[int, ...], steps: int, *, channels_last: bool = False) -> Tensor:
    value = torch.randn(steps, *shape) * 3.0 + 1.0
    return value.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else value


def assert_same_step_by_step(norm: Any, value: Tensor, calls: int = 2) -> None:
    """Bits of outputs and running statistics, strides of steps; over several chunks."""
    reference = copy.deepcopy(norm)
    for _ in range(calls):
        got, expected = batch_norm_by_step(norm, value), per_step(len(value), reference, value)
        assert torch.equal(got, expected)
        assert got.dtype is expected.dtype
        assert got[0].stride() == expected[0].stride()
    for (name, buffer), other in zip(norm.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def obstacle(norm: Any, value: Tensor) -> str:
    return fold_channels_obstacle(norm, TensorType.of(value[0]))


# The kernel against the naive twin


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_running_statistics_have_the_step_loops_bits(name: str, steps: int) -> None:
    shape = SHAPES[name]
    for channels_last in (False, True) if len(shape) > 3 else (False,):
        value = make_chunk(shape, steps, channels_last=channels_last)
        assert not obstacle(make_norm(shape), value)
        assert_same_step_by_step(make_norm(shape), value)


BARE = {"affine": False, "track_running_stats": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "another momentum": {"momentum": 0.37},
    "a momentum of one": {"momentum": 1.0},
    "a momentum of zero": {"momentum": 0.0},
    "a cumulative average": {"momentum": None},
    "another epsilon": {"eps": 0.3},
    "no affine part": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "neither": BARE,
}


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_what_it_means_in_the_step_loop(name: str, steps: int) -> None:
    for shape in ((5, 17), (4, 3, 5, 7)):
        norm = make_norm(shape, **OPTIONS[name])
        assert_same_step_by_step(norm, make_chunk(shape, steps), calls=3)
        if not norm.track_running_stats:
            assert_same_step_by_step(norm.eval(), make_chunk(shape, steps))


def test_statistics_switched_off_after_construction_stay_as_they_are() -> None:
    norm = make_norm((4, 3, 5, 7))
    norm.track_running_stats = False
    before = norm.running_mean.clone()
    assert_same_step_by_step(norm, make_chunk((4, 3, 5, 7), 3))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("name", ["vectors", "images", "one channel"])
def test_dtypes(name: str, parameters: torch.dtype | None, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and parameters is not None:
        return  # torch refuses it
    for channels_last in (False, True) if name == "images" else (False,):
        value = make_chunk(SHAPES[name], 3, channels_last=channels_last).to(dtype)
        assert_same_step_by_step(make_norm(SHAPES[name]).to(parameters or dtype), value)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("name", ["images", "one channel", "one image", "volumes"])
def test_gradients(name: str, options: dict[str, Any], channels_last: bool, steps: int) -> None:
    norm, value = make_norm(SHAPES[name], **options), make_chunk(SHAPES[name], steps, channels_last=channels_last)
    reference = copy.deepcopy(norm)
    leaf, other = value.clone().requires_grad_(), value.clone().requires_grad_()
    weights = torch.rand(value.shape)
    (batch_norm_by_step(norm, leaf) * weights).sum().backward()
    (per_step(steps, reference, other) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-5)
    for got, expected in zip(norm.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_running_statistics_may_change_between_a_single_step_and_its_backward() -> None:
    # It keeps them for backward without need; the library's own updates do not hinder that.
    norm, value = make_norm((4, 3, 5, 7)), make_chunk((4, 3, 5, 7), 4).requires_grad_()
    reference, other = copy.deepcopy(norm), value.detach().clone().requires_grad_()
    single, rest = batch_norm_by_step(norm, value[:1]), batch_norm_by_step(norm, value[1:])
    (single.square().sum() + rest.square().sum()).backward()
    per_step(4, reference, other).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_second_order_gradients() -> None:
    norm = make_norm((3, 2, 2, 2)).double()
    value = make_chunk((3, 2, 2, 2), 2).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: batch_norm_by_step(norm, value), value)


def test_a_large_and_distant_value_is_normalised_as_in_the_step_loop() -> None:
    value = make_chunk((4, 3, 5, 7), 3)
    value[1] = 1e4 + 1e-2 * value[1]
    assert_same_step_by_step(make_norm((4, 3, 5, 7)), value)
    value[2, 0, 1, 0, 0] = float("nan")
    norm = make_norm((4, 3, 5, 7))
    got = batch_norm_by_step(norm, value)
    assert got[2, :, 1].isnan().all()
    assert not got[:2].isnan().any()
    assert norm.running_mean.isnan().tolist() == [False, True, False]


def test_buffers_are_written_in_place_whatever_the_mode() -> None:
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        norm = make_norm((4, 3, 5, 7))
        held = dict(norm.named_buffers())
        before = {name: buffer.clone() for name, buffer in held.items()}
        with mode():
            batch_norm_by_step(norm, make_chunk((4, 3, 5, 7), 3))
        for name, buffer in norm.named_buffers():
            assert buffer is held[name]
            assert not torch.equal(buffer, before[name])
            assert not buffer.requires_grad
        assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("momenta", [[0.1] * 7, [1.0 / (2 + step) for step in range(7)], [0.0] * 3, [1.0] * 3, [0.4]])
def test_the_closed_form_of_other_devices_equals_the_updates_in_order(momenta: list[float]) -> None:
    running, statistics = torch.rand(2, 5), torch.rand(len(momenta), 2, 5)
    expected = running.clone()
    for momentum, step in zip(momenta, statistics, strict=True):
        expected = momentum * step + (1.0 - momentum) * expected
    for got in (
        _updated_at_once(running, statistics, momenta),
        _updated_in_order(running, statistics, momenta, torch.float32),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# One call, whatever the chunk length


class Operations(TorchDispatchMode):
    """The names of the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> list[str]:
    with Operations() as seen:
        call()
    return seen.names


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_library_calls_does_not_grow_with_the_steps(channels_last: bool, momentum: float | None) -> None:
    seen = []
    for steps in (2, 3, 64):
        norm = make_norm((4, 3, 5, 7), momentum=momentum)
        value = make_chunk((4, 3, 5, 7), steps, channels_last=channels_last).requires_grad_()
        seen.append(operations(lambda: batch_norm_by_step(norm, value).sum().backward()))  # noqa: B023
    assert seen[0] == seen[1] == seen[2]
    assert sum("batch_norm" in name and "backward" not in name for name in seen[0]) == 1


# Where it is called once a step


def test_fewer_than_two_values_a_channel_are_the_step_loops_error() -> None:
    for shape in ((1, 17), (1, 6, 1), (1, 3, 1, 1)):
        norm, value = make_norm(shape), make_chunk(shape, 3)
        with pytest.raises(ValueError, match="more than 1 value") as expected:
            norm(value[0])
        with pytest.raises(ValueError, match="more than 1 value") as got:
            batch_norm_by_step(norm, value)
        assert str(got.value) == str(expected.value)


def test_an_empty_batch_counts_as_a_batch_and_updates_nothing_else() -> None:
    assert_same_step_by_step(make_norm((0, 3, 5, 7)), torch.zeros(3, 0, 3, 5, 7))


@pytest.mark.parametrize(
    ("norm", "value", "reason"),
    [
        (make_norm((4, 6)), torch.randn(3, 8, 12)[:, ::2, ::2], "neither contiguous nor channels-last"),
        (make_norm((4, 6, 5)), torch.randn(3, 4, 5, 6).mT, "neither contiguous nor channels-last"),
        (make_norm((2, 17)), torch.randn(3, 2, 17), "no more values a channel than threads"),
        (make_norm((4, 6)), torch.randn(3, 4, 6).half(), "float16"),
        (make_norm((4, 3, 5, 7)).half(), torch.randn(3, 4, 3, 5, 7).half(), "float16"),
    ],
    ids=["a slice", "a transposed sequence", "few values", "half vectors", "half parameters"],
)
def test_a_layout_that_would_round_otherwise_keeps_one_call_a_step(norm: Any, value: Tensor, reason: str) -> None:
    assert reason in obstacle(norm, value)
    assert_same_step_by_step(norm, value)


# In a network


def said_of(opt: Any, node: str) -> list[str]:
    return [f"{each.verdict.value}: {each.reason}" for each in opt.report.decisions if each.node == node]


def assert_step_loop(net: nn.Module, x_seq: Tensor, schedule: Any) -> Any:
    """Outputs, buffers and gradients; returns the optimised network."""
    reference = twin(net)
    opt = snncompile.optimize(net, len(x_seq), schedule=schedule)
    inputs, others = x_seq.clone().requires_grad_(), x_seq.clone().requires_grad_()
    got, expected = opt(inputs), step_loop(reference, others)
    assert torch.equal(got, expected)
    for (name, buffer), other in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    weights = torch.rand(got.shape)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(inputs, others), *zip(net.parameters(), reference.parameters(), strict=True)]
    for p, q in pairs:
        # Sums over steps in another order: relative to the tensor, since a batch norm's gradients cancel in each entry.
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * max(1.0, float(q.grad.abs().max())))
    return opt


def small_net(norm: nn.Module, *, channels_last: bool = False) -> nn.Sequential:
    convolution = nn.Conv2d(2, 5, 3, padding=1, bias=False)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return nn.Sequential(convolution, norm, neuron.LIFNode(v_threshold=0.3)).to(memory_format=memory_format).train()


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize(("channels_last", "options"), [(False, {}), (True, {"momentum": None})])
def test_chunks_with_a_remainder(options: dict[str, Any], channels_last: bool, steps: int, schedule: Any) -> None:
    net = small_net(make_norm((4, 5, 6, 6), **options), channels_last=channels_last)
    x_seq = torch.rand(steps, 4, 2, 6, 6)
    if channels_last:
        x_seq = x_seq.movedim(2, -1).contiguous().movedim(-1, 2)
    opt = assert_step_loop(net, x_seq, schedule)
    assert net[1].num_batches_tracked == steps
    assert said_of(opt, "1") == [AT_ONCE]
    assert ("batch_norm_by_step(" in opt.code) == (schedule != "depth-first" and steps > 1) or schedule == "auto"


def test_a_static_input_has_the_same_statistics_at_every_step() -> None:
    net = nn.Sequential(make_norm((4, 5, 6, 6)), neuron.LIFNode()).train()
    reference, x = twin(net), torch.rand(4, 5, 6, 6)
    opt = snncompile.optimize(net, 5, schedule="breadth-first", static_input=True)
    assert torch.equal(opt(x), torch.stack([reference(x) for _ in range(5)]))
    assert torch.equal(net[0].running_var, reference[0].running_var)
    assert "batch_norm_by_step" in opt.code


def test_one_batch_norm_at_two_places_updates_its_statistics_in_the_order_of_the_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.site = make_norm((4, 6)), nn.Linear(6, 6), neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.site(self.norm(self.layer(self.norm(x))))
            return result

    for schedule in ("depth-first", "breadth-first", 3):
        net = Twice().train()
        opt = assert_step_loop(net, torch.randn(7, 4, 6), schedule)
        assert net.norm.num_batches_tracked == 14
        assert any("keep their order" in text for text in said_of(opt, ""))


def test_a_frozen_batch_norm_in_a_training_network_is_no_business_of_this() -> None:
    net = small_net(make_norm((4, 5, 6, 6)))
    net[1].eval()
    opt = assert_step_loop(net, torch.rand(7, 4, 2, 6, 6), 3)
    assert said_of(opt, "1") == []
    assert net[1].num_batches_tracked == 0


class Doubled(nn.BatchNorm2d):
    """With a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


def hooked() -> nn.Module:
    norm: nn.Module = make_norm((4, 5, 6, 6))
    norm.register_forward_hook(lambda module, args, output: None)
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda: Doubled(5), "batch norm in train mode sees the statistics of one step at a time"), (hooked, "hooks")],
    ids=["a forward of its own", "a hook"],
)
def test_what_is_more_than_a_batch_norm_is_called_once_a_step(make: Callable[[], nn.Module], reason: str) -> None:
    opt = assert_step_loop(small_net(make()), torch.rand(7, 4, 2, 6, 6), 3)
    assert any(reason in text for text in said_of(opt, "1"))
    assert "batch_norm_by_step" not in opt.code


def test_a_plan_says_why_there_is_one_call_a_step() -> None:
    net = nn.Sequential(nn.Linear(6, 6), make_norm((2, 6)), neuron.LIFNode()).train()
    opt = assert_step_loop(net, torch.randn(7, 2, 6), 3)
    (text,) = said_of(opt, "1")
    assert text.startswith("note: statistics of each step, one call a step: with no more values a channel than threads")


def test_only_statistics_of_each_step_may_fold_time_into_the_channels() -> None:
    opt = snncompile.optimize(small_net(make_norm((4, 5, 6, 6))), 3, example_input=torch.rand(3, 4, 2, 6, 6))
    graph = opt.latest_program.graph
    norm, convolution = graph["batchnorm2d_1"], graph["conv2d_0"]
    assert (norm.coupling, norm.batching) == (TimeCoupling.STEP_STATISTICS, Batching.FOLD_CHANNELS)
    for node, batching in ((norm, Batching.FOLD), (convolution, Batching.FOLD_CHANNELS)):
        with pytest.raises(VerifyError, match=f"may not be batched as {batching.value}"):
            verify_graph(graph.with_nodes({node.name: replace(node, batching=batching)}))


@pytest.mark.parametrize("schedule", ["breadth-first", 3])
def test_batch_norms_of_spikingjelly(schedule: Any) -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer

    for wrapper, shape in (
        (layer.BatchNorm1d(6), (4, 6)),
        (layer.BatchNorm1d(6), (4, 6, 5)),
        (layer.BatchNorm2d(6), (4, 6, 5, 5)),
        (layer.BatchNorm3d(6), (4, 6, 3, 3, 3)),
    ):
        net = nn.Sequential(nn.Tanh(), wrapper, neuron.LIFNode(v_threshold=0.3)).train()
        opt = assert_step_loop(net, torch.randn(7, *shape), schedule)
        assert said_of(opt, "1") == [AT_ONCE]
        assert "batch_norm_by_step" in opt.code


# Bytes


@pytest.mark.parametrize("schedule", ["breadth-first", 3])
@pytest.mark.parametrize(("channels_last", "options"), [(False, {}), (True, {"momentum": None}), (False, BARE)])
@pytest.mark.parametrize("gradients", [False, True])
def test_no_more_is_held_than_predicted(
    gradients: bool, options: dict[str, Any], channels_last: bool, schedule: Any
) -> None:
    features = small_net(make_norm((4, 5, 6, 6), **options), channels_last=channels_last)
    net = nn.Sequential(*features, nn.Flatten(), nn.Linear(5 * 256, 3))
    x_seq = torch.rand(11, 16, 2, 16, 16)
    with torch.set_grad_enabled(gradients):
        opt = snncompile.optimize(net, 11, schedule=schedule, example_input=x_seq)
        opt(x_seq)
        snncompile.functional.reset_net(net)
        peak = snncompile.measure_peak(lambda: opt(x_seq).sum().backward() if gradients else opt(x_seq))
    assert peak <= opt.report.predicted_peak_bytes
    assert opt.report.predicted_peak_bytes <= 1.1 * peak
