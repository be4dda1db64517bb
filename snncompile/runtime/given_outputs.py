"""Memory of the caller's for what a call returns: `opt(x_seq, out=y)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ir import TensorType, extent
from ..torch_private import tree_flatten


def given_outputs(out: Any, types: Any, others: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a call's outputs are written to, checked.

    Args:
        out: What the caller gave.
        types: What a call returns, a `TensorType` in the place of each tensor.
        others: What the call reads; they must not lie where it writes.

    Raises:
        TypeError: `out` is not built as the outputs are.
        ValueError: A tensor of another shape, dtype or device; one with gaps; or one whose memory is taken.
    """
    expected, structure = tree_flatten(types)
    given, got = tree_flatten(out)
    if got != structure:
        raise TypeError(f"out must be built as what the network returns, {_built(types)}; got {_built(out)}")
    found: list[Tensor] = []
    for leaf, value in zip(expected, given, strict=True):
        if not isinstance(leaf, TensorType):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"out must hold a tensor for each output, got {type(value).__name__}")
        _check(value, leaf)
        if any(_overlap(value, other) for other in (*others, *found)):
            raise ValueError(
                "out shares memory with an input, a state, a parameter or another output, which would be read after "
                "it was overwritten; give it memory of its own"
            )
        found.append(value)
    return found


def _check(value: Tensor, leaf: TensorType) -> None:
    if (tuple(value.shape), value.dtype, value.device) != (leaf.shape, leaf.dtype, leaf.device):
        raise ValueError(
            f"out must be {list(leaf.shape)} of {leaf.dtype} on {leaf.device}, "
            f"got {list(value.shape)} of {value.dtype} on {value.device}"
        )
    if not value.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {value.stride()} of shape {list(value.shape)}")
    if value.requires_grad:
        raise ValueError("out must not require gradients: what is written into it is not recorded")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an address in common."""
    if one.device != other.device or not one.numel() or not other.numel():
        return False
    (a, b), (c, d) = _addresses(one), _addresses(other)
    return a < d and c < b


def _addresses(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _built(structure: Any) -> str:
    """A structure with its tensors named as such."""
    if isinstance(structure, dict):
        return "{" + ", ".join(f"{key!r}: {_built(value)}" for key, value in structure.items()) + "}"
    if isinstance(structure, (tuple, list)):
        inner = ", ".join(map(_built, structure))
        return f"[{inner}]" if isinstance(structure, list) else f"({inner})"
    return "a tensor" if isinstance(structure, (Tensor, TensorType)) else repr(structure)
