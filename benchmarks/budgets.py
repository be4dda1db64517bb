"""Whether the schedule chosen under a budget is as fast as the best uniform chunk that fits into it.

    python -m benchmarks.budgets --output DIR

From the smallest feasible budget to none, on a network converted from an ANN: "auto" beside every uniform chunk length,
in one process and taking turns, the fastest call of each counted; a line is printed only of schedules that give the
step loop's results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snncompile
from snncompile import Loop, Schedule
from snncompile.errors import InfeasibleBudgetError

from .case import Case, make_case, potentials
from .findings import report
from .outcome import Outcome, compare
from .table import markdown
from .workloads import Converted

POINTS = 8
ROUNDS = 7
LEVEL = 0.05  # "auto" may be slower by this share


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        budget: Bytes; None without one.
        peak: Bytes that "auto" was predicted to hold.
        seconds: Of "auto", the fastest of its calls.
        uniform_chunk, uniform_seconds: The fastest uniform chunk that fits.
        schedule: Which "auto" chose, as text.
    """

    budget: int | None
    peak: int
    seconds: float
    uniform_chunk: int
    uniform_seconds: float
    schedule: str = ""

    @property
    def ratio(self) -> float:
        return self.uniform_seconds / self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    workload = Converted(arguments.steps, arguments.batch, arguments.network, arguments.width)
    points = measure(workload, arguments.rounds)
    name = "budgets-" + "-".join(workload.name.replace("=", "-").split())
    report(workload.name, table(points), [asdict(point) for point in points], arguments.output, name)
    return 0 if all(point.ratio >= 1.0 - LEVEL for point in points) else 1


def measure(workload: Converted, rounds: int) -> list[Point]:
    """Every budget's schedule beside every uniform chunk.

    Raises:
        RuntimeError: A schedule departs from the step loop.
    """
    case = make_case(workload, torch.device("cpu"))

    def optimized(**options: Any) -> snncompile.OptimizedModule:
        return snncompile.optimize(
            case.network, workload.steps, example_input=case.inputs, static_input=True, readout="sum", **options
        )

    with torch.no_grad():
        try:
            smallest = optimized(memory_budget=1).report.predicted_peak_bytes
        except InfeasibleBudgetError as error:
            smallest = error.minimum_bytes
        lengths = [2**k for k in range(workload.steps.bit_length()) if 2**k <= workload.steps]
        uniform = {length: optimized(schedule=length) for length in lengths}
        free = optimized()
        # Below the leanest of them there is nothing to compare with.
        smallest = max(smallest, min(one.report.predicted_peak_bytes for one in uniform.values()))
        largest = max(free.report.predicted_peak_bytes, smallest)
        growth = (largest / smallest) ** (1 / max(1, POINTS - 2))
        budgets = [int(smallest * growth**k) for k in range(POINTS - 1)]
        chosen = {budget: optimized(memory_budget=budget) for budget in budgets}
        # One loop nest is one program, whichever way it came about: it is run once in a round.
        nests = {_nest_of(opt): opt for opt in (*uniform.values(), *chosen.values(), free)}
        seconds = _fastest({nest: _run_of(opt, case) for nest, opt in nests.items()}, rounds)
    points = []
    for budget, opt in [*chosen.items(), (None, free)]:
        fitting = [n for n, one in uniform.items() if budget is None or one.report.predicted_peak_bytes <= budget]
        best = min(fitting, key=lambda length: seconds[_nest_of(uniform[length])])
        peak, own = opt.report.predicted_peak_bytes, seconds[_nest_of(opt)]
        points.append(Point(budget, peak, own, best, seconds[_nest_of(uniform[best])], str(opt.report.schedule)))
    return points


def _nest_of(opt: snncompile.OptimizedModule) -> Loop:
    schedule = opt.report.schedule
    assert isinstance(schedule, Schedule)
    root: Loop = schedule.root
    return root


def _run_of(opt: snncompile.OptimizedModule, case: Case) -> Callable[[], Tensor]:
    """A call from reset states, which has given the step loop's results."""

    def run() -> Tensor:
        opt.reset()
        output: Tensor = opt(*case.inputs)
        return output

    departure = compare(case.expected, Outcome(run(), tuple(potentials(case.network))))
    if not departure.within(case.rounding):
        raise RuntimeError(f"{opt.report.schedule} departs from the step loop: {departure}")
    return run


def _fastest(runs: Mapping[Loop, Callable[[], Tensor]], rounds: int) -> dict[Loop, float]:
    """Seconds of the call that was disturbed the least, for each; they take turns."""
    taken: dict[Loop, list[float]] = {nest: [] for nest in runs}
    for _ in range(rounds):
        for nest, run in runs.items():
            started = time.perf_counter()
            run()
            taken[nest].append(time.perf_counter() - started)
    return {nest: min(seconds) for nest, seconds in taken.items()}


def table(points: Sequence[Point]) -> str:
    header = ["budget", "predicted peak", "auto", "best uniform chunk that fits", "its time", "ratio", ""]
    lines = [
        [
            "none" if point.budget is None else f"{point.budget / 2**20:.2f} MiB",
            f"{point.peak / 2**20:.2f} MiB",
            f"{point.seconds * 1e3:.0f} ms",
            str(point.uniform_chunk),
            f"{point.uniform_seconds * 1e3:.0f} ms",
            f"{point.ratio:.2f}",
            "" if point.ratio >= 1.0 - LEVEL else "**slower**",
        ]
        for point in points
    ]
    return markdown([header, *lines], numbers=range(6))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--network", choices=["resnet18", "vgg16"], default="resnet18")
    made.add_argument("--steps", type=int, default=64)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--width", type=int, default=64, help="channels of the first convolution")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--output", type=Path, metavar="DIR", help="for the results")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
