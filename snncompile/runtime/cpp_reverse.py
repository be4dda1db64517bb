"""The scan of a chunk backward by generated C++: how the compiled function is called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import REVERSE_BLOCK, StepFunction, StepGradient, Totals, emit_reverse
from ..torch_private import FakeTensor
from .compiled_scan import ReverseOperands, ReverseResults
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

    def run(self, steps: int, operands: ReverseOperands, results: ReverseResults) -> Totals:
        """See `CompiledReverse`."""
        size = operands.like.numel()
        block = min(size, REVERSE_BLOCK)
        blocks = -(-size // block)
        parts = min(torch.get_num_threads(), blocks)
        sums = torch.empty((blocks, len(self.gradient.sums)), dtype=torch.float64)
        of_neurons = [torch.empty_like(operands.like) for _ in self.gradient.neuron_sums]
        scratch = torch.empty(parts * (steps - 1) * len(operands.states) * block)
        totals = Totals(sums[0], of_neurons)
        if isinstance(operands.like, FakeTensor):
            return totals
        layouts = [longs(layout.flat) for _, layout in operands.tables]
        self.reverse(
            ctypes.c_long(steps),
            ctypes.c_long(size),
            ctypes.c_long(block),
            ctypes.c_long(parts if steps * size >= _PARALLEL_ELEMENTS else 1),
            pointers(_addresses(operands.inputs)),
            longs(operands.strides),
            pointers(_addresses(operands.states)),
            pointers(_addresses(operands.given)),
            longs(operands.given_strides),
            pointers(_addresses(operands.after)),
            pointers(_addresses(results.of_inputs)),
            longs(results.strides),
            pointers(_addresses(results.of_states)),
            ctypes.c_void_p(sums.data_ptr()),
            pointers(_addresses(of_neurons)),
            pointers(_addresses([table for table, _ in operands.tables])),
            pointers([*map(ctypes.addressof, layouts)]),
            ctypes.c_void_p(scratch.data_ptr()),
            *map(floats, operands.numbers),
        )
        return totals


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
