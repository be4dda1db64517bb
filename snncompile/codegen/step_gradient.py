"""A step of a neuron backward, as a small pointwise program: the vector-Jacobian product of its step function.

Autograd itself differentiates the step, surrogate gradients included, on tensors without data; `make_fx` writes down
what it does. Gradients of parameters come out as sums: over all elements and steps where a parameter is one number,
over the steps alone where it has a number for each channel or neuron. A few operations on them make the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .step_function import Instruction, Table, needed, values_read
from .step_reader import BATCH_NORMS, COPIES, Normalisation, NotPointwise, StepReader
from .step_trace import StepTrace, trace_step
from .written_out import FILLED

_aten = torch.ops.aten
_Step = Callable[
    [tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Sequence[Tensor], Sequence[Tensor]]
]


@dataclass(frozen=True)
class Totals:
    """What a chunk of steps adds up to for the gradients of parameters.

    Attributes:
        overall: `StepGradient.sums`, over all elements and steps: float64 `[sums]`.
        of_neurons: `StepGradient.neuron_sums`, over the steps: float32 `[N, *]` each.
    """

    overall: Tensor
    of_neurons: Sequence[Tensor]


ParameterGradient = Callable[[Totals], Tensor]


@dataclass(frozen=True)
class StepGradient:
    """One step backward: gradients of the results in, gradients of the arguments out, all float32 of one shape.

    Its operands are `x0`… the inputs and, behind them, tables, `s0`… the states before the step, `g0`… the gradients of
    the outputs and `h0`… of the states after the step, and `u0`… numbers.

    Attributes:
        inputs, states, outputs: How many there are.
        program: Instructions in order.
        input_gradients, state_gradients: Names of the results; None where no gradient flows.
        sums: Names of values whose sums over elements and steps the gradients of parameters are made of.
        neuron_sums: Names of values whose sums over the steps, one for each neuron, they are made of.
        parameter_gradients: From those sums to the gradient of each parameter; None where no gradient flows.
        differentiable: Whether a gradient flows from each output and, behind them, from each state after the step.
        numbers: What computes each number anew at every call.
        tables: What looks up, or computes, each tensor that is made of parameters alone and broadcast to the states.
        constants: Tensors that it computes with, which must not record gradients.
    """

    inputs: int
    states: int
    outputs: int
    program: tuple[Instruction, ...]
    input_gradients: tuple[str | None, ...]
    state_gradients: tuple[str | None, ...]
    sums: tuple[str, ...]
    neuron_sums: tuple[str, ...]
    differentiable: tuple[bool, ...]
    parameter_gradients: tuple[ParameterGradient | None, ...] = field(compare=False)
    numbers: tuple[Callable[[], float], ...] = field(compare=False)
    tables: tuple[Table, ...]
    constants: tuple[Tensor, ...] = field(compare=False)

    @property
    def results(self) -> list[str]:
        """Names of all that it computes."""
        named = (*self.input_gradients, *self.state_gradients, *self.sums, *self.neuron_sums)
        return [name for name in named if name is not None]

    @property
    def inputs_read(self) -> list[int]:
        """The inputs that it reads."""
        return [n for n in values_read("x", self.program, self.results) if n < self.inputs]

    def __str__(self) -> str:
        lines = [f"{i.name} = {i.operation}({', '.join(i.operands)})" for i in self.program]
        groups = (self.input_gradients, self.state_gradients, self.sums, self.neuron_sums)
        return "\n".join([*lines, "return " + ", ".join(f"({', '.join(map(str, group))})" for group in groups)])


def trace_step_gradient(
    step: _Step,
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    outputs: int,
    parameters: tuple[Tensor, ...],
) -> StepGradient:
    """Write a step's vector-Jacobian product as a pointwise program.

    Args:
        step: `(inputs, states, parameters) -> (outputs, states')`.
        inputs, states: Examples, all float32 of one shape; only their types are looked at.
        outputs: How many there are.
        parameters: What gradients are wanted of beside inputs and states; read anew at every call.

    Raises:
        NotPointwise: Backward does something that has no place in such a program.
    """
    shape = inputs[0].shape
    if any(value.shape != shape for value in (*inputs, *states)):
        raise NotPointwise("backward, an input is broadcast")
    differentiable: list[bool] = []

    def vector_jacobian_product(
        x: tuple[Tensor, ...],
        s: tuple[Tensor, ...],
        g: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        p: tuple[Tensor, ...],
    ) -> Any:
        with torch.enable_grad():
            x, s, p = (tuple(value.detach().requires_grad_() for value in group) for group in (x, s, p))
            results = [result for group in step(x, s, p) for result in group]
            differentiable.extend(result.requires_grad for result in results)
            found = [
                (result, gradient) for result, gradient in zip(results, (*g, *h), strict=True) if result.requires_grad
            ]
            if not found:
                return [None] * (len(x) + len(s) + len(p))
            of, given = zip(*found, strict=True)
            return torch.autograd.grad(of, (*x, *s, *p), given, allow_unused=True)

    gradients = tuple(torch.empty_like(inputs[0]) for _ in range(outputs))
    try:
        after = tuple(map(torch.empty_like, states))
        trace = trace_step(vector_jacobian_product, inputs, states, gradients, after, parameters)
    except Exception as error:  # whatever a step, or its backward, raises that looks at values
        raise NotPointwise(f"its gradient cannot be traced without data: {type(error).__name__}: {error}") from error
    reader = _GradientReader(trace, len(inputs), len(states), shape, outputs, parameters)
    return reader.read_gradient(tuple(differentiable))


class _GradientReader(StepReader):
    """Reads what autograd did: more operations than in a step, and sums of what parameters get.

    Args:
        trace, inputs, states, shape: As for a step.
        outputs: How many the step has.
        parameters: The arguments behind the gradients.
    """

    def __init__(
        self,
        trace: StepTrace,
        inputs: int,
        states: int,
        shape: torch.Size,
        outputs: int,
        parameters: Sequence[Tensor],
    ) -> None:
        super().__init__(trace, inputs, states, shape)
        self._outputs = outputs
        self._parameters = parameters
        self._sums: list[str] = []
        self._neuron_sums: list[str] = []
        self._summed: dict[fx.Node, ParameterGradient] = {}  # what is made of sums
        self._norms: dict[fx.Node, Normalisation] = {}  # those that go backward

    def read_gradient(self, differentiable: tuple[bool, ...]) -> StepGradient:
        names = [f"x{n}" for n in range(self._inputs)] + [f"s{n}" for n in range(self._states)]
        names += [f"g{n}" for n in range(self._outputs)] + [f"h{n}" for n in range(self._states)]
        names += [f"p{n}" for n in range(len(self._parameters))]
        results = self._walk(names)
        arguments = self._inputs + self._states
        gradients = tuple(None if result is None else self._result(result) for result in results[:arguments])
        of_parameters = tuple(None if result is None else self._of_sums(result) for result in results[arguments:])
        constants = list(self._trace.constants.values())
        tensors = tuple(value for value in constants if isinstance(value, Tensor))
        if any(value.requires_grad for value in tensors):
            raise NotPointwise("it computes with a tensor that records gradients and is no parameter of its own")
        return StepGradient(
            self._inputs,
            self._states,
            self._outputs,
            needed(self._program, [name for name in (*gradients, *self._sums, *self._neuron_sums) if name is not None]),
            gradients[: self._inputs],
            gradients[self._inputs :],
            tuple(self._sums),
            tuple(self._neuron_sums),
            differentiable,
            of_parameters,
            tuple(self._numbers),
            tuple(self._tables),
            tensors,
        )

    def _placeholder(self, node: fx.Node, name: str) -> None:
        if name.startswith("p"):
            self._uniform[node] = self._parameters[int(name[1:])].detach
        else:
            super()._placeholder(node, name)

    def _call(self, node: fx.Node) -> None:
        if not node.users:
            return
        node.target = self._out_of_place(node)
        target = node.target
        if _reads_statistics(node):
            return  # they are not there where running ones are used
        if target is _aten.native_batch_norm_backward.default:
            self._norms[node] = self._norm_backward(node)
        elif node.all_input_nodes and node.all_input_nodes[0] in self._norms:
            self._part_of_norm_backward(node)
        elif any(source in self._summed for source in node.all_input_nodes):
            self._summed[node] = self._of_sums_call(node)
        elif target in _SUMS and node.args[0] in self._values:
            self._summed[node] = self._sum(node)
        elif target in FILLED and self._is_uniform(node):
            self._uniform[node] = self._uniform_call(node)
        elif target in FILLED:
            self._values[node] = self._filled(node)
        elif target in _OF_BACKWARD and node.args[0] in self._values:
            self._values[node] = self._written_out(node, _OF_BACKWARD[target])
        else:
            super()._call(node)

    def _out_of_place(self, node: fx.Node) -> Any:
        """What a call does, as a function without side effects."""
        namespace, *name = str(node.target).split(".")
        if namespace != "aten" or len(name) != 2 or not name[0].endswith("_") or name[0].endswith("__"):
            return node.target
        written: Any = node.args[0]
        is_own = written.op == "call_function" and str(self._values.get(written, "r")).startswith("r")
        others = [user for user in written.users if user is not node]
        shares = [source for source in self._values if self._values[source] == self._values.get(written)]
        is_shared = len(shares) > 1 or any(user.target in COPIES for user in others)
        if not is_own or is_shared or not all(map(self._is_read, others)):
            raise NotPointwise(f"{node.target} writes into a tensor that is read elsewhere")
        return getattr(getattr(_aten, name[0][:-1]), name[1])

    def _is_uniform(self, node: fx.Node) -> bool:
        """Whether what is filled with a number is made of parameters alone."""
        shape = node.meta["val"].shape
        if not node.all_input_nodes:
            return bool(shape.numel() == 1)
        return shape != self._shape and all(source in self._uniform for source in node.all_input_nodes)

    def _is_read(self, node: fx.Node) -> bool:
        return any(node in known for known in (self._values, self._uniform, self._summed))

    def _sum(self, node: fx.Node) -> ParameterGradient:
        source, value = node.args[0], node.meta["val"]
        summed = source.meta["val"].shape  # type: ignore[union-attr]
        name = self._number_of(source)
        if value.numel() == 1 and summed.numel() == self._shape.numel():
            return self._add_up(name, value.shape)
        if summed != self._shape:
            raise NotPointwise("backward, it adds up a part of the elements")
        of_neurons, (_, *how), kwargs = self._add_up_steps(name), node.args, node.kwargs
        # Sums over elements and over steps may change places.
        return lambda totals: node.target(of_neurons(totals), *how, **kwargs)  # type: ignore[operator]

    def _add_up(self, name: str, shape: torch.Size) -> ParameterGradient:
        """The sum over elements and steps."""
        place = len(self._sums)
        self._sums.append(name)
        return lambda totals: totals.overall[place].reshape(shape)

    def _add_up_steps(self, name: str) -> ParameterGradient:
        """The sum over the steps: `[N, *]`."""
        place = len(self._neuron_sums)
        self._neuron_sums.append(name)
        return lambda totals: totals.of_neurons[place]

    def _norm_backward(self, node: fx.Node) -> Normalisation:
        _, x, weight, mean, var, _, _, trains, eps, _ = node.args
        return self._normalisation(x, (weight, None, mean, var), eps, trains=bool(trains))

    def _part_of_norm_backward(self, node: fx.Node) -> None:
        """The gradient of what a batch norm reads, of its weight, or of its bias."""
        source: Any = node.args[0]
        norm, gradient = self._norms[source], self.operand(source, 0)
        if node.args[1] == 0:
            self._values[node] = self.emit("mul", gradient, self._channels(norm.factor))
            return
        if node.args[1] == 1:
            centred = self.emit("sub", self.operand(source, 1), self._channels(norm.centre))
            gradient = self.emit("mul", gradient, self.emit("mul", centred, self._channels(norm.scale)))
        of_neurons = self._add_up_steps(gradient)
        dims = [d for d in range(len(self._shape)) if d != 1]
        self._summed[node] = lambda totals: of_neurons(totals).sum(dims)

    def _of_sums_call(self, node: fx.Node) -> ParameterGradient:
        # A vector-Jacobian product is linear in what it sums: what is done to a step's sum may be done to that of all.
        arguments = (node.args, node.kwargs)
        for source in node.all_input_nodes:
            if source not in self._summed and source not in self._uniform:
                raise NotPointwise("backward, it computes with a sum over elements")

        def compute(totals: Totals) -> Tensor:
            def of(source: fx.Node) -> Any:
                return self._summed[source](totals) if source in self._summed else self._uniform[source]()

            args, kwargs = fx.node.map_arg(arguments, of)
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
            return result

        return compute

    def _of_sums(self, node: Any) -> ParameterGradient:
        """The gradient of a parameter."""
        if node in self._summed:
            return self._summed[node]
        if node in self._uniform:
            compute = self._uniform[node]
            return lambda _: compute()
        shape = node.meta["val"].shape
        if shape.numel() == 1:
            return self._add_up(self._number_of(node), shape)  # the states have one element
        if shape != self._shape:
            raise NotPointwise("backward, a parameter is of another shape than the states")
        return self._add_up_steps(self._number_of(node))

    def same_step(self, node: fx.Node) -> Any:
        """The only step of a time axis of length 1, put back into it."""
        if node.args[2:] != (0, 0) or node.meta["val"].shape[0] != 1:
            raise NotPointwise("it puts a part of a tensor back")
        return self._values[node.args[0]]  # type: ignore[index]


def _reads_statistics(node: fx.Node) -> bool:
    """Whether a call takes, for backward, what a batch norm says of the statistics of its input."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.target not in BATCH_NORMS or node.args[1] == 0:
        return False
    return all(user.target is _aten.native_batch_norm_backward.default for user in node.users)


