"""The one peak simulator: walks a schedule and follows every byte that the emitted program holds.

Iterations of a loop differ only in whether states exist yet, in the length of the last chunk and, if only the last step
is read out, in whether that is among them; so of each loop the first, the second and the last iteration are walked.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir import Node, OpKind, StepGraph, accumulation_dtype, has_registers, result_dtype, tensor_types
from ..options import Readout
from .liveness import Liveness, Path, is_invariant_output, output_names
from .measurements import Measurements
from .plan import Loop, Schedule, Segment


@dataclass(frozen=True)
class Peak:
    """The most that one call holds.

    Attributes:
        peak_bytes: By the definition of `memory_budget`.
        node: Where it is reached.
        segment_peaks: For each segment in order, the most that is held while it runs.
    """

    peak_bytes: int
    node: str
    segment_peaks: tuple[int, ...]


def simulate_peak(graph: StepGraph, schedule: Schedule, measurements: Measurements, readout: Readout) -> Peak:
    """Predict the peak bytes of one inference call."""
    # Where the network runs the first step itself, chunks begin one step later, and the last one has another length.
    begins = (0, 1) if has_registers(graph) and schedule.steps > 1 else (0,)
    walkers = [_Walker(graph, schedule, measurements, readout) for _ in begins]
    for walker, begin in zip(walkers, begins, strict=True):
        walker.run(begin)
    highest = max(walkers, key=lambda walker: walker.peak)
    peaks = tuple(max(walker.segment_peaks[path] for walker in walkers) for path in sorted(highest.segment_peaks))
    return Peak(highest.peak, highest.peak_node, peaks)


def gathered_bytes(graph: StepGraph, name: str) -> int:
    """Bytes of one step of a value in a buffer that gathers it."""
    return sum(leaf.gathered_bytes for leaf in tensor_types(graph[name].value))


def state_bytes(graph: StepGraph, name: str) -> int:
    """Bytes of the state that a node carries."""
    return sum(leaf.nbytes for leaf in tensor_types(graph[name].state))


def readout_bytes(graph: StepGraph, slot: int, steps: int, readout: Readout) -> int:
    """Bytes of one output tensor of the whole call, its accumulator included."""
    output = graph[output_names(graph)[slot]]
    (leaf,) = tensor_types(output.value)
    if output.timeless:
        return leaf.nbytes
    if readout == "sequence":
        return leaf.nbytes * steps
    if readout == "last":
        return leaf.nbytes
    accumulated, returned = accumulation_dtype(leaf.dtype), result_dtype(leaf.dtype)
    elements = leaf.nbytes // leaf.dtype.itemsize
    return elements * (accumulated.itemsize + (returned.itemsize if returned != accumulated else 0))


_Variable = tuple[str, str]  # ("local" | "buffer", node name) or ("state", module)


class _Storage:
    """Bytes in one allocation, until no variable holds them."""

    def __init__(self, size: int, holder: _Variable) -> None:
        self.size = size
        self.holders = {holder}


class _Walker:
    """The state of one simulated call: which variables exist, and which storages they keep alive."""

    def __init__(self, graph: StepGraph, schedule: Schedule, measurements: Measurements, readout: Readout) -> None:
        self.graph = graph
        self.schedule = schedule
        self.measurements = measurements
        self.readout = readout
        self.liveness = Liveness(graph, schedule)
        self.live = 0
        self.peak = 0
        self.peak_node = ""
        self.segment_peaks: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}  # steps that each loop's current iteration covers
        self.end = 1  # the step before which the current iteration of the innermost loop ends
        self.storage_of: dict[_Variable, _Storage] = {}
        self.outputs: set[int] = set()

    def run(self, begin: int) -> None:
        """Follow a call whose loop nest begins at a step."""
        self._first_step()
        deaths = hoisted_deaths(self.graph)
        for node in self.graph:
            if node.invariant and node.kind not in (OpKind.INPUT, OpKind.CONSTANT):
                self._execute(node, 1, chunked=False)
                for name in deaths.get(node.name, ()):
                    self._drop(("local", name))
        self._loop(self.schedule.root, (), begin, self.schedule.steps)
        for slot, name in enumerate(output_names(self.graph)):
            if is_invariant_output(self.graph, name):
                self._open_output(slot)

    def _first_step(self) -> None:
        """Where a register is empty, the network runs a step itself, which leaves states and outputs behind."""
        if not has_registers(self.graph):
            return
        for node in self.graph:
            state = ("state", node.target)
            if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE, OpKind.LOAD) and state not in self.storage_of:
                self._allocate(state, state_bytes(self.graph, node.name), node.name)
        for slot in range(len(output_names(self.graph))):
            self._open_output(slot)
        self._note(self.measurements.first_step_bytes, "the first step")

    def _loop(self, loop: Loop, path: Path, begin: int, end: int) -> None:
        count = -(-(end - begin) // loop.chunk)
        walked = {0, min(1, count - 1)}
        if (end - begin) % loop.chunk or self.readout == "last":
            walked.add(count - 1)
        for iteration in sorted(walked):
            first = begin + iteration * loop.chunk
            self.lengths[path] = min(loop.chunk, end - first)
            self.end = first + self.lengths[path]
            for number, item in enumerate(loop.body):
                inner = (*path, number)
                if isinstance(item, Segment):
                    self._segment(item, inner, self.lengths[path], chunked=loop.chunk > 1)
                else:
                    self._loop(item, inner, first, first + self.lengths[path])
                self._die(inner)

    def _segment(self, segment: Segment, path: Path, length: int, *, chunked: bool) -> None:
        peak_before, self.peak = self.peak, self.live
        node_before = self.peak_node
        for name in segment.nodes:
            self._node(self.graph[name], length, chunked=chunked)
        self.segment_peaks[path] = max(self.segment_peaks.get(path, 0), self.peak)
        if self.peak <= peak_before:
            self.peak, self.peak_node = peak_before, node_before

    def _node(self, node: Node, length: int, *, chunked: bool) -> None:
        state = ("state", node.target)
        # A reset state is first spread over the input's shape; what an opaque module keeps appears with its first step.
        exists_before = node.kind is OpKind.STATEFUL or (node.kind is OpKind.OPAQUE and length > 1)
        if exists_before and state not in self.storage_of:
            self._allocate(state, state_bytes(self.graph, node.name), node.name)
        if node.output_slot is not None:
            self._open_output(node.output_slot)
        self._execute(node, length, chunked=chunked)
        for slot in self.liveness.output_slots.get(node.name, ()):
            self._open_output(slot)
        if node.name in self.liveness.buffers and ("buffer", node.name) not in self.storage_of:
            home = self.liveness.buffers[node.name].home
            size = gathered_bytes(self.graph, node.name) * self.lengths[home]
            self._allocate(("buffer", node.name), size, node.name)
        self._die((node.name,))

    def _execute(self, node: Node, length: int, *, chunked: bool) -> None:
        footprint = self.measurements.footprint(self.graph, node, length, chunked=chunked)
        if node.kind is OpKind.STORE:
            self._store(node)
            return
        self._note(self.live + footprint.work_bytes, node.name)
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE):
            self._renew_state(node)
        variable = ("local", node.name)
        if footprint.alias_of == node.name:
            operand: _Variable | None = ("state", node.target)
        else:
            operand = None if footprint.alias_of is None else self._read(footprint.alias_of, node.name)
        if operand in self.storage_of:
            self.storage_of[variable] = self.storage_of[operand]
            self.storage_of[variable].holders.add(variable)
        else:
            self._allocate(variable, footprint.output_bytes, node.name)

    def _renew_state(self, node: Node) -> None:
        """The next state takes the place of the last, which an output of the last step may still hold."""
        state = ("state", node.target)
        if state in self.storage_of:
            if len(self.storage_of[state].holders) == 1:
                return  # as much goes as comes
            self._drop(state)
        self._allocate(state, state_bytes(self.graph, node.name), node.name)

    def _store(self, node: Node) -> None:
        """A register keeps the very tensor stored, or a copy where that is a part of something larger."""
        register, size = ("state", node.target), state_bytes(self.graph, node.name)
        source = self.storage_of.get(self._read(node.refs[0], node.name))
        if source is None or source.size != size:
            source = _Storage(size, register)
            self.live += size
            self._note(self.live, node.name)
        source.holders.add(register)
        if register in self.storage_of and self.storage_of[register] is not source:
            self._drop(register)
        self.storage_of[register] = source

    def _read(self, name: str, reader: str) -> _Variable:
        """The variable from which a reader takes a value."""
        home = self.liveness.loop_of.get(name)
        if home is None or reader not in self.liveness.loop_of:
            return ("local", name)
        return ("local" if self.liveness.loop_of[reader][: len(home)] == home else "buffer", name)

    def _allocate(self, variable: _Variable, size: int, node: str) -> None:
        self.storage_of[variable] = _Storage(size, variable)
        self.live += size
        self._note(self.live, node)

    def _die(self, point: tuple[str, ...] | Path) -> None:
        for name in self.liveness.local_deaths.get(point, ()):
            self._drop(("local", name))
        for name in self.liveness.buffer_deaths.get(point, ()):
            self._drop(("buffer", name))

    def _drop(self, variable: _Variable) -> None:
        storage = self.storage_of.pop(variable)
        storage.holders.remove(variable)
        if not storage.holders:
            self.live -= storage.size

    def _note(self, held: int, name: str) -> None:
        if held > self.peak:
            self.peak, self.peak_node = held, name

    def _open_output(self, slot: int) -> None:
        is_kept = self.readout != "last" or self.end == self.schedule.steps
        if is_kept and slot not in self.outputs:
            self.outputs.add(slot)
            self.live += readout_bytes(self.graph, slot, self.schedule.steps, self.readout)
            self._note(self.live, output_names(self.graph)[slot])


def hoisted_deaths(graph: StepGraph) -> dict[str, tuple[str, ...]]:
    """Hoisted values that die among the hoisted nodes: node -> values that no one reads after it."""
    deaths: dict[str, list[str]] = {}
    outputs = set(output_names(graph))
    for node in graph:
        if not node.invariant or node.kind in (OpKind.INPUT, OpKind.CONSTANT) or node.name in outputs:
            continue
        readers = [graph[reader] for reader in graph.consumers[node.name]]
        if readers and all(reader.invariant for reader in readers):
            deaths.setdefault(readers[-1].name, []).append(node.name)
    return {name: tuple(values) for name, values in deaths.items()}
