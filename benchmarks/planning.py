"""How long planning takes on a network of the size of a ResNet-50.

    python -m benchmarks.planning --output DIR

Each line is a fresh process: the first measures costs and compiles kernels, the second finds both on disk. A small
network is planned before, so that what torch imports with the first plan of a process is a column of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import snncompile

from .findings import report
from .networks import BLOCKS, SpikingResNet50
from .table import markdown

COLD, WARM = "cold", "warm"


@dataclass(frozen=True)
class Planned:
    """One plan.

    Attributes:
        costs: Whether they had to be measured.
        first_seconds: Of the first plan of the process, of a small network.
        seconds: Of the network's plan.
        measuring_seconds: Of these, for measuring costs.
        compiling_seconds: Of these, for compiling kernels.
    """

    costs: str
    first_seconds: float
    seconds: float
    measuring_seconds: float
    compiling_seconds: float

    @property
    def other_seconds(self) -> float:
        return self.seconds - self.measuring_seconds - self.compiling_seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    planned = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for costs in (COLD, WARM):
                planned.append(_in_a_process(costs, cache, arguments))
    shape = f"1 x 3 x {arguments.size} x {arguments.size}, T = {arguments.steps}"
    depth = sum(arguments.blocks)
    what = f"ResNet-{3 * depth + 2} of width {arguments.width}, {shape}"
    report(what, table(planned), [asdict(plan) for plan in planned], arguments.output, "planning")
    return 0


def _in_a_process(costs: str, cache: str, arguments: argparse.Namespace) -> Planned:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plan, (costs, cache, arguments.width, arguments.blocks, arguments.size, arguments.steps))


def plan(costs: str, cache: str, width: int, blocks: Sequence[int], size: int, steps: int) -> Planned:
    """Plan twice: a small network, and the ResNet-50.

    Args:
        costs: Names the line.
        cache: Directory for what is kept on disk.
        width: Channels of the first stage.
        blocks: In each stage.
        size: Of the images.
        steps: T.
    """
    os.environ["SNNCOMPILE_CACHE"] = cache
    with torch.no_grad():
        small = nn.Sequential(nn.Linear(4, 4), snncompile.neuron.IFNode()).eval()
        first = _seconds(snncompile.optimize(small, steps), torch.rand(steps, 2, 4))
        torch.manual_seed(0)
        net = SpikingResNet50(width, blocks=blocks).eval()
        opt = snncompile.optimize(net, steps, static_input=True, readout="sum")
        seconds = _seconds(opt, torch.rand(1, 3, size, size))
    spent = dict(opt.report.pass_seconds)
    return Planned(costs, first, seconds, spent["measuring"], spent["compiling"])


def _seconds(opt: snncompile.OptimizedModule, x: torch.Tensor) -> float:
    started = time.perf_counter()
    opt.plan(x)
    return time.perf_counter() - started


def table(planned: Sequence[Planned]) -> str:
    header = ["costs", "first plan of the process", "plan", "of it measuring", "compiling kernels", "beyond both"]
    lines = [
        [
            plan.costs,
            f"{plan.first_seconds:.1f} s",
            f"{plan.seconds:.1f} s",
            f"{plan.measuring_seconds:.1f} s",
            f"{plan.compiling_seconds:.1f} s",
            f"{plan.other_seconds:.1f} s",
        ]
        for plan in planned
    ]
    return markdown([header, *lines], numbers=range(1, 6))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--width", type=int, default=64, help="channels of the first stage")
    made.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="in each stage")
    made.add_argument("--size", type=int, default=224, help="of the images")
    made.add_argument("--steps", type=int, default=64)
    made.add_argument("--rounds", type=int, default=3, help="each with nothing on disk at first")
    made.add_argument("--output", type=Path, metavar="DIR", help="for the results")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
