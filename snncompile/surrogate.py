"""Spikes that can be trained: a Heaviside step forward, a smooth surrogate gradient backward.

The spike function Θ(x) = 1 for x >= 0, else 0, has a derivative of zero almost everywhere. Training replaces that
derivative, and only that derivative, by the derivative g'(x) of a smooth function g that looks like a step: the
surrogate gradient (Neftci, Mostafa and Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", 2019). Here
x = h - v_threshold, the distance of the charged membrane potential from its threshold.

Write your own by subclassing :class:`SurrogateFunction` and giving g'::

    class Rectangle(SurrogateFunction):
        def gradient(self, x):
            return (x.abs() < 0.5 / self.alpha).to(x.dtype) * self.alpha
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ATan", "Sigmoid", "SurrogateFunction"]


class _Spike(torch.autograd.Function):
    """Θ forward, the surrogate's derivative backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: SurrogateFunction) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SurrogateFunction], output: Tensor) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.surrogate.backward(grad_output, x), None


class SurrogateFunction(nn.Module):
    """Θ(x) in the forward pass, ``gradient(x)`` for its derivative in the backward pass.

    A subclass overrides :meth:`gradient`. The gradient flows whenever autograd records, in train and in eval mode
    alike. It works under ``torch.func.vjp``, ``grad`` and ``vmap``, ``make_fx`` and ``torch.compile``, and can be
    differentiated again where ``gradient`` can.

    Shapes:
        x of any shape and floating-point dtype -> spikes 0 or 1 of the same shape and dtype; NaN gives 0.

    Args:
        alpha: Sharpness of the surrogate, a number > 0; larger is closer to the step.

    Raises:
        TypeError: ``alpha`` is not a real number.
        ValueError: ``alpha`` is not positive and finite.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha must be a real number, got {type(alpha).__name__}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        self.alpha = float(alpha)

    def gradient(self, x: Tensor) -> Tensor:
        """The surrogate derivative g'(x), element by element, in x's shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define gradient(x), the surrogate derivative")

    def backward(self, grad_output: Tensor, x: Tensor) -> Tensor:
        """``grad_output · g'(x)``; override it only where the order of rounding matters."""
        return grad_output * self.gradient(x)

    def forward(self, x: Tensor) -> Tensor:
        spike: Tensor = _Spike.apply(x, self)  # type: ignore[no-untyped-call]
        return spike

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Sigmoid(SurrogateFunction):
    """g(x) = σ(αx), so g'(x) = α σ(αx) (1 - σ(αx)), with σ the logistic function and α = ``alpha``; g'(0) = α/4.

    Rounds in the order of SpikingJelly's single-step ``surrogate.Sigmoid``, bit for bit.
    """

    def __init__(self, alpha: float = 4.0) -> None:
        super().__init__(alpha)

    def gradient(self, x: Tensor) -> Tensor:
        sigmoid = (x * self.alpha).sigmoid()
        return (1.0 - sigmoid) * sigmoid * self.alpha

    def backward(self, grad_output: Tensor, x: Tensor) -> Tensor:
        sigmoid = (x * self.alpha).sigmoid()
        return grad_output * (1.0 - sigmoid) * sigmoid * self.alpha


class ATan(SurrogateFunction):
    """g(x) = arctan(παx/2)/π + 1/2, so g'(x) = (α/2) / (1 + (παx/2)²), with α = ``alpha``; g'(0) = α/2.

    Rounds in the order of SpikingJelly's single-step ``surrogate.ATan``, bit for bit (Fang et al., "Incorporating
    Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks", 2021).
    """

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__(alpha)

    def gradient(self, x: Tensor) -> Tensor:
        half = self.alpha / 2
        scaled = math.pi * half * x
        return half / (1 + scaled * scaled)
