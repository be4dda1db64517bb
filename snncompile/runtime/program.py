"""One plan as a callable: binds the emitted source to the modules, states and constants of a network."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..capture import NeuronChain, adapter_of, has_hooks, out_of_place, resolve_attribute, step_mode_of
from ..codegen import Collector, Emitted, SumReadout, emit_program, make_collector
from ..errors import CaptureError
from ..functional import reset_net
from ..ir import Node, OpKind, StepGraph, TensorType, map_refs, mean_dtype, result_dtype, tensor_types
from ..options import Readout
from ..schedule import Schedule, output_names
from ..torch_private import is_traced, tree_leaves
from .chunk_replays import ChunkReplays, Recorder
from .modules import module_of
from .scan_kernels import ScanKernels
from .states import RegisterSlot, StateSlot


class Program:
    """Runs T steps of a network by one schedule.

    Args:
        net: Owns modules, parameters and states; read anew at every call, so that changed weights are honoured.
        graph: Scheduled graph.
        schedule: The loop nest.
        readout: How outputs are collected.
        needs_grad: Values are recorded for backward.
        static_input: Inputs are those of every step.
        on_node: See `emit_program`.
        on_neuron: Called with the name and the outputs of each neuron within a chain, step by step, without kernels.
        kernels: Run chunks of neurons' steps where they can.
        original: The network that `net` is a twin of, for whose values the kernels are.

    Attributes:
        net, graph, schedule, kernels: As given.
        source: The emitted loop nest.
        needs_grad: As given.
        is_static: As `static_input`.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: StepGraph,
        schedule: Schedule,
        readout: Readout,
        *,
        needs_grad: bool,
        static_input: bool = False,
        on_node: Callable[[str, Any], None] | None = None,
        on_neuron: Callable[[str, Any], None] | None = None,
        kernels: ScanKernels | None = None,
        original: nn.Module | None = None,
    ) -> None:
        self.kernels = kernels
        self.graph = graph
        self.schedule = schedule
        emitted = emit_program(graph, schedule, needs_grad=needs_grad, on_node=on_node)
        self.source = emitted.source
        self._readout: Readout = readout
        self.needs_grad = needs_grad
        self.net = net
        self._run = _load(emitted)
        self._replays: ChunkReplays | None = None
        self._called = [node for node in graph if node.kind in (OpKind.MODULE, OpKind.OPAQUE)]
        self._constants = tuple(node.target for node in graph if node.kind is OpKind.CONSTANT)
        stateful = {node.target: node for node in graph if node.kind is OpKind.STATEFUL}
        self._stateful = {
            target: (module_of(net, node), graph[node.refs[0]].value) for target, node in stateful.items()
        }
        self._originals = {
            target: module_of(original, node) if original is not None else self._stateful[target][0]
            for target, node in stateful.items()
        }
        for module, _ in self._stateful.values():
            if isinstance(module, NeuronChain):
                module.on_neuron = on_neuron
        self._outputs = output_names(graph)
        self._registers = {node.target: node for node in graph if node.kind in (OpKind.STORE, OpKind.LOAD)}
        self._loaded = {node.target: node.value for node in graph if node.kind is OpKind.LOAD}
        self.is_static = static_input

    def watched(self, net: nn.Module, kernels: ScanKernels | None, **watchers: Any) -> Program:
        """The same program on another network, with something that looks on.

        Args:
            net: A copy of the network.
            kernels: As for this class.
            watchers: `on_node`, `on_neuron`.
        """
        return type(self)(net, self.graph, self.schedule, self._readout, kernels=kernels, **self._settings, **watchers)

    def of_steps(self, net: nn.Module, steps: int) -> Program:
        """The same program on a copy of its network, for another number of steps."""
        schedule = replace(self.schedule, steps=steps)
        settings = {**self._settings, "kernels": self.kernels, "original": self.net}
        return type(self)(net, self.graph, schedule, self._readout, **settings)

    def replay_chunks(self, recorder: Recorder) -> None:
        """From now on, replay the chunks of the outermost loop but for the first and what is left at the end.

        Args:
            recorder: Records a chunk in every call.
        """
        steps, chunk = self.schedule.steps, self.schedule.root.chunk
        rest = self._loops_over(steps % chunk) if steps % chunk else None
        self._replays = ChunkReplays(steps, chunk, self.is_static, self._loops_over(chunk), rest, recorder)

    def _loops_over(self, steps: int) -> Callable[..., None]:
        """The loop nest, emitted for so many steps."""
        return _load(emit_program(self.graph, replace(self.schedule, steps=steps), needs_grad=self.needs_grad))

    @property
    def is_replayed(self) -> bool:
        """Whether chunks are replayed."""
        return self._replays is not None

    def states(self) -> dict[str, StateSlot]:
        """The states of neurons and chains as the network holds them now."""
        return {name: slot for name, slot in self._slots().items() if isinstance(slot, StateSlot)}

    @property
    def _settings(self) -> dict[str, Any]:
        return {"needs_grad": self.needs_grad, "static_input": self.is_static}

    def __call__(self, *inputs: Tensor, into: Sequence[Tensor] = ()) -> Any:
        """Run `[T, N, *]` (or a static `[N, *]`) and leave the final states in the modules.

        An error in the middle leaves the states as they were.

        Args:
            inputs: One for each input of the network.
            into: Memory for the outputs, one of `output_types` each; none: they get their own.
        """
        return self.collect(self.compute(*inputs, into=into), into)

    def compute(
        self, *inputs: Tensor, before: Sequence[Collector] = (), into: Sequence[Tensor] = ()
    ) -> list[Collector]:
        """Run the loop nest; the collectors hold what it put out.

        Args:
            inputs: As for a call.
            before: The collectors of the call before, whose sums go on in these.
            into: As for a call.
        """
        for module, value in self._stateful.values():
            adapter_of(module).check(module, value.shape)
        with step_mode_of(self.net.modules(), "s"):
            return self._compute(inputs, before, into)

    def _compute(
        self, inputs: tuple[Tensor, ...], earlier: Sequence[Collector], into: Sequence[Tensor]
    ) -> list[Collector]:
        rooms = into or (None,) * len(self._outputs)
        collectors = [self._collector(name, room) for name, room in zip(self._outputs, rooms, strict=True)]
        for collector, other in zip(collectors, earlier, strict=False):
            if isinstance(collector, SumReadout) and isinstance(other, SumReadout):
                collector.follow(other)
        before = slots = self._slots()
        first = 0
        try:
            first = self._run_until_registers_fit(inputs, collectors)
            if first:
                slots = self._slots()
                for slot in slots.values():
                    slot.take_over()
            if first < self.schedule.steps:
                constants = {path: resolve_attribute(self.net, path) for path in self._constants}
                modules = {node.target: _callable(node, module_of(self.net, node)) for node in self._called}
                run = self._run if self._replays is None or is_traced() else self._replays.run
                run(*inputs, modules, constants, slots, collectors, *((first,) if self._loaded else ()))
        except BaseException:
            if self._loaded:
                for slot in before.values():
                    slot.write()
            raise
        for slot in slots.values():
            slot.commit()
        return collectors

    def _collector(self, name: str, into: Tensor | None) -> Collector:
        """What collects an output; one without time is collected whole."""
        readout = "whole" if self.graph[name].timeless else self._readout
        return make_collector(readout, self.schedule.steps, needs_grad=self.needs_grad, into=into)

    def _slots(self) -> dict[str, StateSlot | RegisterSlot]:
        """The states as the network holds them now."""
        slots: dict[str, StateSlot | RegisterSlot] = {
            target: StateSlot(module, self.kernels, self._originals[target])
            for target, (module, _) in self._stateful.items()
        }
        slots.update({path: RegisterSlot(self.net, path) for path in self._registers})
        return slots

    def _run_until_registers_fit(self, inputs: tuple[Tensor, ...], collectors: list[Collector]) -> int:
        """Run the network as it is while a register does not hold a tensor of its lasting type; returns the steps done.

        That is one step after a reset: the network itself knows what it computes where it has no past.
        """
        for step in range(self.schedule.steps):
            if all(RegisterSlot(self.net, path).fits(leaf) for path, leaf in self._loaded.items()):
                return step
            outputs = self.net(*(x if self.is_static else x[step] for x in inputs))
            leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
            for collector, leaf in zip(collectors, leaves, strict=True):
                collector.put_step(step, leaf)
        return self.schedule.steps

    @property
    def obstacle_to_export(self) -> str:
        """Why torch cannot write down what the program does; empty if it can."""
        for node in self.graph:
            if node.kind is OpKind.OPAQUE:
                return f"{node.where} is called as it is at every step, and what its Python code does would be fixed"
            if node.channels_last or node.events_below:
                what = "computes with a copy of its weight that is made for this machine"
                return f"{node.where} {what}; compile without reassociate=True"
        return ""

    @contextmanager
    def reset(self) -> Iterator[None]:
        """States are reset within, and afterwards as they were before."""
        before = self._slots()
        reset_net(self.net)
        try:
            yield
        finally:
            reset_net(self.net)
            for slot in before.values():
                slot.write()

    def collect(self, collectors: Iterable[Collector], into: Sequence[Tensor] = ()) -> Any:
        """The network's output, in its structure.

        Args:
            collectors: One for each output tensor.
            into: Memory for them, as for a call.
        """
        taken = (collector.take() for collector in collectors)
        return self._structured(_written(taken, into))

    @property
    def output_types(self) -> Any:
        """Types of what a call returns, in its structure."""
        return self._structured(map(self._output_type, self._outputs))

    def _structured(self, values: Iterable[Any]) -> Any:
        """One value for each output tensor, in the structure of what the network returns."""
        left = iter(values)
        return map_refs(self.graph.output.args[0], lambda _: next(left))

    def _output_type(self, name: str) -> TensorType:
        (leaf,) = tensor_types(self.graph[name].value)
        if self.graph[name].timeless:
            return leaf
        if self._readout == "sequence":
            return leaf.of_chunk(self.schedule.steps)
        dtype = {"last": leaf.dtype, "sum": result_dtype(leaf.dtype), "mean": mean_dtype(leaf.dtype)}[self._readout]
        return replace(leaf, dtype=dtype)


