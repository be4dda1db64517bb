"""Which modules are leaves of the graph, and how each is treated."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from ..ir import OpKind
from ..ir.batching_rules import library_class
from ..surrogate import SurrogateFunction
from .adapter import Adapter, Leaf
from .chains import ChainAdapter
from .native import NativeAdapter
from .registered import RegisteredAdapter
from .spikingjelly import SpikingJellyAdapter

_FRAMEWORKS: tuple[Adapter, ...] = (RegisteredAdapter(), NativeAdapter(), SpikingJellyAdapter())
ADAPTERS: tuple[Adapter, ...] = (*_FRAMEWORKS, ChainAdapter(_FRAMEWORKS))

# Attributes in which modules of the frameworks keep their states, by name.
STATE_STORES = ("_states", "_memories")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def classify(module: nn.Module) -> Leaf | None:
    """How to treat a module; None: trace through its forward.

    Raises:
        CaptureError: The module has no single-step form.
    """
    if has_hooks(module):
        return Leaf(OpKind.OPAQUE, "it has hooks, which must see every step", ordered=True)
    if _has_own_forward(module):
        return Leaf(OpKind.OPAQUE, "its forward was replaced on the instance", ordered=True)
    for adapter in ADAPTERS:
        if (leaf := adapter.leaf(module)) is not None:
            return leaf
    if isinstance(module, _CONTAINERS):
        return None
    if type(module).__module__.startswith("torch.nn."):
        return Leaf(OpKind.MODULE, acts_like=library_class(module))
    inherited = library_class(module)
    # Tracing through a subclass of batch norm would lose the in-place update of its running statistics.
    if inherited is not None or isinstance(module, BATCH_NORMS):
        return Leaf(OpKind.MODULE, acts_like=inherited)
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks of the user's."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def without_hooks(module: nn.Module) -> nn.Module:
    """Take the hooks off a copy that planning runs: what they record is of the user's own calls."""
    for part in module.modules():
        for hooks in _HOOKS:
            vars(part)[hooks] = OrderedDict()
    return module


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter that knows the step function of a STATEFUL leaf."""
    return next(adapter for adapter in ADAPTERS if adapter.leaf(module) is not None)


def state_holders(module: nn.Module) -> list[nn.Module]:
    """The modules whose state a stateful or opaque leaf may touch: itself, and what it contains or refers to that is
    not known to hold none. Neurons share one surrogate function by default, which couples nothing.
    """
    return [part for part in modules_within_reach(module) if part is module or not _is_stateless(part)]


def modules_within_reach(module: nn.Module) -> list[nn.Module]:
    """A module, its parts, and the modules that these refer to in plain attributes, with their parts."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        for part in waiting.pop().modules():
            if id(part) not in found:
                found[id(part)] = part
                waiting += [other for value in vars(part).values() for other in _modules_in(value)]
    return list(found.values())


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _modules_in(item)
    elif isinstance(value, dict):
        yield from _modules_in(list(value.values()))
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__)


def _is_stateless(module: nn.Module) -> bool:
    if isinstance(module, SurrogateFunction) or any(adapter.is_stateless(module) for adapter in ADAPTERS):
        return True
    leaf = classify(module)
    return leaf is not None and leaf.kind is OpKind.MODULE and next(module.buffers(), None) is None


def _has_own_forward(module: Any) -> bool:
    return "forward" in vars(module)
