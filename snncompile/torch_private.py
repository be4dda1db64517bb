"""Every private name of torch that snncompile touches; `tests/test_torch_private.py` notices when one moves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException as _UnsupportedFake
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "NEEDS_DATA",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TraceError",
    "addcmul_in_order",
    "fake_mode",
    "fake_twin",
    "is_traced",
    "is_traced_by_jit",
    "make_fx",
    "may_hook_saved_tensors",
    "no_modes",
    "not_compiled",
    "packed_convolution",
    "packed_weight",
    "packs_convolutions",
    "storage_key",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "writes_to",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What an operation on data-less tensors raises whose result depends on their values.
NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class TorchDispatchMode(_TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    disabled = logger.disabled
    logger.disabled = True  # a change of level would make every logger look its level up anew
    try:
        yield
    finally:
        logger.disabled = disabled


class _QuietFakeMode(FakeTensorMode):
    """Does not log a traceback for every operation that fails; the exception says it."""

    def __enter__(self) -> Any:
        quiet = _quiet(FakeTensorMode.__module__)
        quiet.__enter__()
        self.__dict__.setdefault("quiet", []).append(quiet)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.__dict__["quiet"].pop().__exit__(None, None, None)


def fake_mode() -> FakeTensorMode:
    """A mode in which operations compute shapes, strides and storage sizes but no values."""
    with _quiet("torch._library.triton"):  # the first mode imports it, and it warns where there is no Triton
        return _QuietFakeMode(allow_non_fake_inputs=True)


def fake_twin(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides, dtype and device without data."""
    try:
        return mode.from_tensor(tensor)
    except _UnsupportedFake:
        return tensor


def storage_key(tensor: Tensor) -> int:
    """Identity of the storage behind a tensor: equal for a tensor and its views."""
    storage: Any = tensor.untyped_storage()
    return int(storage._cdata)


def may_hook_saved_tensors() -> bool:
    """Whether hooks on what autograd saves are allowed; transforms such as `torch.func.grad` forbid them."""
    autograd: Any = torch._C._autograd
    return bool(autograd._saved_tensors_hooks_is_enabled())


def no_modes() -> Any:
    """A context in which no dispatch mode is active, so that real tensors can be computed inside a fake mode."""
    return _disable_current_modes()


def is_traced() -> bool:
    """Whether `torch.export`, `make_fx` or `torch.jit.trace` writes operations down for a program of its own."""
    return get_proxy_mode() is not None or torch.compiler.is_exporting() or is_traced_by_jit()


def is_traced_by_jit() -> bool:
    """Whether it is `torch.jit.trace` that does."""
    jit: Any = torch.jit
    return bool(jit.is_tracing())


def not_compiled(function: _Function) -> _Function:
    """A function that `torch.compile` calls as it is instead of looking into it."""
    disabled: Any = _disable_dynamo(function)  # imports the compiler when it is first called, not before
    return cast(_Function, disabled)


def addcmul_in_order(targets: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> None:
    """`target += first * second` one after the other, in one library call, for tensors on CPU.

    An operand may be an earlier target. (On CUDA all would be computed at the same time.)
    """
    torch._foreach_addcmul_(list(targets), list(firsts), list(seconds))


def packs_convolutions() -> bool:
    """Whether torch has what `packed_weight` and `packed_convolution` need."""
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled)


def packed_weight(
    weight: Tensor,
    input_shape: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The float32 weight of a 2d convolution in the form that oneDNN computes with for inputs of one shape.

    `torch.nn.functional.conv2d` brings the weight into this form anew at every call.
    """
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed: Tensor = pack(weight.to_mkldnn(), padding, stride, dilation, groups, list(input_shape))
    return packed


def packed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A 2d convolution of `[N, C, H, W]` float32 on the CPU by a packed weight; the result lies channels-last."""
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return result


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as that is counted: a tensor of inference mode does not count."""
    return 0 if tensor.is_inference() else int(tensor._version)
