"""From a network to a plan: the stages and passes in order."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from .capture import (
    Captured,
    FakeNetwork,
    Fallback,
    NodeFailure,
    RandomState,
    capture,
    capture_multi_step,
    capture_sequence,
    check_output,
    input_names,
    is_multi_step,
    propagate_shapes,
    step_mode_of,
)
from .errors import InfeasibleBudgetError, ScheduleError
from .explicit_states import ExplicitStates
from .ir import Decision, OpKind, StepGraph, TensorType, Verdict, print_graph
from .options import Environment, Options, render_bytes
from .passes.canonicalise import Canonicalise
from .passes.choose_layout import ChooseLayout
from .passes.choose_schedule import ChooseSchedule
from .passes.drive_by_events import DriveByEvents
from .passes.eliminate_dead import EliminateDead
from .passes.find_recurrent_regions import FindRecurrentRegions
from .passes.fuse_neuron_chains import FuseNeuronChains
from .passes.hoist_static import HoistStatic
from .passes.infra import Pass, PassContext
from .passes.keep_spikes_as_bits import KeepSpikesAsBits
from .passes.manager import PassManager, PipelineResult
from .passes.mark_time_coupling import MarkTimeCoupling
from .passes.tile_batch import TileBatch
from .passes.write_into_outputs import WriteIntoOutputs
from .report import Report, SegmentRow, front_of, profile_module
from .runtime import (
    FirstStep,
    KernelTarget,
    NodeCosts,
    NodeMeasurements,
    NoTarget,
    OptimizedModule,
    Plan,
    Program,
    Request,
    ScanKernels,
    TiledProgram,
    Tiles,
    Visited,
    find_target,
    joined_bytes,
    prospect,
    replay_bytes,
    replay_chunks,
    run_first_step,
    tilings,
)
from .runtime.freed_blocks import keep_freed_blocks
from .runtime.node_program import empty_like_type
from .schedule import Liveness, output_names, simulate_peak

GIVEN_FACTS = frozenset({"shapes"})


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Planning makes many small objects, few of them garbage: looking for cycles would take a sixth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def trace(net: nn.Module) -> Captured:
    """What can be known of a network before its inputs are.

    Raises:
        CaptureError: It cannot be captured.
    """
    return capture_sequence(net) if is_multi_step(net) else capture(net)


def default_passes(tiles: Tiles | None = None) -> tuple[Pass, ...]:
    """The pipeline, in order; of a plan that runs the batch in parts, if there are some."""
    return (
        Canonicalise(),
        EliminateDead(),
        MarkTimeCoupling(),
        FindRecurrentRegions(),
        HoistStatic(),
        ChooseLayout(),
        DriveByEvents(),
        FuseNeuronChains(),
        KeepSpikesAsBits(),
        WriteIntoOutputs(),
        *(() if tiles is None else (TileBatch(tiles.count, tiles.size),)),
        ChooseSchedule(),
    )


@dataclass(frozen=True)
class DefaultCompiler:
    """Capture, shapes, passes, program, report."""

    def input_names(self, net: nn.Module) -> list[str]:
        return input_names(net)

    def unplanned_report(self, net: nn.Module, options: Options) -> Report:
        # A network with explicit states cannot be traced before it has some.
        captured = None if isinstance(net, ExplicitStates) else trace(net)
        decisions = () if captured is None else captured.decisions
        return Report(options, decisions=(*decisions, *backend_decisions(options)))

    def profile(self, module: OptimizedModule, inputs: tuple[Tensor, ...]) -> Report:
        with RandomState():
            return profile_module(module, inputs)

    def compile(self, net: nn.Module, options: Options, request: Request) -> Plan:
        if any(leaf.device.type == "cpu" for leaf in request.inputs):
            keep_freed_blocks()
        # Modules that are tried and timed draw none of the user's random numbers.
        with RandomState(), collector_at_rest():
            return self._compile(net, options, request)

    def _compile(self, net: nn.Module, options: Options, request: Request) -> Plan:
        environment = Environment.read()
        started = time.perf_counter()
        found = None
        if is_multi_step(net):
            found, net = capture_multi_step(net, tuple(_of_all_steps(leaf, options) for leaf in request.inputs))
        with step_mode_of(net.modules(), "s"):
            try:
                return self._plan(net, found, options, request, environment, started)
            except InfeasibleBudgetError as failure:
                if found is not None or request.needs_grad or request.whole_batch or options.schedule != "auto":
                    raise
                return self._plan_in_tiles(net, options, request, environment, started, failure)

    def _plan_in_tiles(
        self,
        net: nn.Module,
        options: Options,
        request: Request,
        environment: Environment,
        started: float,
        failure: InfeasibleBudgetError,
    ) -> Plan:
        """A plan that runs the batch in parts, as few as fit into the budget; raises the failure if none does."""
        assert options.memory_budget is not None
        joined = None
        dim = 0 if options.static_input else 1
        for tiles in tilings(request.inputs, dim, reassociate=options.reassociate):
            if joined is None:
                _, graph, _ = typed_graph(net, FakeNetwork(net), tiles.request(request), options)
                joined = tiles.count * joined_bytes(graph, options.steps, options.readout)
            within = replace(options, memory_budget=max(1, options.memory_budget - joined))
            try:
                plan = self._plan(net, None, within, tiles.request(request), environment, started, tiles)
            except InfeasibleBudgetError as smaller:
                failure = _of_whole_batch(smaller, tiles, joined, options, failure)
            except ScheduleError as coupled:
                failure.args = (f"{failure.args[0]}; {coupled}",)
                break
            else:
                whole = plan.report.of_whole_batch(options, tuple(map(str, request.inputs)), tiles.count, joined)
                return replace(plan, report=whole)
        raise failure

    def _plan(
        self,
        net: nn.Module,
        found: Captured | None,
        options: Options,
        request: Request,
        environment: Environment,
        started: float,
        tiles: Tiles | None = None,
    ) -> Plan:
        fakes = FakeNetwork(net)
        captured, graph, first_step = typed_graph(net, fakes, request, options, found)
        _check_readout(graph, options)
        kernels = _kernels(options, request)
        measurements = NodeMeasurements(
            net,
            fakes,
            request.inputs,
            options,
            input_gradients=request.input_gradients,
            first_step_bytes=first_step.peak_bytes,
            kernels=kernels,
        )
        context = PassContext(
            options,
            net,
            captured.leaves,
            request.needs_grad,
            measurements,
            measurements,
            kernels,
            lambda changed: _retyped(changed, net, fakes, request, options, first_step),
            request.input_gradients,
        )
        try:
            result = PassManager(default_passes(tiles), GIVEN_FACTS).run(graph, context, environment)
        finally:
            measurements.costs.flush()
        make = Program if tiles is None else partial(TiledProgram, tiles=tiles.count)
        program = make(
            net,
            result.graph,
            result.schedule,
            options.readout,
            needs_grad=request.needs_grad,
            static_input=options.static_input,
            kernels=kernels,
        )
        backend = (
            *backend_decisions(options, request),
            *_neuron_decisions(net, result.graph, kernels),
            *_cost_decisions(measurements.costs),
        )
        report = _report(captured, backend, result, measurements, options, request, started)
        if tiles is None:
            report = _with_replays(report, program, options, request)
        _explain(environment, report, program, result)
        visited = tuple(
            Visited(net.get_submodule(name), captured.leaves.get(name), captured.registers_of(name))
            for name in (*captured.traced, *captured.leaves)
        )
        return Plan(program, report, visited)


def _of_all_steps(leaf: TensorType, options: Options) -> TensorType:
    return leaf.of_chunk(options.steps) if options.static_input else leaf


def _of_whole_batch(
    smaller: InfeasibleBudgetError, tiles: Tiles, joined: int, options: Options, failure: InfeasibleBudgetError
) -> InfeasibleBudgetError:
    """The failure that names the smallest budget that would do, the batch in parts or whole."""
    minimum = smaller.minimum_bytes + joined
    if minimum >= failure.minimum_bytes:
        return failure
    budget = options.memory_budget or 0
    return InfeasibleBudgetError(
        f"memory_budget {render_bytes(budget)} ({budget} bytes) is below the smallest feasible peak, "
        f"{render_bytes(minimum)} ({minimum} bytes) with the batch in {tiles.count} parts; "
        "raise memory_budget or lower N",
        minimum_bytes=minimum,
        where=smaller.where,
    )


def _check_readout(graph: StepGraph, options: Options) -> None:
    if options.readout != "sequence" and any(graph[name].timeless for name in output_names(graph)):
        raise ValueError(
            f"readout={options.readout!r} combines the outputs of T steps, but the network returns a value that has no "
            "steps; use readout='sequence', which returns it as it is"
        )


def typed_graph(
    net: nn.Module, fakes: FakeNetwork, request: Request, options: Options, found: Captured | None = None
) -> tuple[Captured, StepGraph, FirstStep]:
    """The captured graph with the types of one step for these inputs.

    Args:
        found: What was captured already, of a network in multi-step mode.

    A register must hold the same type of tensor after every step; one that does not makes its module opaque. So does an
    operation that needs data.
    """
    steps = _example_steps(fakes, request, options)
    rejected: frozenset[str] = frozenset()
    fallback = Fallback(net, steps)
    while True:
        types = tuple(TensorType.of(step) for step in steps)
        captured = found or capture(net, rejected, fallback.forced, types, fakes)
        first_step = run_first_step(captured.graph, net, steps)
        wrong = captured.registers - first_step.registers.keys()
        if not wrong:
            try:
                graph = propagate_shapes(captured.graph, fakes, steps, net, first_step.registers)
            except NodeFailure as failure:
                if found is not None:
                    raise
                fallback.widen(failure, captured)
                continue
            check_output(graph)
            wrong = frozenset(
                node.target
                for node in graph
                if node.kind is OpKind.STORE and not node.state.holds_like(first_step.registers[node.target])
            )
            if not wrong:
                return captured, graph, first_step
        rejected |= wrong


def _example_steps(fakes: FakeNetwork, request: Request, options: Options) -> tuple[Tensor, ...]:
    """One data-less step `[N, *]` of each input, as it lies in the caller's sequence."""
    with fakes.mode:
        sequences = [empty_like_type(leaf) for leaf in request.inputs]
        return tuple(sequence if options.static_input else sequence[0] for sequence in sequences)


