"""The scan of a chunk backward by generated C++: how the compiled function is called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import REVERSE_BLOCK, StepFunction, StepGradient, emit_reverse
from ..torch_private import FakeTensor
from .cpp_build import build
from .ctypes_arrays import floats, longs, pointers

_PARALLEL_ELEMENTS = 16 * 1024  # below it, threads cost more than they save


@dataclass(frozen=True)
class CppReverse:
    """A compiled step gradient.

    Attributes:
        function: The step.
        gradient: Its gradient.
        reverse: The compiled function, by ctypes.
    """

    function: StepFunction
    gradient: StepGradient
    reverse: Any

    def run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        given: Sequence[Tensor | None],
        given_strides: Sequence[int],
        after: Sequence[Tensor | None],
        numbers: tuple[Sequence[float], Sequence[float]],
        of_inputs: Sequence[Tensor | None],
        of_input_strides: Sequence[int],
        of_states: Sequence[Tensor | None],
    ) -> Tensor:
        """See `CompiledReverse`."""
        size = states[0].numel() if states else inputs[0].numel()
        block = min(size, REVERSE_BLOCK)
        blocks = -(-size // block)
        parts = min(torch.get_num_threads(), blocks)
        sums = torch.empty((blocks, len(self.gradient.sums)), dtype=torch.float64)
        scratch = torch.empty(parts * (steps - 1) * len(states) * block)
        if isinstance(inputs[0], FakeTensor):
            return sums[0]
        self.reverse(
            ctypes.c_long(steps),
            ctypes.c_long(size),
            ctypes.c_long(block),
            ctypes.c_long(parts if steps * size >= _PARALLEL_ELEMENTS else 1),
            pointers(_addresses(inputs)),
            longs(strides),
            pointers(_addresses(states)),
            pointers(_addresses(given)),
            longs(given_strides),
            pointers(_addresses(after)),
            pointers(_addresses(of_inputs)),
            longs(of_input_strides),
            pointers(_addresses(of_states)),
            ctypes.c_void_p(sums.data_ptr()),
            ctypes.c_void_p(scratch.data_ptr()),
            *map(floats, numbers),
        )
        return sums[0]


def build_reverse(function: StepFunction, gradient: StepGradient) -> CppReverse:
    """Compile a step gradient, if nothing like it has been compiled yet.

    Raises:
        BuildError: It cannot be compiled here.
    """
    return CppReverse(function, gradient, _compiled(emit_reverse(function, gradient)))


@cache
def _compiled(source: str) -> Any:
    reverse = build(source).reverse
    reverse.restype = None
    return reverse


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
