"""Surrogates: the step forward, the closed-form derivative backward, SpikingJelly's bits, every way of calling them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from snncompile.surrogate import ATan, Sigmoid, SurrogateFunction

ALPHAS = (0.5, 2.0, 3.7, 4.0)


class Rectangle(SurrogateFunction):
    """What a user writes."""

    def gradient(self, x: Tensor) -> Tensor:
        return (x.abs() < 0.5 / self.alpha).to(x.dtype) * self.alpha


def sigmoid_derivative(x: float, alpha: float) -> float:
    sigmoid = 1 / (1 + math.exp(-alpha * x))
    return alpha * sigmoid * (1 - sigmoid)


def atan_derivative(x: float, alpha: float) -> float:
    return alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2)


def grad_of(surrogate: SurrogateFunction, x: Tensor, grad_output: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(surrogate(x), x, grad_output)
    return grad


@pytest.mark.parametrize("surrogate", [Sigmoid(), ATan(), Rectangle()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_forward_is_the_step_in_the_input_dtype(surrogate: SurrogateFunction, dtype: torch.dtype) -> None:
    x = torch.tensor([-math.inf, -1e-6, -0.0, 0.0, 1e-6, 2.0, math.inf, math.nan], dtype=dtype)
    spikes = surrogate(x)
    assert spikes.dtype == dtype
    # -1e-6 is a subnormal, not zero, in float16 too.
    assert spikes.tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("surrogate_class", "derivative"), [(Sigmoid, sigmoid_derivative), (ATan, atan_derivative)])
def test_gradient_is_the_closed_form(
    surrogate_class: type[SurrogateFunction], derivative: Callable[[float, float], float], alpha: float
) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    grad_output = torch.randn_like(x)
    expected = torch.tensor([derivative(value, alpha) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(surrogate_class(alpha).gradient(x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        grad_of(surrogate_class(alpha), x, grad_output), grad_output * expected, rtol=1e-12, atol=0
    )


def test_defaults_are_the_field_s() -> None:
    assert (Sigmoid().alpha, ATan().alpha) == (4.0, 2.0)
    zero = torch.zeros(())
    assert Sigmoid().gradient(zero).item() == 1.0  # alpha / 4
    assert ATan().gradient(zero).item() == 1.0  # alpha / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ["Sigmoid", "ATan"])
def test_spikingjelly_bits(name: str, alpha: float, dtype: torch.dtype) -> None:
    oracle_module = pytest.importorskip("spikingjelly.activation_based.surrogate")
    ours, oracle = {"Sigmoid": Sigmoid, "ATan": ATan}[name](alpha), getattr(oracle_module, name)(alpha)
    x = torch.cat([torch.randn(1000, dtype=dtype) * 2, torch.tensor([0.0, -0.0, math.nan], dtype=dtype)])
    grad_output = torch.randn_like(x)
    assert torch.equal(ours(x), oracle(x))
    assert torch.equal(grad_of(ours, x, grad_output).nan_to_num(7.0), grad_of(oracle, x, grad_output).nan_to_num(7.0))


def test_a_user_s_surrogate_needs_only_its_gradient() -> None:
    x = torch.tensor([-1.0, -0.2, 0.2, 1.0])
    grad = grad_of(Rectangle(alpha=2.0), x, torch.full_like(x, 3.0))
    assert grad.tolist() == [0.0, 6.0, 6.0, 0.0]


def test_a_surrogate_without_gradient_says_so() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"SurrogateFunction must define gradient\(x\)"):
        SurrogateFunction()(x).sum().backward()


def test_gradient_flows_in_eval_mode() -> None:
    x = torch.zeros(2)
    assert grad_of(Sigmoid().eval(), x, torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("surrogate", [Sigmoid(), ATan(), Rectangle()], ids=repr)
def test_torch_func_transforms(surrogate: SurrogateFunction) -> None:
    x = torch.randn(3, 5)
    gradient = surrogate.gradient(x)
    per_row = torch.func.vmap(torch.func.grad(lambda row: surrogate(row).sum()))(x)
    torch.testing.assert_close(per_row, gradient)
    _, pull_back = torch.func.vjp(surrogate, x)
    torch.testing.assert_close(pull_back(2 * torch.ones_like(x))[0], 2 * gradient)
    assert torch.equal(torch.func.vmap(surrogate)(x), surrogate(x))


def test_second_derivative() -> None:
    x = torch.randn(20, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(Sigmoid()(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    sigmoid = (4 * x).sigmoid()
    torch.testing.assert_close(second, 16 * sigmoid * (1 - sigmoid) * (1 - 2 * sigmoid))


def test_make_fx_sees_through_forward_and_backward() -> None:
    def vector_jacobian(x: Tensor, grad_output: Tensor) -> Tensor:
        return torch.func.vjp(ATan(), x)[1](grad_output)[0]

    x, grad_output = torch.randn(4), torch.randn(4)
    graph = make_fx(vector_jacobian)(x, grad_output)
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(torch.Tag.pointwise in target.tags for target in targets - {torch.ops.aten._to_copy.default})
    fresh = torch.randn(4)
    torch.testing.assert_close(graph(fresh, grad_output), grad_output * ATan().gradient(fresh))


def test_torch_compile_does_not_break_the_graph() -> None:
    compiled = torch.compile(Sigmoid().forward, backend="aot_eager", fullgraph=True)
    x = torch.randn(20, requires_grad=True)
    spikes = compiled(x)
    spikes.sum().backward()
    assert torch.equal(spikes, Sigmoid()(x))
    torch.testing.assert_close(x.grad, Sigmoid().gradient(x.detach()))


@pytest.mark.parametrize("alpha", [True, "4", None, torch.tensor(4.0)])
def test_alpha_of_a_wrong_type(alpha: object) -> None:
    with pytest.raises(TypeError, match="alpha must be a real number"):
        Sigmoid(alpha)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        ATan(alpha)
