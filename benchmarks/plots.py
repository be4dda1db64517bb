"""Results as pictures: time against peak for each workload; time and peak against T."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .records import CaseResult, Results, Row

MIB = 2**20
MARKERS = "osD^v<>PX*phH8d"
OURS = "C3"
PEERS = ("C0", "C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9", "k")


def write_plots(results: Results, folder: Path) -> list[Path]:
    """PNG files, one for each workload and each curve; none where matplotlib (extra `plot`) is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    written = []
    for case in results.cases:
        if len(_placed(case)) > 1:
            written.append(_pareto(case, folder / f"pareto-{_slug(case.name)}.png"))
    curves: dict[str, list[CaseResult]] = defaultdict(list)
    for case in results.cases:
        if case.measured():
            curves[case.curve].append(case)
    for name, cases in curves.items():
        if len(cases) > 1:
            ordered = sorted(cases, key=lambda case: case.steps)
            written.append(_over_steps(name, ordered, folder / f"steps-{_slug(name)}.png"))
    return written


def _placed(case: CaseResult) -> list[Row]:
    """Rows that have a time and bytes."""
    return [row for row in case.measured() if row.status == "ok" and row.peak_bytes]


def _pareto(case: CaseResult, path: Path) -> Path:
    """One point for each system; the line joins those that nothing beats in both time and bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    rows = _placed(case)
    for row, style in zip(rows, styles(rows), strict=True):
        low, high = row.quartiles
        axes.errorbar(
            [row.median * 1e3],
            [(row.peak_bytes or 0) / MIB],
            xerr=[[(row.median - low) * 1e3], [(high - row.median) * 1e3]],
            **style,
            linestyle="none",
        )
    front = pareto_front([(row.median * 1e3, (row.peak_bytes or 0) / MIB) for row in rows])
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color="grey", linewidth=0.8, zorder=0)
    axes.set(title=case.name, xlabel="median time, ms", ylabel="measured peak, MiB", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    return _save(figure, path)


def styles(rows: list[Row]) -> list[dict[str, Any]]:
    """A marker and a colour for each system: ours are red, hollow where they are not the defaults."""
    markers, colours = itertools.cycle(MARKERS), itertools.cycle(PEERS)
    return [
        {
            "label": row.label,
            "marker": next(markers),
            "color": OURS if row.is_ours else next(colours),
            "fillstyle": "none" if row.is_ours and row.system != "snncompile" else "full",
        }
        for row in rows
    ]


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _over_steps(name: str, cases: list[CaseResult], path: Path) -> Path:
    """Two pictures side by side: time against T, peak against T, a line for each system."""
    from matplotlib import pyplot

    figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(11.0, 4.5), layout="constrained")
    labels = {row.system: row for case in cases for row in case.measured() if row.status == "ok"}
    for system, style in zip(labels, styles(list(labels.values())), strict=True):
        rows = [(case.steps, row) for case in cases for row in case.measured() if row.system == system]
        times.plot([steps for steps, _ in rows], [row.median for _, row in rows], **style)
        sized = [(steps, row.peak_bytes / MIB) for steps, row in rows if row.peak_bytes]
        peaks.plot([steps for steps, _ in sized], [size for _, size in sized], **style)
    times.set(title=f"{name}: time", xlabel="T", ylabel="median time, s", xscale="log", yscale="log")
    peaks.set(title=f"{name}: peak", xlabel="T", ylabel="measured peak, MiB", xscale="log", yscale="log")
    times.legend(fontsize="small")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
