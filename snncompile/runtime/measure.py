"""Measures nodes: bytes on data-less tensors, seconds and rounding on real ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..capture import FakeNetwork, RandomState, copy_network, module_of, out_of_place, tensors_of, without_hooks
from ..codegen import Buffer, step_of
from ..functional import reset_net
from ..ir import (
    MODULE_KINDS,
    Batching,
    Node,
    OpKind,
    Ref,
    StepGraph,
    TensorType,
    TimeCoupling,
    chunk_like,
    map_refs,
    tensor_types,
)
from ..options import Options
from ..schedule import MAX_CHUNK, Footprint, Schedule, chunk_lengths
from ..torch_private import storage_key, tree_leaves, tree_map
from .memory import MemoryTracker
from .node_program import (
    NodeProgram,
    empty_like_type,
    fresh_slot,
    make_operands,
    operand_types,
    zeros_like_type,
)
from .scan_kernels import ScanKernels
from .states import StateSlot
from .training import training_peak

# Timings are the same for every plan of the process; the number of threads is part of the key.
_SECONDS: dict[tuple[str, int, int], float] = {}
_SAMPLED_LENGTHS = chunk_lengths(MAX_CHUNK)  # in between, seconds are interpolated
_SAMPLE_BYTES = 128 * 2**20
_PUT_BYTES = (4 * 2**10, 4 * 2**20)
_SMALL_BYTES = 16 * 2**10
_REPETITIONS = 3
_Result = TypeVar("_Result")
_FOLDED = (Batching.FOLD, Batching.FOLD_CHANNELS)
_ENOUGH_SECONDS = 0.02


class NodeMeasurements:
    """Bytes and seconds of the nodes of one plan; also tries batchings.

    Args:
        net: The network; real modules are timed, those with side effects as copies.
        fakes: Its data-less twin.
        inputs: Types of the caller's sequences `[T, N, *]` (of one step if static).
        options: The plan's options.
        input_gradients: The caller wants gradients of the inputs.
        first_step_bytes: See `Measurements`.
        kernels: Those of the plan's neurons, if it has any.
    """

    def __init__(
        self,
        net: nn.Module,
        fakes: FakeNetwork,
        inputs: tuple[TensorType, ...],
        options: Options,
        *,
        input_gradients: bool,
        first_step_bytes: int = 0,
        kernels: ScanKernels | None = None,
    ) -> None:
        self.net = net
        self.fakes = fakes
        self.inputs = inputs
        self.options = options
        self.input_gradients = input_gradients
        self.first_step_bytes = first_step_bytes
        self.kernels = kernels
        self._footprints: dict[tuple[str, int, bool], tuple[int, int, int | None]] = {}
        self._signatures: WeakKeyDictionary[StepGraph, dict[str, str]] = WeakKeyDictionary()
        self._copies: dict[tuple[str, bool], nn.Module] = {}

    def batching_error(self, graph: StepGraph, node: Node) -> str | None:
        """Run the node over two steps, if T allows, without data and compare shapes and dtypes with one step's."""
        if node.batching is Batching.PER_STEP:
            return None
        try:
            steps = min(2, self.options.steps)
            result = self._run_fake(graph, node, steps, chunked=True)[0]
        except Exception as error:  # whatever a library raises on a wrong batching is a reason not to use it
            return f"{type(error).__name__}: {error}"
        expected = [((steps, *leaf.shape), leaf.dtype) for leaf in tensor_types(node.value)]
        got = [(tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return None if got == expected else f"expected {expected}, got {got}"

    def footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
        if node.kind is OpKind.LOAD:
            return Footprint(0, 0, node.name)
        if node.kind is OpKind.STORE:
            return Footprint(sum(leaf.nbytes for leaf in tensor_types(node.state)), 0)
        if steps > 3 and node.batching is not Batching.WHOLE:
            # Every kernel's bytes are linear in the chunk length from 2 on; 1 may take another path.
            two, three = (self.footprint(graph, node, length, chunked=chunked) for length in (2, 3))
            return Footprint(
                two.work_bytes + (steps - 2) * (three.work_bytes - two.work_bytes),
                two.output_bytes + (steps - 2) * (three.output_bytes - two.output_bytes),
                two.alias_of,
            )
        key = (self._signature(graph, node), steps, chunked)
        if key not in self._footprints:
            _, seen = self._run_fake(graph, node, steps, chunked=chunked)
            names = (*node.refs, node.name)
            owner = None if seen.alias_of is None else names.index(seen.alias_of)
            self._footprints[key] = (seen.work_bytes, seen.output_bytes, owner)
        work, output, owner = self._footprints[key]
        return Footprint(work, output, None if owner is None else (*node.refs, node.name)[owner])

    def _run_fake(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> tuple[Any, Footprint]:
        has_module = node.kind in MODULE_KINDS
        with RandomState(), torch.no_grad():
            try:
                with self.fakes.mode:
                    return self._watch(
                        graph,
                        node,
                        steps,
                        module_of(self.fakes.net, node) if has_module else None,
                        empty_like_type,
                        chunked=chunked,
                    )
            except Exception:
                if node.kind is not OpKind.OPAQUE:
                    raise
            # Its code needs data.
            return self._watch(graph, node, steps, self._module(node), zeros_like_type, chunked=chunked)

    def _watch(
        self,
        graph: StepGraph,
        node: Node,
        steps: int,
        module: nn.Module | None,
        make: Callable[[TensorType], Tensor],
        *,
        chunked: bool,
    ) -> tuple[Any, Footprint]:
        """Run a node and follow the memory, once its state exists if it allows that many steps."""
        if node.kind in (OpKind.STATEFUL, OpKind.OPAQUE):
            try:
                return self._follow(graph, node, steps, module, make, chunked=chunked, warm=True)
            except Exception:
                if 2 * steps <= self.options.steps:
                    raise
        # A module may be made for T steps, and not take one more.
        return self._follow(graph, node, steps, module, make, chunked=chunked, warm=False)

    def _follow(
        self,
        graph: StepGraph,
        node: Node,
        steps: int,
        module: nn.Module | None,
        make: Callable[[TensorType], Tensor],
        *,
        chunked: bool,
        warm: bool,
    ) -> tuple[Any, Footprint]:
        """Run a node from its reset state or, if warm, from the one that as many steps leave."""
        program = NodeProgram(graph, node, chunked=chunked)
        types = operand_types(graph, node, steps, chunked=chunked, inputs=self.inputs)
        with MemoryTracker() as tracker:
            operands = make_operands(types, make)
            net: dict[str, nn.Module] = {}
            state: dict[str, StateSlot] = {}
            if module is not None and node.kind is OpKind.STATEFUL:
                state[node.target] = fresh_slot(module, self.kernels, module_of(self.net, node))
            elif module is not None:
                net[node.target] = out_of_place(module)
            if node.kind is OpKind.OPAQUE:
                reset_net(net[node.target])
            if warm:
                program(operands, steps, net, state)  # from here on the state exists
                for slot in state.values():
                    slot.bound = None  # each call binds its kernels once, which takes memory for a moment
            before = tracker.current_bytes
            tracker.peak_bytes = before
            result = program(operands, steps, net, state)
            work, output = tracker.peak_bytes - before, tracker.current_bytes - before
            owners = {storage: name for name, operand in operands.items() for storage in _storages(operand)}
            kept: list[Any] = [slot.states for slot in state.values()]
            if node.kind is OpKind.OPAQUE:
                kept += tensors_of(net[node.target])
            owners |= dict.fromkeys(_storages(kept), node.name)
            shared = [owners[storage] for storage in _storages(result) if storage in owners]
        alias = shared[0] if shared and output == 0 else None
        return result, Footprint(work, output, alias)

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        if node.kind in (OpKind.LOAD, OpKind.STORE):
            return 0.0
        signature = self._signature(graph, node)
        if node.batching is Batching.WHOLE:
            # There is no choice to make, so it is not worth more memory than anything else.
            return self._timed(graph, node, signature, steps) if steps <= self._most_steps(graph, node) else 0.0
        linear = node.batching in (Batching.SCAN, Batching.PER_STEP)
        if steps == 1:
            return self._timed(graph, node, signature, 1)
        if linear:
            sample = min(4, self.options.steps, self._most_steps(graph, node))
            if sample == 1:
                return self._timed(graph, node, signature, 1) * steps
            return self._timed(graph, node, signature, sample) * steps / sample
        most = self._most_steps(graph, node)
        lengths = [n for n in _SAMPLED_LENGTHS if n <= most]
        below = max(n for n in lengths if n <= steps)
        above = min((n for n in lengths if n >= steps), default=below)
        low, high = (self._timed(graph, node, signature, n) / n for n in (below, above))
        share = 0.0 if above == below else (steps - below) / (above - below)
        return steps * (low + share * (high - low))

    def _most_steps(self, graph: StepGraph, node: Node) -> int:
        """The longest chunk to try for real: one that the budget would not allow need not be measured."""
        step_bytes = sum(leaf.nbytes for name in node.refs for leaf in tensor_types(graph[name].value))
        step_bytes += sum(leaf.nbytes for leaf in tensor_types(node.value))
        limit = min(_SAMPLE_BYTES, self.options.memory_budget or _SAMPLE_BYTES)
        return max(1, min(_SAMPLED_LENGTHS[-1], limit // max(1, step_bytes)))

    def _timed(self, graph: StepGraph, node: Node, signature: str, steps: int) -> float:
        key = (signature, steps, torch.get_num_threads())
        if key not in _SECONDS:
            _SECONDS[key] = self._time(graph, node, steps)
        return _SECONDS[key]

    def _time(self, graph: StepGraph, node: Node, steps: int) -> float:
        rng = torch.get_rng_state()
        try:
            with torch.no_grad():
                return _on_fit_operands(lambda make: self._time_on(make, graph, node, steps))
        finally:
            torch.set_rng_state(rng)

    def _time_on(self, make: Callable[[TensorType], Tensor], graph: StepGraph, node: Node, steps: int) -> float:
        run, start = self._real_runner(make, graph, node, steps, chunked=steps > 1)
        on_cuda = any(leaf.device.type == "cuda" for leaf in tensor_types(node.value))
        return best_seconds(run, start, on_cuda=on_cuda)

    def _real_runner(
        self, make: Callable[[TensorType], Tensor], graph: StepGraph, node: Node, steps: int, *, chunked: bool
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """What runs a node, and what puts its state back before."""
        program = NodeProgram(graph, node, chunked=chunked)
        types = operand_types(graph, node, steps, chunked=chunked, inputs=self.inputs)
        operands = make_operands(types, make)
        if node.kind is OpKind.STATEFUL:
            module = self._module(node)  # a copy, because its step may change more than the states it is given
            state: dict[str, StateSlot] = {}
            original = module_of(self.net, node)

            def start() -> None:
                state[node.target] = fresh_slot(module, self.kernels, original)

            return lambda: program(operands, steps, {}, state), start
        net: dict[str, nn.Module] = {}
        if node.kind in (OpKind.MODULE, OpKind.OPAQUE):
            net[node.target] = self._module(node)
        is_opaque = node.kind is OpKind.OPAQUE
        return lambda: program(operands, steps, net, {}), lambda: reset_net(net[node.target]) if is_opaque else None

    def _module(self, node: Node) -> nn.Module:
        """The module of a node, as a copy where running it would spoil its state or statistics."""
        module = module_of(self.net, node)
        if node.kind is OpKind.MODULE and node.coupling is TimeCoupling.POINTWISE:
            return out_of_place(module)
        key = (node.target, node.chain is None)
        if key not in self._copies:
            self._copies[key] = without_hooks(copy_network(module, {}))
            reset_net(self._copies[key])
        return self._copies[key]

    def put_seconds(self, size: int) -> float:
        device = self.inputs[0].device
        small, large = (_put_seconds(device, bytes_) for bytes_ in _PUT_BYTES)
        return small + max(0, size - _PUT_BYTES[0]) * (large - small) / (_PUT_BYTES[1] - _PUT_BYTES[0])

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        if node.batching not in _FOLDED or node.kind is OpKind.METHOD or steps == 1:
            return False
        steps = min(steps, self._most_steps(graph, node))
        return _on_fit_operands(lambda make: self._rounds_differently(make, graph, node, steps))

    def _rounds_differently(
        self, make: Callable[[TensorType], Tensor], graph: StepGraph, node: Node, steps: int
    ) -> bool:
        types = operand_types(graph, node, steps, chunked=True, inputs=self.inputs)
        operands = make_operands(types, make)
        net = {node.target: self._module(node)} if node.kind is OpKind.MODULE else {}
        with torch.no_grad():
            whole = NodeProgram(graph, node, chunked=True)(operands, steps, net, {})
            moving = {name for name in node.refs if not graph[name].invariant}
            step_alone = NodeProgram(graph, node, chunked=False)
            # Rows that a vector unit takes together stand elsewhere in every step; large batches are all alike to it.
            is_small = sum(leaf.nbytes for leaf in tensor_types(node.value)) <= _SMALL_BYTES
            for step in range(steps) if is_small else (0, 1, steps - 1):
                one = {
                    name: step_of(value, step) if graph[name].kind is OpKind.INPUT else _alone(value, step)
                    for name, value in operands.items()
                    if name in moving
                }
                one = {**operands, **one}
                pairs = zip(tree_leaves(whole), tree_leaves(step_alone(one, 1, net, {})), strict=True)
                if any(isinstance(a, Tensor) and not torch.equal(a[step], b) for a, b in pairs):
                    return True
        return False

    def training_peak_bytes(self, graph: StepGraph, schedule: Schedule) -> int:
        return training_peak(self.net, graph, schedule, self.inputs, self.options, input_gradients=self.input_gradients)

    def _signature(self, graph: StepGraph, node: Node) -> str:
        """Equal for nodes that cost the same: same operation, same configuration, same operand types."""
        known = self._signatures.setdefault(graph, {})
        # A candidate that is not in the graph yet, or not as it stands there, has a signature of its own.
        if node.name not in graph or graph[node.name] is not node:
            return self._describe(graph, node)
        if node.name not in known:
            known[node.name] = self._describe(graph, node)
        return known[node.name]

    def _describe(self, graph: StepGraph, node: Node) -> str:
        operands = [(graph[name].value, graph[name].invariant, graph[name].kind is OpKind.INPUT) for name in node.refs]
        if node.kind in (OpKind.FUNCTION, OpKind.METHOD):
            arguments = (node.args, sorted(node.kwargs.items(), key=lambda item: item[0]))
            order = {name: index for index, name in enumerate(node.refs)}
            target = f"{node.target} {[order[name] for name in node.refs]} {_without_names(arguments)}"
        elif node.chain is not None:
            target = _chain_form(self.net, node)
        else:
            module = module_of(self.net, node)
            parameters = [(tuple(p.shape), p.dtype) for p in module.parameters()]
            own = node.target if node.kind is OpKind.OPAQUE else ""
            target = f"{type(module).__qualname__} {module!r} {parameters} {module.training} {own}"
        inputs = [self.inputs[graph[name].target] for name in node.refs if graph[name].kind is OpKind.INPUT]
        kernels = ""
        if self.kernels is not None and node.kind is OpKind.STATEFUL:
            kernels = self.kernels.target.compiled_by
        sequences = inputs if not self.options.static_input else ""
        layout = "channels-last" if node.channels_last else ""
        return f"{node.kind} {node.batching} {target} {operands} {sequences} {kernels} {layout}"


def _chain_form(net: nn.Module, node: Node) -> str:
    """What a chain does, whatever its parts are called."""
    assert node.chain is not None
    names = (*node.chain.operands, *(part.name for part in node.chain.nodes))
    numbers = {name: str(number) for number, name in enumerate(names)}
    lines = []
    for part in node.chain.nodes:
        does = net.get_submodule(part.target) if part.kind in MODULE_KINDS else part.target
        lines.append(f"{does} {map_refs((part.args, dict(part.kwargs)), lambda ref: Ref(numbers[ref.name]))}")
    return f"{lines} -> {[numbers[name] for name in node.chain.results]}"


def _on_fit_operands(attempt: Callable[[Callable[[TensorType], Tensor]], _Result]) -> _Result:
    """An attempt with random operands or, where it fails, zeros: some operations take probabilities only."""
    try:
        return attempt(random_operand)
    except Exception:  # whatever an operation raises on values that it does not take
        return attempt(zeros_like_type)


def best_seconds(run: Callable[[], Any], start: Callable[[], Any] = lambda: None, *, on_cuda: bool) -> float:
    """The shortest of a few runs after a warm-up; fewer where one takes long. `start` goes before each, not timed."""
    best, spent = float("inf"), 0.0
    for repetition in range(_REPETITIONS + 1):
        start()
        started = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        if repetition == 0:
            continue
        best, spent = min(best, took), spent + took
        if spent > _ENOUGH_SECONDS:
            break
    return best


@cache
def _put_seconds(device: torch.device, size: int) -> float:
    """Seconds to copy `size` bytes into the middle of a buffer."""
    piece = torch.zeros(1, size, dtype=torch.uint8, device=device)
    buffer = Buffer(3)
    buffer.put(0, piece)
    return best_seconds(lambda: buffer.put(1, piece), on_cuda=device.type == "cuda")


def _alone(value: Any, step: int) -> Any:
    """One step of a chunk in memory of its own: kernels also round by where in memory their operand begins."""
    return tree_map(
        lambda leaf: chunk_like(leaf, 1)[0].copy_(leaf) if isinstance(leaf, Tensor) else leaf, step_of(value, step)
    )


def _storages(value: Any) -> list[int]:
    return [storage_key(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _without_names(arguments: Any) -> str:
    return repr(map_refs(arguments, lambda ref: Ref("")))


def random_operand(leaf: TensorType) -> Tensor:
    """A real tensor of a type, from a generator of its own, so that the user's random numbers stay theirs."""
    tensor = empty_like_type(leaf)
    generator = torch.Generator(device=leaf.device)
    generator.manual_seed(0)
    if leaf.dtype.is_floating_point:
        return tensor.copy_(torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=leaf.dtype))
    return tensor.zero_()
