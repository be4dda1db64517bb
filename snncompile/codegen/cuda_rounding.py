"""Where ATen rounds otherwise on CUDA than on the CPU: a kernel there gives the bits of the eager step there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .step_function import Instruction, Literal, StepFunction
from .step_gradient import StepGradient


@dataclass(frozen=True)
class _Reciprocal:
    """Of a number, in float32."""

    of: float

    def __call__(self) -> float:
        return float(torch.tensor(1.0) / torch.tensor(self.of))


_Program = TypeVar("_Program", StepFunction, StepGradient)


def as_on_cuda(function: _Program) -> _Program:
    """A step function, or its gradient, that rounds as ATen's CUDA kernels do.

    They divide by a number that stands in the code by multiplying with its reciprocal (`div_true_kernel_cuda`); by a
    parameter they divide.
    """
    numbers: list[Callable[[], float]] = list(function.numbers)
    program = []
    for instruction in function.program:
        operands = instruction.operands
        divisor = _literal(function, operands[1]) if instruction.operation == "div" else None
        if divisor is None:
            program.append(instruction)
        else:
            numbers.append(_Reciprocal(divisor.value))
            program.append(Instruction(instruction.name, "mul", (operands[0], f"u{len(numbers) - 1}")))
    return replace(function, program=tuple(program), numbers=tuple(numbers))


def _literal(function: StepFunction | StepGradient, name: str) -> Literal | None:
    number = function.numbers[int(name[1:])] if name.startswith("u") else None
    return number if isinstance(number, Literal) and not number.is_tensor else None
