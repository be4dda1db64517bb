"""Ways to run a converted network, side by side: plain PyTorch and `snncompile.optimize`, measured and judged.

Every way takes images [N, *], shows them to the network at each of T steps and sums the outputs, [N, *]; rate coding
asks for no more. All ways share one network, so they use the same weights.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

import snncompile
from snncompile import functional, neuron

MIB = 2**20
MIN_RATIO = 10
MIN_RATIO_STEPS = 100  # memory layer by layer grows with T; for fewer steps no ratio is promised
SPIKE_BATCHES = 4  # every spike of these is compared
STEP_LOOP, PLAIN_LAYERS = "step loop, plain PyTorch", "layer by layer, plain PyTorch"
BREADTH_FIRST, DEPTH_FIRST = "optimize, breadth-first", "optimize, depth-first"


class LayerByLayer(fx.Interpreter):
    """Layer by layer without a compiler: stateless modules on [T * N, *], neurons on [T, N, *] in step mode "m".

    As an interpreter does, it lets go of every value after its last use.
    """

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, x_seq = self.fetch_attr(target), args[0]
        if has_neurons(module):
            return module(x_seq)
        return module(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def has_neurons(module: nn.Module) -> bool:
    return any(isinstance(part, neuron.SpikingNode) for part in module.modules())


def count_neurons(snn: nn.Module, x: Tensor) -> int:
    """Neurons that one image has."""
    functional.reset_net(snn)
    with torch.no_grad():
        snn(x[:1])
    return sum(part.v.numel() for part in snn.modules() if isinstance(part, neuron.SpikingNode))


def layer_by_layer(snn: fx.GraphModule, steps: int, x: Tensor) -> Any:
    """Outputs [T, N, *] for images [N, *] shown at every step."""
    functional.set_step_mode(snn, "m")
    try:
        return LayerByLayer(snn).run(x.expand(steps, *x.shape))
    finally:
        functional.set_step_mode(snn, "s")


def step_loop(snn: fx.GraphModule, steps: int, x: Tensor) -> Tensor:
    """The sum of the outputs, [N, 10], for images [N, *] shown at every step."""
    total = snn(x)
    for _ in range(steps - 1):
        total = total + snn(x)
    return total


def with_spikes(snn: fx.GraphModule) -> fx.GraphModule:
    """The same network, same modules, that returns what each layer of neurons sends on besides its output.

    A conversion scales the spikes as they leave a neuron, so that there is a spike wherever the value is not 0.
    """
    graph = copy.deepcopy(snn.graph)
    spikes = [node for node in graph.nodes if node.op == "call_module" and has_neurons(snn.get_submodule(node.target))]
    output = next(iter(reversed(graph.nodes)))
    output.args = ((output.args[0], *spikes),)
    return fx.GraphModule(snn, graph)


@dataclass(frozen=True)
class Way:
    """One way to run the network.

    Attributes:
        name: As in the table.
        run: Images [N, *] to outputs summed over T, [N, 10].
        record: Images [N, *] to every step's outputs and spikes, each [T, N, *].
        compiled: The optimised module; None in plain PyTorch.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    record: Callable[[Tensor], Sequence[Tensor]]
    compiled: snncompile.OptimizedModule | None = None


def plain_ways(snn: fx.GraphModule, steps: int) -> list[Way]:
    """Step loop and layer by layer, as one writes them by hand."""
    recorder = with_spikes(snn)

    def record_steps(x: Tensor) -> list[Tensor]:
        return [torch.stack(sequence) for sequence in zip(*(recorder(x) for _ in range(steps)), strict=True)]

    def sum_layers(x: Tensor) -> Tensor:
        return layer_by_layer(snn, steps, x).sum(0)

    def record_layers(x: Tensor) -> Sequence[Tensor]:
        return layer_by_layer(recorder, steps, x)

    return [
        Way(STEP_LOOP, lambda x: step_loop(snn, steps, x), record_steps),
        Way(PLAIN_LAYERS, sum_layers, record_layers),
    ]


def compiled_way(name: str, snn: fx.GraphModule, steps: int, x: Tensor, **options: Any) -> Way:
    """What `optimize` makes of the network, planned for images like x."""
    opt = snncompile.optimize(snn, steps, example_input=x, static_input=True, readout="sum", **options)
    # With more outputs the search might end elsewhere, so the recording is told to follow this plan.
    recorder = snncompile.optimize(with_spikes(snn), steps, schedule=opt.report.schedule, static_input=True)
    return Way(name, opt, recorder, opt)


