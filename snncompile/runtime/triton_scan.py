"""Kernels by Triton for tensors on CUDA: how the compiled function is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codegen import (
    GATHERED_DIMS,
    HALVES,
    TRITON_BLOCK,
    TRITON_OPERATIONS,
    StepFunction,
    StepGradient,
    TritonSource,
    as_on_cuda,
    emit_triton_scan,
    rounded_as_stored,
)
from .compiled_scan import Layout
from .triton_build import version
from .triton_launch import compiled, flat, launch
from .triton_reverse import TritonReverse

_NUMBERS_FOR_A_NUMBER = 4  # of a table while it is computed: intermediate results
_MOST_NEURONS = 2**31 - TRITON_BLOCK


@dataclass(frozen=True)
class TritonTarget:
    """Kernels by Triton.

    Attributes:
        arch: The compute capability of the GPU, such as 90; None: kernels are interpreted, on the CPU.
    """

    arch: int | None

    name = "triton"
    title = "Triton kernel"
    max_dims = GATHERED_DIMS

    @property
    def compiled_by(self) -> str:
        return f"Triton {version()} {'interpreted' if self.arch is None else f'for sm_{self.arch}'}"

    def operand_obstacle(self, values: Sequence[Any]) -> str:
        device = "cpu" if self.arch is None else "cuda"
        if torch.is_autocast_enabled(device):
            return "autocast chooses its dtypes"
        dtype = values[0].dtype if isinstance(values[0], Tensor) else None
        if dtype not in (torch.float32, *HALVES) or not all(_is_plain(value, dtype, device) for value in values):
            return f"its inputs and states are not all float32, or all float16, or bfloat16, on {device.upper()}"
        if values[0].numel() > _MOST_NEURONS:
            return f"it has more than {_MOST_NEURONS} neurons"
        return ""

    def obstacle(self, function: StepFunction) -> str:
        unknown = {instruction.operation for instruction in function.program} - TRITON_OPERATIONS
        return f"there is no Triton for {', '.join(sorted(unknown))}" if unknown else ""

    def as_stored(self, function: StepFunction) -> StepFunction:
        return rounded_as_stored(function, on_cuda=self.arch is not None)

    def build(self, function: StepFunction, gathered: frozenset[int]) -> TritonScan:
        if self.arch is not None:
            function = as_on_cuda(function)
        scan = TritonScan(function, gathered, emit_triton_scan(function, gathered), self.arch)
        if self.arch is not None and function.dtype is torch.float32:  # else for the tensors that come
            compiled(scan.source, ("*fp32",) * scan.source.pointers, self.arch, torch.cuda.current_device())
        return scan

    def build_reverse(self, function: StepFunction, gradient: StepGradient) -> TritonReverse:
        return TritonReverse.build(function, gradient, self.arch)


def _is_plain(value: Any, dtype: torch.dtype | None, device: str) -> bool:
    return isinstance(value, Tensor) and value.dtype is dtype and value.device.type == device


@dataclass(frozen=True)
class TritonScan:
    """A step function as a Triton kernel; compiled for the types of its arguments when they are known.

    Attributes:
        function: The step function.
        gathered: The inputs that it lays out anew.
        source: The kernel.
        arch: See `TritonTarget`.
    """

    function: StepFunction
    gathered: frozenset[int]
    source: TritonSource
    arch: int | None

    def bind(self, size: int, layouts: Sequence[Layout | None], numbers: Sequence[float]) -> _TritonCall:
        return _TritonCall(self, size, layouts, numbers)

    def reserve(self, like: Tensor) -> list[Tensor]:
        tables = []
        for table in self.function.tables:
            if table.is_computed:
                tables.append(like.new_empty(table.shape, dtype=torch.float32))
                like.new_empty((_NUMBERS_FOR_A_NUMBER, *table.shape), dtype=torch.float32)
        return tables


class _TritonCall:
    """See `ScanCall`."""

    def __init__(self, scan: TritonScan, size: int, layouts: Sequence[Layout | None], numbers: Sequence[float]) -> None:
        self._scan = scan
        self._size = size
        function = scan.function
        arguments = [[] if layout is None else flat(layout) for layout in layouts]
        self._layouts = arguments[: function.inputs]
        self._tables: list[Any] = []
        for table, layout in zip(function.tables, arguments[function.inputs :], strict=True):
            value = table.value().detach()
            self._tables += [value.contiguous() if table.is_computed else value, *layout]
        self._numbers = [*numbers, *(number() for number in function.numbers[len(numbers) :])]

    def run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        outputs: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        read = [
            argument
            for value, stride, layout in zip(inputs, strides, self._layouts, strict=True)
            for argument in (value, stride, *layout)
        ]
        arguments = [steps, self._size, self._size, *read, *self._tables, *states, *outputs, *after, *self._numbers]
        launch(self._scan.source, self._scan.arch, self._size, arguments)
