"""Collectors of the network's output: the whole sequence, or a running sum, mean or last step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..ir import accumulation_dtype, contiguous_chunk, result_dtype
from ..options import Readout
from .kernels import Buffer, gather


class SequenceReadout(Buffer):
    """All steps, laid out as `torch.stack` lays them out; `[T, N, *]`.

    Args:
        length: T.
        into: Memory for them, of the caller's; None: they get their own.
    """

    def __init__(self, length: int, into: Tensor | None = None) -> None:
        super().__init__(length)
        self._whole = into

    def put_own(self, offset: int, chunk: Tensor) -> None:
        """A chunk whose memory nothing else holds."""
        self.put(offset, chunk)

    def room(self, offset: int, length: int, like: Tensor) -> Tensor | None:
        """Where the steps `[C, N, *]` from `offset` on go, to be written by who asks; None if they must be put.

        Args:
            offset: The first step.
            length: C.
            like: A step `[N, *]` of the same shape and dtype.
        """
        if self._whole is None:
            self._whole = contiguous_chunk(like, self._length)
        room: Tensor = self._whole[offset : offset + length]
        return room

    def _allocate(self, chunk: Any) -> Any:
        return contiguous_chunk(chunk[0], self._length)


class GradSequenceReadout:
    """As `SequenceReadout`, for recorded values: steps and chunks are kept and joined at the end.

    Single steps are stacked as the step loop stacks them, so that gradients are added up in its order.
    """

    def __init__(self, length: int) -> None:
        self._chunks: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._owns = False

    def put(self, offset: int, chunk: Tensor) -> None:
        self._join_steps()
        self._chunks.append(chunk)

    def put_own(self, offset: int, chunk: Tensor) -> None:
        """A chunk whose memory nothing else holds: of all steps, it is the sequence."""
        self._owns = chunk.is_contiguous()
        self.put(offset, chunk)

    def put_step(self, offset: int, step: Tensor) -> None:
        self._steps.append(step)

    def room(self, offset: int, length: int, like: Tensor) -> Tensor | None:
        """Recorded values are put."""
        return None

    def take(self) -> Tensor:
        if not self._chunks:
            return torch.stack(self._steps)
        self._join_steps()
        if self._owns and len(self._chunks) == 1:
            return self._chunks[0]
        return gather(self._chunks, contiguous_chunk)

    def _join_steps(self) -> None:
        if self._steps:
            self._chunks.append(torch.stack(self._steps))
            self._steps = []


class SumReadout:
    """Adds the steps one after the other, in order, whatever the schedule; `[N, *]`.

    As torch's sum does, it adds half-precision floats in float32, and integers and booleans in int64.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._sum: Tensor | None = None
        self._dtype = torch.float32

    def follow(self, earlier: SumReadout) -> None:
        """Go on where the readout of the call before has ended: to the bit what one call over all steps adds up."""
        self._length += earlier._length
        self._sum, self._dtype = earlier._sum, earlier._dtype

    def put(self, offset: int, chunk: Tensor) -> None:
        for step in chunk.unbind(0):
            self.put_step(offset, step)

    def put_step(self, offset: int, step: Tensor) -> None:
        if self._sum is None:
            self._dtype = result_dtype(step.dtype)
            self._sum = step.to(accumulation_dtype(step.dtype), copy=True)
        elif torch.is_grad_enabled():
            self._sum = self._sum + step
        else:
            self._sum += step

    def take(self) -> Tensor:
        assert self._sum is not None
        return self._sum.to(self._dtype)


class MeanReadout(SumReadout):
    """The sum divided by T."""

    def take(self) -> Tensor:
        assert self._sum is not None
        # In place where nothing was recorded: a second [N, *] would count against the budget.
        in_place = self._sum.is_floating_point() and not torch.is_grad_enabled()
        mean = self._sum.div_(self._length) if in_place else self._sum / self._length
        return mean.to(self._dtype) if mean.is_floating_point() and self._dtype.is_floating_point else mean


class LastReadout:
    """The last step alone."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._last: Tensor | None = None

    def put(self, offset: int, chunk: Tensor) -> None:
        if offset + chunk.shape[0] == self._length:
            self.put_step(self._length - 1, chunk[-1])

    def put_step(self, offset: int, step: Tensor) -> None:
        if offset + 1 == self._length:
            # Recorded steps are copied at the end, so that gradients are added up in the step loop's order.
            self._last = step if torch.is_grad_enabled() else step.clone()

    def take(self) -> Tensor:
        assert self._last is not None
        return self._last.clone() if torch.is_grad_enabled() else self._last


class WholeReadout:
    """A value that has no time: one for the whole sequence."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def put(self, offset: int, value: Tensor) -> None:
        self._value = value if torch.is_grad_enabled() else value.clone()

    def put_step(self, offset: int, value: Tensor) -> None:
        self.put(offset, value)

    def take(self) -> Tensor:
        assert self._value is not None
        return self._value


Sequences = SequenceReadout | GradSequenceReadout
Collector = WholeReadout | SequenceReadout | GradSequenceReadout | SumReadout | LastReadout


def make_collector(
    readout: Readout | Literal["whole"], length: int, *, needs_grad: bool, into: Tensor | None = None
) -> Collector:
    """The collector of one output tensor over T steps; "whole" for one without time.

    Args:
        readout, length: What is read out of how many steps.
        needs_grad: Values are recorded for backward.
        into: Memory that a sequence without gradients is collected in.
    """
    if readout == "whole":
        return WholeReadout()
    if readout == "sequence":
        return GradSequenceReadout(length) if needs_grad else SequenceReadout(length, into)
    if readout == "last":
        return LastReadout(length)
    return SumReadout(length) if readout == "sum" else MeanReadout(length)
