"""Measures nodes: bytes on data-less tensors; seconds and rounding are those of `NodeCosts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..capture import FakeNetwork, RandomState, out_of_place, tensors_of
from ..functional import reset_net
from ..ir import (
    MODULE_KINDS,
    Batching,
    Node,
    OpKind,
    StepGraph,
    TensorType,
    tensor_types,
)
from ..ir.batching_rules import FOLD_MODULES
from ..options import Options
from ..schedule import Footprint, Schedule
from ..torch_private import storage_key, tree_leaves
from .cost_key import signature
from .costs import NodeCosts
from .memory import MemoryTracker
from .modules import module_of
from .node_program import (
    NodeProgram,
    empty_like_type,
    fresh_slot,
    make_operands,
    operand_types,
    zeros_like_type,
)
from .scan_kernels import ScanKernels
from .schedule_trials import ScheduleTrials
from .states import StateSlot
from .structure import apart_from_sizes
from .training import training_peak
from .trial_modules import TrialModules


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

    Attributes:
        costs: Seconds and rounding.
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
        self._footprints_in: WeakKeyDictionary[StepGraph, dict[tuple[str, int, bool], tuple[Node, Footprint]]] = (
            WeakKeyDictionary()
        )
        self._batching_errors: dict[Any, str | None] = {}
        self._signatures: WeakKeyDictionary[StepGraph, dict[str, str]] = WeakKeyDictionary()
        self._modules = TrialModules(net)
        self.costs = NodeCosts(net, self._modules, inputs, options, kernels)

    def batching_error(self, graph: StepGraph, node: Node) -> str | None:
        """Run the node over two steps, if T allows, without data and compare shapes and dtypes with one step's."""
        if node.batching is Batching.PER_STEP:
            return None
        key = self._batching_key(graph, node)
        if key not in self._batching_errors:
            self._batching_errors[key] = self._try_batching(graph, node)
        return self._batching_errors[key]

    def _batching_key(self, graph: StepGraph, node: Node) -> Any:
        """Equal for nodes whose batching works or fails alike; torch's own layers take any sizes."""
        layer = type(self.net.get_submodule(node.target)) if node.kind is OpKind.MODULE else None
        if layer not in FOLD_MODULES or node.batching is not Batching.FOLD or len(node.args) != 1 or node.kwargs:
            return self._signature(graph, node)
        operands = operand_types(graph, node, min(2, self.options.steps), chunked=True, inputs=self.inputs)
        types, _ = apart_from_sizes((*operands.values(), node.value))
        return layer, types

    def _try_batching(self, graph: StepGraph, node: Node) -> str | None:
        try:
            steps = min(2, self.options.steps)
            warm = node.kind is OpKind.OPAQUE  # what an adapter steps treats its second call as its first
            result = self._run_fake(graph, node, steps, chunked=True, kernels=None, warm=warm)[0]
        except Exception as error:  # whatever a library raises on a wrong batching is a reason not to use it
            return f"{type(error).__name__}: {error}"
        expected = [((steps, *leaf.shape), leaf.dtype) for leaf in tensor_types(node.value)]
        got = [(tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return None if got == expected else f"expected {expected}, got {got}"

    def footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
        known = self._footprints_in.setdefault(graph, {})
        key = (node.name, steps, chunked)
        # A candidate that is not in the graph yet, or not as it stands there, is not what the graph's node is.
        if key not in known or known[key][0] is not node:
            found = self._footprint(graph, node, steps, chunked=chunked)
            if node.output_slot is not None:
                found = Footprint(found.work_bytes - found.output_bytes, 0)
            known[key] = (node, found)
        return known[key][1]

    def _footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
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
            warm = node.kind in (OpKind.STATEFUL, OpKind.OPAQUE)
            _, seen = self._run_fake(graph, node, steps, chunked=chunked, kernels=self.kernels, warm=warm)
            names = (*node.refs, node.name)
            owner = None if seen.alias_of is None else names.index(seen.alias_of)
            self._footprints[key] = (seen.work_bytes, seen.output_bytes, owner)
        work, output, owner = self._footprints[key]
        return Footprint(work, output, None if owner is None else (*node.refs, node.name)[owner])

    def _run_fake(
        self, graph: StepGraph, node: Node, steps: int, *, chunked: bool, kernels: ScanKernels | None, warm: bool
    ) -> tuple[Any, Footprint]:
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
                        kernels,
                        chunked=chunked,
                        warm=warm,
                    )
            except Exception:
                if node.kind is not OpKind.OPAQUE:
                    raise
            # Its code needs data.
            real = self._modules.of(node)
            return self._watch(graph, node, steps, real, zeros_like_type, kernels, chunked=chunked, warm=warm)

    def _watch(
        self,
        graph: StepGraph,
        node: Node,
        steps: int,
        module: nn.Module | None,
        make: Callable[[TensorType], Tensor],
        kernels: ScanKernels | None,
        *,
        chunked: bool,
        warm: bool,
    ) -> tuple[Any, Footprint]:
        """Run a node and follow the memory; if warm, once its state exists, where it allows that many steps."""
        if warm:
            try:
                return self._follow(graph, node, steps, module, make, kernels, chunked=chunked, warm=True)
            except Exception:
                if 2 * steps <= self.options.steps:
                    raise
        # A module may be made for T steps, and not take one more.
        return self._follow(graph, node, steps, module, make, kernels, chunked=chunked, warm=False)

    def _follow(
        self,
        graph: StepGraph,
        node: Node,
        steps: int,
        module: nn.Module | None,
        make: Callable[[TensorType], Tensor],
        kernels: ScanKernels | None,
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
                state[node.target] = fresh_slot(module, kernels, module_of(self.net, node))
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
        return self.costs.seconds(graph, node, steps)

    def put_seconds(self, size: int) -> float:
        return self.costs.put_seconds(size)

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        return self.costs.rounds_differently(graph, node, steps)

    def trial_seconds(self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]) -> list[float | None] | None:
        return ScheduleTrials(self.costs).seconds(graph, estimates)

    def within(self, budget: int) -> NodeMeasurements:
        same = copy(self)
        same.options = replace(self.options, memory_budget=budget)
        same.costs = self.costs.within(budget)
        return same

    def training_peak_bytes(self, graph: StepGraph, schedule: Schedule) -> int:
        return training_peak(
            self.net,
            graph,
            schedule,
            self.inputs,
            self.options,
            input_gradients=self.input_gradients,
            kernels=self.kernels,
        )

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
        return signature(self.net, graph, node, self.inputs, is_static=self.options.static_input)


def _storages(value: Any) -> list[int]:
    return [storage_key(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
