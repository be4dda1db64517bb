"""Predicts the peak of a training step: forward and backward of short runs without data, drawn out to T steps.

While one and the same node computes, or goes backward, in the same half of the run, what is held grows by the same
bytes with every further step. So each such phase lies on a line of its own, which a few short runs of the emitted
program itself fix; the peak is the highest of the lines at T. A long chunk is shortened as well, with everything that
grows with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import FakeNetwork, RandomState, adapter_of, copy_network, module_of, without_hooks
from ..functional import reset_net
from ..ir import Batching, OpKind, StepGraph, TensorType
from ..options import Options
from ..schedule import Loop, Schedule, Segment
from ..torch_private import NEEDS_DATA, tree_leaves
from .memory import MemoryTracker
from .node_program import empty_like_type, zeros_like_type
from .program import Program
from .scan_kernels import ScanKernels

# Lengths to run for: the second step that goes backward, the first to add up gradients, belongs to the first half.
_FEW, _MORE = 4, 6


def training_peak(
    net: nn.Module,
    graph: StepGraph,
    schedule: Schedule,
    inputs: tuple[TensorType, ...],
    options: Options,
    *,
    input_gradients: bool,
    kernels: ScanKernels | None = None,
) -> int:
    """Peak bytes of one call and its backward, gradients of all parameters included."""

    def peaks_of(run: Schedule) -> _Peaks:
        return _run(net, graph, run, inputs, options, input_gradients=input_gradients, kernels=kernels)

    def peaks_at(chunk: int, loops: int) -> _Peaks:
        return peaks_of(Schedule(chunk * loops, _with_chunk(schedule.root, chunk), schedule.label))

    steps, chunk = schedule.steps, schedule.root.chunk
    # What takes the whole sequence was captured for this length.
    is_bound = any(node.batching is Batching.WHOLE for node in graph)
    if is_bound or steps <= _MORE * min(chunk, _MORE):
        return _highest(peaks_of(schedule))
    chunks = (chunk,) if chunk <= _MORE else (_FEW, _MORE)
    counts = (1,) if chunk == steps else (_FEW, _MORE)
    at_chunks = [_through(counts, [peaks_at(length, count) for count in counts], steps / chunk) for length in chunks]
    return _highest(_through(chunks, at_chunks, chunk))


_Peaks = dict[tuple[str, str], float]  # (phase, half of it) -> the most bytes held in it


def _highest(peaks: _Peaks) -> int:
    return math.ceil(max(peaks.values(), default=0))


def _through(lengths: Sequence[int], peaks: Sequence[_Peaks], at: float) -> _Peaks:
    """The line through two points, phase by phase, or the one point there is."""
    if len(lengths) == 1:
        return peaks[0]
    (x0, x1), (y0, y1) = lengths, peaks
    share = (at - x0) / (x1 - x0)
    return {phase: y0[phase] + share * (y1[phase] - y0[phase]) for phase in y0.keys() & y1.keys()}


class _PhaseTracker(MemoryTracker):
    """Sorts what is held at each allocation by the phase of the run."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, list[int]] = {}
        self._since_mark: list[int] = []
        self._phase = "backward"

    def _add(self, key: int, storage: Any) -> None:
        super()._add(key, storage)
        self._since_mark.append(self.current_bytes)

    def ends(self, phase: str) -> None:
        """What was allocated since the last mark belongs to this phase."""
        self._held.setdefault(phase, []).extend(self._since_mark)
        self._since_mark = []

    def on_node(self, name: str, value: Any) -> None:
        """A node was computed; when the gradient of its value is known, it goes backward."""
        self.ends(f"forward {name}")

        def goes_backward(_: Tensor) -> None:
            self.ends(self._phase)
            self._phase = f"backward {name}"

        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(goes_backward)

    def peaks(self) -> _Peaks:
        """The peaks of the phases, backward's last included."""
        self.ends(self._phase)
        peaks: _Peaks = {}
        for phase, held in self._held.items():
            middle = (len(held) + 1) // 2
            for half, part in (("first", held[:middle]), ("second", held[middle:] or held)):
                if part:
                    peaks[phase, half] = max(part)
        return peaks


def _with_chunk(loop: Loop, chunk: int) -> Loop:
    """The nest with its outermost chunk changed, and inner ones shortened in proportion."""
    body = tuple(
        item if isinstance(item, Segment) else _with_chunk(item, max(1, round(item.chunk * chunk / loop.chunk)))
        for item in loop.body
    )
    return Loop(chunk, body)


def _run(
    net: nn.Module,
    graph: StepGraph,
    schedule: Schedule,
    inputs: tuple[TensorType, ...],
    options: Options,
    *,
    input_gradients: bool,
    kernels: ScanKernels | None,
) -> _Peaks:
    def watch(twin: nn.Module, make: Callable[[TensorType], Tensor]) -> _Peaks:
        return _watch(twin, net, graph, schedule, inputs, options, make, input_gradients, kernels)

    with RandomState(), torch.enable_grad():
        fakes = FakeNetwork(net)
        try:
            with fakes.mode:
                return watch(fakes.net, empty_like_type)
        except NEEDS_DATA:
            pass  # the code of a backward function, at least
        except Exception:
            if all(node.kind not in (OpKind.OPAQUE, OpKind.LOAD) for node in graph):
                raise
        # The code of an opaque module, or of a first step that the network runs itself, needs data.
        twin = without_hooks(copy_network(net, {}))
        return watch(twin, zeros_like_type)


def _watch(
    net: nn.Module,
    original: nn.Module,
    graph: StepGraph,
    schedule: Schedule,
    inputs: tuple[TensorType, ...],
    options: Options,
    make: Callable[[TensorType], Tensor],
    input_gradients: bool,
    kernels: ScanKernels | None,
) -> _Peaks:
    """Run forward and backward of a twin from reset states, and follow the memory."""
    for node in graph:
        if node.kind is OpKind.STATEFUL:
            module = module_of(net, node)
            adapter = adapter_of(module)
            adapter.write(module, adapter.reset_values(module))
        elif node.kind is OpKind.OPAQUE:
            reset_net(net.get_submodule(node.target))
    tracker = _PhaseTracker()
    program = Program(
        net,
        graph,
        schedule,
        options.readout,
        needs_grad=True,
        static_input=options.static_input,
        on_node=tracker.on_node,
        kernels=kernels,
        original=original,
    )
    sequences = [make(leaf if options.static_input else leaf.of_length(schedule.steps)) for leaf in inputs]
    for sequence in sequences:
        sequence.requires_grad_(input_gradients and sequence.is_floating_point())
    with tracker:
        collectors = program.compute(*sequences)
        tracker.ends("forward")
        outputs = program.collect(collectors)
        del collectors
        tracker.ends("collect")
        try:
            backward_from_ones(outputs)
        except RuntimeError as error:
            # The forward of such a network can be run all the same. Any other failure must not shorten the prediction.
            if "derivative for" not in str(error):
                raise
    return tracker.peaks()


def backward_from_ones(outputs: Any) -> None:
    """Backward with a gradient of ones from every output tensor that records one."""
    recorded = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if recorded:
        torch.autograd.backward(recorded, [torch.ones_like(leaf) for leaf in recorded])