def _retyped(
    graph: StepGraph, net: nn.Module, fakes: FakeNetwork, request: Request, options: Options, first_step: FirstStep
) -> StepGraph:
    """The graph with the types of its values computed anew; all else that is known of its nodes stays."""
    typed = propagate_shapes(graph, fakes, _example_steps(fakes, request, options), net, first_step.registers)
    changes = {node.name: (node.value, node.state, node.shares) for node in typed}
    return graph.with_nodes(
        {
            name: replace(graph[name], value=value, state=state, shares=shares)
            for name, (value, state, shares) in changes.items()
        }
    )


def _kernels(options: Options, request: Request) -> ScanKernels | None:
    """Where the kernels of a plan's neurons are kept; None if the eager steps run."""
    target = _target(options, request)
    if isinstance(target, NoTarget):
        return None
    return ScanKernels(target, trains=request.needs_grad, reassociates=options.reassociate)


def _target(options: Options, request: Request) -> KernelTarget | NoTarget:
    devices = [leaf.device for leaf in request.inputs]
    return find_target(options.backend, devices)


def backend_decisions(options: Options, request: Request | None = None) -> tuple[Decision, ...]:
    """What became of the wish for a backend."""
    if request is None:
        reason = prospect(options.backend)
    else:
        target = _target(options, request)
        if isinstance(target, NoTarget):
            reason = f"eager: {target.reason}" if target.reason else ""
        else:
            reason = f"{target.title}s for neurons" + (", forward and backward" if request.needs_grad else "")
    return (Decision("backend", "", Verdict.NOTE, reason),) if reason else ()


