"""Kernels by generated C++ for tensors on the CPU: how the compiled function is called."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import MAX_DIMS, StepFunction, StepGradient, Table, emit_scan
from .compiled_scan import Layout
from .cpp_build import build, version
from .cpp_reverse import CppReverse, build_reverse
from .ctypes_arrays import floats, longs, pointers

_NOT_FLOAT = "its inputs and states are not all float32 on the CPU"
_DOUBLES_FOR_A_NUMBER = 8  # of a table that is computed, and its intermediate results
_PARALLEL_ELEMENTS = 32 * 1024  # below it, threads cost more than they save


@dataclass(frozen=True)
class CppTarget:
    """Kernels by the machine's C++ compiler."""

    name = "cpp"
    title = "C++ kernel"
    max_dims = MAX_DIMS

    @property
    def compiled_by(self) -> str:
        return version()

    def operand_obstacle(self, values: Sequence[Any]) -> str:
        if torch.is_autocast_enabled("cpu"):
            return _NOT_FLOAT
        return "" if all(map(_is_plain, values)) else _NOT_FLOAT

    def obstacle(self, function: StepFunction) -> str:
        return ""

    def as_stored(self, function: StepFunction) -> StepFunction:
        return function  # of float32 only

    def build(self, function: StepFunction, gathered: frozenset[int]) -> CppScan:
        tables = range(function.inputs, function.read)
        return CppScan(function, _compiled(emit_scan(function, gathered.union(tables))))

    def build_reverse(self, function: StepFunction, gradient: StepGradient) -> CppReverse:
        return build_reverse(function, gradient)


def _is_plain(value: Any) -> bool:
    """Whether nothing asks for more than float32 numbers on the CPU."""
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.device.type == "cpu"


@cache
def _compiled(source: str) -> Any:
    scan = build(source).scan
    scan.restype = None
    return scan


@dataclass(frozen=True)
class CppScan:
    """A compiled step function.

    Attributes:
        function: The step function.
        scan: The compiled function, by ctypes.
    """

    function: StepFunction
    scan: Any

    def bind(self, size: int, layouts: Sequence[Layout | None], numbers: Sequence[float]) -> _CppCall:
        return _CppCall(self.scan, size, [_HeldTable(table) for table in self.function.tables], layouts, numbers)

    def reserve(self, like: Tensor) -> None:
        # What computing the largest table takes for a moment.
        computed = [math.prod(table.shape) for table in self.function.tables if table.is_computed]
        torch.empty(_DOUBLES_FOR_A_NUMBER * max(computed, default=0), dtype=torch.float64)


class _CppCall:
    """See `ScanCall`."""

    def __init__(
        self,
        scan: Any,
        size: int,
        tables: Sequence[_HeldTable],
        layouts: Sequence[Layout | None],
        numbers: Sequence[float],
    ) -> None:
        self._scan = scan
        self._size = size
        self._tables = tables
        arrays = [longs([] if layout is None else layout.flat) for layout in layouts]
        self._arrays = arrays  # kept alive: below are only their addresses
        self._layouts = pointers([*map(ctypes.addressof, arrays)])
        self._numbers = floats(numbers)

    def run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        outputs: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        self._scan(
            ctypes.c_long(steps),
            ctypes.c_long(self._size),
            pointers([*_addresses(inputs), *(table.address for table in self._tables)]),
            longs([*strides, *(0 for _ in self._tables)]),
            self._layouts,
            pointers(_addresses(states)),
            pointers(_addresses(outputs)),
            pointers(_addresses(after)),
            self._numbers,
            ctypes.c_int(torch.get_num_threads() if steps * self._size >= _PARALLEL_ELEMENTS else 1),
        )


class _HeldTable:
    """A table's numbers as they are in one call.

    What is computed is kept apart from torch's memory: it is a few numbers, as a kernel's other numbers are.

    Attributes:
        address: Where its numbers are.
    """

    def __init__(self, table: Table) -> None:
        value = table.value().detach()
        if table.is_computed:
            value = value.contiguous()
            held = (ctypes.c_float * value.numel())()
            ctypes.memmove(held, value.data_ptr(), value.nbytes)
            self._held: Any = held
            self.address = ctypes.addressof(held)
        else:
            self._held = value
            self.address = value.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
