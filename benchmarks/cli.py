"""The command line: measure, and write what came out."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import machine
from .plots import write_plots
from .readme import write_between_markers
from .records import Results
from .runner import Settings, Stopwatch, described, measure_case
from .systems import SYSTEMS, chosen
from .table import case_lines, comparison, render
from .workloads import FAMILIES, Workload, workloads

QUICK = Settings(rounds=3, round_seconds=0.3, setup_limit=60.0, call_limit=60.0)
QUICK_LIMIT = 500.0  # seconds after which a quick run begins no other workload
FULL = Settings()
RESULTS_NAME = "results.json"
INTERRUPTED = 130  # the exit status that shells give an interrupted command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure snncompile against its peers, each in a process of its own, parity before numbers.",
    )
    made.add_argument("--suite", nargs="+", choices=list(FAMILIES), metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    made.add_argument(
        "--peers", nargs="+", choices=list(SYSTEMS), metavar="NAME", help=f"beside snncompile, of {', '.join(SYSTEMS)}"
    )
    made.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose name contains one of these texts")
    made.add_argument(
        "--quick", action="store_true", help="fewer and smaller workloads, within ten minutes on two cores"
    )
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--output", type=Path, default=Path("benchmark-results"), metavar="DIR")
    made.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch, in every process")
    made.add_argument("--rounds", type=positive, help="in which the systems take turns")
    made.add_argument("--setup-limit", type=float, metavar="SECONDS", help="for compilation and search of one system")
    made.add_argument("--limit", type=float, metavar="SECONDS", help="after which no other workload is begun")
    made.add_argument("--resume", action="store_true", help=f"go on with DIR/{RESULTS_NAME}: measure what is missing")
    made.add_argument("--list", action="store_true", help="print the workloads and their systems, and measure nothing")
    made.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print the comparison in this result")
    made.add_argument("--write", type=Path, metavar="README", help="with --table: write it between the file's markers")
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.table is not None:
        return print_table(arguments.table, arguments.write)
    if arguments.write is not None:
        parser().error("--write needs --table")
    selected = selection(arguments)
    if not selected:
        parser().error("no workload of this device is of these suites and names")
    if arguments.list:
        for workload in selected:
            print(f"{workload.name}: {', '.join(system.name for system in _systems(workload, arguments))}")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch finds no CUDA device")
    results = measure(selected, arguments, print)
    return 0 if any(case.measured() for case in results.cases) else 1


def selection(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads that the arguments ask for."""
    return [
        workload
        for workload in workloads(arguments.device, arguments.quick)
        if (arguments.suite is None or workload.suite in arguments.suite)
        and (arguments.only is None or any(text in workload.name for text in arguments.only))
    ]


def settings_from(arguments: argparse.Namespace) -> Settings:
    settings = replace(QUICK if arguments.quick else FULL, device=arguments.device, threads=arguments.threads)
    if arguments.rounds is not None:
        settings = replace(settings, rounds=arguments.rounds)
    if arguments.setup_limit is not None:
        settings = replace(settings, setup_limit=arguments.setup_limit)
    return settings


def measure(selected: Sequence[Workload], arguments: argparse.Namespace, say: Callable[[str], None]) -> Results:
    """Measure each workload; every finished one is on disk before the next begins."""
    folder, settings = arguments.output, settings_from(arguments)
    path = folder / RESULTS_NAME
    results = _begin(path, settings, arguments.resume)
    folder.mkdir(parents=True, exist_ok=True)
    limit = arguments.limit if arguments.limit is not None or not arguments.quick else QUICK_LIMIT
    stopwatch = Stopwatch(limit)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for workload in selected:
            old = results.case(workload.name)
            if old is not None and old.measured():
                say(f"{workload.name}: measured before")
                continue
            if stopwatch.has_run_out:
                results = results.with_case(replace(described(workload), error=f"not begun within {limit:.0f} s"))
                continue
            say(workload.name)
            systems = _systems(workload, arguments)
            case = measure_case(workload, systems, settings, folder / "log.txt", say)
            results = replace(results.with_case(case), until=_today())
            results.save(path)
            say("\n".join(case_lines(case)) + "\n")
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on with {path}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        results.save(path)
        (folder / "results.md").write_text(render(results), encoding="utf-8")
        for plot in write_plots(results, folder):
            say(f"wrote {plot}")
        say(f"wrote {path} and results.md")
    return results


def _begin(path: Path, settings: Settings, resume: bool) -> Results:
    """Empty results, or those on disk if they may be added to."""
    fresh = Results(
        machine=machine.machine(settings.device, settings.threads),
        versions=machine.versions(),
        settings=asdict(settings),
        date=_today(),
    )
    if not resume or not path.exists():
        return fresh
    old = Results.load(path)
    if (dict(old.machine), dict(old.versions)) != (dict(fresh.machine), dict(fresh.versions)):
        raise SystemExit(f"{path} was measured on another machine or with other versions; choose another --output")
    return old


def _today() -> str:
    return datetime.date.today().isoformat()


def _systems(workload: Workload, arguments: argparse.Namespace) -> list[Any]:
    peers = None if arguments.peers is None else tuple(arguments.peers)
    return chosen(workload, arguments.device, arguments.quick, peers)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def print_table(path: Path, readme: Path | None) -> int:
    """The comparison that stands in README, printed or written there."""
    text = comparison(Results.load(path))
    if readme is None:
        print(text)
    else:
        write_between_markers(readme, text)
        print(f"wrote {readme}")
    return 0
