"""An independent referee of the peak simulator: every cell of the unrolled view, in the order the schedule prescribes.

It walks all iterations of all loops, finds for each cell who reads it by the edges of the unrolled graph, and follows
every variable from first principles:

* a node that runs over the steps [a, b) leaves a *local*, held until all that reads it in the same iteration of the
  loop around it is done (where the reader stands in an inner loop, until that loop is done);
* readers outside that iteration read a *buffer*, which belongs to the iteration of the innermost loop that contains
  producer and all such readers, spans the steps of that iteration, exists from the first piece put into it on, and is
  held until its last reader (or the loop around it) is done;
* a view of an operand holds the operand's storage instead of one of its own;
* a state exists from before the first step of its module on (from its end on, if opaque) and is renewed by every run;
  an output that is the state itself holds the state of its run;
* an output tensor exists from the first step that counts on, to the end;
* a register starts with a tensor of its own and then holds the tensors stored in it;
* outputs that no cell computes are filled at the very end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from snncompile.ir import (
    Cell,
    EdgeKind,
    Node,
    OpKind,
    StepGraph,
    accumulation_dtype,
    result_dtype,
    tensor_types,
    unroll,
)
from snncompile.schedule import Loop, Measurements, Schedule, Segment

Iteration = tuple[tuple[int, ...], int, int]  # loop (positions from the root), first step, end step


@dataclass
class Event:
    """One node over a range of steps, inside nested loop iterations (outermost first)."""

    node: str
    begin: int
    end: int
    stack: tuple[Iteration, ...]
    chunked: bool
    segment: int  # in program order


@dataclass
class Held:
    """The most that is held during a call, the nodes at which that is so, and the most during each segment."""

    peak_bytes: int = 0
    nodes: set[str] = field(default_factory=set)
    segment_peaks: dict[int, int] = field(default_factory=dict)


@dataclass
class Storage:
    """Bytes that one or more variables hold."""

    size: int


def events_of(schedule: Schedule, start: int) -> list[Event]:
    """Every execution from a step on, in order."""
    events: list[Event] = []
    segments: dict[tuple[int, ...], int] = {}  # positions from the root -> number

    def walk(loop: Loop, path: tuple[int, ...], begin: int, end: int, stack: tuple[Iteration, ...]) -> None:
        for first in range(begin, end, loop.chunk):
            last = min(first + loop.chunk, end)
            inner = (*stack, (path, first, last))
            for number, item in enumerate(loop.body):
                if isinstance(item, Segment):
                    segment = segments.setdefault((*path, number), len(segments))
                    events.extend(Event(name, first, last, inner, loop.chunk > 1, segment) for name in item.nodes)
                else:
                    walk(item, (*path, number), first, last, inner)

    walk(schedule.root, (), start, schedule.steps, ())
    return events


def brute_force_peak(graph: StepGraph, schedule: Schedule, measurements: Measurements, readout: str) -> Held:
    """What one call holds, by following everything: from the first step on or, after one of the network's own, from the
    second."""
    has_first_step = any(node.kind is OpKind.LOAD for node in graph) and schedule.steps > 1
    starts = (0, 1) if has_first_step else (0,)
    found = [brute_force_from(start, graph, schedule, measurements, readout) for start in starts]
    highest = max(held.peak_bytes for held in found)
    return Held(
        highest,
        set().union(*(held.nodes for held in found if held.peak_bytes == highest)),
        {number: max(held.segment_peaks[number] for held in found) for number in found[0].segment_peaks},
    )


def brute_force_from(
    start: int, graph: StepGraph, schedule: Schedule, measurements: Measurements, readout: str
) -> Held:
    """What a call holds whose loop nest begins at a step."""
    events = events_of(schedule, start)
    event_of = {Cell(e.node, step): index for index, e in enumerate(events) for step in range(e.begin, e.end)}
    cells = unroll(graph, schedule.steps)
    data = {(edge.source, edge.target) for edge in graph.edges if edge.kind is EdgeKind.DATA}
    readers: dict[int, set[int]] = defaultdict(set)
    for source, target in cells.edges:
        is_data = source.step == target.step and (source.name, target.name) in data
        if is_data and source in event_of and target in event_of:
            readers[event_of[source]].add(event_of[target])

    local_end: dict[int, int] = {}
    outside: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, event in enumerate(events):
        inside = [r for r in readers[index] if event.stack[-1] in events[r].stack]
        outside[event.node] += [(index, r) for r in readers[index] if r not in inside]
        depth = len(event.stack)
        local_end[index] = max([end_of(events, r, depth) for r in inside], default=index)

    homes = {name: min(common(events[p], events[r]) for p, r in pairs) for name, pairs in outside.items() if pairs}
    buffer_end: dict[tuple[str, Iteration], int] = {}
    for name, depth in homes.items():
        for producer, reader in outside[name]:
            key = (name, events[producer].stack[depth - 1])
            buffer_end[key] = max(buffer_end.get(key, -1), end_of(events, reader, depth))

    return _Replay(graph, schedule, measurements, readout, events, homes, local_end, buffer_end).run()


def common(a: Event, b: Event) -> int:
    """How many loop iterations two events share."""
    return sum(1 for x, y in zip(a.stack, b.stack, strict=False) if x == y)


def end_of(events: list[Event], reader: int, depth: int) -> int:
    """The event after which a reader is done, seen from an iteration `depth` deep: the last of its inner loop."""
    event = events[reader]
    if len(event.stack) == depth:
        return reader
    around, loop = event.stack[:depth], event.stack[depth][0]
    return max(
        index
        for index, other in enumerate(events)
        if other.stack[:depth] == around and len(other.stack) > depth and other.stack[depth][0] == loop
    )


class _Replay:
    def __init__(  # type: ignore[no-untyped-def]
        self, graph, schedule, measurements, readout, events, homes, local_end, buffer_end
    ) -> None:
        self.graph, self.schedule, self.measurements, self.readout = graph, schedule, measurements, readout
        self.events, self.homes, self.local_end, self.buffer_end = events, homes, local_end, buffer_end
        self.storages: dict[object, Storage] = {}  # variable -> storage
        self.held = Held()
        self.segment: int | None = None  # None among what is hoisted

    def note(self, size: int, node: str) -> None:
        if size > self.held.peak_bytes:
            self.held.peak_bytes, self.held.nodes = size, set()
        if size == self.held.peak_bytes:
            self.held.nodes.add(node)
        if self.segment is not None:
            self.held.segment_peaks[self.segment] = max(size, self.held.segment_peaks.get(self.segment, 0))

    def live(self) -> int:
        return sum(storage.size for storage in {id(s): s for s in self.storages.values()}.values())

    def allocate(self, variable: object, size: int, node: str) -> None:
        self.storages[variable] = Storage(size)
        self.note(self.live(), node)

    def run(self) -> Held:
        outputs = _output_names(self.graph)
        if any(node.kind is OpKind.LOAD for node in self.graph):
            self.first_step(outputs)
        self.hoisted()
        for index, event in enumerate(self.events):
            node = self.graph[event.node]
            self.segment = event.segment
            is_first = ("state", node.target) not in self.storages
            appears_within = node.kind is OpKind.OPAQUE and event.end - event.begin > 1
            if is_first and (node.kind is OpKind.STATEFUL or appears_within):
                self.renew_state(node)
            if node.output_slot is not None:
                self.output(node.output_slot, event.node, event.end)
            self.execute(index, event)
            for slot, name in enumerate(outputs):
                if name == event.node:
                    self.output(slot, name, event.end)
            depth = self.homes.get(event.node)
            if depth is not None:
                path, begin, end = event.stack[depth - 1]
                key = ("buffer", event.node, (path, begin, end))
                if key not in self.storages:
                    one = sum(leaf.gathered_bytes for leaf in tensor_types(node.value))
                    self.allocate(key, one * (end - begin), event.node)
            self.forget(index)
        self.segment = None
        for slot, name in enumerate(outputs):
            if self.graph[name].invariant or self.graph[name].kind is OpKind.INPUT:
                self.output(slot, name, self.schedule.steps)
        return self.held

    def first_step(self, outputs: list[str]) -> None:
        """With registers, the network may run a step itself, which leaves all states and opens the outputs."""
        for node in self.graph:
            has_state = node.kind in (OpKind.STATEFUL, OpKind.OPAQUE, OpKind.LOAD)
            if has_state and ("state", node.target) not in self.storages:
                self.renew_state(node)
        for slot, name in enumerate(outputs):
            self.output(slot, name, 1)
        self.note(self.measurements.first_step_bytes, "the first step")

    def store(self, index: int, event: Event) -> None:
        """A register takes the tensor itself, or a copy of a part of something larger."""
        node = self.graph[event.node]
        size = sum(leaf.nbytes for leaf in tensor_types(node.state))
        source = self.storages.get(self.operand(node.refs[0], event))
        if source is None or source.size != size:
            source = Storage(size)
            self.storages["incoming"] = source
            self.note(self.live(), node.name)
            del self.storages["incoming"]
        self.storages["state", node.target] = source

    def renew_state(self, node: Node) -> None:
        size = sum(leaf.nbytes for leaf in tensor_types(node.state))
        self.allocate(("state", node.target), size, node.name)

    def hoisted(self) -> None:
        nodes = [n for n in self.graph if n.invariant and n.kind not in (OpKind.INPUT, OpKind.CONSTANT)]
        outputs = set(_output_names(self.graph))
        for position, node in enumerate(nodes):
            footprint = self.measurements.footprint(self.graph, node, 1, chunked=False)
            self.note(self.live() + footprint.work_bytes, node.name)
            source = ("hoisted", footprint.alias_of)
            if footprint.alias_of is not None and source in self.storages:
                self.storages["hoisted", node.name] = self.storages[source]
            else:
                self.allocate(("hoisted", node.name), footprint.output_bytes, node.name)
            done = {n.name for n in nodes[: position + 1]}
            for held in [key for key in self.storages if key[0] == "hoisted"]:  # type: ignore[index]
                users = self.graph.consumers[held[1]]  # type: ignore[index]
                if users and held[1] not in outputs and set(users) <= done:  # type: ignore[index]
                    del self.storages[held]

    def execute(self, index: int, event: Event) -> None:
        node = self.graph[event.node]
        if node.kind is OpKind.STORE:
            self.store(index, event)
            return
        footprint = self.measurements.footprint(self.graph, node, event.end - event.begin, chunked=event.chunked)
        self.note(self.live() + footprint.work_bytes, event.node)
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE):
            self.renew_state(node)
        source: object = None
        if footprint.alias_of is not None:
            own = footprint.alias_of == node.name
            source = ("state", node.target) if own else self.operand(footprint.alias_of, event)
        if source in self.storages:
            self.storages["local", index] = self.storages[source]
        else:
            self.allocate(("local", index), footprint.output_bytes, event.node)

    def operand(self, name: str, event: Event) -> object:
        """The variable that an event reads a value from."""
        if self.graph[name].invariant:
            return ("hoisted", name)
        for index, other in enumerate(self.events):
            covers = other.node == name and other.begin <= event.begin and event.end <= other.end
            if covers and other.stack[-1] in event.stack:
                return ("local", index)
        depth = self.homes.get(name)
        return None if depth is None else ("buffer", name, event.stack[depth - 1])

    def output(self, slot: int, name: str, end: int) -> None:
        if ("output", slot) in self.storages or (self.readout == "last" and end < self.schedule.steps):
            return
        (leaf,) = tensor_types(self.graph[name].value)
        count = leaf.nbytes // leaf.dtype.itemsize
        accumulated, returned = accumulation_dtype(leaf.dtype), result_dtype(leaf.dtype)
        extra = returned.itemsize if accumulated != returned else 0
        sizes = {"sequence": leaf.nbytes * self.schedule.steps, "last": leaf.nbytes}
        self.allocate(("output", slot), sizes.get(self.readout, count * (accumulated.itemsize + extra)), name)

    def forget(self, index: int) -> None:
        for other, end in self.local_end.items():
            if end == index:
                self.storages.pop(("local", other), None)
        for (name, iteration), end in self.buffer_end.items():
            if end == index:
                self.storages.pop(("buffer", name, iteration), None)


def _output_names(graph: StepGraph) -> list[str]:
    found: list[str] = []

    def visit(value: object) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            for item in value:
                visit(item)
        elif hasattr(value, "name"):
            found.append(value.name)

    visit(graph.output.args)
    return found