def compiled_ways(snn: fx.GraphModule, steps: int, x: Tensor, budgets: Sequence[str]) -> list[Way]:
    """Both fixed orders, then the compiler's choice: within each budget, and without one."""
    plans: dict[str, dict[str, Any]] = {
        BREADTH_FIRST: {"schedule": "breadth-first"},
        DEPTH_FIRST: {"schedule": "depth-first"},
    }
    if budgets:
        plans |= {f"optimize, budget {budget}": {"memory_budget": budget} for budget in budgets}
    else:
        smallest = smallest_budget(snn, steps, x)
        plans["optimize, smallest budget"] = {"memory_budget": smallest}
        plans["optimize, twice that budget"] = {"memory_budget": 2 * smallest}
    plans["optimize, no budget"] = {}
    with tqdm(plans.items(), desc="compile", unit="plan") as bar:
        return [compiled_way(name, snn, steps, x, **options) for name, options in bar]


def smallest_budget(snn: fx.GraphModule, steps: int, x: Tensor) -> int:
    """The fewest bytes that any schedule needs, from the error for a budget that is too small."""
    try:
        snncompile.optimize(snn, steps, 1, example_input=x, static_input=True, readout="sum")
    except snncompile.InfeasibleBudgetError as error:
        return error.minimum_bytes
    raise AssertionError("a schedule fits into one byte")


@dataclass(frozen=True)
class Row:
    """What was measured of one way.

    Attributes:
        name: As in the table.
        milliseconds: Of one batch, the median of all.
        slowest_milliseconds: Of one batch, the longest of all.
        measured_peak_bytes: Of one batch.
        predicted_peak_bytes, budget_bytes: None where there is none.
        accuracy: Share of all images.
        spike_mismatches: Spikes of the recorded batches that differ from the step loop's.
        output_mismatches: Images whose summed outputs differ in any bit from the step loop's.
        is_recorded: The run that recorded spikes gave the outputs of the run that was timed.
    """

    name: str
    milliseconds: float
    slowest_milliseconds: float
    measured_peak_bytes: int
    predicted_peak_bytes: int | None
    budget_bytes: int | None
    accuracy: float
    spike_mismatches: int
    output_mismatches: int
    is_recorded: bool


Call = Callable[[Callable[[Tensor], Any], Tensor], Any]  # calls a function of a way on one batch, states reset before


def measure(ways: Sequence[Way], snn: nn.Module, batches: Sequence[Tensor], labels: Tensor) -> list[Row]:
    """A row for each way, compared with the first one.

    Args:
        batches: Images [N, *], every batch of one size.
        labels: Of all batches.
    """
    recorded = batches[:SPIKE_BATCHES]
    runs = len(ways) * (2 + len(batches) + len(recorded))
    with torch.no_grad(), tqdm(total=runs, desc="evaluate", unit="run") as bar:

        def call(function: Callable[[Tensor], Any], x: Tensor) -> Any:
            functional.reset_net(snn)
            bar.update()
            return function(x)

        peaks = measure_peaks(ways, call, batches[0])
        seconds, outputs = time_runs(ways, call, batches)
        mismatches, sums = count_mismatches(ways, call, recorded)
    return [
        Row(
            name=way.name,
            milliseconds=statistics.median(seconds[number]) * 1e3,
            slowest_milliseconds=max(seconds[number]) * 1e3,
            measured_peak_bytes=peaks[number],
            predicted_peak_bytes=None if way.compiled is None else way.compiled.report.predicted_peak_bytes,
            budget_bytes=None if way.compiled is None else way.compiled.options.memory_budget,
            accuracy=(outputs[number].argmax(1) == labels).double().mean().item(),
            spike_mismatches=mismatches[number],
            output_mismatches=int((outputs[number] != outputs[0]).any(1).sum()),
            # By hand, layer by layer is summed in an order of torch's choice.
            is_recorded=way.compiled is None or torch.equal(sums[number], outputs[number][: len(sums[number])]),
        )
        for number, way in enumerate(ways)
    ]


