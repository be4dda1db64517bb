"""The gradient of a step as a pointwise program, and the C++ that runs it backward over a chunk of steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snncompile import neuron, surrogate
from snncompile.codegen import (
    NotPointwise,
    StepGradient,
    Totals,
    emit_reverse,
    trace_step_function,
    trace_step_gradient,
)
from snncompile.codegen.cpp_functions import functions_of
from snncompile.codegen.step_function import Instruction
from snncompile.neuron import StatefulModule
from snncompile.runtime import cpp_build


def gradient_of(module: StatefulModule) -> StepGradient:
    x = torch.zeros(2, 3)
    states = module.materialize_states((x,), module.reset_values)
    names = [name for name, _ in module.named_parameters()]

    def step(inputs: Any, before: Any, parameters: Any) -> Any:
        module._parameters.update(dict(zip(names, parameters, strict=True)))
        return module.step(inputs, before)

    own = tuple(module.parameters())
    try:
        return trace_step_gradient(step, (x,), states, 1, own)
    finally:
        module._parameters.update(dict(zip(names, own, strict=True)))


def test_the_program_and_its_source(golden: Callable[[str], None]) -> None:
    module = neuron.ParametricLIFNode(surrogate_function=surrogate.ATan())
    gradient = gradient_of(module)
    x = torch.zeros(2, 3)
    with torch.no_grad():
        function = trace_step_function(module.step, (x,), module.materialize_states((x,), module.reset_values))
    golden(f"{gradient}\n\n{emit_reverse(function, gradient)}")


def test_the_program_and_source_with_a_number_for_each_channel(golden: Callable[[str], None]) -> None:
    module = Stepping(lambda x, v, w: w.clamp(0.0, 1.0) * v + x, torch.tensor([0.5, 0.7, 0.9]))
    gradient = gradient_of(module)
    x = torch.zeros(2, 3)
    with torch.no_grad():
        function = trace_step_function(module.step, (x,), module.materialize_states((x,), module.reset_values))
    golden(f"{gradient}\n\n{emit_reverse(function, gradient)}")


class Stepping(StatefulModule):
    """`v' = f(x, v)`, which is the output too."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], weight: Any = None) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.function = function
        if weight is not None:
            self.weight = nn.Parameter(weight)

    def step(self, inputs: Any, states: Any) -> Any:
        weight = (self.weight,) if hasattr(self, "weight") else ()
        v = self.function(inputs[0], states[0], *weight)
        return (v,), (v,)


def evaluated(gradient: StepGradient, x: Tensor, s: Tensor, g: Tensor, h: Tensor) -> list[Tensor]:
    """The gradients of input and state, the program taken at its word."""
    values: dict[str, Any] = {"x0": x, "s0": s, "g0": g, "h0": h}
    values.update({f"u{n}": torch.tensor(number()) for n, number in enumerate(gradient.numbers)})
    meaning: dict[str, Callable[..., Any]] = {
        "rsub": torch.rsub,
        "and": torch.logical_and,
        "or": torch.logical_or,
        "not": torch.logical_not,
        "select": lambda flag: flag.float(),
    }
    for i in gradient.program:
        values[i.name] = meaning.get(i.operation, getattr(torch, i.operation, None))(*(values[o] for o in i.operands))
    names = (*gradient.input_gradients, *gradient.state_gradients)
    return [torch.zeros_like(x) if name is None else values[name].expand_as(x) for name in names]


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "products": lambda x, v: x * v - v / (x + 3.0),
    "squares and roots": lambda x, v: (x**2 + v.square() + 1.0).sqrt() + (v + 4.0) ** 3 + 1.0 / (x + 2.0) ** 2,
    "clamped": lambda x, v: x.clamp(-0.5, 0.5) + v.clamp_min(0.1) - v.clamp(max=0.6),
    "absolute values": lambda x, v: x.abs() * v.relu(),
    "greatest and least": lambda x, v: torch.maximum(x, v) + 2.0 * torch.minimum(x, 0.5 * v),
    "chosen": lambda x, v: torch.where(x > 0.2, x * v, -v),
    "reciprocals": lambda x, v: (x + 3.0).reciprocal() + (v + 4.0).rsqrt(),
    "a gate": lambda x, v: x * (v > 0.3).float(),
    "detached": lambda x, v: x.detach() * v,
    "rounded": lambda x, v: x.round() + v,
    "in place": lambda x, v: (x * v).mul_(2.0).add_(v),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_it_is_what_autograd_computes(kind: str) -> None:
    module = Stepping(FUNCTIONS[kind])
    x, s, g, h = 3.0 * torch.rand(4, 2, 3) - 1.5
    got = evaluated(gradient_of(module), x, s, g, h)
    x.requires_grad_()
    s.requires_grad_()
    (y,), (z,) = module.step((x,), (s,))
    expected = torch.autograd.grad((y, z), (x, s), (g, h), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-6, atol=1e-6)


