"""Convolutions whose weight lies channels-last, so that they compute, and hand on, images that do.

The copies are derived from the weights: they are kept as long as the module lives and made anew when its weight is
another tensor, was written to, or does not hold what was copied any more.
"""

from __future__ import annotations

import copy
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..torch_private import FakeTensor

_Copied = tuple[int, int, Tensor, Tensor]  # id and version of the weight, a sample of it, and the copy
_COPIES: WeakKeyDictionary[nn.Module, _Copied] = WeakKeyDictionary()
_LOCK = threading.Lock()
_SAMPLE = 61  # elements: what is written through `.data` leaves no trace in the version


def channels_last(module: nn.Module) -> nn.Module:
    """A shallow twin of a 2d convolution that computes channels-last; all but its weight is the module's own."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, "weight": _laid_out(module)}  # type: ignore[dict-item]
    return twin


def _laid_out(module: Any) -> Tensor:
    weight: Tensor = module.weight
    if torch.is_grad_enabled() and weight.requires_grad:
        return weight.contiguous(memory_format=torch.channels_last)  # recorded, so that its gradient comes back
    if isinstance(weight, FakeTensor):
        return weight.detach().contiguous(memory_format=torch.channels_last)
    weight = weight.detach()
    sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLE)] if weight.is_contiguous() else weight
    version = 0 if weight.is_inference() else weight._version
    with _LOCK:
        known = _COPIES.get(module)
        if known is not None:
            identity, copied_version, sampled, copied = known
            if (identity, copied_version) == (id(module.weight), version) and torch.equal(sampled, sample):
                return copied
        copied = weight.contiguous(memory_format=torch.channels_last)
        _COPIES[module] = (id(module.weight), version, sample.clone(), copied)
        return copied
