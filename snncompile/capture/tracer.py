"""Traces one step of a network with torch.fx: stateful and library modules are leaves, the rest is traced through."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, SnnCompileError
from ..ir import AutogradCall, OpKind
from .adapter import Leaf
from .hidden_states import HiddenStates, Place, RandomState, StateRead
from .leaves import ADAPTERS, classify, state_holders
from .opaque_code import Untraceable, autograd_functions_as_leaves, modes
from .side_effects import AttributeSnapshot

ROOT = "net"
_LIBRARY = tuple(str(Path(path).parent) for path in (torch.__file__, inspect.__file__, __file__))


class _Root(nn.Module):
    """Holds the network as a child, so that a network that is itself a leaf needs no special case."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any) -> Any:
        return self.net(*inputs)


class StepProxy(fx.Proxy):
    """A traced value that keeps `x += y` as the write into x that it is; fx alone would trace `x = x + y`."""


def _in_place(name: str) -> Callable[[StepProxy, Any], Any]:
    target = getattr(operator, name)

    def write(self: StepProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(StepProxy, f"__{_name}__", _in_place(_name))


class StepTracer(fx.Tracer):
    """One tracing run.

    Args:
        forced: Qualified names to keep as opaque leaves, and how.

    Attributes:
        leaves: Qualified name -> treatment of every leaf met.
        traced: Qualified names of the modules traced through.
        drew_random: Qualified names of those whose forward drew random numbers while it was traced.
        switched_modes: Qualified names of those that compute under `no_grad`, `autocast` and the like.
    """

    # A buffer becomes a node, so that writing into it shows up in the graph instead of happening while tracing.
    proxy_buffer_attributes = True

    def __init__(self, forced: Mapping[str, Leaf]) -> None:
        super().__init__()
        self.forced = forced
        self.leaves: dict[str, Leaf] = {}
        self.traced: list[str] = []
        self.drew_random: list[str] = []
        self.switched_modes: list[str] = []
        self._modes = modes()
        self._random = RandomState()
        self.stack: list[str] = []
        self.failed_in: str | None = None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # The root takes *inputs; one placeholder for each positional argument that the network requires.
        assert isinstance(self.root, _Root)
        names = input_names(self.root.net)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return StepProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = strip_root(module_qualified_name)
        if name in self.forced:
            self.leaves[name] = self.forced[name]
            return True
        leaf = classify(m)
        if leaf is None:
            self.traced.append(name)
            return False
        self.leaves[name] = leaf
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._blame_random()
        self.stack.append(strip_root(self.path_of_module(m)))
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._blame_random()
            return result
        except Exception:
            self.failed_in = self.failed_in if self.failed_in is not None else self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def _blame_random(self) -> None:
        """Note the innermost module at work if random numbers were drawn since the last look."""
        if self._random.has_moved():
            self.drew_random.append(self.stack[-1] if self.stack else "")
            self._random = RandomState()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack[-1] if self.stack else ""
        if modes() != self._modes:
            # A leaf's node is created on the leaf's own account; it is the forward around it that switched.
            around = self.stack[:-1] if node.op == "call_module" else self.stack
            self.switched_modes.append(around[-1] if around else "")
        return node

    def call_autograd_function(self, function: AutogradCall, args: tuple[Any, ...]) -> fx.Proxy:
        """One node for a call of a user's autograd function."""
        return self.create_proxy("call_function", function, args, {})


def strip_root(qualified_name: str) -> str:
    """A qualified name as the user's network spells it."""
    return "" if qualified_name == ROOT else qualified_name.removeprefix(f"{ROOT}.")


def input_names(net: nn.Module) -> list[str]:
    """Names of the positional arguments that a network's forward requires; at least one."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return required or ["x"]


def trace_step(net: nn.Module) -> tuple[fx.Graph, StepTracer]:
    """Trace one step.

    What tracing would freeze is not traced: a module whose forward changes Python state, writes into its buffers, draws
    random numbers from no input or reads the state of another module is kept as an opaque leaf, and the trace is
    repeated until there is none left.

    Raises:
        CaptureError: The forward cannot be traced; names module and line.
    """
    forced: dict[str, Leaf] = {}
    changing: set[tuple[str, str]] = set()
    while True:
        tracer = StepTracer(forced)
        graph, found = _trace_once(net, tracer, changing)
        if graph is not None and not found:
            return graph, tracer
        forced = {**forced, **found}


def _trace_once(
    net: nn.Module, tracer: StepTracer, changing: set[tuple[str, str]]
) -> tuple[fx.Graph | None, dict[str, Leaf]]:
    """The graph, and which modules may not be traced, as the leaves to make of them.

    Args:
        changing: Qualified module name and attribute of the Python state found so far; added to.
    """
    random = RandomState()
    with HiddenStates(_places_of_state(net, changing)):
        snapshot = AttributeSnapshot(dict(net.named_modules()))
        try:
            with autograd_functions_as_leaves(tracer.call_autograd_function):
                graph = tracer.trace(_Root(net))
        except Untraceable as reason:
            return None, {tracer.failed_in or "": _opaque(str(reason))}
        except StateRead as read:
            return None, _readers(net, tracer, read)
        except SnnCompileError as error:
            raise type(error)(error.message, where=error.where or _qualified(tracer)) from error
        except Exception as error:
            if isinstance(error, TypeError) and "cannot assign" in str(error) and tracer.failed_in is not None:
                return None, {tracer.failed_in: _opaque("it assigns to a registered buffer or parameter at every step")}
            raise _untraceable(error, tracer) from error
        finally:
            changed = list(snapshot.changed())
            snapshot.restore()
            random.restore()
    changing.update(changed)
    found = {name: Leaf(OpKind.OPAQUE, "it draws random numbers from no input", True) for name in tracer.drew_random}
    found |= {name: _opaque("it computes under no_grad, autocast or the like") for name in tracer.switched_modes}
    for name, attribute in changed:
        found[_changer(name, tracer)] = _opaque(f"{attribute!r} of {name or 'the network'} changes at every step")
    found.update(_buffer_writers(graph))
    return graph, found or _shared_with_opaque(net, tracer)


def _opaque(reason: str) -> Leaf:
    return Leaf(OpKind.OPAQUE, reason)


def _places_of_state(net: nn.Module, changing: Iterable[tuple[str, str]]) -> Iterator[Place]:
    for name, module in net.named_modules():
        for adapter in ADAPTERS:
            store = adapter.state_store(module)
            yield from ((name, store, key) for key in store)
    for name, attribute in changing:
        attributes = vars(net.get_submodule(name))
        if attribute in attributes and attribute not in _STORES:
            yield name, attributes, attribute


_STORES = ("_states", "_memories")  # hidden item by item


def _readers(net: nn.Module, tracer: StepTracer, read: StateRead) -> dict[str, Leaf]:
    """The module whose forward reads a state; and the owner, if it runs elsewhere and so must keep order with it."""
    reader = tracer.failed_in or ""
    if any(part is net.get_submodule(read.owner) for part in net.get_submodule(reader).modules()):
        return {reader: _opaque(str(read))}
    return {
        reader: Leaf(OpKind.OPAQUE, str(read), ordered=True),
        read.owner: Leaf(OpKind.OPAQUE, f"its state is read by {reader or 'the network'}", ordered=True),
    }


def _changer(name: str, tracer: StepTracer) -> str:
    """The traced module to blame for a change in a module: itself, or the nearest one around it."""
    while name not in tracer.traced:
        if not name:
            raise CaptureError(
                "a forward changes Python attributes of a module that it does not contain; keep state in the module "
                "that changes it"
            )
        name = name.rpartition(".")[0]
    return name


def _shared_with_opaque(net: nn.Module, tracer: StepTracer) -> dict[str, Leaf]:
    """Stateful leaves that an opaque leaf contains too: their state must stay where that one finds it."""
    holders = {
        id(part): name
        for name, leaf in tracer.leaves.items()
        if leaf.kind is OpKind.OPAQUE
        for part in state_holders(net.get_submodule(name))
    }
    return {
        name: _opaque(f"it is a part of {holders[id(module)] or 'the network'} too")
        for name, leaf in tracer.leaves.items()
        if leaf.kind is OpKind.STATEFUL and id(module := net.get_submodule(name)) in holders
    }


def _buffer_writers(graph: fx.Graph) -> dict[str, Leaf]:
    """Modules whose traced forward writes into a buffer or parameter."""
    writers = {}
    for node in graph.nodes:
        written = node.kwargs.get("out") or (node.args[0] if _writes_first_argument(node) and node.args else None)
        if isinstance(written, fx.Node) and written.op == "get_attr":
            reason = f"it writes into {strip_root(str(written.target))!r} at every step"
            writers[node.meta.get("scope", "")] = _opaque(reason)
    return writers


def _writes_first_argument(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    marked = name.endswith("_") and not name.endswith("__")
    return marked or name in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True


_IN_PLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"})


def _qualified(tracer: StepTracer) -> str | None:
    return tracer.failed_in if tracer.failed_in else None


def _untraceable(error: Exception, tracer: StepTracer) -> CaptureError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_LIBRARY)]
    line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown line"
    module = tracer.failed_in or "the network itself"
    return CaptureError(
        f"cannot trace one step of {module}, at {line}: {error}. "
        "A forward may not branch or loop on the values of its inputs; keep such code in a module of its own "
        "with state of its own, or write it with tensor operations (torch.where)",
        where=_qualified(tracer),
    )