def _written(values: Iterable[Tensor], into: Sequence[Tensor]) -> Iterable[Tensor]:
    """Values in the memory that was given for them, if any was."""
    if not into:
        return values
    return (value if value is room else room.copy_(value) for value, room in zip(values, into, strict=True))


def _callable(node: Node, module: nn.Module) -> Callable[..., Any]:
    """The module to call, read anew at every call; if it has hooks, with a check that they leave what was planned."""
    if not has_hooks(module):
        return out_of_place(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = module(*args, **kwargs)
        got = [(tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        expected = [(leaf.shape, leaf.dtype) for leaf in tensor_types(node.value)]
        if got != expected:
            raise CaptureError(
                f"a hook changes what {node.where} returns from {expected} to {got}, and planning does not run hooks; "
                "let hooks keep shapes and dtypes, or do it in a module",
                where=node.where,
            )
        return result

    return call


def _load(emitted: Emitted) -> Callable[..., None]:
    """Compile emitted source so that a traceback shows its lines."""
    digest = hashlib.sha256(emitted.source.encode()).hexdigest()[:12]
    filename = f"<snncompile {digest}>"
    lines = emitted.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(emitted.source), None, lines, filename)
    exec(compile(emitted.source, filename, "exec"), emitted.namespace)
    run: Callable[..., None] = emitted.namespace["run"]
    return run
