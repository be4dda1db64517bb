"""What one does to a whole spiking network: reset it, set its step mode, run it for T steps, cut its history.

The functions find modules by what they can do (``reset``, ``step_mode``, ``detach_states``), not by their class, so
they work on networks of other frameworks too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .stateful import registered_states

__all__ = ["detach_net", "multi_step_forward", "reset_net", "set_step_mode"]


def reset_net(net: nn.Module) -> None:
    """Call ``reset()`` on every module of ``net`` that has it, so that all states return to their reset values.

    snnTorch's neurons have ``reset_mem()`` instead; a registered neuron that has neither gets its reset values.
    """
    for module in _modules(net):
        if not _call_first(module, "reset", "reset_mem"):
            for name, value in registered_states(module).items():
                setattr(module, name, value)


def detach_net(net: nn.Module) -> None:
    """Cut the autograd history of every state in ``net`` (``detach_states()``, or SpikingJelly's ``detach()``).

    The states of a registered neuron that has neither are detached where they are.
    """
    for module in _modules(net):
        if not _call_first(module, "detach_states", "detach"):
            for name in registered_states(module):
                state = getattr(module, name)
                setattr(module, name, state.detach() if isinstance(state, Tensor) else state)


def set_step_mode(net: nn.Module, step_mode: str) -> None:
    """Set ``step_mode`` on every module of ``net`` that has one; all of them or, on an error, none.

    Args:
        net: The network.
        step_mode: "s" (single-step, ``[N, *]``) or "m" (multi-step, ``[T, N, *]``).

    Raises:
        ValueError: An unknown step mode, or one that a module does not support.
    """
    if step_mode not in ("s", "m"):
        raise ValueError(f'step_mode must be "s" or "m", got {step_mode!r}')
    modules: list[Any] = [module for module in _modules(net) if hasattr(module, "step_mode")]
    before = [module.step_mode for module in modules]
    try:
        for module in modules:
            module.step_mode = step_mode
    except Exception:
        for module, mode in zip(modules, before, strict=True):
            module.step_mode = mode
        raise


def multi_step_forward(x_seq: Tensor, net: Callable[[Tensor], Tensor]) -> Tensor:
    """Run the single-step network ``net`` once per time step, in order: the step loop.

    Args:
        x_seq: The input, ``[T, N, *]`` with T >= 1.
        net: A network (or any callable) from one step's input ``[N, *]`` to one step's output ``[N, *]``.

    Returns:
        The T outputs, stacked: ``[T, N, *]``. The states of ``net`` are those after step T.

    Raises:
        TypeError: ``x_seq`` is not a tensor.
        ValueError: ``x_seq`` has no time axis, or T is 0.
    """
    if not isinstance(x_seq, Tensor):
        raise TypeError(f"x_seq must be a tensor [T, N, *], got {type(x_seq).__name__}")
    if x_seq.ndim == 0 or x_seq.shape[0] == 0:
        raise ValueError(f"x_seq must be [T, N, *] with T >= 1, got shape {tuple(x_seq.shape)}")
    return torch.stack([net(x) for x in x_seq.unbind(0)])


def _modules(net: nn.Module) -> list[nn.Module]:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return list(net.modules())


def _call_first(module: nn.Module, *names: str) -> bool:
    """Call the first of these methods that a module has; whether it has one."""
    for name in names:
        method = getattr(module, name, None)
        if callable(method):
            method()
            return True
    return False
