"""Draws the time-memory front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .front import FrontPoint

DRAWN = (".png", ".svg", ".pdf")


def draw_front(points: Sequence[FrontPoint], budget_bytes: int | None, path: Path) -> None:
    """Draw estimated time over predicted peak, the chosen point and the budget, into a file.

    Args:
        points: Fastest first.
        budget_bytes: The limit that the plan keeps, if it has one.
        path: Ends in one of `DRAWN`.

    Raises:
        ImportError: The package ``matplotlib`` is not installed.
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("there is no time-memory front to draw; planning searches for one with schedule='auto'")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing the front needs the package matplotlib; install it with pip install matplotlib, "
            "or save the report as .txt or .json"
        ) from error
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes, times = [point.peak_bytes / 2**20 for point in points], [point.seconds * 1e3 for point in points]
    axes.step(sizes, times, where="pre", marker="o", color="tab:blue", label="front")
    for point, size, seconds in zip(points, sizes, times, strict=True):
        if point.is_chosen:
            axes.plot([size], [seconds], "o", color="tab:red", markersize=10, label="chosen")
    if budget_bytes is not None:
        axes.axvline(budget_bytes / 2**20, color="gray", linestyle="--", label="memory_budget")
    axes.set_xscale("log")
    axes.set_xlabel("predicted peak [MiB]")
    axes.set_ylabel("estimated time [ms]")
    axes.legend()
    figure.savefig(path)
