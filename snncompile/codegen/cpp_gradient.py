"""From a step's gradient to C++: the scan of a chunk backward, with the gradients of the states in the cache.

For each block of neurons it first runs the steps forward once more from the states at the start of the chunk, keeping
the states before every step in a small scratch memory, and then walks back over time. So the chunk's inputs and its
first states are all that has to be kept for it. Synonyms: reverse scan, backpropagation through time with
rematerialisation.
"""

from __future__ import annotations

from collections.abc import Iterable

from .cpp import GATHER, expressions
from .cpp_functions import functions_of
from .step_function import StepFunction, needed, values_read
from .step_gradient import StepGradient

REVERSE_BLOCK = 1024  # the most neurons whose gradients stay in the cache from step to step

_HEAD = """// {inputs} inputs, {states} states, {outputs} outputs, {sums} sums; all float32 but the sums.
// x: the inputs [steps, *], each with its own stride from step to step; null: it is not read.
// s: the states [size] before the first step.
// g: gradients of the outputs [steps, *], with strides; h: of the states after the last step; null: no gradient.
// dx: gradients of the inputs, with strides (0: of an input that is the same at every step, added up); ds: of the
// states; null: not wanted. sums: [blocks, sums], the totals in the first row.
// e: sums over the steps, one for each neuron [size].
// p: tables of the step and, behind them, of its gradient, each with the way in which it is broadcast to the neurons.
// scratch: [parts, steps - 1, states, block]; u, v: numbers of the step and of its gradient.
// Neurons go block by block, and blocks in as many parts as there may be threads.
extern "C" void reverse(long steps, long size, long block, long parts, const float *const *x, const long *x_stride,
                        const float *const *s, const float *const *g, const long *g_stride, const float *const *h,
                        float *const *dx, const long *dx_stride, float *const *ds, double *sums, float *const *e,
                        const float *const *p, const long *const *p_layout, float *scratch, const float *u,
                        const float *v) {{
  static const float zeros[{most}] = {{0}};
  const long blocks = (size + block - 1) / block;
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (long part = 0; part < parts; ++part) {{
    float *const kept = scratch + part * (steps - 1) * {states} * block;
    for (long b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {{
      const long begin = b * block, count = size - begin < block ? size - begin : block;
"""


def emit_reverse(function: StepFunction, gradient: StepGradient) -> str:
    """The source of `reverse`, which runs a chunk of steps backward.

    Args:
        function: The step, which reads inputs and states of one shape only, and tables.
        gradient: Its gradient.
    """
    head = _HEAD.format(
        inputs=function.inputs,
        states=function.states,
        outputs=len(function.outputs),
        sums=len(gradient.sums),
        most=REVERSE_BLOCK,
    )
    lines = [*functions_of((*function.program, *gradient.program))]
    lines.append((GATHER if function.tables or gradient.tables else "") + head.rstrip("\n"))
    lines += _declarations(gradient)
    lines += [f"      {line}" for line in _tables(function, gradient)]
    lines += _forward(function)
    lines += _backward(function, gradient)
    lines += ["    }", "  }"]
    if count := len(gradient.sums):
        # One after the other, so that the number of threads changes nothing.
        lines.append(f"  for (long b = 1; b < blocks; ++b) for (long n = 0; n < {count}; ++n)")
        lines.append(f"    sums[n] += sums[b * {count} + n];")
    lines.append("}")
    return "\n".join(lines) + "\n"


def _declarations(gradient: StepGradient) -> list[str]:
    lines = []
    for n, name in enumerate(gradient.input_gradients):
        if name is not None:
            lines.append(f"float own{n}[{REVERSE_BLOCK}] = {{0}};")
    for n in range(gradient.states):
        lines += [
            f"float held{n}[{REVERSE_BLOCK}];",
            f"for (long i = 0; i < count; ++i) held{n}[i] = h[{n}] ? h[{n}][begin + i] : 0.0f;",
        ]
    lines += [f"double sum{n}[{REVERSE_BLOCK}] = {{0}};" for n in range(len(gradient.sums))]
    lines += [f"double each{n}[{REVERSE_BLOCK}] = {{0}};" for n in range(len(gradient.neuron_sums))]
    return [f"      {line}" for line in lines]


def _tables(function: StepFunction, gradient: StepGradient) -> list[str]:
    """Those that the step reads and, behind them, those that its gradient reads, laid out as a block of neurons."""
    again, back = _tables_of_step(function), _tables_of_gradient(gradient)
    lines = []
    for place in (*again, *(len(function.tables) + n for n in back)):
        lines.append(f"float table{place}[{REVERSE_BLOCK}];")
        lines.append(f"gather(table{place}, p[{place}], p_layout[{place}], begin, count);")
    return lines


def _tables_of_step(function: StepFunction) -> list[int]:
    read = values_read("x", needed(function.program, function.new_states), function.new_states)
    return [n - function.inputs for n in read if n >= function.inputs]


