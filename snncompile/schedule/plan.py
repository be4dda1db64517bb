"""A schedule: a loop nest over time. Depth-first is one loop of chunk 1, breadth-first one of chunk T."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Segment:
    """Connected nodes that run one after the other, each over the whole chunk of the loop around them."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """Runs its body for `chunk` steps at a time until the steps given to it are done; the last chunk may be shorter."""

    chunk: int
    body: tuple[Segment | Loop, ...]


@dataclass(frozen=True)
class Schedule:
    """A whole plan.

    Attributes:
        steps: Number of time steps T.
        root: The outermost loop.
        label: What the user asked for, or how it was found.
    """

    steps: int
    root: Loop
    label: str = "custom"

    def segments(self) -> Iterator[tuple[int, Segment]]:
        """Each segment with the chunk length it runs at, in order."""
        yield from _segments(self.root)

    def loops(self) -> Iterator[Loop]:
        """Every loop, outermost first."""
        yield from _loops(self.root)

    def __str__(self) -> str:
        return "\n".join([f"schedule {self.label}, T = {self.steps}", *_lines(self.root, 1)])

    def to_dict(self) -> dict[str, Any]:
        return {"label": self.label, "steps": self.steps, "root": _plain(self.root)}


def _segments(loop: Loop) -> Iterator[tuple[int, Segment]]:
    for item in loop.body:
        if isinstance(item, Segment):
            yield loop.chunk, item
        else:
            yield from _segments(item)


def _loops(loop: Loop) -> Iterator[Loop]:
    yield loop
    for item in loop.body:
        if isinstance(item, Loop):
            yield from _loops(item)


def _lines(loop: Loop, depth: int) -> list[str]:
    lines = [f"{'  ' * depth}loop {loop.chunk}:"]
    for item in loop.body:
        if isinstance(item, Segment):
            lines.append(f"{'  ' * (depth + 1)}{', '.join(item.nodes)}")
        else:
            lines += _lines(item, depth + 1)
    return lines


def _plain(item: Segment | Loop) -> dict[str, Any]:
    if isinstance(item, Segment):
        return {"nodes": list(item.nodes)}
    return {"chunk": item.chunk, "body": [_plain(inner) for inner in item.body]}
