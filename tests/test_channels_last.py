"""Convolutions by copies of their weights: results, layouts, and what makes a copy anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snncompile.capture import weight_copies
from snncompile.capture.channels_last import ChannelsLastConv2d, is_plain_convolution
from snncompile.torch_private import fake_mode, fake_twin


def images(n: int = 3, channels: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, channels, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_like(convolution: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """The twin gives the convolution's result, channels-last."""
    with torch.no_grad():
        got, expected = ChannelsLastConv2d(convolution)(x), convolution(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("lay_out", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"dilation": (2, 1), "padding": (2, 0)},
        {"groups": 4},
        {"groups": 8, "padding": 1},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_the_result_is_the_convolutions(settings: dict[str, Any], lay_out: torch.memory_format) -> None:
    torch.manual_seed(1)
    convolution = nn.Conv2d(8, 16, **{"kernel_size": 3, **settings})
    for n in (1, 2, 7):  # more shapes than copies are kept for
        assert_like(convolution, images(n).contiguous(memory_format=lay_out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_weight_channels_last(dtype: torch.dtype) -> None:
    assert_like(nn.Conv2d(8, 4, 3).to(dtype), images(dtype=dtype), 0.05 if dtype is torch.bfloat16 else 1e-12)


def test_autocast_is_honoured() -> None:
    convolution = nn.Conv2d(8, 4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ChannelsLastConv2d(convolution)(images()).dtype is torch.bfloat16


def double_in_place(convolution: nn.Conv2d) -> None:
    with torch.no_grad():
        convolution.weight.mul_(2.0)


def double_data(convolution: nn.Conv2d) -> None:
    convolution.weight.data.mul_(2.0)


def replace_parameter(convolution: nn.Conv2d) -> None:
    convolution.weight = nn.Parameter(2.0 * convolution.weight.detach())


@pytest.mark.parametrize("change", [double_in_place, double_data, replace_parameter])
def test_a_changed_weight_is_copied_anew(change: Callable[[nn.Conv2d], None]) -> None:
    convolution = nn.Conv2d(8, 4, 3)
    assert_like(convolution, images())
    change(convolution)
    assert_like(convolution, images())


def test_copies_are_kept_and_go_with_the_module() -> None:
    convolution = nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        ChannelsLastConv2d(convolution)(images())
        (first,) = weight_copies._COPIES[convolution].made.values()
        ChannelsLastConv2d(convolution)(images())
    (second,) = weight_copies._COPIES[convolution].made.values()
    assert first is second
    kept = weakref.ref(convolution)
    del convolution
    gc.collect()
    assert kept() is None


def test_without_data_shapes_and_strides_come_out_right() -> None:
    convolution = nn.Conv2d(8, 4, 3, stride=2)
    with torch.no_grad():
        expected = ChannelsLastConv2d(convolution)(images())
        mode = fake_mode()
        convolution.weight = nn.Parameter(fake_twin(mode, convolution.weight.detach()))
        convolution.bias = nn.Parameter(fake_twin(mode, convolution.bias.detach()))
        with mode:
            got = ChannelsLastConv2d(convolution)(fake_twin(mode, images()))
    assert (got.shape, got.stride()) == (expected.shape, expected.stride())


def test_only_plain_padding_has_such_a_form() -> None:
    assert is_plain_convolution(nn.Conv2d(2, 2, 3, padding=1))
    assert not is_plain_convolution(nn.Conv2d(2, 2, 3, padding="same"))
    assert not is_plain_convolution(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
