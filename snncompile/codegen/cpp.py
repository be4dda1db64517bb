"""From a step function to C++: one pass over memory for a chunk of steps, with the states in the first-level cache.

The code keeps the rounding of every operation (it is compiled without contraction), loops over blocks of neurons, and
inside each block over time. It has a plain C interface and no headers, so that it compiles in a fraction of a second.
"""

from __future__ import annotations

from .step_function import StepFunction, is_boolean

_BLOCK = 1024  # neurons whose states stay in the cache from step to step

_EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "__builtin_fabsf({0})",
    "relu": "{0} < 0.0f ? 0.0f : {0}",
    "sqrt": "__builtin_sqrtf({0})",
    "round": "__builtin_nearbyintf({0})",
    "floor": "__builtin_floorf({0})",
    "ceil": "__builtin_ceilf({0})",
    # As ATen's: a NaN on either side is the result.
    "maximum": "{0} != {0} || {0} > {1} ? {0} : {1}",
    "minimum": "{0} != {0} || {0} < {1} ? {0} : {1}",
    "where": "{0} ? {1} : {2}",
    "select": "{0} ? 1.0f : 0.0f",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "le": "{0} <= {1}",
    "lt": "{0} < {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "!{0}",
}

_HEAD = """// {inputs} inputs, {states} states, {outputs} outputs, all float32.
// x: the inputs [steps, size], each with its own stride from step to step; s: the states [size] before the first step;
// y: the outputs [steps, size], dense; z: the states after the last step; u: numbers; threads: at most that many.
extern "C" void scan(long steps, long size, const float *const *x, const long *x_stride, const float *const *s,
                     float *const *y, float *const *z, const float *u, int threads) {{
"""


def emit_scan(function: StepFunction) -> str:
    """The source of `scan`, which runs a step function over a chunk of steps."""
    lines = [_HEAD.format(inputs=function.inputs, states=function.states, outputs=len(function.outputs)).rstrip("\n")]
    lines += [f"  const float u{n} = u[{n}];" for n in range(len(function.numbers))]
    lines += [
        "#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)",
        f"  for (long begin = 0; begin < size; begin += {_BLOCK}) {{",
        f"    const long count = size - begin < {_BLOCK} ? size - begin : {_BLOCK};",
    ]
    for n in range(function.states):
        lines += [
            f"    float held{n}[{_BLOCK}];",
            f"    for (long i = 0; i < count; ++i) held{n}[i] = s[{n}][begin + i];",
        ]
    lines.append("    for (long t = 0; t < steps; ++t) {")
    for n in range(function.inputs):
        lines.append(f"      const float *__restrict__ in{n} = x[{n}] + t * x_stride[{n}] + begin;")
    for n in range(len(function.outputs)):
        lines.append(f"      float *__restrict__ out{n} = y[{n}] + t * size + begin;")
    lines += ["      for (long i = 0; i < count; ++i) {", *(f"        {line}" for line in _body(function)), "      }"]
    lines.append("    }")
    for n in range(function.states):
        lines.append(f"    for (long i = 0; i < count; ++i) z[{n}][begin + i] = held{n}[i];")
    lines += ["  }", "}"]
    return "\n".join(lines) + "\n"


def _body(function: StepFunction) -> list[str]:
    """One neuron at one step."""
    lines = [f"const float x{n} = in{n}[i];" for n in range(function.inputs)]
    lines += [f"const float s{n} = held{n}[i];" for n in range(function.states)]
    for instruction in function.program:
        kind = "bool" if is_boolean(instruction.operation) else "float"
        expression = _EXPRESSIONS[instruction.operation].format(*instruction.operands)
        lines.append(f"const {kind} {instruction.name} = {expression};")
    lines += [f"out{n}[i] = {name};" for n, name in enumerate(function.outputs)]
    return lines + [f"held{n}[i] = {name};" for n, name in enumerate(function.new_states)]
