"""Reads a step into its program: traced from the adapter's step function by `make_fx`, operation by operation.

On tensors without data, so that a step that looks at values is refused, whatever framework it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..torch_private import tree_leaves
from .step_function import Instruction, Literal, StepFunction, Table, is_boolean, needed
from .step_trace import StepTrace, trace_step
from .written_out import FILLED, WRITTEN_OUT, filling, is_scaled_exactly

_aten = torch.ops.aten
Step = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Sequence[Tensor], Sequence[Tensor]]]

# ATen operation -> name in the generators' tables.
_OPERATIONS: dict[Any, str] = {
    _aten.exp.default: "exp",
    _aten.sigmoid.default: "sigmoid",
    _aten.tanh.default: "tanh",
    _aten.add.Tensor: "add",
    _aten.add.Scalar: "add",
    _aten.sub.Tensor: "sub",
    _aten.sub.Scalar: "sub",
    _aten.rsub.Scalar: "rsub",
    _aten.rsub.Tensor: "rsub",
    _aten.mul.Tensor: "mul",
    _aten.mul.Scalar: "mul",
    _aten.div.Tensor: "div",
    _aten.div.Scalar: "div",
    _aten.neg.default: "neg",
    _aten.abs.default: "abs",
    _aten.relu.default: "relu",
    _aten.sqrt.default: "sqrt",
    _aten.round.default: "round",
    _aten.floor.default: "floor",
    _aten.ceil.default: "ceil",
    _aten.maximum.default: "maximum",
    _aten.minimum.default: "minimum",
    _aten.ge.Scalar: "ge",
    _aten.ge.Tensor: "ge",
    _aten.gt.Scalar: "gt",
    _aten.gt.Tensor: "gt",
    _aten.le.Scalar: "le",
    _aten.le.Tensor: "le",
    _aten.lt.Scalar: "lt",
    _aten.lt.Tensor: "lt",
    _aten.eq.Scalar: "eq",
    _aten.eq.Tensor: "eq",
    _aten.ne.Scalar: "ne",
    _aten.ne.Tensor: "ne",
    _aten.logical_and.default: "and",
    _aten.logical_or.default: "or",
    _aten.logical_not.default: "not",
    _aten.bitwise_and.Tensor: "and",
    _aten.bitwise_or.Tensor: "or",
    _aten.bitwise_not.default: "not",
}
BATCH_NORMS = (_aten.native_batch_norm.default, _aten._native_batch_norm_legit_no_training.default)
MOST_COMPUTED = 16 * 1024  # numbers of a table that is computed anew at every call
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COPIES = (
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.contiguous.default,
)


class NotPointwise(Exception):
    """A step cannot be written as a pointwise program; says why."""


@dataclass(frozen=True)
class Normalisation:
    """Batch norm by running statistics, `x * factor + offset` in one rounding, as torch's own kernel does it.

    Attributes:
        eps: Added to the variance.
        view: The shape that puts channels where they meet those of an image.
        weight, bias: Look up the parameters; None without them.
        mean, var: Look up the running statistics.
    """

    eps: float
    view: tuple[int, ...]
    weight: Callable[[], Tensor] | None
    bias: Callable[[], Tensor] | None
    mean: Callable[[], Tensor]
    var: Callable[[], Tensor]

    def centre(self) -> Tensor:
        return self.mean().view(self.view)

    def scale(self) -> Tensor:
        return (self.var().float() + self.eps).rsqrt().view(self.view)

    def factor(self) -> Tensor:
        scale = self.scale()
        return scale if self.weight is None else scale * self.weight().float().view(self.view)

    def offset(self) -> Tensor:
        # In one rounding, as torch does it.
        moved = self.mean().double().view(self.view) * self.factor().double()
        return (-moved if self.bias is None else self.bias().double().view(self.view) - moved).float()


def _trains(node: fx.Node) -> bool:
    """Whether a batch norm takes the statistics of its input."""
    return node.target is _aten.native_batch_norm.default and bool(node.args[5])


def trace_step_function(step: Step, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> StepFunction:
    """Write a step as a pointwise program: `trace_pointwise_step` and `read_step_function` in one."""
    trace = trace_pointwise_step(step, inputs, states)
    return read_step_function(trace, len(inputs), len(states), inputs[0].shape, inputs[0].dtype)


def trace_pointwise_step(step: Step, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> StepTrace:
    """What a step does, if its types are those of a pointwise program.

    Args:
        step: `(inputs, states) -> (outputs, states')`.
        inputs, states: Examples; only their types are looked at. The first input has the shape of the states and of
            all results; others may be broadcast to it. All are float32, float16 or bfloat16.

    Raises:
        NotPointwise: The step cannot be traced, or its types do not fit.
    """
    shape, dtype = inputs[0].shape, inputs[0].dtype
    for value in (*inputs, *states):
        if value.dtype is not dtype or dtype not in _DTYPES or not _broadcasts_to(shape, value.shape):
            kind = f"{value.dtype}{list(value.shape)}"
            raise NotPointwise(f"inputs and states are not all of one shape and one floating dtype: {kind}")
    if any(state.shape != shape for state in states):
        raise NotPointwise("a state is not of its input's shape")

    try:
        return trace_step(step, inputs, states)
    except Exception as error:  # whatever a step raises that looks at values
        raise NotPointwise(f"it cannot be traced without data: {type(error).__name__}: {error}") from error


def read_step_function(
    trace: StepTrace, inputs: int, states: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> StepFunction:
    """A traced step as a pointwise program.

    Args:
        trace: Of the step.
        inputs, states: How many it has.
        shape, dtype: Of the first input.

    Raises:
        NotPointwise: The step does something that has no place in such a program.
    """
    return StepReader(trace, inputs, states, torch.Size(shape), dtype).read()


def _broadcasts_to(shape: Sequence[int], part: Sequence[int]) -> bool:
    """Whether a tensor of shape `part` can be broadcast to `shape`."""
    if len(part) > len(shape):
        return False
    return all(size in (1, whole) for size, whole in zip(reversed(part), reversed(shape), strict=False))


def _named_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _without_leading_ones(shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return sizes


class StepReader:
    """Reads the trace of a step.

    Args:
        trace: The trace.
        inputs, states: How many arguments are inputs and, behind them, states.
        shape, dtype: Of the states and of all results.
    """

    def __init__(
        self, trace: StepTrace, inputs: int, states: int, shape: torch.Size, dtype: torch.dtype = torch.float32
    ) -> None:
        self._trace = trace
        self._inputs = inputs
        self._states = states
        self._shape = shape
        self._dtype = dtype
        self._values: dict[fx.Node, Any] = {}  # the name of a value, or a list of such
        self._uniform: dict[fx.Node, Callable[[], Any]] = {}  # values made of parameters and numbers alone
        self._program: list[Instruction] = []
        self._numbers: list[Callable[[], float]] = []
        self._tables: list[Table] = []
        self._boolean: set[str] = set()

    def read(self) -> StepFunction:
        """The step that the graph computes."""
        names = [f"x{n}" for n in range(self._inputs)] + [f"s{n}" for n in range(self._states)]
        outputs = [self._result(result) for result in self._walk(names)]
        count = len(outputs) - self._states
        if count < 1:
            raise NotPointwise("it returns fewer states than it takes")
        return StepFunction(
            self._inputs,
            self._states,
            needed(self._program, outputs),
            tuple(outputs[:count]),
            tuple(outputs[count:]),
            tuple(self._numbers),
            tuple(self._tables),
            self._dtype,
        )

    def _result(self, node: Any) -> str:
        """The name of a result, which must be of the full shape, in the dtype of the states."""
        if not isinstance(node, fx.Node) or node not in self._values:
            raise NotPointwise("it returns something that does not depend on its inputs")
        name, value = self._values[node], node.meta["val"]
        if not isinstance(name, str) or value.dtype is not self._dtype or value.shape != self._shape:
            raise NotPointwise(f"it returns something that is not {_named_dtype(self._dtype)} of its input's shape")
        return name

    def _walk(self, names: Sequence[str]) -> list[Any]:
        """Read every node, the arguments under these names; the nodes of the results."""
        given = iter(names)
        for node in self._trace.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, next(given))
            elif node.op == "get_attr":
                self._uniform[node] = partial(self._constant, node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return tree_leaves(node.args[0])
        raise AssertionError("a traced graph has an output")

    def _constant(self, node: fx.Node) -> Any:
        return self._trace.constants[str(node.target)]

    def _placeholder(self, node: fx.Node, name: str) -> None:
        self._values[node] = name

    def _call(self, node: fx.Node) -> None:
        if not node.users:
            return
        if node.all_input_nodes and all(source in self._uniform for source in node.all_input_nodes):
            self._uniform[node] = self._uniform_call(node)
            return
        target = node.target
        if target in COPIES or target in (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default):
            self._values[node] = self._same_elements(node)
        elif target is _aten.unbind.int or target is _aten.stack.default:
            self._values[node] = self._of_one_step(node)
        elif getattr(target, "__name__", "") == "getitem" or target is _aten.select.int:
            self._values[node] = self._item(node)
        elif target is _aten._to_copy.default:
            self._values[node] = self._converted(node)
        elif target is _aten.clamp.default:
            self._values[node] = self._clamped(node)
        elif target in BATCH_NORMS:
            self._values[node] = self._normalised(node)
        elif target in FILLED:
            self._values[node] = self._filled(node)
        elif target in WRITTEN_OUT:
            self._values[node] = self._written_out(node, WRITTEN_OUT[target])
        elif target in _OPERATIONS:
            self._values[node] = self._operation(node, _OPERATIONS[target])
        else:
            raise NotPointwise(f"{target} has no place in a pointwise program")

    def _uniform_call(self, node: fx.Node) -> Callable[[], Any]:
        arguments = (node.args, node.kwargs)

        def compute() -> Any:
            args, kwargs = fx.node.map_arg(arguments, lambda source: self._uniform[source]())
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return compute

    def _same_elements(self, node: fx.Node) -> Any:
        """A copy or a view; a dimension of size 1 more or less moves no element."""
        source = node.args[0]
        name = self._values[source]  # type: ignore[index]
        if isinstance(name, str) and name.startswith("u"):
            return name  # a number fills whatever it is expanded to
        before, after = (value.meta["val"].shape for value in (source, node))  # type: ignore[union-attr]
        # Of a value that is still to be broadcast, only leading dimensions may come or go.
        plain = _without_ones if before.numel() == self._shape.numel() else _without_leading_ones
        if plain(before) != plain(after):
            raise NotPointwise(f"{node.target} changes the shape")
        return name

    def _of_one_step(self, node: fx.Node) -> Any:
        """`unbind` and `stack` over a time axis of length 1."""
        values = tree_leaves(node.args[0])
        many = node.meta["val"]
        if len(values) != 1 or (isinstance(many, (list, tuple)) and len(many) != 1):
            raise NotPointwise(f"{node.target} joins or splits more than one step")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 0:
            raise NotPointwise(f"{node.target} works on dimension {dim}")
        return self._values[values[0]]

    def _item(self, node: fx.Node) -> Any:
        source: Any = node.args[0]
        value = source.meta["val"]
        if node.target is _aten.select.int and (value.shape[0] != 1 or tuple(node.args[1:]) != (0, 0)):
            raise NotPointwise("it selects a part of a tensor")
        values = self._values[source]
        if node.target is not _aten.select.int and isinstance(values, list):
            if node.args[1] != 0:
                raise NotPointwise("it reads the statistics of a batch norm")
            return values[0]
        if node.target is not _aten.select.int and (not isinstance(value, (list, tuple)) or len(value) != 1):
            raise NotPointwise("it takes a tuple apart")
        return values

    def _converted(self, node: fx.Node) -> str:
        name, dtype = self._named(node.args[0]), node.meta["val"].dtype
        if dtype is self._dtype:
            return self._number_of(node.args[0])
        if dtype is torch.bool:
            return self.truth(node.args[0])
        if name in self._boolean and not dtype.is_floating_point and not dtype.is_complex:
            return name  # 0 and 1, until they meet other numbers
        raise NotPointwise(f"it computes in {dtype}")

    def _filled(self, node: fx.Node) -> str:
        """A tensor of one number."""
        value = filling(node)
        if value is None:
            raise NotPointwise(f"{node.target} is filled with {node.args[-1]!r}")
        self._check_dtype(node)
        self._check_alignment(node)
        return self._number(Literal(value, is_tensor=True))

    def _written_out(self, node: fx.Node, write: Callable[[Any, fx.Node], str | None]) -> str:
        self._check_dtype(node)
        self._check_alignment(node)
        name = write(self, node)
        if name is None:
            raise NotPointwise(f"{node.target} has no place in a pointwise program with {node.args[1:]}")
        return name

    def _check_dtype(self, node: fx.Node) -> None:
        if node.meta["val"].dtype is not self._dtype:
            raise NotPointwise(f"it computes in {node.meta['val'].dtype}")

    def _clamped(self, node: fx.Node) -> str:
        self._check_dtype(node)
        name = self._number_of(node.args[0])
        low, high = (*node.args[1:], None, None)[:2]
        if low is not None:
            name = self._emit("maximum", (name, self._named(low)))
        return name if high is None else self._emit("minimum", (name, self._named(high)))

    def _normalised(self, node: fx.Node) -> list[str]:
        """Batch norm by its running statistics: as torch does it, one factor and one offset for each channel."""
        x, *parts = node.args[:5]
        norm = self._normalisation(x, parts, node.args[-1], trains=_trains(node))
        return [self._emit("fma", (self._named(x), *(self._channels(part) for part in (norm.factor, norm.offset))))]

    def _normalisation(self, x: Any, parts: Sequence[Any], eps: Any, *, trains: bool) -> Normalisation:
        """A batch norm of `x`; its parts are weight, bias, mean and variance."""
        if trains or not all(part is None or part in self._uniform for part in parts):
            raise NotPointwise("it normalises by the statistics of its input")
        if not isinstance(x, fx.Node) or x.meta["val"].shape != self._shape:
            raise NotPointwise("it normalises a part of a tensor")
        found: Any = [None if part is None else self._uniform[part] for part in parts]
        return Normalisation(eps, (-1, *[1] * (len(self._shape) - 2)), *found)

    def _channels(self, compute: Callable[[], Tensor]) -> str:
        """A table of one number for each channel."""
        return self._table((self._shape[1], *[1] * (len(self._shape) - 2)), True, compute)

    def _operation(self, node: fx.Node, operation: str) -> str:
        """One instruction. Truth values count as 0 and 1 among numbers, and numbers as true where they are not 0."""
        dtype = node.meta["val"].dtype
        if dtype is not (torch.bool if is_boolean(operation) else self._dtype):
            raise NotPointwise(f"it computes in {dtype}")
        self._check_alignment(node)
        read = self.truth if operation in ("and", "or", "not") else self._number_of
        operands = [read(arg) for arg in node.args]
        if node.kwargs:
            alpha = node.kwargs.get("alpha")
            if len(node.kwargs) > 1 or not is_scaled_exactly(alpha):
                raise NotPointwise(f"{node.target} is called with {', '.join(node.kwargs)}")
            operands[1] = self._emit("mul", (operands[1], self.number(float(alpha))))  # type: ignore[arg-type]
        return self._emit(operation, tuple(operands))

    def _number_of(self, operand: Any) -> str:
        """The name of an operand that is a number."""
        name = self._named(operand)
        return self._emit("select", (name,)) if name in self._boolean else name

    # For what is written out in more than one instruction

    def number(self, value: float) -> str:
        return self._number(Literal(value))

    def operand(self, node: fx.Node, place: int) -> str:
        return self._number_of(node.args[place])

    def truth(self, operand: Any) -> str:
        name = self._named(operand)
        return name if name in self._boolean else self._emit("ne", (name, self.number(0.0)))

    def emit(self, operation: str, *operands: str) -> str:
        return self._emit(operation, operands)

    def _check_alignment(self, node: fx.Node) -> None:
        """Elements must meet as they do in the full shape, also where an operand is broadcast to it."""
        shapes = [shape for source in node.all_input_nodes if (shape := self._shape_of(source)).numel() != 1]
        shapes.append(node.meta["val"].shape)
        full = self._shape.numel()
        if all(shape.numel() == full for shape in shapes):
            return
        if not all(_broadcasts_to(self._shape, _without_leading_ones(shape)) for shape in shapes):
            raise NotPointwise(f"{node.target} broadcasts to another shape than its input's")

    def _shape_of(self, node: fx.Node) -> torch.Size:
        value = node.meta["val"] if "val" in node.meta else self._constant(node)
        return torch.Size(value.shape)

    def _named(self, operand: Any) -> str:
        """The name of an operand; numbers and what is made of parameters become numbers of the program."""
        if isinstance(operand, fx.Node) and operand in self._values:
            name = self._values[operand]
            if not isinstance(name, str):
                raise NotPointwise("it computes with a tuple")
            return name
        if isinstance(operand, fx.Node):
            value = operand.meta["val"] if "val" in operand.meta else self._constant(operand)
            if value.dtype is not self._dtype:
                raise NotPointwise(f"a parameter is not {_named_dtype(self._dtype)}: {value.dtype}{list(value.shape)}")
            compute = self._uniform[operand]
            if value.numel() == 1:
                return self._number(lambda: float(compute().detach()))
            return self._table(tuple(value.shape), operand.op == "call_function", compute)
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return self._number(Literal(float(operand)))
        raise NotPointwise(f"it computes with {operand!r}")

    def _number(self, compute: Callable[[], float]) -> str:
        self._numbers.append(compute)
        return f"u{len(self._numbers) - 1}"

    def _table(self, shape: tuple[int, ...], is_computed: bool, value: Callable[[], Tensor]) -> str:
        if is_computed and math.prod(shape) > MOST_COMPUTED:
            raise NotPointwise(f"it computes {list(shape)} from parameters, more than {MOST_COMPUTED} numbers")
        self._tables.append(Table(shape, is_computed, value))
        return f"x{self._inputs + len(self._tables) - 1}"

    def _emit(self, operation: str, operands: tuple[str, ...]) -> str:
        name = f"r{len(self._program)}"
        self._program.append(Instruction(name, operation, operands))
        if is_boolean(operation):
            self._boolean.add(name)
        return name