def _neuron_decisions(net: nn.Module, graph: StepGraph, kernels: ScanKernels | None) -> tuple[Decision, ...]:
    """Which neurons have a kernel, and why the others have none."""
    if kernels is None:
        return ()
    found = []
    for target, node in {node.target: node for node in graph if node.kind is OpKind.STATEFUL}.items():
        types = tuple(graph[name].value for name in node.refs)
        refusal = kernels.obstacle(net, node, types)
        if refusal:
            found.append(Decision("backend", target, Verdict.REFUSED, f"eager step: {refusal}"))
        else:
            wider = ", float32 from step to step of a chunk" if kernels.is_wider(net, node, types) else ""
            found.append(Decision("backend", target, Verdict.DONE, f"runs as a {kernels.target.title}{wider}"))
    return tuple(found)


def _with_replays(report: Report, program: Program, options: Options, request: Request) -> Report:
    """The report of a program whose chunks are replayed where that pays."""
    predicted = report.predicted_peak_bytes
    room = math.inf if options.memory_budget is None or predicted is None else options.memory_budget - predicted
    decisions = replay_chunks(program, request.inputs, room)
    if program.is_replayed and predicted is not None:
        predicted += replay_bytes(program.graph, program.schedule, request.inputs, is_static=program.is_static)
    return replace(report, decisions=(*report.decisions, *decisions), predicted_peak_bytes=predicted)


