"""Kernels for neurons and neuron chains, found as they are needed: a chunk of steps in one pass over memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import (
    STATE_STORES,
    Adapter,
    NeuronChain,
    RandomState,
    adapter_of,
    copy_network,
    module_of,
)
from ..codegen import NotPointwise, StepFunction, keeps_float32
from ..ir import Node, TensorType, extent, tensor_types
from ..torch_private import is_traced, no_modes
from .bound_scan import BoundScan, Kernel, ScanCalls, StepTypes, is_walked_as, step_types
from .compiled_scan import BuildError, KernelTarget
from .cpp_scan import CppTarget
from .event_modules import event_obstacle
from .fingerprint import Same, value_key
from .kernel_checks import agrees, fewer_elements, gradients_agree
from .scan_gradients import make_backward, trace_gradient
from .scan_operator import TracedScan
from .spike_bits import bits_obstacle
from .step_traces import StepTraces, buffers_kept
from .structure import apart_from_sizes, structure_of

_MOST_KERNELS = 256  # kernels kept for one plan; attributes that change at every call would pile them up
_CPP = CppTarget()


@dataclass(frozen=True)
class _Refusal:
    reason: str


class ScanKernels:
    """The kernels of one network's neurons and neuron chains, found as they are needed.

    A kernel is used where it gives the bits of the eager step on a short random sequence (transcendental functions: up
    to their rounding) and, where gradients are recorded, its gradients; elsewhere the eager step runs.

    Args:
        target: What compiles and runs them.
        trains: Gradients are recorded.
        reassociates: Kernels may compute transcendental functions that round otherwise than torch's.

    Attributes:
        target: As given.
        compiling_seconds: What compiling took so far; little where a kernel was found on disk.
    """

    def __init__(self, target: KernelTarget = _CPP, *, trains: bool = False, reassociates: bool = False) -> None:
        self.target = target
        self.compiling_seconds = 0.0
        self._trains = trains
        self._reassociates = reassociates
        self._found: dict[Any, Kernel | _Refusal] = {}
        self._traces = StepTraces()
        self._proven: set[Any] = set()
        self._obstacles: dict[Any, str] = {}
        self._called: dict[Same, tuple[Kernel, StepTypes]] = {}

    def bind(
        self,
        module: nn.Module,
        adapter: Adapter,
        inputs: tuple[Any, ...],
        states: tuple[Any, ...],
        called: nn.Module | None = None,
    ) -> ScanCalls | None:
        """The kernel of a neuron or a chain for one call; None where the eager step must run.

        Args:
            module: The neuron or chain.
            adapter: Knows its step function.
            inputs: One step `[N, *]` of each input.
            states: As tensors fit for these inputs.
            called: Has the parameters that get the gradients, if that is not the module itself.
        """
        if is_traced():
            return self._of_last_call(module, inputs)
        kernel = self._kernel(module, adapter, inputs, states)
        if isinstance(kernel, _Refusal):
            return None
        if kernel.backward is None:
            bound = BoundScan(kernel, inputs)
            if kernel.function.dtype is torch.float32:
                self._called[Same(module)] = kernel, bound.types
            return bound
        if any(constant.requires_grad for constant in kernel.backward.gradient.constants):
            return None
        return BoundScan(kernel, inputs, kernel.backward.parameters_of(called or module))

    def _of_last_call(self, module: nn.Module, inputs: tuple[Any, ...]) -> TracedScan | None:
        """The kernel that a module had when it was called, for a program that torch writes down.

        What stands for parameters there has no values, so that no kernel can be found by these, let alone be tried.
        """
        kernel, types = self._called.get(Same(module), (None, ()))
        return TracedScan(kernel, inputs) if kernel is not None and types == step_types(inputs) else None

    def obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why a stateful node has no kernel for inputs of these types `[N, *]`; empty if it has one."""
        kernel = self._kernel_of(net, node, inputs)
        return kernel.reason if isinstance(kernel, _Refusal) else ""

    def is_wider(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> bool:
        """Whether a stateful node's kernel keeps float32 where its tensors are of less."""
        kernel = self._kernel_of(net, node, inputs)
        return not isinstance(kernel, _Refusal) and keeps_float32(kernel.function)

    def largest(
        self, net: nn.Module, node: Node, inputs: Sequence[TensorType], read: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """For each result of a stateful node, the largest it may be of the whole numbers from 0 on; None: anything.

        Args:
            net: The network.
            node: The node.
            inputs: Types `[N, *]` of what it reads.
            read: The same of what it reads.
        """
        if not isinstance(self.target, CppTarget) or bits_obstacle():
            return ()
        kernel = self._kernel_of(net, node, inputs)
        return () if isinstance(kernel, _Refusal) else kernel.function.largest(read)

    def keeps(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> frozenset[int]:
        """Which of what a stateful node reads, inputs of these types, is kept for its backward."""
        kernel = self._kernel_of(net, node, inputs)
        if isinstance(kernel, _Refusal) or kernel.backward is None:
            return frozenset(range(len(inputs)))
        return kernel.backward.kept_inputs

    def _kernel_of(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> Kernel | _Refusal:
        module = module_of(net, node)
        # A call lays the states out as the first input; see `StateSlot`.
        states = [
            replace(leaf, stride=inputs[0].stride) if leaf.shape == inputs[0].shape else leaf
            for leaf in tensor_types(node.state)
        ]
        return self._kernel(module, adapter_of(module), _examples(inputs), _examples(states))

    def pointwise_obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why what a chain's node does cannot be part of a kernel; empty if it can. It need not hold a neuron."""
        chain = NeuronChain.of(net, node)
        adapter = adapter_of(chain)
        # Sizes decide nothing here; the kernel of the whole chain is proven for its own.
        key, _ = apart_from_sizes((structure_of(chain, adapter).key, *inputs))
        if key not in self._obstacles:
            self._obstacles[key] = self._pointwise_obstacle(chain, adapter, _examples(inputs))
        return self._obstacles[key]

    def _pointwise_obstacle(self, chain: NeuronChain, adapter: Adapter, inputs: tuple[Tensor, ...]) -> str:
        states = adapter.materialize(chain, inputs, adapter.reset_values(chain))
        if obstacle := self.target.operand_obstacle((*inputs, *states)):
            return obstacle
        random = RandomState()
        try:
            with no_modes(), _keeping_as_it_is():
                function = self._traces.step_function(chain, adapter, inputs, states)
                obstacle = self._obstacle_to(function)
                if self._trains and not obstacle:
                    with buffers_kept(chain):
                        trace_gradient(function, chain, adapter, inputs, states)
                return obstacle
        except NotPointwise as refusal:
            return str(refusal)
        finally:
            random.restore()

    def _obstacle_to(self, function: StepFunction) -> str:
        """Why there is no kernel of a step function; empty if there is one."""
        if self._trains and function.dtype is not torch.float32:
            return "backward, its values are not float32"
        if function.transcendental and not self._reassociates:
            names = ", ".join(function.transcendental)
            return f"its {names} may round otherwise than torch's; reassociate=True allows that"
        return self.target.obstacle(function)

    def event_obstacle(self, net: nn.Module, node: Node) -> str:
        """Why there is no event-driven kernel of a linear layer or a 2d convolution; empty if there is one."""
        if not isinstance(self.target, CppTarget):
            return "there are event-driven kernels for the CPU only"
        return event_obstacle(net.get_submodule(node.target))

    def _kernel(self, module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> Kernel | _Refusal:
        values = (*inputs, *states)
        if obstacle := self.target.operand_obstacle(values):
            return _Refusal(obstacle)
        if not self._trains and torch.is_grad_enabled() and any(value.requires_grad for value in values):
            return _Refusal("gradients are recorded")
        if not all(is_walked_as(value, inputs[0]) for value in (inputs[0], *states)):
            return _Refusal("its states are not laid out as its input")
        gathered = frozenset(n for n, value in enumerate(inputs) if not is_walked_as(value, inputs[0]))
        if gathered and self._trains:
            return _Refusal("backward, an input does not lie in memory as its neurons do")
        if gathered and inputs[0].dim() > self.target.max_dims:
            return _Refusal(f"its inputs have more than {self.target.max_dims} dimensions")
        types = tuple(TensorType.of(value) for value in values)
        key = (_attributes(module, adapter), types)
        if key not in self._found:
            if len(self._found) >= _MOST_KERNELS:
                self._found.clear()
            with no_modes():
                self._found[key] = self._make(module, adapter, types, len(inputs), gathered)
        return self._found[key]

    def _make(
        self, module: nn.Module, adapter: Adapter, types: Sequence[TensorType], inputs: int, gathered: frozenset[int]
    ) -> Kernel | _Refusal:
        examples = _examples(types)
        given, states = examples[:inputs], examples[inputs:]
        random = RandomState()
        try:
            function = self._traces.step_function(module, adapter, given, states)
            if obstacle := self._obstacle_to(function):
                return _Refusal(obstacle)
            if not self._reassociates:
                function = self.target.as_stored(function)
            with torch.no_grad(), _keeping_as_it_is():
                kernel = Kernel(function, gathered, self._compiled(self.target.build, function, gathered))
                if self._trains:
                    build_reverse = partial(self._compiled, self.target.build_reverse)
                    with buffers_kept(module):
                        backward = make_backward(build_reverse, function, module, adapter, given, states)
                    kernel = replace(kernel, backward=backward)
                # What one module has proven holds for those that differ from it in their tensors only.
                key = (structure_of(module, adapter).key, types, gathered)
                if key not in self._proven:
                    examples = _examples(fewer_elements(types, [table.shape for table in function.tables]))
                    if reason := _disproof(kernel, module, adapter, examples[:inputs], examples[inputs:]):
                        return _Refusal(reason)
                    self._proven.add(key)
        except NotPointwise as refusal:
            return _Refusal(str(refusal))
        except BuildError as failure:
            return _Refusal(failure.message)
        finally:
            random.restore()
        return kernel

    def _compiled(self, build: Callable[..., Any], *given: Any) -> Any:
        started = time.perf_counter()
        try:
            return build(*given)
        finally:
            self.compiling_seconds += time.perf_counter() - started


def _keeping_as_it_is() -> Any:
    """Hooks of the user's on what backward keeps are for what the user runs."""
    return torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value)


def _examples(types: Sequence[TensorType]) -> tuple[Tensor, ...]:
    """Uninitialised tensors of these types, also where elements share their place in memory."""
    return tuple(
        torch.empty(extent(x.shape, x.stride), dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride)
        for x in types
    )


def _disproof(kernel: Kernel, module: nn.Module, adapter: Adapter, given: Any, states: Any) -> str:
    """Why a kernel may not stand for a module's eager step; empty if it may."""
    twin = copy_network(module, {})
    before = _held_by(twin, adapter)
    if not agrees(kernel, twin, adapter, given, states):
        return "its compiled form rounds differently"
    if not _same(before, _held_by(twin, adapter)):
        return "its step changes more than its states"
    if kernel.backward is not None and not gradients_agree(kernel, twin, adapter, given, states):
        return "its compiled gradient differs from that of the eager step"
    return ""


def _attributes(module: nn.Module, adapter: Adapter) -> tuple[Any, ...]:
    """Equal as long as a module holds the same beside its states."""
    if not isinstance(module, NeuronChain):
        return value_key(module, frozenset({*adapter.state_keys(module), *STATE_STORES}))
    neurons = module.neurons
    others = [part for part in module.parts if all(part is not neuron for neuron in neurons)]
    own = [_attributes(neuron, adapter_of(neuron)) for neuron in neurons]
    return (Same(module.chain), *own, *(value_key(part, frozenset()) for part in others))


def _held_by(module: nn.Module, adapter: Adapter) -> tuple[Any, list[Tensor]]:
    """What a module keeps beside its states: its attributes, and a copy of its buffers."""
    return _attributes(module, adapter), [buffer.clone() for buffer in module.buffers()]


def _same(before: tuple[Any, list[Tensor]], after: tuple[Any, list[Tensor]]) -> bool:
    return before[0] == after[0] and all(map(torch.equal, before[1], after[1]))
