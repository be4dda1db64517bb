"""The states that a call hands to a network with explicit states: tried on a copy before any work starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError, SnnCompileError
from ..explicit_states import ExplicitStates, describe, map_tensors
from ..torch_private import no_modes
from .copies import copy_network
from .hidden_states import RandomState
from .leaves import has_hooks, without_hooks
from .side_effects import AttributeSnapshot


def start_from(net: ExplicitStates, states: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> None:
    """Put states where the first step finds them.

    States of a form that is new here are tried: a copy of the network runs two steps on zeros, which shows what its
    states become, and that they keep that form.

    Args:
        net: The network.
        states: As the caller handed them in; fewer where the rest has defaults.
        inputs: One step `[N, *]` of each input.

    Raises:
        TypeError: There are too many states.
        CaptureError: The network does not take states of this form with such inputs.
    """
    if has_hooks(net.wrapped):
        raise CaptureError(
            "the network has hooks of its own, which would not see its states; register them on its parts instead"
        )
    states = net.complete(states)
    form = f"{describe(inputs)} {describe(states)}"
    if not net.has_tried(form):
        _try(net, states, inputs, form)
    net.put_states(states)


def _try(net: ExplicitStates, states: tuple[Any, ...], inputs: tuple[Tensor, ...], form: str) -> None:
    twin = without_hooks(copy_network(net, {}))
    assert isinstance(twin, ExplicitStates)
    twin.forget_form()
    twin.put_states(map_tensors(states, lambda state: state.detach().clone()))
    own = AttributeSnapshot({"": twin.wrapped})
    with RandomState(), no_modes(), torch.no_grad():
        try:
            for _ in range(2):
                twin(*(torch.zeros_like(x) for x in inputs))
        except SnnCompileError:
            raise
        except Exception as error:  # whatever a network raises that does not take such states
            returned = f"; it returns states {net.lasting_form}" if net.lasting_form else ""
            raise CaptureError(
                f"one step fails on inputs {describe(inputs)} with states {describe(states)}: {error}{returned}"
            ) from error
    buffers = twin.wrapped._buffers  # shared, so that they are watched as the parts' are
    net.learn(twin, form, tuple(name for _, name in own.changed() if name not in buffers))
