"""Steps on float16 or bfloat16 tensors, computed in float32: rounded where ATen rounds, or only where they are stored.

ATen computes each operation on such tensors in float32 and rounds its result. A number that a tensor is multiplied with
or divided by is float32 there (`opmath`), on CUDA also one that is added or subtracted. All others are rounded first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .step_function import Instruction, Literal, StepFunction, is_boolean

HALVES = {torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}  # -> the operation that rounds to it
_EXACT = frozenset(["neg", "abs", "relu", "round", "floor", "ceil", "maximum", "minimum", "where", "select"])
_PRODUCTS = frozenset(["mul", "div", "fma"])
_SUMS = frozenset(["add", "sub", "rsub"])


@dataclass(frozen=True)
class _Rounded:
    """A number as it is in a tensor of this dtype."""

    of: Callable[[], float]
    dtype: torch.dtype

    def __call__(self) -> float:
        return float(torch.tensor(self.of(), dtype=self.dtype))


def rounded_as_stored(function: StepFunction, *, on_cuda: bool = False) -> StepFunction:
    """A step that rounds the result of every operation to the dtype of its tensors, as ATen does.

    Without it, all values between what is read and what is written are float32, the states from step to step too.
    """
    if function.dtype not in HALVES:
        return function
    float32_numbers = _PRODUCTS | _SUMS if on_cuda else _PRODUCTS
    numbers, program = list(function.numbers), []
    names = {name: name for name in (*function.outputs, *function.new_states)}

    def number(name: str, operation: str) -> str:
        found = function.numbers[int(name[1:])]
        if operation in float32_numbers and not (isinstance(found, Literal) and found.is_tensor):
            return name
        rounded = _Rounded(found, function.dtype)
        numbers.append(Literal(rounded(), found.is_tensor) if isinstance(found, Literal) else rounded)
        return f"u{len(numbers) - 1}"

    for one in function.program:
        operands = tuple(
            number(name, one.operation) if name.startswith("u") else names.get(name, name) for name in one.operands
        )
        program.append(Instruction(one.name, one.operation, operands))
        if one.operation not in _EXACT and not is_boolean(one.operation):
            names[one.name] = f"{one.name}_stored"
            program.append(Instruction(names[one.name], HALVES[function.dtype], (one.name,)))
    return replace(
        function,
        program=tuple(program),
        outputs=tuple(names[name] for name in function.outputs),
        new_states=tuple(names[name] for name in function.new_states),
        numbers=tuple(numbers),
    )


def keeps_float32(function: StepFunction) -> bool:
    """Whether what a step computes on float16 or bfloat16 tensors is float32 until it is stored."""
    rounding = set(HALVES.values())
    return function.dtype in HALVES and not any(one.operation in rounding for one in function.program)
