"""Convolutions that compute, and hand on, images that lie channels-last, by copies of their weights.

On the CPU the copy is the form that the library computes with, into which it would bring the weight anew at every call;
that takes longer than the convolution itself where the images are few and small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_private import FakeTensor, packed_convolution, packed_weight, packs_convolutions
from .weight_copies import Form, weight_copy

_CHANNELS_LAST = "channels-last"  # the weight itself, laid out so


class ChannelsLastConv2d(nn.Module):
    """A 2d convolution `[N, C, H, W] -> [N, C', H', W']` whose result lies channels-last; not recorded for gradients.

    Made anew for each call of a program, during which weights stay as they are.

    Args:
        convolution: Whose weight and bias it computes with.
    """

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        weight: Any = convolution.weight
        # Neither is a part of this module: the one stays the network's, the other is made of it.
        self.__dict__["convolution"] = convolution
        self.__dict__["weights"] = {_CHANNELS_LAST: _laid_out(convolution)} if isinstance(weight, FakeTensor) else {}

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = self.__dict__["convolution"]
        padding, stride, dilation, groups = settings = _settings(convolution)
        bias = None if convolution.bias is None else convolution.bias.detach()
        if not _can_be_packed(x, convolution.weight):
            return F.conv2d(x, self.weight(_CHANNELS_LAST, _laid_out), bias, stride, padding, dilation, groups)
        packed = self.weight(tuple(x.shape), lambda its: packed_weight(its.weight.detach(), x.shape, *settings))
        return packed_convolution(x, packed, bias, *settings)

    def weight(self, form: Form, make: Callable[[Any], Tensor]) -> Tensor:
        """The weight in another form, made if there is none yet of the weight as it is.

        Args:
            form: Its name.
            make: From the convolution.
        """
        weights: dict[Form, Tensor] = self.__dict__["weights"]
        if form not in weights:
            weights[form] = weight_copy(self.__dict__["convolution"], form, make)
        return weights[form]


def is_plain_convolution(convolution: nn.Module) -> bool:
    """Whether a 2d convolution pads by zeros, as many on either side."""
    module: Any = convolution
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _settings(convolution: Any) -> tuple[Any, ...]:
    return convolution.padding, convolution.stride, convolution.dilation, convolution.groups


def _laid_out(convolution: Any) -> Tensor:
    weight: Tensor = convolution.weight.detach()
    return weight.contiguous(memory_format=torch.channels_last)


def _can_be_packed(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.numel() > 0
        and x.dtype is weight.dtype is torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and not torch.is_autocast_enabled("cpu")
        and packs_convolutions()
    )
