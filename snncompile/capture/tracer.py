"""Traces one step of a network with torch.fx: stateful and library modules are leaves, the rest is traced through."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, SnnCompileError
from ..ir import OpKind
from .adapter import Leaf
from .leaves import classify
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
        forced: Qualified names to keep as opaque leaves, and why.

    Attributes:
        leaves: Qualified name -> treatment of every leaf met.
        traced: Qualified names of the modules traced through.
    """

    # A buffer becomes a node, so that writing into it shows up in the graph instead of happening while tracing.
    proxy_buffer_attributes = True

    def __init__(self, forced: Mapping[str, str]) -> None:
        super().__init__()
        self.forced = forced
        self.leaves: dict[str, Leaf] = {}
        self.traced: list[str] = []
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
            self.leaves[name] = Leaf(OpKind.OPAQUE, self.forced[name])
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
        self.stack.append(strip_root(self.path_of_module(m)))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in if self.failed_in is not None else self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack[-1] if self.stack else ""
        return node


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

    A module found to keep Python state, or to write into its buffers, is kept as an opaque leaf and the trace is
    repeated, until nothing is changed by tracing.

    Raises:
        CaptureError: The forward cannot be traced; names module and line.
    """
    forced: dict[str, str] = {}
    while True:
        tracer = StepTracer(forced)
        graph, found = _trace_once(net, tracer)
        new = {name: reason for name, reason in found.items() if name not in forced}
        if not new:
            if graph is None:
                raise CaptureError("tracing did not come to an end")
            return graph, tracer
        forced = {**forced, **new}


def _trace_once(net: nn.Module, tracer: StepTracer) -> tuple[fx.Graph | None, dict[str, str]]:
    snapshot = AttributeSnapshot(dict(net.named_modules()))
    rng_before = torch.get_rng_state()
    try:
        graph = tracer.trace(_Root(net))
    except SnnCompileError as error:
        raise type(error)(error.message, where=error.where or _qualified(tracer)) from error
    except Exception as error:
        if isinstance(error, TypeError) and "cannot assign" in str(error) and tracer.failed_in is not None:
            return None, {tracer.failed_in: "it assigns to a registered buffer or parameter at every step"}
        raise _untraceable(error, tracer) from error
    finally:
        changed = list(snapshot.changed())
        snapshot.restore()
        drew_random = not torch.equal(rng_before, torch.get_rng_state())
        torch.set_rng_state(rng_before)
    if drew_random:
        raise CaptureError(
            "forward draws random numbers that depend on no input, which tracing would freeze into a constant; "
            "draw them from the input (torch.rand_like(x)) or in a module of its own"
        )
    effects = {name: f"it changes its attribute {attribute!r} at every step" for name, attribute in changed}
    return graph, effects | _buffer_writers(graph)


def _buffer_writers(graph: fx.Graph) -> dict[str, str]:
    """Modules whose traced forward writes into a buffer or parameter."""
    writers = {}
    for node in graph.nodes:
        written = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if written is None or written.op != "get_attr":
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = node.op in ("call_method", "call_function") and (
            (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
        )
        if in_place:
            writers[node.meta.get("scope", "")] = f"it writes into {strip_root(str(written.target))!r} at every step"
    return writers


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
        where=tracer.failed_in,
    )