def _tables_of_gradient(gradient: StepGradient) -> list[int]:
    read = values_read("x", gradient.program, gradient.results)
    return [n - gradient.inputs for n in read if n >= gradient.inputs]


def _forward(function: StepFunction) -> list[str]:
    """The steps once more, but for the last, whose results backward does not need."""
    program = needed(function.program, function.new_states)
    numbers = values_read("u", program, function.new_states)
    lines = ["{", *(f"  const float u{n} = u[{n}];" for n in numbers)]
    lines.append("  for (long t = 0; t < steps - 1; ++t) {")
    lines += [f"    {line}" for line in _inputs(function.inputs_of_states)]
    for n in range(function.states):
        lines.append(_before(n, function.states))
        lines.append(f"    float *__restrict__ after{n} = kept + (t * {function.states} + {n}) * block;")
    lines.append("    for (long i = 0; i < count; ++i) {")
    lines += [f"      {line}" for line in _loads(function.inputs_of_states, function.states)]
    lines += [f"      const float x{function.inputs + n} = table{n}[i];" for n in _tables_of_step(function)]
    lines += [f"      {line}" for line in expressions(program)]
    lines += [f"      after{n}[i] = {name};" for n, name in enumerate(function.new_states)]
    lines += ["    }", "  }", "}"]
    return [f"      {line}" for line in lines]


def _backward(function: StepFunction, gradient: StepGradient) -> list[str]:
    numbers = values_read("u", gradient.program, gradient.results)
    lines = ["{", *(f"  const float u{n} = v[{n}];" for n in numbers)]
    lines.append("  for (long t = steps - 1; t >= 0; --t) {")
    lines += [f"    {line}" for line in _inputs(gradient.inputs_read)]
    for n in range(function.states):
        lines.append(_before(n, function.states))
    for n in range(gradient.outputs):
        lines.append(f"    const float *__restrict__ of{n} = g[{n}] ? g[{n}] + t * g_stride[{n}] + begin : zeros;")
    wanted = [n for n, name in enumerate(gradient.input_gradients) if name is not None]
    for n in wanted:
        place = f"dx[{n}] && dx_stride[{n}] ? dx[{n}] + t * dx_stride[{n}] + begin : own{n}"
        lines.append(f"    float *__restrict__ to{n} = {place};")
    lines.append("    for (long i = 0; i < count; ++i) {")
    lines += [f"      {line}" for line in _loads(gradient.inputs_read, function.states)]
    for n in _tables_of_gradient(gradient):
        lines.append(f"      const float x{gradient.inputs + n} = table{len(function.tables) + n}[i];")
    lines += [f"      const float g{n} = of{n}[i];" for n in range(gradient.outputs)]
    lines += [f"      const float h{n} = held{n}[i];" for n in range(gradient.states)]
    lines += [f"      {line}" for line in expressions(gradient.program)]
    lines += [f"      to{n}[i] = {gradient.input_gradients[n]};" for n in wanted]
    lines += [f"      held{n}[i] = {name or '0.0f'};" for n, name in enumerate(gradient.state_gradients)]
    lines += [f"      sum{n}[i] += {name};" for n, name in enumerate(gradient.sums)]
    lines += [f"      each{n}[i] += {name};" for n, name in enumerate(gradient.neuron_sums)]
    lines.append("    }")
    for n in wanted:
        total = f"dx[{n}][begin + i] = t == steps - 1 ? own{n}[i] : dx[{n}][begin + i] + own{n}[i]"
        lines.append(f"    if (dx[{n}] && !dx_stride[{n}]) for (long i = 0; i < count; ++i) {total};")
    lines += ["  }", "}"]
    for n, name in enumerate(gradient.state_gradients):
        if name is not None:
            lines.append(f"if (ds[{n}]) for (long i = 0; i < count; ++i) ds[{n}][begin + i] = held{n}[i];")
    for n in range(len(gradient.neuron_sums)):
        lines.append(f"for (long i = 0; i < count; ++i) e[{n}][begin + i] = (float)each{n}[i];")
    for n in range(len(gradient.sums)):
        lines.append(f"double total{n} = 0.0;")
        lines.append(f"for (long i = 0; i < count; ++i) total{n} += sum{n}[i];")
        lines.append(f"sums[b * {len(gradient.sums)} + {n}] = total{n};")
    return [f"      {line}" for line in lines]


def _before(n: int, states: int) -> str:
    return f"    const float *__restrict__ before{n} = t ? kept + ((t - 1) * {states} + {n}) * block : s[{n}] + begin;"


def _inputs(read: Iterable[int]) -> list[str]:
    return [f"const float *__restrict__ in{n} = x[{n}] + t * x_stride[{n}] + begin;" for n in read]


def _loads(read: Iterable[int], states: int) -> list[str]:
    lines = [f"const float x{n} = in{n}[i];" for n in read]
    return lines + [f"const float s{n} = before{n}[i];" for n in range(states)]
