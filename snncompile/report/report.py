"""The report of one plan: segments, chunk lengths, predicted bytes, the front, and every decision with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..ir import Decision
from ..options import Options, render_bytes
from ..schedule import Schedule
from .front import FrontPoint, render_front
from .plot import DRAWN, draw_front
from .table import render_table, shortened


@dataclass(frozen=True)
class SegmentRow:
    """One line of the table.

    Attributes:
        number: Position in the schedule.
        chunk: Steps it runs at a time.
        nodes: What it runs.
        predicted_bytes: The most that is held while it runs; None where only the whole call is predicted.
        measured_seconds: Of all T steps, from `profile`.
        spikes_per_step: Node -> share of outputs that are not zero, from `profile`.
    """

    number: int
    chunk: int
    nodes: tuple[str, ...]
    predicted_bytes: int | None = None
    measured_seconds: float | None = None
    spikes_per_step: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a compile decided; `print` it.

    Attributes:
        options: What was asked for.
        inputs: Input types of the plan, as text.
        mode: "inference" or "training"; "" before planning.
        schedule: The loop nest; None before planning.
        predicted_peak_bytes: By the peak simulator; None before planning.
        segments: One row a segment.
        front: With schedule="auto": the schedules between the fastest and the leanest, fastest first.
        decisions: Every decision with its reason.
        pass_seconds: What planning took, pass by pass; "measuring" and "compiling" are the parts
            of them that went into costs and into kernels; what is found on disk takes little of either.
        measured_peak_bytes: From `profile`.
        measured_seconds: From `profile`: one call, the median of several.
    """

    options: Options
    inputs: tuple[str, ...] = ()
    mode: str = ""
    schedule: Schedule | None = None
    predicted_peak_bytes: int | None = None
    segments: tuple[SegmentRow, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    decisions: tuple[Decision, ...] = ()
    pass_seconds: tuple[tuple[str, float], ...] = ()
    measured_peak_bytes: int | None = None
    measured_seconds: float | None = None

    def of_whole_batch(self, options: Options, inputs: Sequence[str], parts: int, joined_bytes: int) -> Report:
        """What this report of one part of a batch says of the whole.

        Args:
            options: What was asked for.
            inputs: Input types of the whole batch.
            parts: How many parts of this size there are.
            joined_bytes: What the whole batch's outputs and states take beside the part that runs.
        """
        return replace(
            self,
            options=options,
            inputs=tuple(inputs),
            predicted_peak_bytes=_plus(self.predicted_peak_bytes, joined_bytes),
            segments=tuple(
                replace(row, predicted_bytes=_plus(row.predicted_bytes, joined_bytes)) for row in self.segments
            ),
            front=tuple(
                replace(point, seconds=parts * point.seconds, peak_bytes=point.peak_bytes + joined_bytes)
                for point in self.front
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        options = asdict(self.options)
        if isinstance(self.options.schedule, Schedule):
            options["schedule"] = self.options.schedule.to_dict()
        return {
            "options": options,
            "inputs": list(self.inputs),
            "mode": self.mode,
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "measured_seconds": self.measured_seconds,
            "segments": [
                {**asdict(row), "nodes": list(row.nodes), "spikes_per_step": dict(row.spikes_per_step)}
                for row in self.segments
            ],
            "front": [point.to_dict() for point in self.front],
            "decisions": [
                {"pass": d.pass_name, "node": d.node, "verdict": d.verdict.value, "reason": d.reason}
                for d in self.decisions
            ],
            "pass_seconds": dict(self.pass_seconds),
        }

    def save(self, path: str | Path) -> None:
        """Write JSON to a path ending in .json, the front as a picture to .png, .svg or .pdf, the text to any other.

        Raises:
            ImportError: A picture is asked for, and the package ``matplotlib`` is not installed.
            ValueError: A picture is asked for, and there is no front.
        """
        path = Path(path)
        if path.suffix in DRAWN:
            draw_front(self.front, self.options.memory_budget, path)
            return
        text = json.dumps(self.to_dict(), indent=2) + "\n" if path.suffix == ".json" else f"{self}\n"
        path.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.schedule is None:
            lines.append("not planned yet: call the module, or pass example_input to optimize()")
        else:
            lines += [*self._totals(), "", *render_table(*self._table())]
        if self.front:
            lines += ["", *render_front(self.front)]
        if self.decisions:
            lines += ["", "decisions", *(f"  {decision}" for decision in self.decisions)]
        return "\n".join(lines)

    def _headline(self) -> str:
        options = self.options
        budget = "no budget" if options.memory_budget is None else f"budget {render_bytes(options.memory_budget)}"
        static = ", static input" if options.static_input else ""
        return f"snncompile: T = {options.steps}, {budget}, readout {options.readout}{static}"

    def _totals(self) -> list[str]:
        assert self.schedule is not None
        peak = (
            "predicted peak unknown"
            if self.predicted_peak_bytes is None
            else (f"predicted peak {render_bytes(self.predicted_peak_bytes)} ({self.predicted_peak_bytes} bytes)")
        )
        lines = [f"{self.mode} on {', '.join(self.inputs)}, schedule {self.schedule.label}, {peak}"]
        if self.measured_peak_bytes is not None and self.measured_seconds is not None:
            lines.append(
                f"measured peak {render_bytes(self.measured_peak_bytes)} ({self.measured_peak_bytes} bytes), "
                f"measured time {self.measured_seconds * 1e3:.2f} ms"
            )
        return lines

    def _table(self) -> tuple[list[str], list[list[str]]]:
        measured = any(row.measured_seconds is not None for row in self.segments)
        header = ["segment", "chunk", "peak", *(["time", "spikes"] if measured else []), "nodes"]
        rows = []
        for row in self.segments:
            peak = "" if row.predicted_bytes is None else render_bytes(row.predicted_bytes)
            cells = [str(row.number), str(row.chunk), peak]
            if measured:
                rates = [rate for _, rate in row.spikes_per_step]
                cells.append("" if row.measured_seconds is None else f"{row.measured_seconds * 1e3:.2f} ms")
                cells.append(f"{100 * sum(rates) / len(rates):.1f} %" if rates else "")
            rows.append([*cells, shortened(row.nodes)])
        return header, rows


def _plus(known: int | None, more: int) -> int | None:
    return None if known is None else known + more