def measure_peaks(ways: Sequence[Way], call: Call, x: Tensor) -> list[int]:
    """Bytes of each way on one batch, after a call that warms it up."""
    peaks = []
    for way in ways:
        call(way.run, x)
        peaks.append(snncompile.measure_peak(partial(call, way.run, x)))
    return peaks


def time_runs(ways: Sequence[Way], call: Call, batches: Sequence[Tensor]) -> tuple[list[list[float]], list[Tensor]]:
    """Seconds of each way on each batch, and its outputs on all of them.

    The ways take turns on each batch, so that a machine that is busy for a while slows them all.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    outputs: list[list[Tensor]] = [[] for _ in ways]
    for x in batches:
        for way, times, results in zip(ways, seconds, outputs, strict=True):
            started = time.perf_counter()
            results.append(call(way.run, x))
            times.append(time.perf_counter() - started)
    return seconds, [torch.cat(results) for results in outputs]


def count_mismatches(ways: Sequence[Way], call: Call, batches: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Spikes of each way that differ from the first way's, and its outputs summed step by step, on all batches."""
    mismatches = [0 for _ in ways]
    sums: list[list[Tensor]] = [[] for _ in ways]
    for x in batches:
        expected: list[Tensor] = []
        for number, way in enumerate(ways):
            output, *sequences = call(way.record, x)
            spikes = [sequence != 0 for sequence in sequences]
            expected = expected or spikes
            mismatches[number] += sum(int((a != b).sum()) for a, b in zip(spikes, expected, strict=True))
            sums[number].append(reduce(torch.add, output.unbind(0)))
    return mismatches, [torch.cat(parts) for parts in sums]


@dataclass(frozen=True)
class Claim:
    """Something that the table must show; `holds` is None where this run is too small to tell."""

    text: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "ok    ", False: "FAILED", None: "n/a   "}[self.holds]
        return f"{verdict}  {self.text}"


def judge(rows: Sequence[Row], steps: int) -> list[Claim]:
    loop, depth_first = (next(row for row in rows if row.name == name) for name in (STEP_LOOP, DEPTH_FIRST))
    others = [f"{row.name} {row.accuracy:.2%}" for row in rows if row.accuracy != loop.accuracy]
    budgeted = [(row.measured_peak_bytes, row.budget_bytes) for row in rows if row.budget_bytes is not None]
    tightest = min(budget for _, budget in budgeted)
    is_long = steps >= MIN_RATIO_STEPS
    layers = min(row.measured_peak_bytes for row in rows if row.name in (PLAIN_LAYERS, BREADTH_FIRST))
    return [
        Claim(
            f"accuracy: every row has the step loop's {loop.accuracy:.2%}"
            + (f", but {', '.join(others)}" if others else ""),
            not others,
        ),
        Claim(
            f"depth-first: {depth_first.spike_mismatches} spikes differ from the step loop's, and "
            f"{depth_first.output_mismatches} images' outputs differ in any bit",
            depth_first.spike_mismatches == 0 and depth_first.output_mismatches == 0,
        ),
        Claim(
            "budgets: " + ", ".join(f"{peak / MIB:.2f} of {budget / MIB:.2f} MiB used" for peak, budget in budgeted),
            all(peak <= budget for peak, budget in budgeted),
        ),
        Claim(
            f"memory: layer by layer needs {layers / tightest:.1f} times the tightest budget"
            + (f", at least {MIN_RATIO} expected" if is_long else "; not judged, the steps are too few"),
            layers >= MIN_RATIO * tightest if is_long else None,
        ),
        Claim(
            "recording: the runs whose spikes were counted gave the outputs of the runs that were timed",
            all(row.is_recorded for row in rows),
        ),
    ]


def render_table(rows: Sequence[Row]) -> str:
    """A Markdown table that lines up in a terminal too."""
    header = ["", "time per batch", "measured peak", "predicted peak", "budget", "accuracy", "spike mismatches"]
    cells = [header]
    for row in rows:
        peaks = (row.measured_peak_bytes, row.predicted_peak_bytes, row.budget_bytes)
        cells.append(
            [
                row.name,
                f"{row.milliseconds:.0f} ms",
                *("–" if size is None else f"{size / MIB:.2f} MiB" for size in peaks),
                f"{row.accuracy:.2%}",
                f"{row.spike_mismatches:,}",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    ]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
