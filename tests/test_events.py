"""Layers driven by events: the library's results but for rounding, and by the library where events are many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snncompile
from snncompile import measure_peak, neuron
from snncompile.runtime import cpp_build, event_kernel
from snncompile.runtime.event_kernel import EventKernel
from snncompile.runtime.event_modules import EventConv2d, EventLinear, event_obstacle
from snncompile.torch_private import fake_mode, fake_twin

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

ALWAYS = 2.0  # whatever the part of the input that is not zero


def spikes(n: int, channels: int, height: int, width: int, density: float = 0.2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, height, width, generator=generator)
    x *= torch.rand(x.shape, generator=generator) < density
    return x.contiguous(memory_format=torch.channels_last)


def assert_convolves(convolution: nn.Conv2d, x: Tensor) -> None:
    assert not event_obstacle(convolution)
    with torch.no_grad():
        got = EventConv2d(convolution, ALWAYS)(x)
        exact = F.conv2d(
            x.double(),
            convolution.weight.double(),
            None if convolution.bias is None else convolution.bias.double(),
            convolution.stride,
            convolution.padding,
            convolution.dilation,
        )
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.fixture
def by_events(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was computed by events."""
    seen: list[Tensor] = []
    convolve = EventKernel.convolve

    def spy(self: EventKernel, x: Tensor, *rest: Any) -> None:
        seen.append(x)
        convolve(self, x, *rest)

    monkeypatch.setattr(EventKernel, "convolve", spy)
    return seen


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"dilation": (2, 1), "padding": (2, 0)},
        {"kernel_size": 1, "stride": (1, 2)},
        {"kernel_size": (1, 5), "padding": (3, 4)},
    ],
)
def test_the_result_is_the_convolutions(settings: dict[str, Any], density: float, by_events: list[Tensor]) -> None:
    torch.manual_seed(1)
    assert_convolves(nn.Conv2d(19, 21, **{"kernel_size": 3, **settings}), spikes(3, 19, 9, 7, density))
    assert len(by_events) == 1


@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    size = st.integers(1, 12)
    kernel, stride, dilation = ((data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))) for _ in range(3))
    padding = tuple(data.draw(st.integers(0, 3)) for _ in range(2))
    height, width = (
        data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 14))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    convolution = nn.Conv2d(
        data.draw(size),
        data.draw(st.integers(1, 140)),
        kernel,
        stride,
        padding,
        dilation,
        bias=data.draw(st.booleans()),
    )
    density = data.draw(st.floats(0.0, 1.0))
    assert_convolves(convolution, spikes(data.draw(st.integers(1, 5)), convolution.in_channels, height, width, density))


@pytest.mark.parametrize(("n", "channels", "size"), [(9, 64, 4), (2, 130, 17)])
def test_every_image_is_alone_whatever_the_threads(n: int, channels: int, size: int) -> None:
    convolution, x = nn.Conv2d(channels, 72, 3, padding=1), spikes(n, channels, size, size)
    module = EventConv2d(convolution, ALWAYS)
    threads = torch.get_num_threads()
    with torch.no_grad():
        together = module(x)
        assert all(torch.equal(module(x[i : i + 1]), together[i : i + 1]) for i in range(n))
        try:
            torch.set_num_threads(1)
            assert torch.equal(module(x), together)
        finally:
            torch.set_num_threads(threads)


def test_the_library_runs_where_events_are_many(by_events: list[Tensor]) -> None:
    module = EventConv2d(nn.Conv2d(16, 8, 3), 0.3)
    with torch.no_grad():
        few, many = module(spikes(2, 16, 9, 9, 0.1)), module(spikes(2, 16, 9, 9, 0.6))
    assert len(by_events) == 1
    assert few.stride() == many.stride()


@pytest.mark.parametrize(
    "x",
    [
        spikes(2, 16, 9, 9).contiguous(),
        spikes(2, 16, 9, 18)[..., ::2],
        spikes(2, 16, 9, 9)[0],
        spikes(2, 16, 9, 9)[:0],
    ],
    ids=["channels first", "with gaps", "without a batch", "no image"],
)
def test_the_library_runs_where_images_lie_in_another_way(x: Tensor, by_events: list[Tensor]) -> None:
    convolution = nn.Conv2d(16, 8, 3)
    with torch.no_grad():
        torch.testing.assert_close(EventConv2d(convolution, ALWAYS)(x), convolution(x), rtol=0.0, atol=1e-5)
    assert not by_events


def test_what_is_no_number_is_no_zero() -> None:
    x = spikes(1, 16, 5, 5)
    x[0, 3, 2, 2], x[0, 4, 0, 0], x[0, 5, 1, 1] = float("nan"), float("inf"), -0.0
    assert_convolves(nn.Conv2d(16, 8, 3, padding=1), x)


