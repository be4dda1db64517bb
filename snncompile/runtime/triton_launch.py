"""Runs generated Triton kernels: on the GPU of their tensors, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import GATHERED_DIMS, TRITON_BLOCK, TritonSource
from .compiled_scan import Layout
from .triton_build import compile_kernel, interpreted_kernel

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launch(source: TritonSource, arch: int | None, size: int, arguments: Sequence[Any]) -> None:
    """Run a kernel.

    Args:
        source: The kernel.
        arch: The compute capability of the GPU; None: it is interpreted, on the CPU.
        size: How many neurons there are.
        arguments: Of the kernel, tensors for its pointers.

    Raises:
        BuildError: It cannot be compiled for tensors of these dtypes.
    """
    grid = (-(-size // TRITON_BLOCK), 1, 1)
    if arch is None:
        interpreted_kernel(source.text)[grid](*arguments)
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.cuda.device(tensors[0].device):
        kernel = compiled(source, tuple(_TYPES[tensor.dtype] for tensor in tensors), arch, torch.cuda.current_device())
        kernel[grid](*arguments)


def flat(layout: Layout) -> list[int]:
    """Sizes and strides as a kernel takes them, with dimensions of size 1 before those that there are."""
    absent = GATHERED_DIMS - len(layout.sizes)
    return [*[1] * absent, *layout.sizes, *[0] * absent, *layout.strides]


@cache
def compiled(source: TritonSource, types: tuple[str, ...], arch: int, device: int) -> Any:
    """A kernel for pointers of these types, as Triton writes types.

    One for each device: Triton loads it into the device on which it runs first.

    Raises:
        BuildError: It cannot be compiled.
    """
    pointers = iter(types)
    signature = [(name, next(pointers) if kind == "pointer" else kind) for name, kind in source.parameters]
    return compile_kernel(source.text, signature, arch)