def _threshold_backward(reader: _GradientReader, node: fx.Node) -> str:
    is_below = reader.emit("le", reader.operand(node, 1), reader.operand(node, 2))
    return reader.emit("where", is_below, reader.number(0.0), reader.operand(node, 0))


def _hardtanh_backward(reader: _GradientReader, node: fx.Node) -> str:
    x = reader.operand(node, 1)
    is_outside = reader.emit(
        "or", reader.emit("le", x, reader.operand(node, 2)), reader.emit("ge", x, reader.operand(node, 3))
    )
    return reader.emit("where", is_outside, reader.number(0.0), reader.operand(node, 0))


def _leaky_relu_backward(reader: _GradientReader, node: fx.Node) -> str:
    gradient, is_above = reader.operand(node, 0), reader.emit("gt", reader.operand(node, 1), reader.number(0.0))
    return reader.emit("where", is_above, gradient, reader.emit("mul", gradient, reader.operand(node, 2)))


def _sigmoid_backward(reader: _GradientReader, node: fx.Node) -> str:
    gradient, y = reader.operand(node, 0), reader.operand(node, 1)
    return reader.emit("mul", reader.emit("mul", gradient, reader.emit("sub", reader.number(1.0), y)), y)


def _tanh_backward(reader: _GradientReader, node: fx.Node) -> str:
    gradient, y = reader.operand(node, 0), reader.operand(node, 1)
    return reader.emit("mul", gradient, reader.emit("sub", reader.number(1.0), reader.emit("mul", y, y)))


_SUMS = (_aten.sum.default, _aten.sum.dim_IntList)
# What only autograd does.
_OF_BACKWARD: dict[Any, Callable[[_GradientReader, fx.Node], Any]] = {
    _aten.select_backward.default: _GradientReader.same_step,
    _aten.threshold_backward.default: _threshold_backward,
    _aten.hardtanh_backward.default: _hardtanh_backward,
    _aten.leaky_relu_backward.default: _leaky_relu_backward,
    _aten.sigmoid_backward.default: _sigmoid_backward,
    _aten.tanh_backward.default: _tanh_backward,
}
