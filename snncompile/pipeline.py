"""From a network to a plan: the stages and passes in order."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .capture import Captured, FakeNetwork, RandomState, capture, check_output, input_names, propagate_shapes
from .explicit_states import ExplicitStates
from .ir import Decision, OpKind, StepGraph, Verdict, print_graph
from .options import Environment, Options
from .passes.canonicalise import Canonicalise
from .passes.choose_schedule import ChooseSchedule
from .passes.eliminate_dead import EliminateDead
from .passes.find_recurrent_regions import FindRecurrentRegions
from .passes.hoist_static import HoistStatic
from .passes.infra import Pass, PassContext
from .passes.manager import PassManager, PipelineResult
from .passes.mark_time_coupling import MarkTimeCoupling
from .report import Report, SegmentRow, profile_module
from .runtime import FirstStep, NodeMeasurements, OptimizedModule, Plan, Program, Request, Visited, run_first_step
from .runtime.node_program import empty_like_type
from .schedule import Liveness, simulate_peak

GIVEN_FACTS = frozenset({"shapes"})


def default_passes() -> tuple[Pass, ...]:
    """The pipeline, in order."""
    return (
        Canonicalise(),
        EliminateDead(),
        MarkTimeCoupling(),
        FindRecurrentRegions(),
        HoistStatic(),
        ChooseSchedule(),
    )


@dataclass(frozen=True)
class DefaultCompiler:
    """Capture, shapes, passes, program, report."""

    def input_names(self, net: nn.Module) -> list[str]:
        return input_names(net)

    def unplanned_report(self, net: nn.Module, options: Options) -> Report:
        # A network with explicit states cannot be traced before it has some.
        captured = () if isinstance(net, ExplicitStates) else capture(net).decisions
        return Report(options, decisions=(*captured, *backend_decisions(options)))

    def profile(self, module: OptimizedModule, inputs: tuple[Tensor, ...]) -> Report:
        with RandomState():
            return profile_module(module, inputs)

    def compile(self, net: nn.Module, options: Options, request: Request) -> Plan:
        with RandomState():  # modules that are tried and timed draw none of the user's random numbers
            return self._compile(net, options, request)

    def _compile(self, net: nn.Module, options: Options, request: Request) -> Plan:
        environment = Environment.read()
        started = time.perf_counter()
        fakes = FakeNetwork(net)
        captured, graph, first_step = typed_graph(net, fakes, request, options)
        measurements = NodeMeasurements(
            net,
            fakes,
            request.inputs,
            options,
            input_gradients=request.input_gradients,
            first_step_bytes=first_step.peak_bytes,
        )
        context = PassContext(options, net, captured.leaves, request.needs_grad, measurements, measurements)
        result = PassManager(default_passes(), GIVEN_FACTS).run(graph, context, environment)
        program = Program(
            net,
            result.graph,
            result.schedule,
            options.readout,
            needs_grad=request.needs_grad,
            static_input=options.static_input,
        )
        report = _report(captured, result, measurements, options, request, started)
        _explain(environment, report, program, result)
        visited = tuple(
            Visited(net.get_submodule(name), captured.leaves.get(name), captured.registers_of(name))
            for name in (*captured.traced, *captured.leaves)
        )
        return Plan(program, report, visited)


def typed_graph(
    net: nn.Module, fakes: FakeNetwork, request: Request, options: Options
) -> tuple[Captured, StepGraph, FirstStep]:
    """The captured graph with the types of one step for these inputs.

    A register must hold the same type of tensor after every step; one that does not makes its module opaque.
    """
    with fakes.mode:
        sequences = [empty_like_type(leaf) for leaf in request.inputs]
        steps = tuple(sequence if options.static_input else sequence[0] for sequence in sequences)
    rejected: frozenset[str] = frozenset()
    while True:
        captured = capture(net, rejected)
        first_step = run_first_step(captured.graph, net, steps)
        wrong = captured.registers - first_step.registers.keys()
        if not wrong:
            graph = propagate_shapes(captured.graph, fakes, steps, net, first_step.registers)
            check_output(graph)
            wrong = frozenset(
                node.target
                for node in graph
                if node.kind is OpKind.STORE and not node.state.holds_like(first_step.registers[node.target])
            )
            if not wrong:
                return captured, graph, first_step
        rejected |= wrong


def backend_decisions(options: Options) -> tuple[Decision, ...]:
    """What became of the wish for a backend."""
    if options.backend == "auto":
        return (Decision("backend", "", Verdict.NOTE, "eager: the only backend of this version"),)
    return ()


def _report(
    captured: Captured,
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
        decisions=(*captured.decisions, *backend_decisions(options), *result.decisions),
        pass_seconds=(*result.seconds, ("total", time.perf_counter() - started)),
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
