"""One command for a machine with a GPU and no network: the tests that need it, then the GPU suite, within ten minutes.

    python -m benchmarks.gpu --output gpu-results     # on the machine with the GPU
    python -m benchmarks.gpu --dry-run                # anywhere: the same path on the CPU, with one small workload

It needs torch and Triton, which such a machine has, and this package, its dependencies and the peers, which it may not
have and cannot download. Put them into a folder where there is a network, and name it there in PYTHONPATH:

    pip install --no-deps --target carried . networkx tqdm loguru spikingjelly==2.0.0 snntorch
    PYTHONPATH=carried python -m benchmarks.gpu --output gpu-results

A peer that is missing has that as its row. The last lines are a short table; everything else is in files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cli
from .records import Results
from .table import comparison

LIMIT = 540.0  # of the ten minutes, with room to start up and to finish the workload that is being measured
TESTS_SHARE = 0.35
WORKLOAD_SECONDS = 60.0  # what a workload may take that begins in the last moment
SETUP_LIMIT = 40.0
DRY_WORKLOAD = "lif-layer n=524288"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="GPU tests and the GPU suite.")
    made.add_argument("--output", type=Path, default=Path("benchmark-results/gpu"), metavar="DIR")
    made.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for all of it")
    made.add_argument("--skip-tests", action="store_true", help="no pytest -m gpu before the suite")
    made.add_argument("--dry-run", action="store_true", help="on the CPU: collect the tests, measure one workload")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    started = time.monotonic()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch finds no CUDA device; --dry-run shows what would be done", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    tests = 0 if arguments.skip_tests else run_tests(arguments.output, TESTS_SHARE * arguments.limit, arguments.dry_run)
    left = arguments.limit - (time.monotonic() - started)
    measured = cli.main(suite_arguments(arguments.output, left, arguments.dry_run))
    print()
    print(comparison(Results.load(arguments.output / cli.RESULTS_NAME)))
    print(f"\ntests exited with {tests}, the suite with {measured}; {time.monotonic() - started:.0f} s in all")
    return tests or measured


def suite_arguments(output: Path, left: float, is_dry: bool) -> list[str]:
    """Of `python -m benchmarks`, for the seconds that are left."""
    limit = ["--limit", str(max(0.0, left - WORKLOAD_SECONDS)), "--setup-limit", str(SETUP_LIMIT)]
    device = ["--quick", "--only", DRY_WORKLOAD] if is_dry else ["--device", "cuda", "--rounds", "3"]
    return [*device, "--output", str(output), *limit]


def run_tests(folder: Path, limit: float, is_dry: bool) -> int:
    """`pytest -m gpu`, its words in a file and its closing line here; only collected in a dry run."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    if is_dry:
        command.append("--collect-only")
    log = folder / "pytest.txt"
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, env={**os.environ})
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
            print(f"pytest -m gpu was stopped after {limit:.0f} s")
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    print(f"pytest -m gpu: {lines[-1] if lines else 'printed nothing'} ({log})", flush=True)
    # pytest's 5 says that there was nothing to run, which a dry run may find.
    return 0 if status == 5 else status


if __name__ == "__main__":
    raise SystemExit(main())
