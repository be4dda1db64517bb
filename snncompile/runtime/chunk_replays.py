"""Replays what one chunk of steps launches, instead of launching it operation by operation: a CUDA graph of its body.

Where chunks are short, a GPU waits for the operations to be launched. A call runs its first chunk as usual, records the
second, and replays that for it and each further one. Recorded anew in every call, it reads the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..codegen import Collector, SequenceReadout, SumReadout
from ..torch_private import storage_key

FEWEST_CHUNKS = 8  # recording takes about as long as running a chunk


class Recorder(Protocol):
    """Records what operations do, to do it again on the same memory."""

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What does again what the body does, and what the body returns: memory that each replay writes anew."""


class CudaRecorder:
    """CUDA graphs. Recording runs nothing.

    Each graph takes the memory of the one before, which is kept until then, reserved but not allocated: freed with it,
    it would go back to the driver.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._latest: tuple[Any, Any] | None = None  # a graph, and the stream that it runs on

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(self._device):
            graph, current, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _stream_to_record(self._device)
            shared = {}
            if self._latest is not None:
                shared["pool"] = self._latest[0].pool()
                current.wait_stream(self._latest[1])  # the same memory, which may still be in use there
            own.wait_stream(current)
            # Not by `torch.cuda.graph`, which empties caches and collects garbage each time.
            with torch.cuda.stream(own):
                graph.capture_begin(**shared, capture_error_mode="thread_local")
                try:
                    result = body()
                finally:
                    graph.capture_end()
            current.wait_stream(own)
            self._latest = graph, current
        return graph.replay, result


@cache
def _stream_to_record(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU: libraries keep a workspace for each stream that they have run on."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)  # takes the workspace, which would be a graph's if it were taken while that is recorded
    return stream


@dataclass(frozen=True)
class ChunkReplays:
    """Runs T steps in the chunks of the outermost loop, most of them by a replay.

    Attributes:
        steps: T.
        chunk: Steps of a chunk; there are at least three whole ones.
        is_static: Inputs are those of every step.
        run_chunk: The emitted loop nest for one chunk.
        run_rest: The same for the steps that make no whole chunk; None if there are none.
        recorder: Records a chunk.
    """

    steps: int
    chunk: int
    is_static: bool
    run_chunk: Callable[..., None]
    run_rest: Callable[..., None] | None
    recorder: Recorder

    def run(self, *given: Any) -> None:
        """As the emitted `run(inputs..., net, const, state, out)` of all steps."""
        *inputs, modules, constants, slots, collectors = given

        def part(begin: int, end: int) -> list[Tensor]:
            return inputs if self.is_static else [x[begin:end] for x in inputs]

        def run(by: Callable[..., None], begin: int, end: int) -> None:
            by(*part(begin, end), modules, constants, slots, [_From(each, begin) for each in collectors])

        run(self.run_chunk, 0, self.chunk)
        whole = self.steps // self.chunk * self.chunk
        held = {name: tuple(map(_copied, slot.states)) for name, slot in slots.items()}
        given_chunk = inputs if self.is_static else [x.clone() for x in part(0, self.chunk)]

        def body() -> list[Tensor | None]:
            for name, slot in slots.items():
                slot.states = held[name]
            # Sums go on in their own memory; steps go from memory of the chunk to where they belong.
            staged = [each if isinstance(each, SumReadout) else SequenceReadout(self.chunk) for each in collectors]
            self.run_chunk(*given_chunk, modules, constants, slots, [_From(each, 0) for each in staged])
            _put_back(held, {name: slot.states for name, slot in slots.items()})
            return [None if isinstance(each, SumReadout) else each.take() for each in staged]

        replay, values = self.recorder.record(body)
        for begin in range(self.chunk, whole, self.chunk):
            if not self.is_static:
                for room, x in zip(given_chunk, part(begin, begin + self.chunk), strict=True):
                    room.copy_(x)
            replay()
            for collector, value in zip(collectors, values, strict=True):
                if value is not None:
                    collector.put(begin, value)
        for name, slot in slots.items():
            slot.states = held[name]
        if self.run_rest is not None:
            run(self.run_rest, whole, self.steps)


class _From:
    """A collector for the steps of a chunk, numbered from its first one."""

    def __init__(self, collector: Collector, begin: int) -> None:
        self._collector: Any = collector
        self._begin = begin

    def put(self, offset: int, chunk: Tensor) -> None:
        self._collector.put(self._begin + offset, chunk)

    def put_own(self, offset: int, chunk: Tensor) -> None:
        self._collector.put_own(self._begin + offset, chunk)

    def put_step(self, offset: int, step: Tensor) -> None:
        self._collector.put_step(self._begin + offset, step)

    def room(self, offset: int, length: int, like: Tensor) -> Any:
        return self._collector.room(self._begin + offset, length, like)


def _copied(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a state is {value!r}, and no tensor")
    return value.clone()


def _put_back(held: dict[str, tuple[Tensor, ...]], after: dict[str, Sequence[Tensor]]) -> None:
    """Write states to where the next replay finds them; those that changed places are copied first."""
    places = {storage_key(value) for values in held.values() for value in values}
    found = {name: [_moved(value, places) for value in values] for name, values in after.items()}
    for name, values in held.items():
        for place, value in zip(values, found[name], strict=True):
            place.copy_(value)


def _moved(value: Tensor, places: set[Any]) -> Tensor:
    return value.clone() if storage_key(value) in places else value
