"""Networks in multi-step mode: `net(x_seq)` takes all T steps at once, as SpikingJelly calls it.

A module is in multi-step mode if its `step_mode` is "m". A plan runs the modules that have a single-step form one step,
or one chunk of steps, at a time, so their mode is switched while it is made and while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import CaptureError


def in_multi_step_mode(module: nn.Module) -> bool:
    """Whether one module takes `[T, N, *]`."""
    # Some containers of SpikingJelly take sequences only and have no mode to ask for.
    return getattr(module, "step_mode", "s") == "m" or not has_single_step_form(module)


def has_single_step_form(module: Any) -> bool:
    """Whether a module can be run a step at a time."""
    supported = getattr(module, "supported_step_mode", None)
    return "s" in supported() if callable(supported) else True


def is_multi_step(net: nn.Module) -> bool:
    """Whether a network takes all T steps in one call.

    Raises:
        CaptureError: Some of its modules are in one step mode and some in the other, and no container of single-step
            modules says that this is meant.
    """
    single, multi = [], []
    for name, module in _outside_containers(net, ""):
        if in_multi_step_mode(module):
            multi.append(name)
        elif hasattr(module, "step_mode"):
            single.append(name)
    if multi and single:
        only_multi = [name for name in multi if not has_single_step_form(net.get_submodule(name))]
        remedy = "call set_step_mode(net, 's') or set_step_mode(net, 'm')"
        if only_multi:
            remedy = f"{only_multi[0] or 'the network'} takes whole sequences only, so call set_step_mode(net, 'm')"
        raise CaptureError(
            f"the network mixes step modes: {single[0] or 'the network'} is in single-step mode, "
            f"{multi[0] or 'the network'} in multi-step mode; {remedy}",
            where=single[0] or None,
        )
    return bool(multi)


def _outside_containers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and all it contains, less what a multi-step module runs in a mode of its own choice."""
    yield name, module
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        chooses = in_multi_step_mode(module) and not in_multi_step_mode(child) and hasattr(child, "step_mode")
        if not chooses:
            yield from _outside_containers(child, path)


@contextmanager
def step_mode_of(modules: Iterable[nn.Module], mode: str) -> Iterator[None]:
    """Inside, modules that have both forms are in one step mode; afterwards each is in its own again."""
    switched: list[Any] = [
        module
        for module in modules
        if getattr(module, "step_mode", mode) != mode and (mode == "m" or has_single_step_form(module))
    ]
    before = [module.step_mode for module in switched]
    try:
        for module in switched:
            module.step_mode = mode
        yield
    finally:
        for module, own in zip(switched, before, strict=True):
            module.step_mode = own
