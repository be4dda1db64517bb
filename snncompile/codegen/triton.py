"""From a step function to a Triton kernel: one pass over memory for a chunk of steps, with the states in registers.

Each program takes a block of neurons and loops over time. It reads the operands of several steps before it computes
the first of them, so that as many reads are under way while few neurons are. Numbers, lengths, sizes and strides are
arguments: another T, another batch or another threshold is the same kernel. Every operation rounds by itself, if the
kernel is compiled without contraction. What is computed is float32, whatever is stored; see half_precision.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .step_function import Instruction, StepFunction
from .triton_functions import FUNCTIONS

BLOCK = 256  # neurons of a program
GATHERED_DIMS = 5  # of an operand that is laid out anew: batch, channels and three dimensions of space
_READS_AHEAD = 16  # of one neuron, before it computes
_MOST_STEPS_AHEAD = 8
_MOST_INSTRUCTIONS_AHEAD = 128  # what computes that much waits less for memory, and takes longer to compile

# Multiplied by -1, as subtraction from zero would lose the sign of a zero. Below 2 to the 23rd, adding and subtracting
# that number rounds half to even; above it there are no fractions.
_EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "tl.div_rn({0}, {1})",
    "fma": "tl.fma({0}, {1}, {2})",
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "sqrt": "tl.sqrt_rn({0})",
    "round": "tl.where((tl.abs({0}) >= 8388608.0) | ({0} == 0.0), {0}, "
    "((tl.abs({0}) + 8388608.0) - 8388608.0) * tl.where({0} < 0.0, -1.0, 1.0))",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    # As ATen's: a NaN on either side is the result.
    "maximum": "tl.where(({0} != {0}) | ({0} > {1}), {0}, {1})",
    "minimum": "tl.where(({0} != {0}) | ({0} < {1}), {0}, {1})",
    "where": "tl.where({0}, {1}, {2})",
    "select": "tl.where({0}, 1.0, 0.0)",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "le": "{0} <= {1}",
    "lt": "{0} < {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "{0} == 0",
    "to_float16": "{0}.to(tl.float16).to(tl.float32)",
    "to_bfloat16": "{0}.to(tl.bfloat16).to(tl.float32)",
}
OPERATIONS = frozenset({*_EXPRESSIONS, *FUNCTIONS})


Parameter = tuple[str, Literal["pointer", "i32", "i64", "fp32"]]


@dataclass(frozen=True)
class TritonSource:
    """A kernel as text.

    Attributes:
        text: A Python module that defines `scan`.
        parameters: Of `scan`, in order: name -> type; a pointer's type is that of what it points to, by the caller.
    """

    text: str
    parameters: tuple[Parameter, ...]

    @property
    def pointers(self) -> int:
        """How many parameters are pointers."""
        return sum(kind == "pointer" for _, kind in self.parameters)


def emit_triton_scan(function: StepFunction, gathered: Collection[int] = ()) -> TritonSource:
    """A kernel that runs a step function over a chunk of steps.

    Args:
        function: The step; its tables follow its inputs.
        gathered: The inputs that do not lie in memory as the neurons do: broadcast, or with other strides. Tables are
            laid out anew in any case.
    """
    parameters = tuple(_parameters(function, gathered))
    ahead = _steps_ahead(function)
    lines = [
        f"n = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})",
        "live = n < size",
        *(line for n in _laid_out_anew(function, gathered) for line in offsets(f"x{n}")),
        *(load(f"x{n}_each", f"x{n} + x{n}_at") for n in range(function.inputs, function.read)),
        *(load(f"held{n}", f"s{n} + n") for n in range(function.states)),
        f"whole = steps // {ahead} * {ahead}",
        f"for t in range(0, whole, {ahead}):",
        *(f"    {line}" for line in _steps(function, gathered, ahead)),
        "for t in range(whole, steps):",
        *(f"    {line}" for line in _steps(function, gathered, 1)),
        *(store(f"z{n} + n", f"held{n}") for n in range(function.states)),
    ]
    names = ", ".join(name for name, _ in parameters)
    text = ["import triton.language as tl", "", "", f"def scan({names}):", *(f"    {line}" for line in lines)]
    return TritonSource("\n".join(text) + "\n", parameters)


def _parameters(function: StepFunction, gathered: Collection[int]) -> Iterator[Parameter]:
    """Of the kernel, in the order in which a caller gives them."""
    yield from (("steps", "i32"), ("size", "i32"), ("step", "i64"))
    for n in range(function.read):
        yield f"x{n}", "pointer"
        if n < function.inputs:
            yield f"x{n}_step", "i64"
        if n in _laid_out_anew(function, gathered):
            yield from layout_of(f"x{n}")
    counts = (("s", function.states), ("y", len(function.outputs)), ("z", function.states))
    yield from ((f"{kind}{n}", "pointer") for kind, count in counts for n in range(count))
    yield from ((f"u{n}", "fp32") for n in range(len(function.numbers)))


def _laid_out_anew(function: StepFunction, gathered: Collection[int]) -> list[int]:
    return [*sorted(gathered), *range(function.inputs, function.read)]


def _steps_ahead(function: StepFunction) -> int:
    """How many steps to read at once: a power of two."""
    ahead, instructions = _MOST_STEPS_AHEAD, len(function.program)
    while ahead > 1 and (ahead * function.inputs > _READS_AHEAD or ahead * instructions > _MOST_INSTRUCTIONS_AHEAD):
        ahead //= 2
    return ahead


def layout_of(operand: str) -> Iterator[Parameter]:
    """The parameters that say how an operand lies in memory."""
    yield from ((f"{operand}_size{d}", "i32") for d in range(GATHERED_DIMS))
    yield from ((f"{operand}_stride{d}", "i64") for d in range(GATHERED_DIMS))


def offsets(operand: str) -> Iterator[str]:
    """Where each neuron's element of an operand lies that is laid out in another way."""
    yield f"{operand}_rest = n"
    terms = []
    for d in reversed(range(1, GATHERED_DIMS)):
        yield f"{operand}_index{d} = {operand}_rest % {operand}_size{d}"
        yield f"{operand}_rest = {operand}_rest // {operand}_size{d}"
        terms.append(f"{operand}_index{d} * {operand}_stride{d}")
    yield f"{operand}_at = {' + '.join((f'{operand}_rest * {operand}_stride0', *terms))}"