def test_changed_weights_and_biases_are_honoured() -> None:
    convolution, x = nn.Conv2d(16, 8, 3), spikes(2, 16, 9, 9)
    assert_convolves(convolution, x)
    with torch.no_grad():
        convolution.weight.mul_(2.0)
        convolution.bias.add_(1.0)
    assert_convolves(convolution, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 37), (5, 37), (3, 130, 37), (37,), (2, 0, 37)])
@pytest.mark.parametrize("outputs", [1, 10, 72])
def test_a_linear_layer(shape: tuple[int, ...], outputs: int, bias: bool, by_events: list[Tensor]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, outputs, bias=bias)
    x = torch.randn(shape) * (torch.rand(shape) < 0.2)
    with torch.no_grad():
        got = EventLinear(linear, ALWAYS)(x)
        exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
        assert len(by_events) == (x.numel() > 0)
        linear.weight.mul_(2.0)
        assert not bias or linear.bias.add_(1.0) is not None
        torch.testing.assert_close(EventLinear(linear, ALWAYS)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_runs_by_the_library_where_events_are_many(by_events: list[Tensor]) -> None:
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        for x in (torch.rand(5, 64), torch.zeros(64, 5).t()):
            assert torch.equal(EventLinear(linear, 0.3)(x), linear(x))
        assert not by_events
        EventLinear(linear, 0.3)(torch.zeros(5, 64))
    assert len(by_events) == 1


@pytest.mark.parametrize(
    ("layer", "obstacle"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "it has groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "its padding has no place in it"),
        (nn.Conv2d(4, 4, 3).double(), "its weight is not float32 on the CPU"),
        (nn.Linear(4, 4).double(), "its weight is not float32 on the CPU"),
        (nn.Linear(2**16 + 1, 1), "its input has more than 65536 channels"),
    ],
)
def test_obstacles(layer: nn.Module, obstacle: str) -> None:
    assert event_obstacle(layer) == obstacle


def test_a_compiler_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: str, **options: Any) -> Any:
        raise cpp_build.BuildError("c++ failed")

    monkeypatch.setattr(event_kernel, "build", fails)
    event_kernel._compiled.cache_clear()
    assert event_obstacle(nn.Conv2d(4, 4, 3)) == "c++ failed"


def test_without_data_shapes_and_strides_come_out_right() -> None:
    convolution = nn.Conv2d(8, 4, 3, stride=2)
    x = spikes(2, 8, 9, 7)
    with torch.no_grad():
        expected = EventConv2d(convolution, ALWAYS)(x)
        mode = fake_mode()
        convolution.weight = nn.Parameter(fake_twin(mode, convolution.weight.detach()))
        convolution.bias = nn.Parameter(fake_twin(mode, convolution.bias.detach()))
        with mode:
            got = EventConv2d(convolution, ALWAYS)(fake_twin(mode, x))
    assert (got.shape, got.stride()) == (expected.shape, expected.stride())


def convolutional() -> nn.Sequential:
    """`[N, 3, 12, 12]` -> `[N, 16, 2, 2]`"""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        neuron.IFNode(0.5),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        neuron.LIFNode(v_threshold=0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 16, 3, stride=2),
        neuron.IFNode(0.2),
    )


def dense() -> nn.Sequential:
    """`[N, 3, 12, 12]` -> `[N, 10]`"""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 256),
        neuron.LIFNode(v_threshold=0.3),
        nn.Linear(256, 200),
        neuron.IFNode(0.3),
        nn.Linear(200, 10),
        neuron.LIFNode(v_threshold=0.1),
    )


@pytest.mark.parametrize("schedule", ["depth-first", 3, "breadth-first", "auto"])
@pytest.mark.parametrize("make", [convolutional, dense])
def test_a_network_holds_no_more_than_predicted(
    make: Any, schedule: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("choose_layout", "events"):
        monkeypatch.setattr(
            f"snncompile.passes.{module}.seconds_a_step", lambda graph, node, context: 2.0 - node.channels_last
        )
    net, x = make().eval(), torch.rand(8, 4, 3, 12, 12)
    with torch.no_grad():
        opt = snncompile.optimize(net, 8, schedule=schedule, reassociate=True, example_input=x)
        assert str(opt.report).count("driven by events") == 2
        parity = snncompile.verify(net, opt, x)
        assert parity.spike_mismatch_rate < 0.01
        opt(x)
        opt.reset()
        measured = measure_peak(lambda: opt(x))
    predicted = opt.report.predicted_peak_bytes
    assert measured <= predicted
    assert measured >= 0.9 * predicted


def test_training_and_exact_networks_are_not_driven_by_events() -> None:
    net, x = dense(), torch.rand(4, 2, 3, 12, 12)
    for options in ({"reassociate": False}, {"reassociate": True, "backend": "eager"}):
        with torch.no_grad():
            opt = snncompile.optimize(net.eval(), 4, example_input=x, **options)
        assert "driven by events" not in str(opt.report)
    opt = snncompile.optimize(net.train(), 4, example_input=x, reassociate=True)
    assert "driven by events" not in str(opt.report)
