"""A step function from its text: `parse_step(str(function), ...)` computes what `function` does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from .step_function import Instruction, Literal, StepFunction, Table

_INSTRUCTION = re.compile(r"(\w+) = (\w+)\((.*)\)")
_RETURN = re.compile(r"return \((.*)\), \((.*)\)")


def parse_step(
    text: str, inputs: int, states: int, numbers: Sequence[float] = (), tables: Sequence[Tensor] = ()
) -> StepFunction:
    """The step function of a text.

    Args:
        text: `str` of a step function.
        inputs, states: How many it has.
        numbers: In the place of what computes them anew at every call.
        tables: The same of its tables.

    Raises:
        ValueError: It is no such text.
    """
    *lines, last = text.splitlines() or [""]
    found = [_INSTRUCTION.fullmatch(line) for line in lines]
    returned = _RETURN.fullmatch(last)
    if returned is None or None in found:
        raise ValueError(f"expected the text of a step function, got {text!r}")
    program = tuple(Instruction(each[1], each[2], _names(each[3])) for each in found if each is not None)
    return StepFunction(
        inputs,
        states,
        program,
        _names(returned[1]),
        _names(returned[2]),
        tuple(map(Literal, numbers)),
        tuple(Table(tuple(table.shape), False, _Held(table)) for table in tables),
    )


class _Held:
    """Hands out a tensor that is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __call__(self) -> Tensor:
        return self._tensor


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", ")) if text else ()
