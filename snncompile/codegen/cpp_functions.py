"""Exponential, sigmoid and hyperbolic tangent in C++ that a compiler vectorises.

ATen computes the sigmoid of a vector by SLEEF's exponential (`expf`, 1.0 ulp); the same polynomial with the same
roundings gives its bits, but for the few elements that are left over from whole vectors, which ATen gives to the C
library. `torch.exp` is another library's where torch has one: within 2 ulp, as the tangent, which is Moshier's (Cephes
Mathematical Library: tanhf). Backward uses them; forward, which keeps every bit, only where reassociation is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable

from .step_function import Instruction

_EXPONENTIAL = """// 2^n e^r with |r| <= ln(2) / 2; n in two halves, so that neither is too large for a float.
static inline float exponential(float x) {
  const float from_below = x < -105.0f ? -105.0f : x, bounded = from_below > 101.0f ? 101.0f : from_below;
  const float n = bounded != bounded ? 0.0f : __builtin_nearbyintf(bounded * 1.44269504088896341f);
  const float r = __builtin_fmaf(n, -1.428606765330187045e-06f, __builtin_fmaf(n, -0.693145751953125f, bounded));
  float p = 0.000198527617612853646f;
  p = __builtin_fmaf(p, r, 0.00139304355252534151f);
  p = __builtin_fmaf(p, r, 0.00833336077630519867f);
  p = __builtin_fmaf(p, r, 0.0416664853692054749f);
  p = __builtin_fmaf(p, r, 0.166666671633720398f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = 1.0f + __builtin_fmaf(r * r, p, r);
  const int whole = (int)n, half = whole >> 1;
  const int first = (half + 127) << 23, second = (whole - half + 127) << 23;
  float a, b;
  __builtin_memcpy(&a, &first, 4);
  __builtin_memcpy(&b, &second, 4);
  const float scaled = p * a * b;
  return x < -104.0f ? 0.0f : x > 100.0f ? __builtin_inff() : scaled;
}
"""

_SIGMOID = """static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
"""

_HYPERBOLIC_TANGENT = """static inline float hyperbolic_tangent(float x) {
  const float size = __builtin_fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = __builtin_copysignf(1.0f - 2.0f / (exponential(2.0f * size) + 1.0f), x);
  return size < 0.625f ? near : far;
}
"""

_SOURCES = {
    "exp": (_EXPONENTIAL,),
    "sigmoid": (_EXPONENTIAL, _SIGMOID),
    "tanh": (_EXPONENTIAL, _HYPERBOLIC_TANGENT),
}


def functions_of(program: Iterable[Instruction]) -> list[str]:
    """The sources of the functions that a program calls, each once, in order."""
    called = {instruction.operation for instruction in program}
    found = [source for operation, sources in _SOURCES.items() if operation in called for source in sources]
    return list(dict.fromkeys(found))
