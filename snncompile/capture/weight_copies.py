"""Copies of weights in the forms that kernels compute with.

They are derived from the weights: they are kept as long as the module lives and made anew when its weight is another
tensor, was written to, or does not hold what was copied any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..torch_private import writes_to

Form = tuple[int, ...] | str  # for inputs of this shape, or a name
_SAMPLE = 61  # elements: what is written through `.data` leaves no trace in the version
_MOST_COPIES = 3  # for batches of different sizes: a chunk's, and that of a last chunk that is shorter; for events


@dataclass
class _Copies:
    """Of one weight.

    Attributes:
        key: Identity and version of the weight.
        sample: Some of its elements.
        made: By their form.
    """

    key: tuple[int, int]
    sample: Tensor
    made: dict[Form, Tensor] = field(default_factory=dict)


_COPIES: WeakKeyDictionary[nn.Module, _Copies] = WeakKeyDictionary()
_LOCK = threading.Lock()


def weight_copy(module: nn.Module, form: Form, make: Callable[[Any], Tensor]) -> Tensor:
    """A module's weight in another form, made if there is none yet of the weight as it is.

    Args:
        module: Has the weight.
        form: The name of the form.
        make: From the module.
    """
    owner: Any = module
    weight = owner.weight.detach()
    sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLE)] if weight.is_contiguous() else weight
    key = (id(owner.weight), writes_to(weight))
    with _LOCK:
        known = _COPIES.get(module)
        if known is None or known.key != key or not torch.equal(known.sample, sample):
            known = _COPIES[module] = _Copies(key, sample.clone())
        if form not in known.made:
            while len(known.made) >= _MOST_COPIES:
                del known.made[next(iter(known.made))]
            known.made[form] = make(module)
        return known.made[form]
