"""From a step's gradient to a Triton kernel: the scan of a chunk backward, with gradients of states in registers.

Each program takes a block of neurons and walks back over time tile by tile: a tile is a few steps, whose inputs it
reads once, whose states it computes once more in registers, and which it then runs backward. What is not a whole number
of the longest tiles is made of one tile each of half the length, a quarter, and so on, so that any number of steps is
the same kernel. Where there are several tiles, a first pass forward keeps the states before each but the last.
Synonyms: reverse scan, backpropagation through time with checkpoints and rematerialisation.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from .step_function import StepFunction, needed
from .step_gradient import StepGradient
from .triton import BLOCK, Parameter, TritonSource, layout_of, load, offsets, statements, store

# As `tl.sum`, which Triton's interpreter knows only if it was asked for before Triton was imported.
_SUM = "tl.reduce({0}, 0, tl.standard._sum_combine)"
_LONGEST_TILE = 8
_MOST_VALUES = 48  # of one neuron that a tile holds in registers: inputs, gradients of outputs, states
_MOST_INSTRUCTIONS = 300  # of a tile; more take long to compile


def emit_triton_reverse(function: StepFunction, gradient: StepGradient) -> TritonSource:
    """A kernel that runs a chunk of steps backward.

    Its parameters are, in order: steps; size; step (elements from step to step of what is dense); the inputs, each with
    its stride from step to step; the states before the first step; the tables of the step, then those of its gradient,
    each with its layout; kept, `[kept_steps, states, size]`, which it writes and reads; the gradients of the outputs,
    with strides; those of the states after the last step; those of the inputs, written, with strides (0: the sum over
    all steps); those of the states before the first step, written; for each sum that gradients of parameters are made
    of, its part by each block of neurons, written; for each sum of one neuron, that, written; the numbers of the step,
    then those of its gradient.

    Args:
        function: The step, which reads inputs and states of one shape only, and tables.
        gradient: Its gradient.
    """
    parameters = tuple(_parameters(function, gradient))
    tables, tiles = _tables(function, gradient), _tile_lengths(function, gradient)
    of_blocks, of_neurons = range(len(gradient.sums)), range(len(gradient.sums), _sums(gradient))
    lines = [
        f"n = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})",
        "live = n < size",
        *(line for table in tables for line in offsets(table)),
        *(load(f"{table}_each", f"{table} + {table}_at") for table in tables),
        *(load(f"held{n}", f"s{n} + n") for n in range(function.states)),
        "begun = 0",
        *(line for length in tiles for line in _first_pass(function, length, longest=tiles[0])),
        "tl.debug_barrier()",  # what is kept may be read by other threads than wrote it
        *(load(f"of_state{n}", f"h{n} + n") for n in range(gradient.states)),
        *(f"own{n} = tl.full([{BLOCK}], 0.0, tl.float32)" for n in _flowing(gradient)),
        *(f"sum{n} = tl.full([{BLOCK}], 0.0, tl.float32)" for n in range(_sums(gradient))),
        *(line for length in reversed(tiles) for line in _backward(function, gradient, length, longest=tiles[0])),
        *(store(f"ds{n} + n", f"of_state{n}") for n in range(gradient.states)),
        *(f"tl.store(total{n} + tl.program_id(0), {_SUM.format(f'tl.where(live, sum{n}, 0.0)')})" for n in of_blocks),
        *(store(f"total{n} + n", f"sum{n}") for n in of_neurons),
    ]
    names = ", ".join(name for name, _ in parameters)
    text = ["import triton.language as tl", "", "", f"def scan({names}):", *(f"    {line}" for line in lines)]
    return TritonSource("\n".join(text) + "\n", parameters)


def kept_steps(function: StepFunction, gradient: StepGradient, steps: int) -> int:
    """Before how many of the steps the kernel keeps the states in memory."""
    longest = _tile_lengths(function, gradient)[0]
    return max(0, steps // longest + (steps % longest).bit_count() - 1)


def _tile_lengths(function: StepFunction, gradient: StepGradient) -> list[int]:
    """How many steps the tiles have: a power of two, and those below it."""
    values = len(_inputs(function, gradient)) + gradient.states + gradient.outputs
    instructions = len(needed(function.program, function.new_states)) + len(gradient.program)
    length = _LONGEST_TILE
    while length > 1 and (length * values > _MOST_VALUES or length * instructions > _MOST_INSTRUCTIONS):
        length //= 2
    return [length >> n for n in range(length.bit_length())]


def _inputs(function: StepFunction, gradient: StepGradient) -> list[int]:
    """The inputs that it reads."""
    return sorted({*function.inputs_of_states, *gradient.inputs_read})


def _sums(gradient: StepGradient) -> int:
    return len(gradient.sums) + len(gradient.neuron_sums)


def _parameters(function: StepFunction, gradient: StepGradient) -> Iterator[Parameter]:
    yield "steps", "i32"
    yield "size", "i32"
    yield "step", "i64"
    for n in range(function.inputs):
        yield f"x{n}", "pointer"
        yield f"x{n}_step", "i64"
    for n in range(function.states):
        yield f"s{n}", "pointer"
    for table in _tables(function, gradient):
        yield table, "pointer"
        yield from layout_of(table)
    yield "kept", "pointer"
    for n in range(gradient.outputs):
        yield f"g{n}", "pointer"
        yield f"g{n}_step", "i64"
    for n in range(gradient.states):
        yield f"h{n}", "pointer"
    for n in range(gradient.inputs):
        yield f"dx{n}", "pointer"
        yield f"dx{n}_step", "i64"
    for n in range(gradient.states):
        yield f"ds{n}", "pointer"
    for n in range(_sums(gradient)):
        yield f"total{n}", "pointer"
    for n in range(len(function.numbers)):
        yield f"u{n}", "fp32"
    for n in range(len(gradient.numbers)):
        yield f"v{n}", "fp32"


def _tables(function: StepFunction, gradient: StepGradient) -> list[str]:
    return [f"table{n}" for n in range(len(function.tables) + len(gradient.tables))]


def _flowing(gradient: StepGradient) -> list[int]:
    """The inputs that a gradient flows to."""
    return [n for n, name in enumerate(gradient.input_gradients) if name is not None]


def _span(length: int, longest: int) -> tuple[str, str]:
    """Of the steps that tiles of this length take, the first and the one behind them."""
    start = "0" if length == longest else f"steps // {2 * length} * {2 * length}"
    return start, f"steps // {length} * {length}"


def _first_pass(function: StepFunction, length: int, longest: int) -> Iterator[str]:
    """The tiles of one length but for the last of all, forward; the states before each are kept."""
    start, end = _span(length, longest)
    yield f"for t in range({start}, tl.minimum({end}, steps - {length}), {length}):"
    for n in range(function.states):
        yield "    " + store(f"kept + (begun * {function.states} + {n}) * step + n", f"held{n}")
    yield "    begun += 1"
    yield from (f"    {line}" for line in _reads("x", function.inputs_of_states, length))
    held = [f"held{n}" for n in range(function.states)]
    for k in range(length):
        held = yield from _one_step(function, held, k)
    yield from (f"    after{n} = {name}" for n, name in enumerate(held))
    yield from (f"    held{n} = after{n}" for n in range(function.states))


def _one_step(function: StepFunction, held: list[str], k: int) -> Generator[str, None, list[str]]:
    """Step `k` of a tile; the names of the states after it."""
    names = {f"x{n}": f"x{n}_{k}" for n in range(function.inputs)}
    names |= {f"x{function.inputs + n}": f"table{n}_each" for n in range(len(function.tables))}
    names |= {f"s{n}": name for n, name in enumerate(held)}
    for instruction in needed(function.program, function.new_states):
        names[instruction.name] = f"{instruction.name}_forward_{k}"
        yield from (f"    {line}" for line in statements(instruction, names))
    return [names[name] for name in function.new_states]


def _reads(operand: str, numbers: Iterable[int], length: int) -> Iterator[str]:
    """All steps of a tile of some operands at once, so that as many reads are under way."""
    for k in range(length):
        for n in numbers:
            yield load(f"{operand}{n}_{k}", f"{operand}{n} + (t + {k}) * {operand}{n}_step + n")


def _backward(function: StepFunction, gradient: StepGradient, length: int, longest: int) -> Iterator[str]:
    """The tiles of one length, from the last to the first."""
    start, end = _span(length, longest)
    yield f"for passed in range(0, {end} - {start}, {length}):"
    yield f"    t = {end} - {length} - passed"
    yield from (f"    {line}" for line in _reads("x", _inputs(function, gradient), length))
    yield from (f"    {line}" for line in _reads("g", range(gradient.outputs), length))
    held = [[f"held{n}" for n in range(function.states)]]
    for k in range(length - 1):
        held.append((yield from _one_step(function, held[k], k)))
    of_states = [f"of_state{n}" for n in range(gradient.states)]
    for k in reversed(range(length)):
        of_states = yield from _one_step_back(function, gradient, held[k], of_states, k)
    yield from (f"    of_earlier{n} = {name}" for n, name in enumerate(of_states))
    yield from (f"    of_state{n} = of_earlier{n}" for n in range(gradient.states))
    yield "    begun -= 1"
    yield "    is_kept = n < tl.where(begun < 0, 0, size)"
    for n in range(function.states):
        yield "    " + load(f"held{n}", f"kept + (begun * {function.states} + {n}) * step + n", "is_kept")


def _one_step_back(
    function: StepFunction, gradient: StepGradient, held: list[str], of_states: list[str], k: int
) -> Generator[str, None, list[str]]:
    """Step `k` of a tile backward; the names of the gradients of the states before it."""
    names = {f"u{n}": f"v{n}" for n in range(len(gradient.numbers))}
    names |= {f"x{n}": f"x{n}_{k}" for n in range(gradient.inputs)}
    names |= {f"x{gradient.inputs + n}": f"table{len(function.tables) + n}_each" for n in range(len(gradient.tables))}
    names |= {f"s{n}": name for n, name in enumerate(held)}
    names |= {f"g{n}": f"g{n}_{k}" for n in range(gradient.outputs)}
    names |= {f"h{n}": name for n, name in enumerate(of_states)}
    for instruction in gradient.program:
        names[instruction.name] = f"{instruction.name}_backward_{k}"
        yield from (f"    {line}" for line in statements(instruction, names))
    for n in _flowing(gradient):
        name = names[str(gradient.input_gradients[n])]
        yield f"    own{n} = own{n} + {name}"
        yield "    " + store(f"dx{n} + (t + {k}) * dx{n}_step + n", f"tl.where(dx{n}_step == 0, own{n}, {name})")
    for n, name in enumerate((*gradient.sums, *gradient.neuron_sums)):
        yield f"    sum{n} = sum{n} + {names[name]}"
    earlier = []
    for n, state_name in enumerate(gradient.state_gradients):
        value = "0.0" if state_name is None else names[state_name]
        yield f"    of_state{n}_{k} = tl.where(live, {value}, 0.0)"  # a block, also where one number is all there is
        earlier.append(f"of_state{n}_{k}")
    return earlier
