"""One NIR node to one module of a single step, with its shapes checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import skip_init

from snncompile.errors import CaptureError
from snncompile.nir.delay import Delay
from snncompile.nir.membrane import tensor_of
from snncompile.nir.neurons import IF, LI, LIF, CubaLI, CubaLIF, Integrator, Scale, Threshold

__all__ = ["TRANSLATIONS", "Settings", "Shape", "Site", "declared_shape"]

Shape = tuple[int, ...]  # of one sample in one step, without the batch

# Two delays that differ by less than this share of a step are the same: files often hold single precision.
DELAY_TOLERANCE = 1e-3

_TIME_CONSTANTS = ("tau", "tau_syn", "tau_mem")
_UNBOUNDED = ("v_threshold", "threshold")  # an infinite one never fires
_OPTIONAL = ("v_reset", "w_in")  # graphs made before NIR had them mean 0 and 1, the defaults of our neurons


@dataclass(frozen=True)
class Settings:
    """What every node of a network shares.

    Attributes:
        dt: Length of a step, in the unit of the graph's time constants.
        surrogate_function: Θ with a gradient; None for the default.
        detach_reset: Keep the gradient out of the reset.
    """

    dt: float
    surrogate_function: Callable[[Tensor], Tensor] | None = None
    detach_reset: bool = False

    @property
    def spiking(self) -> dict[str, Any]:
        return {"surrogate_function": self.surrogate_function, "detach_reset": self.detach_reset}


@dataclass(frozen=True)
class Site:
    """A NIR node, where it stands, and what comes in.

    Attributes:
        node: The NIR node.
        where: Its name, as errors spell it.
        shape: Of one sample of one step.
    """

    node: Any
    where: str
    shape: Shape

    def fail(self, message: str) -> NoReturn:
        """Raise a `CaptureError` about this node."""
        raise CaptureError(f"the {type(self.node).__name__} {self.where!r} {message}", where=self.where)

    def array(self, name: str) -> Tensor:
        """One of the node's arrays, as a float64 tensor, its values checked."""
        value = self._numbers(name).to("cpu", torch.float64)
        finite = ~value.isnan() if name in _UNBOUNDED else value.isfinite()
        if not bool(finite.all()):
            self.fail(f"has a {name} that is not finite")
        if name in _TIME_CONSTANTS and not bool((value > 0).all()):
            self.fail(f"has a {name} of {value.min().item()}, expected time constants > 0")
        return value

    def elementwise(self, *names: str) -> dict[str, Tensor]:
        """Arrays that apply to every element of the input, so that they must broadcast to its shape."""
        given = [name for name in names if name not in _OPTIONAL or getattr(self.node, name, None) is not None]
        arrays = {name: self.array(name) for name in given}
        for name, value in arrays.items():
            sizes = zip(reversed(value.shape), reversed(self.shape), strict=False)
            if value.ndim > len(self.shape) or any(size not in (1, wanted) for size, wanted in sizes):
                self.fail(f"has a {name} of shape {tuple(value.shape)}, which does not fit its input of {self.shape}")
        return arrays

    def integers(self, name: str, count: int) -> tuple[int, ...]:
        """A number or a sequence of ``count`` numbers as a tuple of that length."""
        value = self._numbers(name).flatten().tolist()
        if len(value) not in (1, count) or any(number != int(number) for number in value):
            self.fail(f"has {name} = {value}, expected a whole number or {count} of them")
        return tuple(int(number) for number in (value * count if len(value) == 1 else value))

    def _numbers(self, name: str) -> Tensor:
        try:
            value = tensor_of(getattr(self.node, name))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            self.fail(f"needs an array of real numbers as {name}: {error}")
        if value.is_complex():
            self.fail(f"needs an array of real numbers as {name}, got {value.dtype}")
        return value

    def run(self, layer: nn.Module) -> tuple[nn.Module, Shape]:
        """A stateless layer and its output's shape, found by torch itself on tensors without data."""
        meta = {name: value.to("meta") for name, value in layer.named_parameters()}
        try:
            output = functional_call(layer, meta, (torch.empty((1, *self.shape), device="meta"),))
        except (ArithmeticError, RuntimeError, ValueError) as error:
            self.fail(f"cannot take an input of shape {self.shape}: {error}")
        return layer, tuple(output.shape[1:])


def declared_shape(types: Mapping[str, Any] | None) -> Shape | None:
    """A shape as NIR's ``input_type`` and ``output_type`` hold it; None where it is left open."""
    shape = next(iter(types.values()), None) if types else None
    return None if shape is None else tuple(int(size) for size in tensor_of(shape).flatten().tolist())


def _input(site: Site, settings: Settings) -> tuple[None, Shape]:
    return _checked(site, site.node.input_type)


def _output(site: Site, settings: Settings) -> tuple[None, Shape]:
    return _checked(site, site.node.output_type)


def _checked(site: Site, types: Mapping[str, Any] | None) -> tuple[None, Shape]:
    declared = declared_shape(types)
    if declared is not None and declared != site.shape:
        site.fail(f"declares the shape {declared}, but what reaches it has {site.shape}")
    return None, site.shape


