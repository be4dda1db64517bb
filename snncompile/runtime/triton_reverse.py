"""The scan of a chunk backward by Triton: how the kernel is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen import (
    TRITON_BLOCK,
    StepFunction,
    StepGradient,
    Totals,
    TritonSource,
    as_on_cuda,
    emit_triton_reverse,
    kept_steps,
)
from ..torch_private import FakeTensor
from .compiled_scan import ReverseOperands, ReverseResults
from .triton_launch import compiled, flat, launch


@dataclass(frozen=True)
class TritonReverse:
    """A step gradient as a Triton kernel.

    Attributes:
        function: The step.
        gradient: Its gradient.
        source: The kernel.
        arch: The compute capability of the GPU; None: it is interpreted, on the CPU.
    """

    function: StepFunction
    gradient: StepGradient
    source: TritonSource
    arch: int | None

    @staticmethod
    def build(function: StepFunction, gradient: StepGradient, arch: int | None) -> TritonReverse:
        """Compile a step gradient, if nothing like it has been compiled yet.

        Raises:
            BuildError: It cannot be compiled here.
        """
        if arch is not None:
            function, gradient = as_on_cuda(function), as_on_cuda(gradient)
        source = emit_triton_reverse(function, gradient)
        if arch is not None:
            compiled(source, ("*fp32",) * source.pointers, arch, torch.cuda.current_device())
        return TritonReverse(function, gradient, source, arch)

    def run(self, steps: int, operands: ReverseOperands, results: ReverseResults) -> Totals:
        """See `CompiledReverse`."""
        like, size = operands.like, operands.like.numel()
        kept = like.new_empty(kept_steps(self.function, self.gradient, steps) * len(operands.states) * size)
        parts = like.new_empty((len(self.gradient.sums), -(-size // TRITON_BLOCK)))
        of_neurons = [torch.empty_like(like) for _ in self.gradient.neuron_sums]
        given = (*operands.given, *operands.after)
        missing = like.new_zeros(size if any(value is None for value in given) else 0)
        wanted = (*results.of_inputs, *results.of_states)
        unwanted = like.new_empty(size if any(value is None for value in wanted) else 0)
        if not isinstance(like, FakeTensor):
            arguments = [
                *(steps, size, size),
                *_with_strides(operands.inputs, operands.strides, missing),
                *operands.states,
                *(argument for table, layout in operands.tables for argument in (table, *flat(layout))),
                kept,
                *_with_strides(operands.given, operands.given_strides, missing),
                *(missing if value is None else value for value in operands.after),
                *_with_strides(results.of_inputs, results.strides, unwanted),
                *(unwanted if value is None else value for value in results.of_states),
                *parts,
                *of_neurons,
                *_all_numbers(self.function, operands.numbers[0]),
                *_all_numbers(self.gradient, operands.numbers[1]),
            ]
            launch(self.source, self.arch, size, arguments)
        return Totals(parts.sum(1, dtype=torch.float64), of_neurons)


def _with_strides(values: Sequence[Tensor | None], strides: Sequence[int], instead: Tensor) -> list[Tensor | int]:
    """Each tensor and its stride from step to step; one that is not there is the same at every step."""
    found: list[Tensor | int] = []
    for value, stride in zip(values, strides, strict=True):
        found += [instead, 0] if value is None else [value, stride]
    return found


def _all_numbers(program: StepFunction | StepGradient, numbers: Sequence[float]) -> list[float]:
    """A program's numbers, and behind them those that it has for CUDA alone."""
    return [*numbers, *(number() for number in program.numbers[len(numbers) :])]
