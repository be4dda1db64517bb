"""The scan of a chunk backward by Triton: how the kernel is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen import StepFunction, StepGradient, TritonSource, as_on_cuda, emit_triton_reverse
from ..torch_private import FakeTensor
from .triton_launch import compiled, launch


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

    def run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        given: Sequence[Tensor | None],
        given_strides: Sequence[int],
        after: Sequence[Tensor | None],
        numbers: tuple[Sequence[float], Sequence[float]],
        of_inputs: Sequence[Tensor | None],
        of_input_strides: Sequence[int],
        of_states: Sequence[Tensor | None],
    ) -> Tensor:
        """Run a chunk of steps backward; see `CompiledReverse`.

        Returns:
            The sums that gradients of parameters are made of, float64 `[sums]`.
        """
        like = states[0] if states else inputs[0]
        size = like.numel()
        kept = like.new_empty(steps * len(states) * size)
        totals = like.new_empty((len(self.gradient.sums), size))
        missing = like.new_zeros(size if any(value is None for value in (*given, *after)) else 0)
        unwanted = like.new_empty(size if any(value is None for value in (*of_inputs, *of_states)) else 0)
        if not isinstance(like, FakeTensor):
            arguments = [
                *(steps, size, size),
                *_with_strides(inputs, strides, missing),
                *states,
                kept,
                *_with_strides(given, given_strides, missing),
                *(missing if value is None else value for value in after),
                *_with_strides(of_inputs, of_input_strides, unwanted),
                *(unwanted if value is None else value for value in of_states),
                *totals,
                *_all_numbers(self.function, numbers[0]),
                *_all_numbers(self.gradient, numbers[1]),
            ]
            launch(self.source, self.arch, size, arguments)
        return totals.sum(1, dtype=torch.float64)


def _with_strides(values: Sequence[Tensor | None], strides: Sequence[int], instead: Tensor) -> list[Tensor | int]:
    """Each tensor and its stride from step to step; one that is not there is the same at every step."""
    found: list[Tensor | int] = []
    for value, stride in zip(values, strides, strict=True):
        found += [instead, 0] if value is None else [value, stride]
    return found


def _all_numbers(program: StepFunction | StepGradient, numbers: Sequence[float]) -> list[float]:
    """A program's numbers, and behind them those that it has for CUDA alone."""
    return [*numbers, *(number() for number in program.numbers[len(numbers) :])]
