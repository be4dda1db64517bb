"""From a step's gradient to a Triton kernel: the scan of a chunk backward, with gradients of states in registers.

Each program takes a block of neurons. It first runs the steps forward once more from the states at the start of the
chunk and keeps the states before every step, and then walks back over time. Synonyms: reverse scan, backpropagation
through time with rematerialisation.

Not optimal: the states before every step go through memory once more; keeping every few steps only would take less.
"""

from __future__ import annotations

from collections.abc import Iterator

from .step_function import StepFunction, needed
from .step_gradient import StepGradient
from .triton import BLOCK, Parameter, TritonSource, layout_of, load, offsets, statements, store


def emit_triton_reverse(function: StepFunction, gradient: StepGradient) -> TritonSource:
    """A kernel that runs a chunk of steps backward.

    Its parameters are, in order: steps; size; step (elements from step to step of what is dense); the inputs, each with
    its stride from step to step; the states before the first step; the tables of the step, then those of its gradient,
    each with its layout; kept, `[steps, states, size]`, which it writes and reads; the gradients of the outputs, with
    strides; those of the states after the last step; those of the inputs, written, with strides (0: the sum over all
    steps); those of the states before the first step, written; for each sum that gradients of parameters are made of,
    then for each sum of one neuron, its part by each neuron, written; the numbers of the step, then those of its
    gradient.

    Args:
        function: The step, which reads inputs and states of one shape only, and tables.
        gradient: Its gradient.
    """
    parameters = tuple(_parameters(function, gradient))
    tables = _tables(function, gradient)
    sums = (*gradient.sums, *gradient.neuron_sums)
    lines = [
        f"n = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})",
        "live = n < size",
        *(line for table in tables for line in offsets(table)),
        *(load(f"{table}_each", f"{table} + {table}_at") for table in tables),
        *(load(f"held{n}", f"s{n} + n") for n in range(function.states)),
        *(store(f"kept + {n} * step + n", f"held{n}") for n in range(function.states)),
        *_forward(function),
        "tl.debug_barrier()",  # what is kept may be read by other threads than wrote it
        *(load(f"of_state{n}", f"h{n} + n") for n in range(gradient.states)),
        *(f"own{n} = tl.full([{BLOCK}], 0.0, tl.float32)" for n in _flowing(gradient)),
        *(f"sum{n} = tl.full([{BLOCK}], 0.0, tl.float32)" for n in range(len(sums))),
        *_backward(function, gradient),
        *(store(f"ds{n} + n", f"of_state{n}") for n in range(gradient.states)),
        *(store(f"total{n} + n", f"sum{n}") for n in range(len(sums))),
    ]
    names = ", ".join(name for name, _ in parameters)
    text = ["import triton.language as tl", "", "", f"def scan({names}):", *(f"    {line}" for line in lines)]
    return TritonSource("\n".join(text) + "\n", parameters)


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
    for n in range(len(gradient.sums) + len(gradient.neuron_sums)):
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


def _forward(function: StepFunction) -> Iterator[str]:
    """The steps once more, but for the last, whose results backward does not need."""
    yield "for t in range(0, steps - 1):"
    for n in function.inputs_of_states:
        yield "    " + load(f"x{n}_now", f"x{n} + t * x{n}_step + n")
    names = {f"x{n}": f"x{n}_now" for n in function.inputs_of_states}
    names |= {f"x{function.inputs + n}": f"table{n}_each" for n in range(len(function.tables))}
    names |= {f"s{n}": f"held{n}" for n in range(function.states)}
    for instruction in needed(function.program, function.new_states):
        names[instruction.name] = f"{instruction.name}_forward"
        yield from (f"    {line}" for line in statements(instruction, names))
    for n, name in enumerate(function.new_states):
        yield "    " + store(f"kept + ((t + 1) * {function.states} + {n}) * step + n", names[name])
        yield f"    after{n} = {names[name]}"
    for n in range(function.states):
        yield f"    held{n} = after{n}"


def _backward(function: StepFunction, gradient: StepGradient) -> Iterator[str]:
    yield "for passed in range(0, steps):"
    yield "    t = steps - 1 - passed"
    names = {f"u{n}": f"v{n}" for n in range(len(gradient.numbers))}
    for n in gradient.inputs_read:
        names[f"x{n}"] = f"x{n}_then"
        yield "    " + load(f"x{n}_then", f"x{n} + t * x{n}_step + n")
    for n in range(len(gradient.tables)):
        names[f"x{gradient.inputs + n}"] = f"table{len(function.tables) + n}_each"
    for n in range(function.states):
        names[f"s{n}"] = f"before{n}"
        yield "    " + load(f"before{n}", f"kept + (t * {function.states} + {n}) * step + n")
    for n in range(gradient.outputs):
        names[f"g{n}"] = f"of_output{n}"
        yield "    " + load(f"of_output{n}", f"g{n} + t * g{n}_step + n")
    names |= {f"h{n}": f"of_state{n}" for n in range(gradient.states)}
    for instruction in gradient.program:
        names[instruction.name] = f"{instruction.name}_backward"
        yield from (f"    {line}" for line in statements(instruction, names))
    for n in _flowing(gradient):
        name = names[str(gradient.input_gradients[n])]
        yield f"    own{n} = own{n} + {name}"
        yield "    " + store(f"dx{n} + t * dx{n}_step + n", f"tl.where(dx{n}_step == 0, own{n}, {name})")
    for n, sum_name in enumerate((*gradient.sums, *gradient.neuron_sums)):
        yield f"    sum{n} = sum{n} + {names[sum_name]}"
    for n, state_name in enumerate(gradient.state_gradients):
        value = "0.0" if state_name is None else names[state_name]
        yield f"    of_earlier{n} = tl.where(live, {value}, 0.0)"  # a block, also where one number is all there is
    for n in range(gradient.states):
        yield f"    of_state{n} = of_earlier{n}"
