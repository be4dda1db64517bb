"""From a schedule to a program: readable Python source, one loop a line of the nest, one line a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..ir import OpKind, StepGraph, TensorType, has_registers
from ..schedule import Liveness, Loop, Path, Schedule, Segment, hoisted_deaths, is_invariant_output, output_names
from .lowering import Lowering
from .names import Namespace, variable_names


@dataclass(frozen=True)
class Emitted:
    """A program as text and the global names it needs.

    `run(inputs..., net, const, state, out)`: inputs `[T, N, *]` (or `[N, *]` if static); modules, constants and states
    by qualified name; one collector for each output tensor.
    """

    source: str
    namespace: dict[str, Any]


def emit_program(
    graph: StepGraph, schedule: Schedule, *, needs_grad: bool, on_node: Callable[[str, Any], None] | None = None
) -> Emitted:
    """Write the loop nest that runs a graph by a schedule.

    Args:
        graph: With all facts that a schedule needs.
        schedule: The loop nest.
        needs_grad: Buffers must be followed by autograd.
        on_node: Called with each scheduled node's name and value as it is computed, to profile a run.
    """
    namespace = Namespace(needs_grad=needs_grad)
    if on_node is not None:
        namespace.globals["on_node"] = on_node
    source = _Emitter(graph, schedule, namespace).emit()
    return Emitted(source, namespace.globals)


class _Emitter:
    def __init__(self, graph: StepGraph, schedule: Schedule, namespace: Namespace) -> None:
        self.graph = graph
        self.schedule = schedule
        self.lowering = Lowering(graph, namespace)
        self.needs_grad = namespace.needs_grad
        self.is_profiled = "on_node" in namespace.globals
        self.liveness = Liveness(graph, schedule)
        self.names = variable_names(node.name for node in graph)
        self.lines: list[str] = []

    def emit(self) -> str:
        inputs = ", ".join(self.names[node.name] for node in self.graph.inputs)
        # Where a register holds nothing yet, the first steps were run before.
        self.first = "first" if has_registers(self.graph) else "0"
        begin = f", {self.first}" if has_registers(self.graph) else ""
        self._line(0, f"def run({inputs}, net, const, state, out{begin}):")
        self._line(1, f'"""{self.schedule.label}: T = {self.schedule.steps}."""')
        self._constants()
        self._hoisted()
        if self.liveness.loop_of:
            self._split_inputs()
            self._loop(self.schedule.root, (), 1, self.first, str(self.schedule.steps))
        self._invariant_outputs()
        return "\n".join(self.lines) + "\n"

    def _line(self, indent: int, text: str) -> None:
        self.lines.append("    " * indent + text)

    def _constants(self) -> None:
        for node in self.graph:
            if node.kind is OpKind.CONSTANT:
                self._line(1, f"{self.names[node.name]} = const[{node.target!r}]")

    def _hoisted(self) -> None:
        deaths = hoisted_deaths(self.graph)
        for node in self.graph:
            if node.invariant and node.kind not in (OpKind.INPUT, OpKind.CONSTANT):
                expression = self.lowering.step(node, self.names.__getitem__)
                self._line(1, f"{self.names[node.name]} = {expression}  # once: the same at every step")
                self._delete(1, [self.names[name] for name in deaths.get(node.name, ())])

    def _split_inputs(self) -> None:
        """The steps of what the outermost loop reads, if gradients flow back to it."""
        for node in self.graph.inputs if self.needs_grad else ():
            readers = self.graph.consumers[node.name]
            if not node.invariant and any(self.liveness.loop_of.get(reader) == () for reader in readers):
                name = self.names[node.name]
                self._line(1, f"{self._parts(name)} = split_steps({name}, {self.first}, {self.schedule.root.chunk})")

    def _loop(self, loop: Loop, path: Path, indent: int, start: str, stop: str) -> None:
        """The loop at `path`, over the steps [start, stop) given by source text."""
        begin, end = _begin(path), _end(path)
        if loop.chunk == 1:
            self._line(indent, f"for {begin} in range({start}, {stop}):")
        else:
            self._line(indent, f"for {begin} in range({start}, {stop}, {loop.chunk}):")
            self._line(indent + 1, f"{end} = min({begin} + {loop.chunk}, {stop})")
        for number, item in enumerate(loop.body):
            inner = (*path, number)
            if isinstance(item, Segment):
                for name in item.nodes:
                    self._node(name, path, indent + 1, chunked=loop.chunk > 1)
            else:
                self._inner_loop(item, path, inner, indent + 1)

    def _inner_loop(self, loop: Loop, path: Path, inner: Path, indent: int) -> None:
        opened = [buffer.name for buffer in self.liveness.opened_in(path, inner[-1])]
        length = self._length(path)
        for name in opened:
            self._line(indent, f"{self._buffer(name)} = Buffer({length})")
        stop = _end(path) if self._is_chunked(path) else f"{_begin(path)} + 1"
        self._loop(loop, inner, indent, _begin(path), stop)
        for name in opened:
            self._line(indent, f"{self._buffer(name)} = {self._buffer(name)}.take()")
        self._delete(indent, self._dead_at(inner))

    def _node(self, name: str, path: Path, indent: int, *, chunked: bool) -> None:
        node = self.graph[name]
        variable = self.names[name]

        def spell(source: str) -> str:
            return self._read(source, name, path, chunked=chunked)

        if node.output_slot is not None:
            steps = self._length(path) if chunked else None
            expression = self.lowering.into_output(node, spell, _begin(path), steps)
        elif chunked:
            expression = self.lowering.chunk(node, spell, self._length(path))
        else:
            expression = self.lowering.step(node, spell)
        parts = "" if node.chain is None else f"  # {', '.join(part.name for part in node.chain.nodes)}"
        self._line(indent, expression if node.kind is OpKind.STORE else f"{variable} = {expression}{parts}")
        if self.is_profiled:
            self._line(indent, f"on_node({name!r}, {'None' if node.kind is OpKind.STORE else variable})")
        put = "put" if chunked else "put_step"
        if name in self.liveness.buffers:
            offset = self._offset(path, self.liveness.buffers[name].home)
            self._line(indent, f"{self._buffer(name)}.{put}({offset}, {variable})")
        for slot in self.liveness.output_slots.get(name, ()) if node.output_slot is None else ():
            self._line(indent, f"out[{slot}].{put}({_begin(path)}, {variable})")
        self._delete(indent, self._dead_at((name,)))

    def _read(self, source: str, reader: str, path: Path, *, chunked: bool) -> str:
        """How a node in the loop at `path` reads a value: whole, or the part of it that its steps cover."""
        node = self.graph[source]
        if node.invariant:
            return self.names[source]
        if node.kind is OpKind.INPUT and self.needs_grad and path == ():
            offset = _begin(path) if self.first == "0" else f"({_begin(path)} - {self.first})"
            return f"{self._parts(self.names[source])}[{offset}{f' // {self.schedule.root.chunk}' if chunked else ''}]"
        if node.kind is OpKind.INPUT:
            return self._slice(self.names[source], _begin(path), _end(path), chunked=chunked)
        home = self.liveness.source_home(source, reader)
        is_local = home == self.liveness.loop_of[source]
        if is_local and (home == path or not self._is_chunked(home)):
            return self.names[source]
        variable = self.names[source] if is_local else self._buffer(source)
        begin, end = self._offset(path, home), f"{_end(path)} - {_begin(home)}"
        if not is_local and self.liveness.is_filling(source, reader):
            return f"{variable}.part({begin}, {end})" if chunked else f"{variable}.step({begin})"
        if home == path and chunked:
            return variable
        if isinstance(node.value, TensorType):
            return self._slice(variable, begin, end, chunked=chunked)
        return f"part_of({variable}, {begin}, {end})" if chunked else f"step_of({variable}, {begin})"

    @staticmethod
    def _slice(variable: str, begin: str, end: str, *, chunked: bool) -> str:
        return f"{variable}[{begin}:{end}]" if chunked else f"{variable}[{begin}]"

    @staticmethod
    def _offset(path: Path, home: Path) -> str:
        return "0" if path == home else f"{_begin(path)} - {_begin(home)}"

    def _length(self, path: Path) -> str:
        return f"{_end(path)} - {_begin(path)}" if self._is_chunked(path) else "1"

    def _is_chunked(self, path: Path) -> bool:
        loop = self.schedule.root
        for number in path:
            item = loop.body[number]
            assert isinstance(item, Loop)
            loop = item
        return loop.chunk > 1

    def _buffer(self, name: str) -> str:
        return f"{self.names[name]}_seq"

    @staticmethod
    def _parts(variable: str) -> str:
        return f"{variable}_parts"

    def _dead_at(self, point: tuple[str, ...] | Path) -> list[str]:
        dead = [self.names[name] for name in self.liveness.local_deaths.get(point, ())]
        return dead + [self._buffer(name) for name in self.liveness.buffer_deaths.get(point, ())]

    def _delete(self, indent: int, variables: Iterable[str]) -> None:
        if names := ", ".join(variables):
            self._line(indent, f"del {names}")

    def _invariant_outputs(self) -> None:
        """Outputs that no scheduled node computes: the input itself, or a hoisted value at every step."""
        for slot, name in enumerate(output_names(self.graph)):
            if not is_invariant_output(self.graph, name):
                continue
            value, first = self.names[name], self.first
            if self.graph[name].invariant:
                length = f"{self.schedule.steps}" if first == "0" else f"{self.schedule.steps} - {first}"
                value += f".expand({length}{', -1' * len(self.graph[name].value.shape)})"
            elif first != "0":
                value += f"[{first}:]"
            self._line(1, f"out[{slot}].put({first}, {value})")


def _begin(path: Path) -> str:
    return f"t{len(path)}"


def _end(path: Path) -> str:
    return f"e{len(path)}"
