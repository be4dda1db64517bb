"""Kernels as an operator of torch's, `snncompile::scan`, for what writes programs down: `torch.export`, `make_fx`.

The operator is given all there is to say of a kernel: the text of its step, and its numbers and tables as they were
when the program was written down. So a program that was saved runs wherever snncompile is imported; the kernel is
built, or found on disk, at its first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen import Still, parse_step
from ..errors import SnnCompileError
from ..ir import chunk_like, is_dense
from ..torch_private import no_modes
from .bound_scan import BoundScan, Kernel, ScanCalls, is_walked_as, laid_out_as
from .compiled_scan import KernelTarget
from .targets import NoTarget, find_target

_SCHEMA = (
    "(str step, Tensor[] inputs, Tensor[] states, Tensor[] tables, float[] numbers, bool[] still, int steps, "
    "bool is_chunk) -> Tensor[]"
)


class TracedScan(ScanCalls):
    """A kernel as a call of the operator; its numbers and tables are those of now.

    Args:
        kernel: The kernel.
        inputs: A step `[N, *]` of each input.
    """

    def __init__(self, kernel: Kernel, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self._step = str(kernel.function)
        # They are made of parameters as they are, not of what stands for these in the program.
        with no_modes(), torch.no_grad():
            self._numbers = [number() for number in kernel.function.numbers]
            self._tables = [table.value().detach().clone() for table in kernel.function.tables]

    def _run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        still: tuple[bool, ...],
        *,
        is_chunk: bool,
        into: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        results = _scan(
            self._step, list(inputs), list(states), self._tables, self._numbers, list(still), steps, is_chunk
        )
        outputs, after = tuple(results[: -len(states) or None]), tuple(results[len(results) - len(states) :])
        return (outputs if into is None else (into.copy_(outputs[0]),)), after


def _scan_eagerly(
    step: str,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    numbers: Sequence[float],
    still: Sequence[bool],
    steps: int,
    is_chunk: bool,
) -> list[Tensor]:
    """A chunk of steps of a kernel.

    Args:
        step: Text of its step.
        inputs: `[C, N, *]`, or `[N, *]` where they are the same at every step or there is no chunk.
        states: `[N, *]` before the first step.
        tables, numbers: Of the step.
        still: For each input, whether it is the same at every step.
        steps: C.
        is_chunk: Values have a dimension for time.

    Returns:
        Outputs `[C, N, *]`, or `[N, *]`, and the states after the last step.

    Raises:
        SnnCompileError: There are no kernels for the device, or this machine cannot build them.
    """
    target = find_target("auto", [inputs[0].device])
    if isinstance(target, NoTarget):
        raise SnnCompileError(f"a program exported from snncompile needs kernels: {target.reason}")
    moves = [is_chunk and not same for same in still]
    given = [_dense(value, has_time) for value, has_time in zip(inputs, moves, strict=True)]
    first = [_first(value, has_time) for value, has_time in zip(given, moves, strict=True)]
    before = [laid_out_as(first[0], state) for state in states]
    gathered = frozenset(number for number, value in enumerate(first) if not is_walked_as(value, first[0]))
    function = parse_step(step, len(inputs), len(states), numbers, tables)
    shapes = tuple(table.shape for table in function.tables)
    built = _built(target, step, len(inputs), len(states), len(numbers), shapes, gathered)
    bound = BoundScan(Kernel(function, gathered, replace(built, function=function)), first)
    if is_chunk:
        chunks = [Still(value) if same else value for value, same in zip(given, still, strict=True)]
        outputs, after = bound.scan(steps, chunks, before)
    else:
        outputs, after = bound.step(given, before)
    return [*outputs, *after]


@cache
def _built(
    target: KernelTarget,
    step: str,
    inputs: int,
    states: int,
    numbers: int,
    tables: tuple[tuple[int, ...], ...],
    gathered: frozenset[int],
) -> Any:
    """The kernel of a step with so many operands, and tables of these shapes."""
    function = parse_step(step, inputs, states, [0.0] * numbers, [torch.empty(shape) for shape in tables])
    return target.build(function, gathered)


def _first(value: Tensor, has_time: bool) -> Tensor:
    return value[0] if has_time else value


def _dense(value: Tensor, has_time: bool) -> Tensor:
    """An input as a kernel walks it."""
    step = _first(value, has_time)
    return value if is_dense(step.shape, step.stride()) else value.contiguous()


def _scan_without_data(
    step: str,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    numbers: Sequence[float],
    still: Sequence[bool],
    steps: int,
    is_chunk: bool,
) -> list[Tensor]:
    """The same memory, without what is in it."""
    like = _first(_dense(inputs[0], is_chunk and not still[0]), is_chunk and not still[0])
    outputs = parse_step(step, len(inputs), len(states)).outputs
    made = [chunk_like(like, steps) if is_chunk else chunk_like(like, 1)[0] for _ in outputs]
    return [*made, *(chunk_like(like, 1)[0] for _ in states)]


_scan: Any = torch.library.custom_op("snncompile::scan", _scan_eagerly, mutates_args=(), schema=_SCHEMA)
_scan.register_fake(_scan_without_data)
