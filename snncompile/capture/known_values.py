"""What is known of traced values while a network is traced: shapes, dtypes and devices, from a run without data.

A forward that asks for a shape, or branches on one, is answered, so that it can be traced; a plan is made for inputs of
one shape anyway. Nothing is computed before something is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..functional import reset_net
from ..ir import TensorType
from ..torch_private import FakeTensor, tree_leaves, tree_map
from .fakes import FakeNetwork, resolve_attribute

_COMPARED = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_KNOWN = "known"  # where a node's value is kept in its `meta`

# Attributes and methods of a tensor that have nothing to do with its values.
FORM = frozenset(
    """
    shape size dim ndim ndimension numel nelement dtype device layout requires_grad is_sparse is_cuda is_floating_point
    is_complex is_contiguous stride element_size is_leaf grad_fn
    """.split()  # noqa: SIM905
)
# Those that no option of the call can change: a plan is made for one shape, dtype and device, and for its gradients.
_ANSWERED = frozenset(
    {
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "numel",
        "nelement",
        "dtype",
        "device",
        "is_cuda",
        "is_sparse",
        "is_floating_point",
    }
)


class KnownValues:
    """Computes the values of nodes without data, in the order in which the nodes were made.

    Args:
        fakes: A twin of the network, for this alone.
        inputs: Types of its inputs.
    """

    def __init__(self, fakes: FakeNetwork, inputs: tuple[TensorType, ...]) -> None:
        self._fakes = fakes
        self._inputs = inputs
        self._starts: dict[int, Any] = {}
        self._earlier: list[_Call] = []
        self._calls: list[_Call] = []
        self._pending: list[Callable[[], None]] = []  # a call may change the shape of an earlier value, so all wait
        self.is_computing = False

    def start(self) -> None:
        """Forget what earlier traces left in the twin."""
        with self._fakes.mode, torch.no_grad():
            reset_net(self._fakes.net)
        self._earlier, self._calls = self._calls, []
        self._pending.clear()

    def of(self, node: fx.Node) -> Any:
        """The value of a node, or None if it cannot be known without data."""
        pending, self._pending = self._pending, []
        for compute in pending:
            compute()
        return node.meta.get(_KNOWN)

    def expect_input(self, node: fx.Node, position: int) -> None:
        """A node is one of the network's inputs."""
        self._expect(node, lambda: self._input(position))

    def expect_constant(self, node: fx.Node, path: str) -> None:
        """A node is a parameter, buffer or tensor attribute of the network."""
        self._expect(node, lambda: self._constant(path))

    def expect_result(self, node: fx.Node, module: str, *, by_step: bool, repeats: bool) -> None:
        """A node is a call.

        Args:
            node: The call.
            module: Qualified name of the module that it calls, if it does.
            by_step: It takes its operands one step at a time.
            repeats: On the same operands it has the value that it had in the trace before.
        """
        self._expect(node, lambda: self._result(node, module, by_step=by_step, repeats=repeats))

    def _expect(self, node: fx.Node, value: Callable[[], Any]) -> None:
        def compute() -> None:
            node.meta[_KNOWN] = value()

        self._pending.append(compute)

    def _input(self, position: int) -> Any:
        if position >= len(self._inputs):
            return None
        leaf = self._inputs[position]
        held = self._starts.get(position)
        if held is None or TensorType.of(held) != leaf:  # its shape may have been changed in place
            held = self._starts[position] = self._empty(leaf)
        return held

    def _constant(self, path: str) -> Any:
        self.is_computing = True
        try:
            return resolve_attribute(self._fakes.net, path)
        except AttributeError:  # made while tracing
            return None
        finally:
            self.is_computing = False

    def _result(self, node: fx.Node, module: str, *, by_step: bool, repeats: bool) -> Any:
        operands = [source.meta.get(_KNOWN) for source in node.all_input_nodes]
        if any(operand is None for operand in operands):
            return None
        by_step = by_step and not all(map(is_held, node.all_input_nodes))
        what = (node.op, node.target, module, by_step)
        call = _Call(what, fx.node.map_arg(node.args, _known), fx.node.map_arg(node.kwargs, _known))
        number = len(self._calls)
        if repeats and number < len(self._earlier) and self._earlier[number].is_like(call):
            call = self._earlier[number]
        else:
            call.take(self._computed(node, module, by_step=by_step))
        self._calls.append(call)
        return call.value

    def _computed(self, node: fx.Node, module: str, *, by_step: bool) -> Any:
        def known(source: fx.Node) -> Any:
            value = _known(source)
            return _first(value) if by_step and not is_held(source) else value

        args, kwargs = (fx.node.map_arg(part, known) for part in (node.args, node.kwargs))
        self.is_computing = True
        try:
            with self._fakes.mode, torch.no_grad():
                value = self._call(node, module, args, kwargs)
                return tree_map(self._repeated, value) if by_step else value
        except Exception:  # whatever is raised where data is needed; errors of the network itself come up again later
            return None
        finally:
            self.is_computing = False

    def _call(self, node: fx.Node, module: str, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self._fakes.module(module)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _repeated(self, leaf: Any) -> Any:
        return leaf.expand(self._inputs[0].shape[0], *leaf.shape) if isinstance(leaf, torch.Tensor) else leaf

    def _empty(self, leaf: TensorType) -> Any:
        with self._fakes.mode:
            return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)


@dataclass
class _Call:
    """A call in a trace.

    Attributes:
        what: Names the operation.
        args, kwargs: What it was called on.
        value: What came out.
        types: Those that the value had at first: a later call may change its shape in place.
    """

    what: tuple[Any, ...]
    args: Any
    kwargs: Any
    value: Any = None
    types: tuple[Any, ...] = ()

    def take(self, value: Any) -> None:
        self.value, self.types = value, _types(value)

    def is_like(self, other: _Call) -> bool:
        """Whether the other, of which no value is known yet, is the same call on the same values."""
        same = self.what == other.what and _alike(self.args, other.args) and _alike(self.kwargs, other.kwargs)
        return same and self.types == _types(self.value)


def _types(value: Any) -> tuple[Any, ...]:
    return tuple(TensorType.of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, and hold the very same tensors."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, torch.Tensor):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, slice):
        return all(_alike(getattr(one, part), getattr(other, part)) for part in ("start", "stop", "step"))
    return type(one) in _COMPARED and bool(one == other)


def _known(source: fx.Node) -> Any:
    return source.meta[_KNOWN]


def _first(value: Any) -> Any:
    return tree_map(lambda leaf: leaf[0] if isinstance(leaf, FakeTensor) and leaf.dim() else leaf, value)


def is_held(node: fx.Node) -> bool:
    """Whether a traced value follows from parameters and buffers alone."""
    inputs = node.all_input_nodes
    calls = node.op in ("call_function", "call_method") and bool(inputs)
    return node.op == "get_attr" or (calls and all(map(is_held, inputs)))


def is_form(name: Any) -> bool:
    """Whether a tensor is asked for what no option of the call can change."""
    return isinstance(name, str) and name in _ANSWERED
