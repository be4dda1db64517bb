"""Step functions of neurons and neuron chains; modules of one structure are traced once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Adapter, RandomState, copy_sharing_tensors
from ..codegen import NotPointwise, StepFunction, StepTrace, read_step_function, trace_pointwise_step
from ..ir import TensorType
from ..torch_private import storage_key, writes_to
from .structure import Structure, apart_from_sizes, structure_of

_MOST_TRACES = 256


@dataclass(frozen=True)
class _Traced:
    trace: StepTrace
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def on(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> StepTrace:
        """The trace of a module with other tensors, for other sizes."""
        trace = self.trace
        if self.sizes != tuple(sizes):
            trace = trace.resized(dict(zip(self.sizes, sizes, strict=True)))
        return trace.with_tensors(dict(zip(map(id, self.tensors), tensors, strict=True)))


class StepTraces:
    """Step functions by structure: what differs from module to module are the tensors that the operations read.

    A step that does not ask how large its tensors are is traced once for all sizes.
    """

    def __init__(self) -> None:
        self._found: dict[Any, _Traced | str] = {}  # or why there is none

    def step_function(
        self, module: nn.Module, adapter: Adapter, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> StepFunction:
        """The step of a neuron or a chain as a pointwise program.

        Args:
            module: The neuron or chain.
            adapter: Knows its step function.
            inputs, states: Examples.

        Raises:
            NotPointwise: Its step has no such form.
        """
        structure = structure_of(module, adapter)
        trace = self._trace(module, adapter, inputs, states, structure)
        return read_step_function(trace, len(inputs), len(states), inputs[0].shape, inputs[0].dtype)

    def _trace(self, module: nn.Module, adapter: Adapter, inputs: Any, states: Any, structure: Structure) -> StepTrace:
        if not all(tensor.is_leaf for tensor in structure.tensors):
            return _trace(module, adapter, inputs, states)  # on clones of those with a history
        own_sizes = (structure.key, *(tuple(map(TensorType.of, group)) for group in (inputs, states)))
        all_sizes, sizes = apart_from_sizes(own_sizes)
        found = self._found.get(all_sizes, self._found.get(own_sizes))
        if isinstance(found, str):
            raise NotPointwise(found)
        if found is not None:
            return found.on(structure.tensors, sizes)
        if len(self._found) >= _MOST_TRACES:
            self._found.clear()
        try:
            trace = _trace(module, adapter, inputs, states)
        except NotPointwise as refusal:
            self._found[own_sizes] = str(refusal)
            raise
        if not _reads_views(trace, structure.tensors):
            key = all_sizes if trace.is_for_all_sizes(sizes, structure.tensors) else own_sizes
            self._found[key] = _Traced(trace, structure.tensors, sizes)
        return trace


def _reads_views(trace: StepTrace, tensors: Sequence[Tensor]) -> bool:
    """Whether a trace reads memory of these tensors in another way than by the tensors themselves."""
    own, memory = {id(tensor) for tensor in tensors}, {storage_key(tensor) for tensor in tensors}
    constants = [value for value in trace.constants.values() if isinstance(value, Tensor)]
    return any(id(value) not in own and storage_key(value) in memory for value in constants)


def _trace(module: nn.Module, adapter: Adapter, inputs: Any, states: Any) -> StepTrace:
    sharing = copy_sharing_tensors(module)  # traced in the module's place: its parameters, and none of its changes
    random = RandomState()
    try:
        with torch.no_grad(), buffers_kept(module):
            return trace_pointwise_step(lambda x, s: adapter.step(sharing, x, s), inputs, states)
    finally:
        random.restore()


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Puts back what tracing writes into the module's buffers, such as a count of batches."""
    before = [(buffer, writes_to(buffer), buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, writes, value in before:
                if writes_to(buffer) != writes:
                    buffer.copy_(value)