def _cost_decisions(costs: NodeCosts) -> Iterator[Decision]:
    """What was not measured, or will have to be measured again."""
    if costs.estimated:
        took = f"measuring took {costs.spent_seconds:.0f} s"
        reason = f"{took}; {len(costs.estimated)} costs are estimated from those of shorter chunks"
        yield Decision("costs", "", Verdict.NOTE, reason)
    if costs.obstacle:
        yield Decision("costs", "", Verdict.REFUSED, f"kept in this process only: {costs.obstacle}")


def _report(
    captured: Captured,
    backend: Sequence[Decision],
    result: PipelineResult,
    measurements: NodeMeasurements,
    options: Options,
    request: Request,
    started: float,
) -> Report:
    if request.needs_grad:
        predicted = measurements.training_peak_bytes(result.graph, result.schedule)
        peaks: Sequence[int | None] = [None] * len(list(result.schedule.segments()))
    else:
        peak = simulate_peak(result.graph, result.schedule, measurements, options.readout)
        predicted, peaks = peak.peak_bytes, peak.segment_peaks
    rows = tuple(
        SegmentRow(number, chunk, segment.nodes, held)
        for number, ((chunk, segment), held) in enumerate(zip(result.schedule.segments(), peaks, strict=True))
    )
    return Report(
        options,
        inputs=tuple(str(leaf) for leaf in request.inputs),
        mode="training" if request.needs_grad else "inference",
        schedule=result.schedule,
        predicted_peak_bytes=predicted,
        segments=rows,
        front=front_of(result.front, result.schedule),
        decisions=(*captured.decisions, *backend, *result.decisions),
        pass_seconds=(
            *result.seconds,
            ("measuring", measurements.costs.spent_seconds),
            ("compiling", 0.0 if measurements.kernels is None else measurements.kernels.compiling_seconds),
            ("total", time.perf_counter() - started),
        ),
    )


def _explain(environment: Environment, report: Report, program: Program, result: PipelineResult) -> None:
    """The debugging ladder; what each level prints is documented in the README."""
    texts = []
    if environment.debug >= 1:
        texts.append(str(report).split("\n\ndecisions")[0])
    if environment.debug >= 2:
        texts.append("\n".join(str(decision) for decision in report.decisions))
    if environment.debug >= 4:
        texts += [print_graph(result.graph), str(result.schedule), program.source]
    if environment.debug >= 5:
        liveness = Liveness(result.graph, result.schedule)
        texts.append(f"local deaths {dict(liveness.local_deaths)}\nbuffers {dict(liveness.buffers)}")
    for text in texts:
        print(text, file=sys.stderr)