def _steps(function: StepFunction, gathered: Collection[int], ahead: int) -> Iterator[str]:
    """Several steps from `t` on: reads, then the computation and writes of each step in order."""
    for k in range(ahead):
        for n in range(function.inputs):
            at = f"x{n}_at" if n in gathered else "n"
            yield load(f"x{n}_{k}", f"x{n} + {_step(k)} * x{n}_step + {at}")
    held: Sequence[str] = [f"held{n}" for n in range(function.states)]
    for k in range(ahead):
        names = {f"x{n}": f"x{n}_{k}" if n < function.inputs else f"x{n}_each" for n in range(function.read)}
        names |= {f"s{n}": name for n, name in enumerate(held)}
        for instruction in function.program:
            names[instruction.name] = f"{instruction.name}_{k}"
            yield from statements(instruction, names)
        for n, name in enumerate(function.outputs):
            yield store(f"y{n} + {_step(k)} * step + n", names[name])
        held = [names[name] for name in function.new_states]
    for n, name in enumerate(held):
        yield f"after{n} = {name}"
    for n in range(function.states):
        yield f"held{n} = after{n}"


def statements(instruction: Instruction, names: Mapping[str, str]) -> Iterator[str]:
    """What computes an instruction, with its result and operands under other names where there are such."""
    result, operation = names[instruction.name], instruction.operation
    operands = [names.get(operand, operand) for operand in instruction.operands]
    if operation in FUNCTIONS:
        yield from FUNCTIONS[operation](result, *operands)
    else:
        yield f"{result} = {_EXPRESSIONS[operation].format(*operands)}"


def _step(k: int) -> str:
    return f"(t + {k})" if k else "t"


def load(name: str, address: str, mask: str = "live") -> str:
    """Read each neuron's element as float32; 0 where the mask is false."""
    return f"{name} = tl.load({address}, {mask}, 0.0).to(tl.float32)"


def store(address: str, value: str) -> str:
    """Write each neuron's element as what the pointer points to; the address begins with it."""
    pointer = address.partition(" ")[0]
    return f"tl.store({address}, {value}.to({pointer}.dtype.element_ty), live)"
