"""How known operations act on a chunk of steps `[C, N, *]`; what is not listed runs one call a step.

The tables state facts about torch: which operations treat the leading dimension as a batch of independent rows, which
treat every element alone, and which arguments of the others are dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .autograd_call import AutogradCall
from .layout import KeepsStrides

FOLD_MODULES: Mapping[type[nn.Module], int] = {
    # Module class -> rank of one step's batched input; 0: any rank of at least 2.
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
    nn.MaxPool1d: 3,
    nn.MaxPool2d: 4,
    nn.MaxPool3d: 5,
    nn.AvgPool1d: 3,
    nn.AvgPool2d: 4,
    nn.AvgPool3d: 5,
    nn.AdaptiveAvgPool1d: 3,
    nn.AdaptiveAvgPool2d: 4,
    nn.AdaptiveAvgPool3d: 5,
    nn.AdaptiveMaxPool1d: 3,
    nn.AdaptiveMaxPool2d: 4,
    nn.AdaptiveMaxPool3d: 5,
    nn.LPPool1d: 3,
    nn.LPPool2d: 4,
    nn.BatchNorm1d: 0,
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
    nn.InstanceNorm1d: 3,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
    nn.GroupNorm: 0,
    nn.LocalResponseNorm: 0,
    nn.Linear: 0,
    nn.ZeroPad2d: 4,
    nn.ReflectionPad1d: 3,
    nn.ReflectionPad2d: 4,
    nn.ReplicationPad1d: 3,
    nn.ReplicationPad2d: 4,
    nn.ConstantPad1d: 3,
    nn.ConstantPad2d: 4,
    nn.Upsample: 0,
    nn.UpsamplingNearest2d: 4,
    nn.UpsamplingBilinear2d: 4,
    nn.PixelShuffle: 4,
    nn.PixelUnshuffle: 4,
    nn.PReLU: 0,
}

ELEMENTWISE_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Sigmoid,
        nn.Tanh,
        nn.Hardtanh,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Softplus,
        nn.Softsign,
        nn.LogSigmoid,
        nn.Tanhshrink,
        nn.Softshrink,
        nn.Hardshrink,
        nn.Threshold,
        nn.LayerNorm,  # normalises trailing dimensions only, so a leading one is free
        nn.Embedding,
        nn.Dropout,  # in train mode it is seen to draw random numbers and is not batched
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    }
)

_ELEMENTWISE_NAMES = """
    abs neg add sub rsub mul div true_divide floor_divide remainder fmod pow square sqrt rsqrt reciprocal exp exp2
    expm1 log log2 log10 log1p sin cos tan asin acos atan atan2 sinh cosh tanh erf erfc sigmoid relu relu6
    leaky_relu elu selu celu gelu silu mish hardtanh hardsigmoid hardswish softplus softsign logsigmoid softshrink
    hardshrink tanhshrink threshold clamp clamp_min clamp_max clip maximum minimum where lerp addcmul addcdiv sign
    sgn floor ceil round trunc frac heaviside logical_and logical_or logical_not logical_xor bitwise_and
    bitwise_or bitwise_xor bitwise_not eq ne lt le gt ge isnan isinf isfinite nan_to_num float double half
    bfloat16 bool int long detach clone contiguous masked_fill dropout dropout1d dropout2d dropout3d
