"""Seconds of nodes over chunks, and how they round, tried on real tensors; kept from plan to plan and on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..codegen import SequenceReadout, part_of, step_of
from ..functional import reset_net
from ..ir import Batching, Node, OpKind, StepGraph, TensorType, chunk_like, tensor_types
from ..options import Options
from ..schedule import MAX_CHUNK, chunk_lengths
from ..torch_private import tree_leaves, tree_map
from .cost_key import CostKey, cost_key, surroundings
from .cost_store import CostStore, cost_store
from .modules import module_of
from .node_program import NodeProgram, fresh_slot, make_operands, operand_types, zeros_like_type
from .scan_kernels import ScanKernels
from .states import StateSlot
from .timing import Timed, best_seconds, put_seconds, random_operand, spike_operand
from .trial_modules import TrialModules

_SAMPLED_LENGTHS = chunk_lengths(MAX_CHUNK)  # in between, seconds are interpolated
_SCANNED_LENGTHS = (1, 4, 16)  # a scan's steps are alike: what its beginning and end cost is shared by more of them
_LONG_STEPS = 8  # longer chunks are timed together, and so are shorter ones; this one with both
_SAMPLE_BYTES = 128 * 2**20
_PUT_BYTES = (4 * 2**10, 4 * 2**20)
_SMALL_BYTES = 16 * 2**10
_FOLDED = (Batching.FOLD, Batching.FOLD_CHANNELS)
LIMIT_SECONDS = 20.0  # of timing for one plan; afterwards longer chunks are estimated from shorter ones

_Result = TypeVar("_Result")


class NodeCosts:
    """Seconds and rounding of the nodes of one plan.

    Args:
        net: The network; real modules are run, those with side effects as copies.
        modules: What is run in their place.
        inputs: Types of the caller's sequences `[T, N, *]` (of one step if static).
        options: The plan's options.
        kernels: Those of the plan's neurons, if it has any.

    Attributes:
        store: Where what is measured is kept.
        spent_seconds: What measuring took so far.
        estimated: What was not measured, because measuring had taken too long already.
    """

    def __init__(
        self,
        net: nn.Module,
        modules: TrialModules,
        inputs: tuple[TensorType, ...],
        options: Options,
        kernels: ScanKernels | None,
    ) -> None:
        self.net = net
        self.inputs = inputs
        self.options = options
        self.kernels = kernels
        self.spent_seconds = 0.0
        self.estimated: set[tuple[CostKey, str]] = set()
        self.store: CostStore = cost_store()
        self._modules = modules
        self._keys: WeakKeyDictionary[StepGraph, dict[str, CostKey]] = WeakKeyDictionary()

    @property
    def obstacle(self) -> str:
        """Why costs are not kept on disk; empty if they are."""
        return self.store.obstacle

    def flush(self) -> None:
        """Write what was measured to disk."""
        self.store.flush()

    def within(self, budget: int) -> NodeCosts:
        """The same for a plan of another budget, in bytes."""
        same = copy(self)
        same.options = replace(self.options, memory_budget=budget)
        return same

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        """See `Measurements`."""
        if node.kind in (OpKind.LOAD, OpKind.STORE):
            return 0.0
        most = self._most_steps(graph, node)
        if node.batching is Batching.WHOLE:
            # There is no choice to make, so it is not worth more memory than anything else.
            return self._timed(graph, node, steps, [steps]) if steps <= most else 0.0
        if node.batching is Batching.PER_STEP:
            sample = min(4, self.options.steps, most) if steps > 1 else 1
            return self._timed(graph, node, sample, sorted({1, sample})) * steps / sample
        sampled = _SCANNED_LENGTHS if node.batching is Batching.SCAN else _SAMPLED_LENGTHS
        longest = min((n for n in sampled if n >= self.options.steps), default=sampled[-1])
        lengths = [n for n in sampled if n <= min(most, longest)]
        below = max(n for n in lengths if n <= steps)
        above = min((n for n in lengths if n >= steps), default=below)
        low, high = (self._timed(graph, node, n, lengths) / n for n in (below, above))
        share = 0.0 if above == below else (steps - below) / (above - below)
        return steps * (low + share * (high - low))

    def put_seconds(self, size: int) -> float:
        """See `Measurements`."""
        device = self.inputs[0].device
        key = CostKey("\n".join([*surroundings(device), f"put into a buffer on {device.type}"]))
        small, large = (
            self._measured(key, f"seconds for {count} bytes", partial(put_seconds, device, count))
            for count in _PUT_BYTES
        )
        return small + max(0, size - _PUT_BYTES[0]) * (large - small) / (_PUT_BYTES[1] - _PUT_BYTES[0])

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        """See `Measurements`."""
        if node.batching not in _FOLDED or node.kind is OpKind.METHOD or steps == 1:
            return False
        steps = max(2, min(steps, self._most_steps(graph, node)))
        # Of weights that are all zeros nothing can be learned for others.
        has_weights = [bool(p.any()) for p in module_of(self.net, node).parameters()] if _is_module(node) else []
        name = f"rounds differently over {steps} steps, weights {has_weights}"

        def tried() -> float:
            return _on_fit_operands(lambda make: self._rounds_differently(make, graph, node, steps))

        return self._measured(self.key(graph, node), name, tried) != 0.0

    def _most_steps(self, graph: StepGraph, node: Node) -> int:
        """The longest chunk to try for real: one that the budget would not allow need not be measured."""
        step_bytes = sum(leaf.nbytes for name in node.refs for leaf in tensor_types(graph[name].value))
        step_bytes += sum(leaf.nbytes for leaf in tensor_types(node.value))
        limit = min(_SAMPLE_BYTES, self.options.memory_budget or _SAMPLE_BYTES)
        return max(1, min(_SAMPLED_LENGTHS[-1], limit // max(1, step_bytes)))

    def _timed(self, graph: StepGraph, node: Node, steps: int, lengths: Sequence[int]) -> float:
        """Seconds over a chunk of one of these lengths.

        Those that lie near each other are timed along with it, by turns: it is them that are compared. What a machine
        does to all of them from the shorter to the longer ones is told by the length that both have.
        """
        key = self.key(graph, node)
        if (known := self.store.get(key, _seconds_over(steps))) is not None:
            return known
        is_late = self.spent_seconds > LIMIT_SECONDS and len(lengths) > 1
        if is_late and steps > 1:
            self.estimated.add((key, _seconds_over(steps)))
            shorter = max(n for n in lengths if n < steps)
            return self._timed(graph, node, shorter, lengths) * steps / shorter
        near = [steps] if is_late else _near(steps, lengths)
        before = self.store.get(key, _seconds_over(near[0]))
        started = time.perf_counter()
        seconds = self._time(graph, node, near)
        self.spent_seconds += time.perf_counter() - started
        drift = 1.0 if before is None else before / max(seconds[0], 1e-9)
        for length, took in zip(near, seconds, strict=True):
            self.store.put(key, _seconds_over(length), took * drift)
        return self._timed(graph, node, steps, lengths)

    def _measured(self, key: CostKey, name: str, measure: Callable[[], float]) -> float:
        """A number from the store, or measured and put there."""
        known = self.store.get(key, name)
        if known is None:
            started = time.perf_counter()
            known = float(measure())
            self.spent_seconds += time.perf_counter() - started
            self.store.put(key, name, known)
        return known

    def key(self, graph: StepGraph, node: Node) -> CostKey:
        """What the cost of a node depends on."""
        # A candidate that is not in the graph yet, or not as it stands there, has a key of its own.
        if node.name not in graph or graph[node.name] is not node:
            return self._described(graph, node)
        known = self._keys.setdefault(graph, {})
        if node.name not in known:
            known[node.name] = self._described(graph, node)
        return known[node.name]

    def _described(self, graph: StepGraph, node: Node) -> CostKey:
        kernel = ""
        if node.kind is OpKind.STATEFUL and self.kernels is not None:
            operands = tuple(graph[name].value for name in node.refs)
            kernel = "" if self.kernels.obstacle(self.net, node, operands) else self.kernels.target.compiled_by
        return cost_key(self.net, graph, node, self.inputs, is_static=self.options.static_input, kernel=kernel)

    def _time(self, graph: StepGraph, node: Node, lengths: Sequence[int]) -> list[float]:
        """Seconds over chunks of these lengths, in ascending order."""
        rng = torch.get_rng_state()
        try:
            with torch.no_grad():
                fill = spike_operand if node.events_below else random_operand
                return _on_fit_operands(lambda make: self._time_on(make, graph, node, lengths), fill)
        finally:
            torch.set_rng_state(rng)

    def _time_on(
        self, make: Callable[[TensorType], Tensor], graph: StepGraph, node: Node, lengths: Sequence[int]
    ) -> list[float]:
        longest = lengths[-1]
        types = operand_types(graph, node, longest, chunked=longest > 1, inputs=self.inputs)
        operands = make_operands(types, make)
        moving = {name for name in node.refs if longest > 1 and not graph[name].invariant}

        def first(steps: int) -> dict[str, Any]:
            """The first steps of the operands, or the first one alone."""
            return {
                name: value if name not in moving else step_of(value, 0) if steps == 1 else part_of(value, 0, steps)
                for name, value in operands.items()
            }

        out = {} if node.output_slot is None else {node.output_slot: _output_of(node, longest)}
        runs = [self._runner(graph, node, steps, first(steps), out) for steps in lengths]
        on_cuda = any(leaf.device.type == "cuda" for leaf in tensor_types(node.value))
        return best_seconds(runs, on_cuda=on_cuda)

    def _runner(self, graph: StepGraph, node: Node, steps: int, operands: Mapping[str, Any], out: Any) -> Timed:
        """What runs a node, and what puts its state back before."""
        program = NodeProgram(graph, node, chunked=steps > 1, into_output=node.output_slot is not None)
        if node.kind is OpKind.STATEFUL:
            module = self._modules.of(node)  # a copy, because its step may change more than the states it is given
            state: dict[str, StateSlot] = {}
            original = module_of(self.net, node)

            def start() -> None:
                state[node.target] = fresh_slot(module, self.kernels, original)

            return lambda: program(operands, steps, {}, state, out), start
        net: dict[str, nn.Module] = {}
        if _is_module(node):
            net[node.target] = self._modules.of(node)
        is_opaque = node.kind is OpKind.OPAQUE
        return lambda: program(operands, steps, net, {}), lambda: reset_net(net[node.target]) if is_opaque else None

    def _rounds_differently(
        self, make: Callable[[TensorType], Tensor], graph: StepGraph, node: Node, steps: int
    ) -> bool:
        types = operand_types(graph, node, steps, chunked=True, inputs=self.inputs)
        operands = make_operands(types, make)
        net = {node.target: self._modules.of(node)} if node.kind is OpKind.MODULE else {}
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


def _near(steps: int, lengths: Sequence[int]) -> Sequence[int]:
    """The lengths that are timed along with one of them: all, if they are few."""
    if len(lengths) <= len(_SCANNED_LENGTHS):
        return lengths
    return [n for n in lengths if (n >= _LONG_STEPS if steps > _LONG_STEPS else n <= _LONG_STEPS)]


def _seconds_over(steps: int) -> str:
    """The name under which the seconds over a chunk are kept."""
    return f"seconds over {steps} steps"


def _is_module(node: Node) -> bool:
    return node.kind in (OpKind.MODULE, OpKind.OPAQUE)


def _output_of(node: Node, steps: int) -> SequenceReadout:
    """An output whose memory is there: it is taken once a call, whatever the chunks are."""
    (leaf,) = tensor_types(node.value)
    return SequenceReadout(steps, into=torch.ones((steps, *leaf.shape), dtype=leaf.dtype, device=leaf.device))


def _on_fit_operands(
    attempt: Callable[[Callable[[TensorType], Tensor]], _Result],
    fill: Callable[[TensorType], Tensor] = random_operand,
) -> _Result:
    """An attempt with random operands or, where it fails, zeros: some operations take probabilities only."""
    try:
        return attempt(fill)
    except Exception:  # whatever an operation raises on values that it does not take
        return attempt(zeros_like_type)


def _alone(value: Any, step: int) -> Any:
    """One step of a chunk in memory of its own: kernels also round by where in memory their operand begins."""
    return tree_map(
        lambda leaf: chunk_like(leaf, 1)[0].copy_(leaf) if isinstance(leaf, Tensor) else leaf, step_of(value, step)
    )
