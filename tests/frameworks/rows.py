"""One row a class: a small network around it, and how it compiles.

The rows of a framework stand in a file of its own. `docs/frameworks.md` is written from them by
`python -m tests.frameworks`, and `tests/test_frameworks.py` holds it to what the compiler does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError

STEPS = (5, 16)  # T; the first starts from states of a call before


class Verdict(Enum):
    """What becomes of a class."""

    BATCHED = "batched"  # its layers take a chunk of steps in one call, its neurons scan over the chunk
    STEPWISE = "step by step"  # called, or computed, one step after the other, for the reason given
    AT_ONCE = "all steps at once"  # takes the whole sequence in one call; for the reason given
    REFUSED = "refused"  # `CaptureError`
    NO_STEP = "no step"  # nothing to compile: abstract, or no module that a network is built of


@dataclass(frozen=True)
class Row:
    """A class of a framework, and a network to try it in.

    Attributes:
        name: `package.Class`, as a user of the framework spells it; a class with other options follows in parentheses.
        network: Makes a network that uses the class, in a form that snncompile documents (`with_states` for one that
            passes states through forward). None: there is nothing to run, for the reason in `remark`.
        shape: One step's input, `[N, *]`.
        inputs: How many inputs of that shape the network takes.
        scale: Inputs are drawn from [0, scale); large enough that neurons fire.
        modes: Modes to try: training, evaluation.
        steps: T, for a class that is made for one; empty: several.
        remark: What a user should know: options that the row chose, or why there is no step.
    """

    name: str
    network: Callable[[], nn.Module] | None
    shape: tuple[int, ...] = (4, 6)
    inputs: int = 1
    scale: float = 2.0
    modes: tuple[bool, ...] = (True, False)
    steps: tuple[int, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Judgement:
    """What the compiler did with a row."""

    verdict: Verdict
    reason: str = ""


def public_modules(*packages: ModuleType) -> Iterator[tuple[str, type[nn.Module]]]:
    """The module classes that packages offer under their own names: `package.Class` and the class."""
    for package in packages:
        short = package.__name__.rpartition(".")[2]
        for name, cls in sorted(vars(package).items()):
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and not name.startswith("_"):
                yield f"{short}.{name}", cls


def judge(row: Row) -> Judgement:
    """Compile the network of a row by chunks and compare it with the step loop in each mode, in the last for several T.

    Raises:
        AssertionError: It computes something else than the step loop; nothing but a wrong result fails here.
    """
    if row.network is None:
        return Judgement(Verdict.NO_STEP, row.remark)
    stepwise: dict[str, None] = {}
    whole: dict[str, None] = {}
    for training in row.modes:
        several = row.steps or STEPS
        if training is not row.modes[-1]:
            several = several[:1]
        for steps in several:
            torch.manual_seed(0)
            inputs = _inputs(row, steps)
            with torch.set_grad_enabled(training):
                try:
                    net = row.network().train(training)
                    opt = snncompile.optimize(net, steps, schedule=max(1, steps // 2))
                    if steps == several[0]:
                        opt(*inputs)
                        stepwise |= dict.fromkeys(_reasons(opt, "kept as it is and run step by step: "))
                        whole |= dict.fromkeys(_reasons(opt, f"runs on all {steps} steps at once: "))
                    parity = snncompile.verify(net, opt, *inputs)
                except CaptureError as error:
                    return Judgement(Verdict.REFUSED, str(error))
            assert parity.ok, f"{row.name}, T = {steps}, training {training}:\n{parity}"
    if stepwise:
        return Judgement(Verdict.STEPWISE, "; ".join([*stepwise, *whole]))
    return Judgement(Verdict.AT_ONCE, "; ".join(whole)) if whole else Judgement(Verdict.BATCHED)


def _inputs(row: Row, steps: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(row.scale * torch.rand(steps, *row.shape, generator=generator) for _ in range(row.inputs))


def _reasons(opt: Any, beginning: str) -> list[str]:
    """The reasons of the decisions of capture that begin like this."""
    return [
        decision.reason.removeprefix(beginning)
        for decision in opt.report.decisions
        if decision.pass_name == "capture" and decision.reason.startswith(beginning)
    ]
