"""Autograd for kernels: a chunk of steps is one node of its graph, and the reverse scan is that node's backward.

What is kept for it is what comes in: of the chunk's inputs those that it reads, the states before its first step, the
parameters and tables. Autograd checks, as for every operation, that nobody has written into them in between. Gradients
of gradients are those of the eager steps, which run once more where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Adapter, copy_sharing_tensors
from ..codegen import StepFunction, StepGradient, Table, stack_steps, trace_step_gradient
from ..ir import chunk_like, lie_alike, on_huge_pages
from ..torch_private import FakeTensor
from .compiled_scan import CompiledReverse, Layout, ReverseOperands, ReverseResults

Tensors = tuple[Tensor, ...]
_Step = Callable[[Tensors, Tensors, Tensors], tuple[Sequence[Tensor], Sequence[Tensor]]]


def step_of_parameters(module: nn.Module, adapter: Adapter) -> _Step:
    """A neuron's step as a function of its parameters too, in the order of `parameter_names`.

    It works on a copy that is made now: on Python values as they are, and on the module's own buffers.
    """
    sharing = copy_sharing_tensors(module)
    places = [(sharing.get_submodule(owner), name) for owner, _, name in map(_split, parameter_names(module))]

    def step(inputs: Tensors, states: Tensors, parameters: Tensors) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        for (owner, name), value in zip(places, parameters, strict=True):
            owner._parameters[name] = value  # type: ignore[assignment]  # it may be any tensor
        return adapter.step(sharing, inputs, states)

    return step


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Qualified names of a module's parameters; one that has several names is there under each."""
    return tuple(name for name, _ in module.named_parameters(remove_duplicate=False))


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