def test_no_gradient_flows_where_none_does() -> None:
    gradient = gradient_of(Stepping(lambda x, v: x.detach() + v))
    assert gradient.input_gradients == (None,)
    assert gradient.differentiable == (True, True)
    assert gradient_of(Stepping(lambda x, v: x.detach() + v.detach())).differentiable == (False, False)


def test_gradients_of_parameters_are_sums_and_what_is_made_of_them() -> None:
    gradient = gradient_of(Stepping(lambda x, v, w: torch.sigmoid(w) * x + w * v, torch.tensor(0.3)))
    assert len(gradient.sums) == 2
    (of_weight,) = gradient.parameter_gradients
    assert of_weight is not None
    sigmoid = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    totals = {False: torch.tensor(2.0), True: torch.tensor(5.0)}  # of products with x, and of products with the state
    program = {i.name: i for i in gradient.program}
    given = torch.stack([totals["s0" in program[name].operands] for name in gradient.sums]).double()
    expected = float(2.0 * sigmoid * (1.0 - sigmoid) + 5.0)
    assert of_weight(Totals(given, [])).item() == pytest.approx(expected)


def test_those_of_a_parameter_with_a_number_for_each_channel_are_sums_over_steps() -> None:
    weight = torch.tensor([0.3, -0.2, 0.9])
    gradient = gradient_of(Stepping(lambda x, v, w: torch.sigmoid(w) * x + w * v, weight))
    assert gradient.sums == ()
    (of_weight,) = gradient.parameter_gradients
    assert of_weight is not None
    program = {i.name: i for i in gradient.program}
    of_x, of_state = torch.rand(2, 2, 3)  # of products with x, and of products with the state
    given = [of_state if "s0" in program[name].operands else of_x for name in gradient.neuron_sums]
    assert len(given) == 2
    slope = torch.sigmoid(weight) * (1.0 - torch.sigmoid(weight))
    expected = of_x.sum(0) * slope + of_state.sum(0)
    torch.testing.assert_close(of_weight(Totals(torch.empty(0), given)), expected)


@pytest.mark.parametrize(
    ("function", "weight", "reason"),
    [
        (lambda x, v: torch.sin(x) + v, None, "aten.sin.default has no place"),
        (lambda x, v: x + v.mean(), None, "has no place"),
        (lambda x, v: x**1.5 + v, None, "has no place|a power of"),
        (lambda x, v: x + v if v.sum() > 0 else x, None, "cannot be traced without data"),
        (lambda x, v, w: w.sin() * x + v.sin(), torch.ones(3), "aten.sin.default has no place"),
    ],
)
def test_what_has_no_place_in_it_is_refused(function: Any, weight: Any, reason: str) -> None:
    with pytest.raises(NotPointwise, match=reason):
        gradient_of(Stepping(function, weight))


def test_a_foreign_tensor_that_records_gradients_is_refused() -> None:
    outside = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(NotPointwise, match="records gradients and is no parameter of its own"):
        gradient_of(Stepping(lambda x, v: outside * x + v))


@pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_functions_are_within_two_units_in_the_last_place(name: str) -> None:
    called = {"exp": "exponential", "sigmoid": "sigmoid", "tanh": "hyperbolic_tangent"}[name]
    source = "\n".join(functions_of([Instruction("r0", name, ("x0",))]))
    source += (
        'extern "C" void all(long n, const float *x, float *y) '
        f"{{ for (long i = 0; i < n; ++i) y[i] = {called}(x[i]); }}\n"
    )
    bits = torch.arange(0, 2**31 - 1, 4099, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), torch.linspace(-90.0, 90.0, 100_000)])
    got = torch.empty_like(x)
    cpp_build.build(source).all(
        ctypes.c_long(x.numel()), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(got.data_ptr())
    )
    expected = getattr(torch, name)(x.double()).float()
    assert torch.equal(got.isnan(), expected.isnan())
    normal = ~expected.isnan() & (expected.abs() >= torch.finfo(torch.float32).tiny) & expected.isfinite()
    distance = (got.view(torch.int32).long() - expected.view(torch.int32).long()).abs()
    assert int(distance[normal].max()) <= 2
    assert torch.equal(got[expected.isinf()], expected[expected.isinf()])
    assert float((got - expected)[expected.abs() < torch.finfo(torch.float32).tiny].abs().max()) < 1e-38
    if name == "sigmoid":  # the bits of ATen's vectors; what is left over from whole vectors is the C library's
        assert int((got != torch.sigmoid(x)).logical_and(normal).sum()) < 100
