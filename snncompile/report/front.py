"""The time-memory front: what other schedules would have cost, beside the one that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..options import render_bytes
from ..schedule import Candidate, Schedule
from .table import render_table, shortened

_MOST_ROWS = 9


@dataclass(frozen=True)
class FrontPoint:
    """One schedule of the front: every other one is slower or needs more bytes.

    Attributes:
        seconds: Estimated, of all T steps.
        peak_bytes: Predicted.
        schedule: The loop nest.
        is_chosen: It is the plan's.
    """

    seconds: float
    peak_bytes: int
    schedule: Schedule
    is_chosen: bool

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk lengths of the segments in order, equal neighbours once."""
        return tuple(chunk for chunk, _ in groupby(chunk for chunk, _ in self.schedule.segments()))

    def to_dict(self) -> dict[str, Any]:
        """The point as plain data."""
        return {
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "schedule": self.schedule.to_dict(),
            "is_chosen": self.is_chosen,
        }


def front_of(candidates: Sequence[Candidate], chosen: Schedule) -> tuple[FrontPoint, ...]:
    """The points of what a search found, fastest first."""
    return tuple(
        FrontPoint(each.seconds, each.peak.peak_bytes, each.schedule, each.schedule is chosen) for each in candidates
    )


def render_front(points: Sequence[FrontPoint]) -> list[str]:
    """The front as lines of text: a table, and what the neighbours of the chosen point would cost."""
    at = next(number for number, point in enumerate(points) if point.is_chosen)
    shown = _around(at, len(points))
    rows = [
        [
            "*" if points[number].is_chosen else "",
            f"{points[number].seconds * 1e3:.2f} ms",
            render_bytes(points[number].peak_bytes),
            shortened([str(chunk) for chunk in points[number].chunks]),
        ]
        for number in shown
    ]
    hidden = f", {len(shown)} of {len(points)} points" if len(shown) < len(points) else ""
    return [
        f"time-memory front{hidden} (* chosen; time is estimated, peak predicted)",
        *render_table(["", "time", "peak", "chunks"], rows),
        _next("faster", points[at], points[at - 1] if at else None),
        _next("leaner", points[at], points[at + 1] if at + 1 < len(points) else None),
    ]


def _around(at: int, count: int) -> list[int]:
    """Positions to show: both ends, and what is nearest to the chosen point."""
    nearest = sorted({*range(1, count - 1)} - {at}, key=lambda number: (abs(number - at), number))
    return sorted({0, count - 1, at, *nearest[: _MOST_ROWS - 3]})


def _next(what: str, chosen: FrontPoint, other: FrontPoint | None) -> str:
    """What the next point in one direction would cost or save."""
    if other is None:
        return f"next {what}: none, this is the {what[:-1]}st"
    milliseconds = (other.seconds - chosen.seconds) * 1e3
    size = other.peak_bytes - chosen.peak_bytes
    return (
        f"next {what}: {abs(milliseconds):.2f} ms {'more' if milliseconds > 0 else 'less'}, "
        f"{render_bytes(abs(size))} {'more' if size > 0 else 'less'}"
    )
