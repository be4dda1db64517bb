"""Where each value lives: the one analysis that both the emitted program and the peak simulator follow.

A value is produced in the innermost loop around its node. Readers inside that loop read it there: its *local*, one
chunk long. Readers outside read a *buffer* that belongs to the innermost loop around producer and readers, as long as
that loop's chunk, which the producer fills piece by piece. Both die after their last reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..ir import OpKind, StepGraph, refs_in
from .plan import Loop, Schedule

Path = tuple[int, ...]  # positions in nested loop bodies, from the root


@dataclass(frozen=True)
class Buffer:
    """A value gathered over the chunk of an outer loop."""

    name: str
    home: Path  # the loop whose chunk it spans


class Liveness:
    """Homes and deaths of all values under a schedule.

    Attributes:
        loop_of: Node -> path of the innermost loop around it.
        buffers: Node -> the buffer its value is gathered in, where it has one.
        output_slots: Node -> positions among the network's output tensors that its value feeds.
    """

    def __init__(self, graph: StepGraph, schedule: Schedule) -> None:
        self.graph = graph
        self.schedule = schedule
        self.loop_of: dict[str, Path] = {}
        self._segment_of: dict[str, Path] = {}
        self._index: dict[str, int] = {}
        self._walk(schedule.root, ())
        outside = {name: self._outside_readers(name) for name in self.loop_of}
        self.buffers: Mapping[str, Buffer] = {
            name: Buffer(name, self._common(name, readers)) for name, readers in outside.items() if readers
        }
        self.output_slots: dict[str, list[int]] = {}
        for slot, name in enumerate(output_names(graph)):
            self.output_slots.setdefault(name, []).append(slot)

    def _walk(self, loop: Loop, path: Path) -> None:
        for number, item in enumerate(loop.body):
            if isinstance(item, Loop):
                self._walk(item, (*path, number))
                continue
            for name in item.nodes:
                self.loop_of[name] = path
                self._segment_of[name] = (*path, number)
                self._index[name] = len(self._index)

    def readers(self, name: str) -> list[str]:
        """Scheduled nodes that read a value."""
        return [reader for reader in self.graph.consumers[name] if reader in self.loop_of]

    def _outside_readers(self, name: str) -> list[str]:
        home = self.loop_of[name]
        return [reader for reader in self.readers(name) if self.loop_of[reader][: len(home)] != home]

    def _common(self, name: str, readers: list[str]) -> Path:
        common = self.loop_of[name]
        for reader in readers:
            path = self.loop_of[reader]
            length = next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), None)
            common = common[: min(len(common), len(path)) if length is None else length]
        return common

    @cached_property
    def local_deaths(self) -> Mapping[tuple[str, ...] | Path, tuple[str, ...]]:
        """Program point -> locals that die there. A point is `(node,)`, or the path of an inner loop that ended."""
        deaths: dict[tuple[str, ...] | Path, list[str]] = {}
        for name, home in self.loop_of.items():
            if self.graph[name].kind is OpKind.STORE:
                continue  # yields nothing
            inside = [reader for reader in self.readers(name) if self.loop_of[reader][: len(home)] == home]
            deaths.setdefault(self._point(home, inside or [name]), []).append(name)
        return {point: tuple(names) for point, names in deaths.items()}

    @cached_property
    def buffer_deaths(self) -> Mapping[tuple[str, ...] | Path, tuple[str, ...]]:
        """Program point -> buffers that die there."""
        deaths: dict[tuple[str, ...] | Path, list[str]] = {}
        for name, buffer in self.buffers.items():
            deaths.setdefault(self._point(buffer.home, self._outside_readers(name)), []).append(name)
        return {point: tuple(names) for point, names in deaths.items()}

    def _point(self, home: Path, readers: list[str]) -> tuple[str, ...] | Path:
        """After the last reader, seen from a loop: after that node, or after the inner loop that holds it."""
        last = max(readers, key=self._index.__getitem__)
        if self.loop_of[last] == home:
            return (last,)
        return self.loop_of[last][: len(home) + 1]

    def source_home(self, name: str, reader: str) -> Path:
        """The loop whose chunk spans the tensor that a reader reads: the local's or the buffer's."""
        home = self.loop_of[name]
        return home if self.loop_of[reader][: len(home)] == home else self.buffers[name].home

    def is_filling(self, name: str, reader: str) -> bool:
        """Whether a reader of a buffer stands in the body item that fills it, and so finds only its own steps there."""
        item = len(self.buffers[name].home) + 1
        return self.loop_of[name][:item] == self.loop_of[reader][:item]

    def opened_in(self, path: Path, number: int) -> list[Buffer]:
        """Buffers that the body item `number` of the loop at `path` fills, and that belong to that loop."""
        inner = (*path, number)
        return [
            buffer
            for buffer in self.buffers.values()
            if buffer.home == path and self.loop_of[buffer.name][: len(inner)] == inner
        ]


def output_names(graph: StepGraph) -> tuple[str, ...]:
    """The nodes behind the tensors that a step returns, in order, repeats included."""
    return tuple(refs_in(graph.output.args))


def is_invariant_output(graph: StepGraph, name: str) -> bool:
    """Whether an output tensor is the same at every step, or an input passed through."""
    return graph[name].invariant or graph[name].kind is OpKind.INPUT