@dataclass(frozen=True)
class Backward:
    """How a kernel goes backward.

    Attributes:
        function: The step.
        gradient: The step's gradient.
        reverse: The same over a chunk of steps, compiled.
        eager: Makes the eager step, with its Python values as they were when the kernel was made.
        parameters: Names of the module's parameters.
    """

    function: StepFunction
    gradient: StepGradient
    reverse: CompiledReverse
    eager: Callable[[], _Step]
    parameters: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Those of the step and, behind them, those of its gradient."""
        return (*self.function.tables, *self.gradient.tables)

    @cached_property
    def kept_inputs(self) -> frozenset[int]:
        """The inputs that the reverse scan reads: another, such as what is added to an output, changes no gradient."""
        read = {*self.function.inputs_of_states, *self.gradient.inputs_read}
        # Without states, it walks memory as the first input lies in it.
        return frozenset(read if self.gradient.states else {0, *read})

    def parameters_of(self, module: nn.Module) -> Tensors:
        """The parameters that a module has now."""
        return tuple(map(module.get_parameter, self.parameters))


def trace_gradient(
    function: StepFunction, module: nn.Module, adapter: Adapter, inputs: Tensors, states: Tensors
) -> StepGradient:
    """The gradient of a neuron's or a chain's step; see `make_backward`.

    Raises:
        NotPointwise: It has no place in a pointwise program.
    """
    own = tuple(map(module.get_parameter, parameter_names(module)))
    return trace_step_gradient(step_of_parameters(module, adapter), inputs, states, len(function.outputs), own)


def make_backward(
    build_reverse: Callable[[StepFunction, StepGradient], CompiledReverse],
    function: StepFunction,
    module: nn.Module,
    adapter: Adapter,
    inputs: Tensors,
    states: Tensors,
) -> Backward:
    """The way back through a neuron's or a chain's step.

    Args:
        build_reverse: Compiles it.
        function: The step.
        module, adapter: The neuron or chain, whose parameters get gradients.
        inputs, states: Examples of a step.

    Raises:
        NotPointwise: It has no place in a pointwise program.
        BuildError: It cannot be compiled.
    """
    names = parameter_names(module)
    gradient = trace_gradient(function, module, adapter, inputs, states)
    # Kept as it is now: the module's own attributes may be others when gradients are asked for.
    kept = copy_sharing_tensors(module)
    eager = partial(step_of_parameters, kept, adapter)
    return Backward(function, gradient, build_reverse(function, gradient), eager, names)


@dataclass(frozen=True)
class RecordedScan:
    """One call of a kernel, as its backward needs to know it.

    Attributes:
        backward: How to go backward.
        forward: `(inputs, states) -> (outputs, states')`, by the kernel.
        numbers: Those of the step and those of its gradient, as they are in this call.
        layouts: Of the tables.
        steps: How many.
        still: For each input, whether it is the same at every step.
        is_chunk: Values have a dimension for time: `[C, N, *]`.
    """

    backward: Backward
    forward: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensors, Tensors]]
    numbers: tuple[Sequence[float], Sequence[float]]
    layouts: Sequence[Layout]
    steps: int
    still: tuple[bool, ...]
    is_chunk: bool

    def run(
        self, inputs: Sequence[Tensor], states: Sequence[Tensor], parameters: Tensors, tables: Sequence[Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Outputs and new states, recorded."""
        results = _Scan.apply(self, *inputs, *states, *parameters, *tables)  # type: ignore[no-untyped-call]
        count = self.backward.gradient.outputs
        return tuple(results[:count]), tuple(results[count:])

    def split(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """What belongs to inputs, to states, to parameters and to tables."""
        gradient = self.backward.gradient
        rest, groups = tuple(tensors), []
        for count in (gradient.inputs, gradient.states, len(self.backward.parameters)):
            groups.append(rest[:count])
            rest = rest[count:]
        return (*groups, rest)

    def gradients(
        self, tensors: Sequence[Tensor | None], given: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of inputs, states and parameters by the reverse scan; tables have none of their own.

        Args:
            tensors: Inputs, states, parameters and tables, as they were forward; None: an input that was not kept.
            given: Gradients of outputs and new states.
            wanted: Of which tensors gradients are wanted.
        """
        gradient = self.backward.gradient
        inputs, states, parameters, tables = self.split(tensors)
        of_inputs, of_states, of_parameters, _ = self.split(wanted)
        like = self._like(tensors)
        outputs = [self._walkable(value, like, is_chunk=self.is_chunk) for value in given[: gradient.outputs]]
        after = [self._walkable(value, like, is_chunk=False) for value in given[gradient.outputs :]]
        moving = [not still for still in self.still]
        # What is added to an output gets that output's gradient as it is.
        handed_on = {
            number: given[int(name[1:])]
            for number, (want, name) in enumerate(zip(of_inputs, gradient.input_gradients, strict=True))
            if want and moving[number] and name is not None and name.startswith("g")
        }
        to_inputs = [
            self._empty(like, is_chunk=self.is_chunk and moving[number])
            if want and name is not None and number not in handed_on
            else None
            for number, (want, name) in enumerate(zip(of_inputs, gradient.input_gradients, strict=True))
        ]
        to_states = [
            torch.empty_like(like) if want and name is not None else None
            for want, name in zip(of_states, gradient.state_gradients, strict=True)
        ]
        operands = ReverseOperands(
            like,
            inputs,
            [self._stride(value) if moves else 0 for value, moves in zip(inputs, moving, strict=True)],
            states,
            list(zip(tables, self.layouts, strict=True)),
            self.numbers,
            outputs,
            [self._stride(value) for value in outputs],
            after,
        )
        # Of one step there is nothing to add up.
        strides = [like.numel() if moves or self.steps == 1 else 0 for moves in moving]
        totals = self.backward.reverse.run(self.steps, operands, ReverseResults(to_inputs, strides, to_states))
        to_parameters: list[Tensor | None] = []
        for parameter, of_parameter, want in zip(parameters, gradient.parameter_gradients, of_parameters, strict=True):
            if want and of_parameter is not None:
                to_parameters.append(of_parameter(totals).to(parameter.dtype).reshape(parameter.shape))
            else:
                to_parameters.append(None)
        to_inputs = [handed_on.get(number, own) for number, own in enumerate(to_inputs)]
        return [*to_inputs, *to_states, *to_parameters, *(None for _ in tables)]

    def eager_gradients(
        self, tensors: Sequence[Tensor | None], given: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The same by eager steps, recorded where gradients are."""
        is_recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that what a tensor is made of another way is not counted: states may depend on parameters.
            own = [
                value.view_as(value) if want else value
                for value, want in zip(self._with_stand_ins(tensors, wanted), wanted, strict=True)
            ]
            inputs, states, parameters, _ = self.split(own)
            step = self.backward.eager()
            steps = []
            for number in range(self.steps):
                now = tuple(self._step(value, still, number) for value, still in zip(inputs, self.still, strict=True))
                outputs, after = step(now, states, parameters)
                states = tuple(after)
                steps.append(tuple(outputs))
            results = [*(stack_steps(steps) if self.is_chunk else steps[0]), *states]
            found = [
                (result, value)
                for result, value in zip(results, given, strict=True)
                if value is not None and result.requires_grad
            ]
            targets = [value for value, want in zip(own, wanted, strict=True) if want]
            if not found or not targets:
                return [None] * len(own)
            of, values = zip(*found, strict=True)
            grads = iter(torch.autograd.grad(of, targets, values, allow_unused=True, create_graph=is_recorded))
        return [next(grads) if want else None for want in wanted]

    def _with_stand_ins(self, tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
        """Zeros for each input that was not kept: no gradient depends on what it was."""
        like = self._like(tensors)

        def stand_in(number: int) -> Tensor:
            moves = self.is_chunk and not self.still[number]
            shape = (self.steps, *like.shape) if moves else like.shape
            return like.new_zeros(()).expand(shape).requires_grad_(wanted[number])

        return [stand_in(number) if value is None else value for number, value in enumerate(tensors)]

    def _like(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A step `[N, *]` that lies in memory as the neurons do."""
        inputs, states, _, _ = self.split(tensors)
        like: Tensor = states[0].detach() if states else self._step(inputs[0].detach(), self.still[0])
        return like

    def _step(self, value: Tensor, still: bool, number: int = 0) -> Tensor:
        return value[number] if self.is_chunk and not still else value

    def _stride(self, value: Tensor | None) -> int:
        return 0 if value is None or not self.is_chunk or self.steps == 1 else value.stride(0)

    def _empty(self, like: Tensor, *, is_chunk: bool) -> Tensor:
        return chunk_like(like, self.steps) if is_chunk else on_huge_pages(torch.empty_like(like))

    def _walkable(self, value: Tensor | None, like: Tensor, *, is_chunk: bool) -> Tensor | None:
        """A gradient that lies in memory as the neurons do."""
        if value is None or lie_alike(like.shape, (value[0] if is_chunk else value).stride(), like.stride()):
            return value
        return self._empty(like, is_chunk=is_chunk).copy_(value)


class _Scan(torch.autograd.Function):
    """Forward by a kernel, backward by its reverse scan."""

    @staticmethod
    def forward(ctx: Any, call: RecordedScan, *tensors: Tensor) -> Any:
        inputs, states, _, _ = call.split(tensors)
        outputs, after = call.forward(inputs, states)
        results = (*outputs, *after)
        ctx.call = call
        kept = call.backward.kept_inputs
        ctx.save_for_backward(
            *(None if n < len(inputs) and n not in kept else value for n, value in enumerate(tensors))
        )
        ctx.set_materialize_grads(False)
        flags = call.backward.gradient.differentiable
        ctx.mark_non_differentiable(*(result for result, flows in zip(results, flags, strict=True) if not flows))
        return results

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        call: RecordedScan = ctx.call
        wanted = ctx.needs_input_grad[1:]
        by_kernel = not torch.is_grad_enabled() and all(map(_has_data, given))
        gradients = call.gradients if by_kernel else call.eager_gradients
        return (None, *gradients(ctx.saved_tensors, given, wanted))


def _has_data(value: Tensor | None) -> bool:
    """Whether a kernel can read a gradient; `vmap` hands out tensors that stand for many."""
    if value is None or isinstance(value, FakeTensor):
        return True
    try:
        value.data_ptr()
    except RuntimeError:
        return False
    return True
