"""Operations that a kernel computes in several instructions, or as a number: the bits of ATen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snncompile.codegen import NotPointwise, trace_step_function
from snncompile.neuron import StatefulModule
from snncompile.runtime import cpp_build
from snncompile.runtime.scan_kernels import ScanKernels
from snncompile.runtime.states import StateSlot

from .test_scan_gradients import check, sequence

needs_compiler = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

# Of an input and a potential.
WORDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros where it fired": lambda x, v: torch.where(v > 1.0, torch.zeros_like(v), v),
    "ones": lambda x, v: torch.ones_like(v) * x + v.new_zeros(v.shape),
    "full": lambda x, v: torch.full_like(v, 0.3) + v.new_full(v.shape, 0.7) * x,
    "chosen numbers": lambda x, v: torch.where(v > 1.0, 1.0, 0.25),
    "a number or a tensor": lambda x, v: torch.where(v > 1.0, 0.5, x) + torch.where(x > 0.0, v, -1.0),
    "a masked fill": lambda x, v: v.masked_fill(x > 0.2, 0.1).masked_fill(v < 0.0, torch.tensor(0.7)),
    "squares": lambda x, v: x**2 + v.square() - v**3,
    "reciprocals": lambda x, v: x**-1 + v.reciprocal() + (v**2).rsqrt(),
    "reciprocals of squares": lambda x, v: (x + 1.0) ** -2 + v,
    "signs": lambda x, v: torch.sign(x) + v,
    "complex signs": lambda x, v: torch.sgn(x) + v,
    "heaviside": lambda x, v: torch.heaviside(x, torch.tensor(0.5)) + torch.heaviside(v, v),
    "clamped below": lambda x, v: torch.clamp_min(x, 0.1) + v.clamp_max(0.4),
    "clamped by tanh's line": lambda x, v: F.hardtanh(x) + F.hardtanh(v, -0.2, 0.3) + F.relu6(x),
    "leaky": lambda x, v: F.leaky_relu(x) + F.leaky_relu(v, 0.25),
    "products added": lambda x, v: torch.addcmul(x, v, v) + torch.addcmul(v, x, v, value=0.3),
    "quotients added": lambda x, v: torch.addcdiv(x, v, x * x + 1.0) + torch.addcdiv(x, v, x * x + 1.0, value=0.3),
    "scaled sums": lambda x, v: torch.add(x, v, alpha=2) - torch.sub(x, v, alpha=0.25),
    "truth values as numbers": lambda x, v: x * (v > 0.3) + (x > 0.1) * v + (1.0 - (v > 1.0).int()) * x,
    "numbers as truth values": lambda x, v: torch.logical_and(torch.relu(x), v > 0.1).float() + v.bool() * 0.5,
    "comparisons of truth values": lambda x, v: ((v > 0.1) == (x > 0.1)).float() * v,
}


# What autograd does with them has no place in a program, or there is no derivative.
NOT_TRAINED = ("reciprocals of squares", "complex signs", "heaviside", "quotients added")


class Worded(StatefulModule):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.function = function

    def step(self, inputs: Any, states: Any) -> Any:
        v = 0.5 * states[0] + inputs[0]
        y = self.function(inputs[0], v)
        return (y + 0.0 * v,), (v,)


@needs_compiler
@pytest.mark.parametrize("special", [None, 0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1e-40])
@pytest.mark.parametrize("kind", WORDS)
def test_a_kernel_has_the_bits_of_the_eager_steps(kind: str, special: float | None) -> None:
    module, x = Worded(WORDS[kind]), sequence(5, 3, 37)
    if special is not None:
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = special
    with torch.no_grad():
        slots = [StateSlot(module, kernels) for kernels in (ScanKernels(), None)]
        for slot in slots:
            slot.states = (torch.zeros(3, 37),)
        got, expected = (slot.scan(5, x) for slot in slots)
    assert slots[0].bound is not None
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


@needs_compiler
@pytest.mark.parametrize("kind", [kind for kind in WORDS if kind not in NOT_TRAINED])
def test_gradients_are_those_of_the_eager_steps(kind: str) -> None:
    check(Worded(WORDS[kind]), [sequence(5, 4, 6) + 0.6], [2, 3])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, v: v**1.5, "has no place in a pointwise program with"),
        (lambda x, v: torch.add(x, v, alpha=0.3), "is called with alpha"),
        (lambda x, v: x * ((v > 1.0).int() + 1), "it computes in torch.int32"),
        (lambda x, v: x * v.int(), "it computes in torch.int32"),
        (lambda x, v: x * v.double(), "it computes in torch.float64"),
        (lambda x, v: torch.full_like(x, 1.0, dtype=torch.float64) * x, "it computes in torch.float64"),
    ],
)
def test_what_would_round_otherwise_is_refused(function: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(NotPointwise, match=reason), torch.no_grad():
        trace_step_function(Worded(function).step, (x,), (torch.zeros(2, 3),))