def _linear(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    weight = site.array("weight")
    if weight.ndim != 2:
        site.fail(f"has a weight of shape {tuple(weight.shape)}, expected (outputs, inputs)")
    outputs, inputs = weight.shape
    if site.shape != (inputs,):
        site.fail(f"takes inputs of shape ({inputs},), got {site.shape}{_hint(site.shape, (inputs,))}")
    bias = _bias(site, outputs)
    return _filled(skip_init(nn.Linear, inputs, outputs, bias=bias is not None), weight, bias), (outputs,)


def _convolution(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    kind, axes = (nn.Conv1d, 1) if type(site.node).__name__ == "Conv1d" else (nn.Conv2d, 2)
    weight = site.array("weight")
    (groups,) = site.integers("groups", 1)
    if weight.ndim != axes + 2:
        site.fail(f"has a weight of {weight.ndim} dimensions, expected {axes + 2}")
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if len(site.shape) != axes + 1 or site.shape[0] != inputs:
        site.fail(f"takes inputs of {axes + 1} dimensions, the first of them {inputs} channels, got {site.shape}")
    if (size := site.node.input_shape) is not None:
        declared = tuple(tensor_of(size).flatten().tolist())
        if declared != site.shape[1:]:
            site.fail(f"declares the input_shape {declared}, but what reaches it has {site.shape[1:]}")
    padding = site.node.padding
    bias = _bias(site, outputs)
    try:
        layer = skip_init(
            kind,
            *(inputs, outputs, tuple(weight.shape[2:])),
            stride=site.integers("stride", axes),
            padding=padding if isinstance(padding, str) else site.integers("padding", axes),
            dilation=site.integers("dilation", axes),
            groups=groups,
            bias=bias is not None,
        )
    except ValueError as error:
        site.fail(f"is no convolution: {error}")
    return site.run(_filled(layer, weight, bias))


def _pooling(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    if len(site.shape) != 3:
        site.fail(f"takes inputs of shape (channels, height, width), got {site.shape}")
    kernel, stride, padding = (_pair(site, name) for name in ("kernel_size", "stride", "padding"))
    # Padding counts as zeros, in the average too. A sum is an average with another divisor.
    divisor = 1 if type(site.node).__name__ == "SumPool2d" else None
    return site.run(nn.AvgPool2d(kernel, stride, padding, divisor_override=divisor))


def _pair(site: Site, name: str) -> tuple[int, int]:
    height, width = site.integers(name, 2)
    return height, width


def _flatten(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    _checked(site, site.node.input_type)
    rank = len(site.shape)
    dims = [site.integers(name, 1)[0] for name in ("start_dim", "end_dim")]
    if any(not -rank <= dim < rank for dim in dims):
        site.fail(f"flattens dimensions {dims[0]} to {dims[1]} of an input of shape {site.shape}")
    # NIR counts without the batch.
    return site.run(nn.Flatten(*(dim % rank + 1 for dim in dims)))


def _neuron(kind: Callable[..., nn.Module], *names: str, spikes: bool = False) -> Translation:
    def translate(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
        arguments = {"dt": settings.dt, **(settings.spiking if spikes else {})}
        return kind(**site.elementwise(*names), **arguments), site.shape

    return translate


def _threshold(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    arrays = site.elementwise("threshold")
    return Threshold(**arrays, surrogate_function=settings.surrogate_function), site.shape


def _scale(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    return Scale(**site.elementwise("scale")), site.shape


def _delay(site: Site, settings: Settings) -> tuple[nn.Module, Shape]:
    steps = site.elementwise("delay")["delay"] / settings.dt
    whole = steps.round()
    if bool((whole < 0).any()):
        site.fail(f"has a delay of {steps.min().item() * settings.dt}, expected delays >= 0")
    off = (steps - whole).abs()
    if bool((off > DELAY_TOLERANCE).any()):
        worst = steps.flatten()[off.argmax()].item()
        site.fail(
            f"delays by {worst * settings.dt:g}, which is {worst:g} steps of dt = {settings.dt:g}; expected a whole "
            "number of steps, so choose another dt"
        )
    return Delay(whole), site.shape


def _bias(site: Site, outputs: int) -> Tensor | None:
    if getattr(site.node, "bias", None) is None:
        return None
    bias = site.array("bias")
    if bias.shape != (outputs,):
        site.fail(f"has a bias of shape {tuple(bias.shape)}, expected ({outputs},)")
    return bias


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                layer.get_parameter(name).copy_(value)
    return layer


def _hint(got: Shape, expected: Shape) -> str:
    return "; a shape in NIR has no batch dimension, so leave it out of the Input" if got[1:] == expected else ""


Translation = Callable[[Site, Settings], tuple[nn.Module | None, Shape]]

# By the name of the NIR type: what makes a module, None where the value is only handed on, and the output's shape.
TRANSLATIONS: Mapping[str, Translation] = {
    "Affine": _linear,
    "AvgPool2d": _pooling,
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "CubaLI": _neuron(CubaLI, "tau_syn", "tau_mem", "r", "v_leak", "w_in"),
    "CubaLIF": _neuron(CubaLIF, "tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in", spikes=True),
    "Delay": _delay,
    "Flatten": _flatten,
    "I": _neuron(Integrator, "r"),
    "IF": _neuron(IF, "r", "v_threshold", "v_reset", spikes=True),
    "Input": _input,
    "LI": _neuron(LI, "tau", "r", "v_leak"),
    "LIF": _neuron(LIF, "tau", "r", "v_leak", "v_threshold", "v_reset", spikes=True),
    "Linear": _linear,
    "Output": _output,
    "Scale": _scale,
    "SumPool2d": _pooling,
    "Threshold": _threshold,
}
