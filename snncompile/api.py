"""The public functions: thin, in the order in which a user meets them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import ScheduleError
from .explicit_states import ExplicitStates
from .options import Options
from .pipeline import DefaultCompiler, trace
from .report import Parity, verify
from .runtime import OptimizedModule, check_backend, measure_peak, planning
from .schedule import Schedule

__all__ = ["Parity", "measure_peak", "optimize", "verify"]


def optimize(
    net: nn.Module,
    T: int,
    memory_budget: int | str | None = None,
    *,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    schedule: str | int | Schedule = "auto",
    static_input: bool = False,
    readout: str = "sequence",
    backend: str = "auto",
    reassociate: bool = False,
) -> OptimizedModule:
    """Compile a network of single-step modules into one that runs T steps at once, with the step loop's results.

    Args:
        net: Called once a step with `[N, *]`; built of single-step modules, stateful ones included. Or a network in
            multi-step mode, called once with `[T, N, *]`: then the result is that of `net(x_seq)`.
        T: Number of time steps.
        memory_budget: The most bytes one call may hold beyond parameters, buffers, its input and carried states:
            an int, or text such as "64MiB". None: no limit.
        example_input: What the result will be called with; plans now instead of at the first call.
        schedule: "auto" (the fastest within the budget), "depth-first" (step by step), "breadth-first" (layer by
            layer), a chunk length, or a `Schedule`.
        static_input: Every step sees the same input; the result takes `[N, *]`.
        readout: "sequence" returns `[T, N, *]`; "sum", "mean" and "last" return `[N, *]` without ever stacking.
        backend: "auto" (kernels for neurons where they can be built: C++ on the CPU, Triton on CUDA), "cpp" or
            "triton" (these only, and an error without a compiler, or without Triton and a CUDA device) or "eager".
        reassociate: Allow passes to change the order of floating-point operations, and kernels to compute `exp`,
            `sigmoid` and `tanh` by functions of their own, within 2 units in the last place.

    Returns:
        A module that shares parameters, buffers and states with `net`.

    Raises:
        TypeError, ValueError: An argument is wrong; nothing was done.
        CaptureError: The network cannot be traced; names module and line.
        InfeasibleBudgetError: With `example_input`: no schedule fits into the budget.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"optimize expects an nn.Module, got {type(net).__name__}")
    for name, module in net.named_modules():
        if isinstance(module, OptimizedModule):
            what = name or "the network"
            raise TypeError(f"{what} is optimised already; pass a network of single-step modules, as it was before")
    options = Options.parse(
        T,
        memory_budget,
        schedule=schedule,
        static_input=static_input,
        readout=readout,
        backend=backend,
        reassociate=reassociate,
    )
    if not isinstance(options.schedule, (str, int, Schedule)):
        raise TypeError(f"schedule must be a name, a chunk length or a Schedule, got {type(schedule).__name__}")
    if isinstance(options.schedule, Schedule) and options.schedule.steps != options.steps:
        raise ScheduleError(f"the schedule is for T = {options.schedule.steps}, expected T = {options.steps}")
    check_backend(options.backend)
    inputs = _inputs(net, example_input)
    if not isinstance(net, ExplicitStates):  # the first call brings its states
        with planning():
            trace(net)  # what cannot be captured is said now, not at the first call
    opt = OptimizedModule(net, options, DefaultCompiler())
    if inputs is not None:
        opt.plan(*inputs)
    return opt


def _inputs(net: nn.Module, example_input: Any) -> tuple[Tensor, ...] | None:
    if example_input is None:
        return None
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in inputs if not isinstance(net, ExplicitStates) else inputs[: len(net.input_names)]:
        if not isinstance(value, Tensor):
            raise TypeError(f"example_input must be a tensor or a tuple of tensors, got {type(value).__name__}")
    return inputs
