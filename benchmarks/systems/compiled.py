"""snncompile: with its defaults, with reassociation, and under memory budgets."""

from __future__ import annotations

from typing import Any

import torch

import snncompile
from snncompile import functional
from snncompile.errors import InfeasibleBudgetError

from ..case import Case, potentials, run, step_loop
from ..workloads import Converted, LinearStacks, Recurrent, SingleLIF, Workload
from .system import Prepared, System


def compile_case(case: Case, *, reuses_output: bool = False, **options: Any) -> Prepared:
    """`optimize`, planned on the inputs that will be run.

    Args:
        case: What to run.
        reuses_output: Every call writes its result to the same memory.
        options: Of `optimize`.
    """
    workload = case.workload
    opt = snncompile.optimize(
        case.network,
        workload.steps,
        example_input=case.inputs,
        static_input=workload.static_input,
        readout=workload.readout,
        **options,
    )
    report = opt.report
    details = {
        "predicted_peak_bytes": report.predicted_peak_bytes,
        "schedule": str(report.schedule),
        "memory_budget": opt.options.memory_budget,
    }
    arguments = {"out": torch.empty_like(case.expected.output)} if reuses_output else {}
    return Prepared(
        case,
        lambda: opt(*case.inputs, **arguments),
        case.network,
        lambda: functional.reset_net(opt),
        lambda: potentials(case.network),
        details,
    )


def compile_within(case: Case, factor: float) -> Prepared:
    """Under a budget of the smallest feasible bytes times a factor."""
    try:
        return compile_case(case, memory_budget=1)
    except InfeasibleBudgetError as error:
        minimum = error.minimum_bytes
    return compile_case(case, memory_budget=int(factor * minimum))


def compile_lean(case: Case) -> Prepared:
    """With reassociation, under a budget of twice the bytes that the step loop holds at its peak."""
    functional.reset_net(case.network)
    peak = snncompile.measure_peak(
        lambda: run(lambda: step_loop(case.workload, case.network, case.inputs), case.cotangent)
    )
    functional.reset_net(case.network)
    return compile_case(case, reassociate=True, memory_budget=2 * peak)


def adds_up(workload: Workload) -> bool:
    """Nothing else has an order that the passes change, and no gradient flows through what they change."""
    return isinstance(workload, (Converted, LinearStacks, Recurrent))


def is_bound_by_memory(workload: Workload) -> bool:
    """Its result is large beside what it computes, and no gradient flows."""
    return isinstance(workload, SingleLIF) and not workload.trains


SYSTEMS = (
    System("snncompile", "snncompile", compile_case, is_ours=True),
    System(
        "snncompile-out",
        "snncompile, out= the same memory",
        lambda case: compile_case(case, reuses_output=True),
        is_bound_by_memory,
        is_ours=True,
    ),
    System(
        "snncompile-reassociate",
        "snncompile, reassociate=True",
        lambda case: compile_case(case, reassociate=True),
        adds_up,
        is_ours=True,
    ),
    System(
        "snncompile-lean",
        "snncompile, reassociate=True, twice the step loop's peak",
        compile_lean,
        lambda workload: isinstance(workload, Converted),
        is_ours=True,
    ),
    System("snncompile-smallest", "snncompile, smallest budget", lambda case: compile_within(case, 1.0), is_ours=True),
    System("snncompile-4x", "snncompile, four times that budget", lambda case: compile_within(case, 4.0), is_ours=True),
)
