"""Operations of ATen that take several instructions, or none but a number; each rounds as ATen's own kernel does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

_aten = torch.ops.aten


class Reader(Protocol):
    """What reads a step's operations into instructions."""

    def number(self, value: float) -> str:
        """The name of a number that stands in the code."""

    def operand(self, node: fx.Node, place: int) -> str:
        """The name of an argument, as a number."""

    def truth(self, operand: Any) -> str:
        """The name of an argument that is a truth value."""

    def emit(self, operation: str, *operands: str) -> str:
        """The name of an instruction's result."""


def filling(node: fx.Node) -> float | None:
    """What a call fills a tensor with; None if that is no number of its arguments."""
    value = FILLED[node.target]
    if value is not None:
        return value
    last = node.args[-1]
    return float(last) if isinstance(last, (int, float)) else None


def is_scaled_exactly(alpha: Any) -> bool:
    """Whether products with a number do not round, so that it matters not where they are rounded."""
    return isinstance(alpha, (int, float)) and alpha != 0 and math.frexp(abs(alpha))[0] == 0.5


def _power(reader: Reader, node: fx.Node) -> str | None:
    x, exponent = reader.operand(node, 0), node.args[1]
    square = partial(reader.emit, "mul", x, x)
    if exponent == 1:
        return x
    if exponent == 2:
        return square()
    if exponent == 3:
        return reader.emit("mul", square(), x)
    if exponent == -1:
        return reader.emit("div", reader.number(1.0), x)
    if exponent == -2:
        return reader.emit("div", reader.number(1.0), square())
    return None


def _where(reader: Reader, node: fx.Node) -> str:
    return reader.emit("where", reader.truth(node.args[0]), reader.operand(node, 1), reader.operand(node, 2))


def _masked_fill(reader: Reader, node: fx.Node) -> str:
    return reader.emit("where", reader.truth(node.args[1]), reader.operand(node, 2), reader.operand(node, 0))


def _sign(reader: Reader, node: fx.Node) -> str:
    x, zero = reader.operand(node, 0), reader.number(0.0)
    above, below = reader.emit("gt", x, zero), reader.emit("lt", x, zero)
    return reader.emit("sub", reader.emit("select", above), reader.emit("select", below))


def _heaviside(reader: Reader, node: fx.Node) -> str:
    x, zero = reader.operand(node, 0), reader.number(0.0)
    above = reader.emit("select", reader.emit("gt", x, zero))
    return reader.emit("where", reader.emit("eq", x, zero), reader.operand(node, 1), above)


def _reciprocal(reader: Reader, node: fx.Node) -> str:
    return reader.emit("div", reader.number(1.0), reader.operand(node, 0))


def _reciprocal_root(reader: Reader, node: fx.Node) -> str:
    return reader.emit("div", reader.number(1.0), reader.emit("sqrt", reader.operand(node, 0)))


def _at_least(reader: Reader, node: fx.Node) -> str:
    return reader.emit("maximum", reader.operand(node, 0), reader.operand(node, 1))


def _at_most(reader: Reader, node: fx.Node) -> str:
    return reader.emit("minimum", reader.operand(node, 0), reader.operand(node, 1))


def _between(reader: Reader, node: fx.Node) -> str:
    bounds: list[Any] = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
    above = reader.emit("maximum", reader.operand(node, 0), reader.number(float(bounds[0])))
    return reader.emit("minimum", above, reader.number(float(bounds[1])))


def _leaky(reader: Reader, node: fx.Node) -> str:
    x = reader.operand(node, 0)
    slope: Any = node.args[1] if len(node.args) > 1 else 0.01
    scaled = reader.emit("mul", x, reader.number(float(slope)))
    return reader.emit("where", reader.emit("gt", x, reader.number(0.0)), x, scaled)


def _with_product(reader: Reader, node: fx.Node) -> str:
    # In one rounding, as torch does it.
    return reader.emit("fma", _scaled(reader, node), reader.operand(node, 2), reader.operand(node, 0))


def _with_quotient(reader: Reader, node: fx.Node) -> str:
    quotient = reader.emit("div", _scaled(reader, node), reader.operand(node, 2))
    return reader.emit("add", reader.operand(node, 0), quotient)


def _scaled(reader: Reader, node: fx.Node) -> str:
    """The second argument times `value`."""
    value: Any = node.kwargs.get("value", 1)
    first = reader.operand(node, 1)
    return first if value == 1 else reader.emit("mul", reader.number(float(value)), first)


# Operation -> what it fills a tensor with; None: its last argument.
FILLED: dict[Any, float | None] = {
    _aten.zeros_like.default: 0.0,
    _aten.ones_like.default: 1.0,
    _aten.new_zeros.default: 0.0,
    _aten.new_ones.default: 1.0,
    _aten.zeros.default: 0.0,
    _aten.ones.default: 1.0,
    _aten.full_like.default: None,
    _aten.full.default: None,
    _aten.new_full.default: None,
    _aten.scalar_tensor.default: None,
}
WRITTEN_OUT: dict[Any, Callable[[Reader, fx.Node], str | None]] = {
    _aten.pow.Tensor_Scalar: _power,
    _aten.where.self: _where,
    _aten.where.ScalarSelf: _where,
    _aten.where.ScalarOther: _where,
    _aten.where.Scalar: _where,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.masked_fill.Tensor: _masked_fill,
    _aten.sgn.default: _sign,
    _aten.sign.default: _sign,
    _aten.heaviside.default: _heaviside,
    _aten.reciprocal.default: _reciprocal,
    _aten.rsqrt.default: _reciprocal_root,
    _aten.clamp_min.default: _at_least,
    _aten.clamp_max.default: _at_most,
    _aten.hardtanh.default: _between,
    _aten.leaky_relu.default: _leaky,
    _aten.addcmul.default: _with_product,
    _aten.addcdiv.default: _with_quotient,
}
