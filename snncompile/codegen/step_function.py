"""A step of a neuron, or of a neuron chain, as a small pointwise program: the form from which kernels are generated.

Numbers are operands, not part of the program, so that neurons which differ in their thresholds share a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Libraries differ in the last bits of these; all other operations round as the generated code does.
_TRANSCENDENTAL = frozenset({"exp", "sigmoid", "tanh"})
_BOOLEAN = frozenset({"ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not"})


@dataclass(frozen=True)
class Instruction:
    """`name = operation(operands)`, elementwise.

    Attributes:
        operation: A key of the generators' tables.
        operands: Names of values: `x0`… inputs and, behind them, tables; `s0`… states, `u0`… numbers, or results of
            earlier instructions.
    """

    name: str
    operation: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Literal:
    """A number of the program that stands in its code, and is no parameter.

    Attributes:
        value: The number.
        is_tensor: It fills a tensor there.
    """

    value: float
    is_tensor: bool = False

    def __call__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Table:
    """A tensor made of parameters alone.

    Attributes:
        shape: Of it, which broadcasts to that of the states.
        is_computed: It takes memory of its own while it is in use.
        value: What looks it up or computes it.
    """

    shape: tuple[int, ...]
    is_computed: bool
    value: Callable[[], Tensor] = field(compare=False)


@dataclass(frozen=True)
class StepFunction:
    """One step: `(inputs, states) -> (outputs, states')`, all of one shape; an input may be broadcast to it.

    Attributes:
        inputs, states: How many there are.
        program: Instructions in order.
        outputs, new_states: Names of the results.
        numbers: What computes each number `u0`… anew at every call.
        tables: What looks up, or computes, each tensor that is made of parameters alone and broadcast to the states,
            such as a number for each channel.
        dtype: Of inputs, states and results. What is computed in between is float32.
    """

    inputs: int
    states: int
    program: tuple[Instruction, ...]
    outputs: tuple[str, ...]
    new_states: tuple[str, ...]
    numbers: tuple[Callable[[], float], ...] = field(compare=False)
    tables: tuple[Table, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def read(self) -> int:
        """How many tensors it reads beside the states: inputs and tables."""
        return self.inputs + len(self.tables)

    @property
    def inputs_of_states(self) -> list[int]:
        """The inputs that the new states depend on."""
        read = values_read("x", needed(self.program, self.new_states), self.new_states)
        return [n for n in read if n < self.inputs]

    @property
    def transcendental(self) -> tuple[str, ...]:
        """The functions it computes that may round otherwise than torch's, within 2 units in the last place."""
        called = {instruction.operation for instruction in self.program}
        return tuple(sorted(called.intersection(_TRANSCENDENTAL)))

    def largest(self, inputs: Sequence[int | None] = ()) -> tuple[int | None, ...]:
        """For each output, the largest number it may be if it is a whole number from 0 on; None: it may be any number.

        A neuron's spikes are 0 and 1 whatever comes in; sums of spikes are more.

        Args:
            inputs: The same of the inputs; what is left out may be any number.
        """
        numbers = {f"u{n}": number.value for n, number in enumerate(self.numbers) if isinstance(number, Literal)}
        found = {name: int(value) for name, value in numbers.items() if value >= 0.0 and value.is_integer()}
        found |= {f"x{n}": most for n, most in enumerate(inputs) if most is not None}
        for instruction in self.program:
            most = _largest(instruction, found, ones={name for name, value in numbers.items() if value == 1.0})
            if most is not None:
                found[instruction.name] = most
        return tuple(map(found.get, self.outputs))

    def __str__(self) -> str:
        lines = [f"{i.name} = {i.operation}({', '.join(i.operands)})" for i in self.program]
        return "\n".join([*lines, f"return ({', '.join(self.outputs)}), ({', '.join(self.new_states)})"])


def _largest(instruction: Instruction, known: Mapping[str, int], ones: Collection[str]) -> int | None:
    """The largest whole number from 0 on that an operation yields; None: it may yield any number."""
    operation, operands = instruction.operation, instruction.operands
    if operation == "select":
        return 1
    if operation in ("rsub", "sub"):
        taken, whole = operands if operation == "rsub" else reversed(operands)
        return 1 if whole in ones and known.get(taken, 2) <= 1 else None
    read = operands[1:] if operation == "where" else operands
    if operation not in _OF_WHOLE_NUMBERS or not all(name in known for name in read):
        return None
    return _OF_WHOLE_NUMBERS[operation]([known[name] for name in read])


_OF_WHOLE_NUMBERS: dict[str, Callable[[Sequence[int]], int]] = {
    "add": sum,
    "mul": math.prod,
    "maximum": max,
    "minimum": min,
    "where": max,
}


def needed(program: Sequence[Instruction], results: Iterable[str]) -> tuple[Instruction, ...]:
    """The instructions of a program that these results depend on."""
    wanted, kept = set(results), []
    for instruction in reversed(program):
        if instruction.name in wanted:
            kept.append(instruction)
            wanted.update(instruction.operands)
    return tuple(reversed(kept))


def values_read(letter: str, program: Iterable[Instruction], results: Sequence[str]) -> list[int]:
    """The numbers of the values under this letter that a program reads, or returns."""
    names = {*results, *(operand for instruction in program for operand in instruction.operands)}
    return sorted(int(name[1:]) for name in names if name.startswith(letter))


def is_boolean(operation: str) -> bool:
    """Whether an operation yields truth values."""
    return operation in _BOOLEAN
