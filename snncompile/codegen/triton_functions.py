"""Exponential, sigmoid and hyperbolic tangent in Triton: the operations of `cpp_functions`, statement by statement.

Triton's own `exp` is the GPU's approximate power of two, whose error grows with its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# e^r = 1 + r + r^2 p(r) for |r| <= ln(2) / 2, the highest power first.
_COEFFICIENTS = (
    0.00139304355252534151,
    0.00833336077630519867,
    0.0416664853692054749,
    0.166666671633720398,
    0.5,
)
_ROUND = 12582912.0  # 1.5 * 2^23: added and subtracted, it rounds to the nearest whole number, half to even


def _exponential(result: str, x: str) -> Iterator[str]:
    n, r, p, whole, half = (f"{result}_{name}" for name in ("n", "r", "p", "whole", "half"))
    yield f"{r} = tl.where({x} < -105.0, -105.0, tl.where({x} > 101.0, 101.0, {x}))"
    yield f"{n} = tl.where({r} != {r}, 0.0, ({r} * 1.44269504088896341 + {_ROUND}) - {_ROUND})"
    yield f"{r} = tl.fma({n}, -1.428606765330187045e-06, tl.fma({n}, -0.693145751953125, {r}))"
    yield f"{p} = tl.fma({r}, 0.000198527617612853646, {_COEFFICIENTS[0]})"
    for coefficient in _COEFFICIENTS[1:]:
        yield f"{p} = tl.fma({p}, {r}, {coefficient})"
    yield f"{p} = 1.0 + tl.fma({r} * {r}, {p}, {r})"
    # 2^n in two halves, so that neither is too large for a float.
    yield f"{whole} = {n}.to(tl.int32)"
    yield f"{half} = {whole} >> 1"
    yield f"{p} = {p} * (({half} + 127) << 23).to(tl.float32, bitcast=True)"
    yield f"{p} = {p} * (({whole} - {half} + 127) << 23).to(tl.float32, bitcast=True)"
    yield f"{result} = tl.where({x} < -104.0, 0.0, tl.where({x} > 100.0, float('inf'), {p}))"


def _sigmoid(result: str, x: str) -> Iterator[str]:
    yield f"{result}_minus = {x} * -1.0"
    yield from _exponential(f"{result}_e", f"{result}_minus")
    yield f"{result} = tl.div_rn(1.0, 1.0 + {result}_e)"


def _hyperbolic_tangent(result: str, x: str) -> Iterator[str]:
    size, square, near, far = (f"{result}_{name}" for name in ("size", "square", "near", "far"))
    yield f"{size} = tl.abs({x})"
    yield f"{square} = {x} * {x}"
    yield f"{near} = {square} * -5.70498872745e-3 + 2.06390887954e-2"
    for coefficient in ("- 5.37397155531e-2", "+ 1.33314422036e-1", "- 3.33332819422e-1"):
        yield f"{near} = {near} * {square} {coefficient}"
    yield f"{near} = {near} * {square} * {x} + {x}"
    yield f"{result}_double = {size} * 2.0"
    yield from _exponential(f"{result}_e", f"{result}_double")
    yield f"{far} = 1.0 - tl.div_rn(2.0, {result}_e + 1.0)"
    yield f"{result} = tl.where({size} < 0.625, {near}, tl.where({x} < 0.0, {far} * -1.0, {far}))"


# Operation -> the statements that compute it, from the names of its result and its operand.
FUNCTIONS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "exp": _exponential,
    "sigmoid": _sigmoid,
    "tanh": _hyperbolic_tangent,
}