""".split()  # noqa: SIM905

_OPERATORS = (
    "add sub mul truediv floordiv mod pow neg pos abs and_ or_ xor invert eq ne lt le gt ge".split()  # noqa: SIM905
)


def _functions(names: list[str], *homes: Any) -> dict[Any, str]:
    found = {}
    for name in names:
        for home in homes:
            function = getattr(home, name, None)
            if callable(function):
                found[function] = name
    return found


ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(_functions(_ELEMENTWISE_NAMES, torch, F)) | frozenset(
    getattr(operator, name) for name in _OPERATORS
)
ELEMENTWISE_METHODS: frozenset[str] = frozenset(_ELEMENTWISE_NAMES)

# Python's operators that write into their first operand -> those that do not.
IN_PLACE_OPERATORS: Mapping[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}

_NOT_EXACT_NAMES = "pow exp2 atan2 sinh cosh sigmoid elu selu celu gelu silu mish softplus".split()  # noqa: SIM905

# Elementwise, but their vectorised and their scalar kernels round differently, and where a tensor ends decides which of
# the two computes an element: over a chunk they do not give the bits of single steps.
ROUNDS_BY_POSITION: frozenset[Any] = frozenset(_functions(_NOT_EXACT_NAMES, torch, F)) | frozenset(
    {*_NOT_EXACT_NAMES, operator.pow, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus}
)
# Powers that torch computes by multiplication, division and square root.
EXACT_EXPONENTS = frozenset({-2, -1, 0, 0.5, 1, 2, 3})

FOLD_FUNCTIONS: Mapping[Any, int] = {
    # Function -> rank of one step's batched first argument; 0: any rank of at least 2. The other arguments are weights.
    F.conv1d: 3,
    F.conv2d: 4,
    F.conv3d: 5,
    F.conv_transpose1d: 3,
    F.conv_transpose2d: 4,
    F.conv_transpose3d: 5,
    F.linear: 0,
    F.batch_norm: 0,
    F.group_norm: 0,
    F.max_pool1d: 3,
    F.max_pool2d: 4,
    F.max_pool3d: 5,
    F.avg_pool1d: 3,
    F.avg_pool2d: 4,
    F.avg_pool3d: 5,
    F.adaptive_avg_pool1d: 3,
    F.adaptive_avg_pool2d: 4,
    F.adaptive_avg_pool3d: 5,
    F.adaptive_max_pool1d: 3,
    F.adaptive_max_pool2d: 4,
    F.interpolate: 0,
    F.prelu: 0,
    torch.max_pool2d: 4,
}


@dataclass(frozen=True)
class DimRule:
    """Which arguments of an operation are dimensions of its first tensor argument.

    Attributes:
        parameters: Names of all parameters after the first, in order.
        dims: Those that hold one dimension or several; a non-negative one moves by one.
        required: Dimensions that must be given: left out, the operation would also reduce over time.
        defaults: Dimensions whose default is not negative and therefore moves as well.
    """

    parameters: tuple[str, ...]
    dims: tuple[str, ...]
    required: bool = False
    defaults: tuple[tuple[str, int], ...] = ()


_REDUCTION = DimRule(("dim", "keepdim"), ("dim",), required=True)

DIM_RULES: Mapping[str, DimRule] = {
    "flatten": DimRule(("start_dim", "end_dim"), ("start_dim", "end_dim"), defaults=(("start_dim", 0),)),
    "unflatten": DimRule(("dim", "sizes"), ("dim",), required=True),
    "unsqueeze": DimRule(("dim",), ("dim",), required=True),
    "squeeze": DimRule(("dim",), ("dim",), required=True),
    "transpose": DimRule(("dim0", "dim1"), ("dim0", "dim1"), required=True),
    "swapaxes": DimRule(("axis0", "axis1"), ("axis0", "axis1"), required=True),
    "sum": _REDUCTION,
    "mean": _REDUCTION,
    "amax": _REDUCTION,
    "amin": _REDUCTION,
    "prod": _REDUCTION,
    "max": _REDUCTION,
    "min": _REDUCTION,
    "argmax": _REDUCTION,
    "argmin": _REDUCTION,
    "any": _REDUCTION,
    "all": _REDUCTION,
    "logsumexp": _REDUCTION,
    "softmax": DimRule(("dim",), ("dim",), required=True),
    "log_softmax": DimRule(("dim",), ("dim",), required=True),
    "cumsum": DimRule(("dim",), ("dim",), required=True),
    "chunk": DimRule(("chunks", "dim"), ("dim",), defaults=(("dim", 0),)),
    "split": DimRule(("split_size", "dim"), ("dim",), defaults=(("dim", 0),)),
    "narrow": DimRule(("dim", "start", "length"), ("dim",), required=True),
    "select": DimRule(("dim", "index"), ("dim",), required=True),
}

# Shapes and permutations are whole argument lists; concatenations take several tensors.
SHAPE_NAMES = frozenset({"view", "reshape", "permute", "expand"})
JOIN_NAMES = frozenset({"cat", "concat", "concatenate", "stack"})

_NAMED = _functions([*DIM_RULES, *SHAPE_NAMES, *JOIN_NAMES], torch, F)


def shift_name(target: Any) -> str | None:
    """The name under which the shift tables know a function or method, if they do."""
    name = target if isinstance(target, str) else _NAMED.get(target)
    return name if name in DIM_RULES or name in SHAPE_NAMES or name in JOIN_NAMES else None


def called_name(target: Any) -> str:
    """The name of a function, or of a method, which is its name already; empty for what has none."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def library_class(module: nn.Module) -> type[nn.Module] | None:
    """The torch class whose forward a module runs: its own class, or the one it inherits forward from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules"):
            return cls if getattr(type(module), "forward", None) is getattr(cls, "forward", None) else None
    return None


def is_known_pure(target: Callable[..., Any]) -> bool:
    """Whether a function keeps no state of its own: torch's, Python's operators, and autograd functions."""
    if isinstance(target, (AutogradCall, KeepsStrides)):
        return True
    module = getattr(target, "__module__", None) or ""
    return (
        module.split(".")[0] in {"torch", "_operator", "operator", "math", "builtins"}
        or target in ELEMENTWISE_FUNCTIONS
        or getattr(torch, getattr(target, "__name__", ""), None) is target
    )
