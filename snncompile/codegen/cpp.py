"""From a step function to C++: one pass over memory for a chunk of steps, with the states in the first-level cache.

The code keeps the rounding of every operation (it is compiled without contraction), loops over blocks of neurons, and
inside each block over time. It has a plain C interface and no headers, so that it compiles in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .cpp_functions import functions_of
from .step_function import Instruction, StepFunction, is_boolean

_BLOCK = 1024  # neurons whose states stay in the cache from step to step

_EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "__builtin_fmaf({0}, {1}, {2})",
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
    # Of `cpp_functions`.
    "exp": "exponential({0})",
    "sigmoid": "sigmoid({0})",
    "tanh": "hyperbolic_tangent({0})",
}

_HEAD = """// {inputs} inputs, {states} states, {outputs} outputs, all float32.
// x: the inputs [steps, *], each with its own stride from step to step; s: the states [size] before the first step;
// y: the outputs [steps, size], dense; z: the states after the last step; u: numbers; threads: at most that many.
extern "C" void scan(long steps, long size, const float *const *x, const long *x_stride, const long *const *x_layout,
                     const float *const *s, float *const *y, float *const *z, const float *u, int threads) {{
"""

# Elements [begin, begin + count) of an operand that lies in memory in another way than the neurons do.
# layout: how many dimensions, the size of each, and its stride in the operand, the outermost first.
GATHER = """static inline void gather(float *to, const float *from, const long *layout, long begin, long count) {
  const long dims = layout[0], *size = layout + 1, *stride = layout + 1 + dims;
  long index[16], offset = 0;
  for (long d = dims - 1, rest = begin; d >= 0; --d) {
    index[d] = rest % size[d];
    rest /= size[d];
    offset += index[d] * stride[d];
  }
  for (long done = 0; done < count;) {
    const long left = size[dims - 1] - index[dims - 1], run = left < count - done ? left : count - done;
    const long step = stride[dims - 1];
    if (step == 0) for (long i = 0; i < run; ++i) to[done + i] = from[offset];
    else if (step == 1) for (long i = 0; i < run; ++i) to[done + i] = from[offset + i];
    else for (long i = 0; i < run; ++i) to[done + i] = from[offset + i * step];
    done += run;
    index[dims - 1] += run;
    offset += run * step;
    for (long d = dims - 1; d > 0 && index[d] == size[d]; --d) {
      offset += stride[d - 1] - size[d] * stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

"""

MAX_DIMS = 16  # of an operand that is gathered


def emit_scan(function: StepFunction, gathered: Collection[int] = ()) -> str:
    """The source of `scan`, which runs a step function over a chunk of steps.

    Args:
        function: The step; its tables follow its inputs.
        gathered: The inputs that do not lie in memory as the neurons do: broadcast, or with other strides. They are
            laid out anew, block by block, in the cache: once for all steps where they are the same at every step.
    """
    head = _HEAD.format(inputs=function.read, states=function.states, outputs=len(function.outputs)).rstrip("\n")
    lines = [*functions_of(function.program), (GATHER if gathered else "") + head]
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
    lines += [f"    float in{n}[{_BLOCK}];" for n in sorted(gathered)]
    lines.append("    for (long t = 0; t < steps; ++t) {")
    for n in range(function.read):
        if n in gathered:
            source = f"x[{n}] + t * x_stride[{n}], x_layout[{n}]"
            lines.append(f"      if (t == 0 || x_stride[{n}] != 0) gather(in{n}, {source}, begin, count);")
        else:
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
    lines = [f"const float x{n} = in{n}[i];" for n in range(function.read)]
    lines += [f"const float s{n} = held{n}[i];" for n in range(function.states)]
    lines += expressions(function.program)
    lines += [f"out{n}[i] = {name};" for n, name in enumerate(function.outputs)]
    return lines + [f"held{n}[i] = {name};" for n, name in enumerate(function.new_states)]


def expressions(program: Iterable[Instruction]) -> list[str]:
    """The instructions of a program, one a line."""
    lines = []
    for instruction in program:
        kind = "bool" if is_boolean(instruction.operation) else "float"
        expression = _EXPRESSIONS[instruction.operation].format(*instruction.operands)
        lines.append(f"const {kind} {instruction.name} = {expression};")
    return lines
