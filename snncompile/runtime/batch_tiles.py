"""Batch tiling: a batch that does not fit into the budget runs in parts, one after the other, each over all T steps.

Legal where nothing couples the samples of a batch. What the parts put out and the states they leave are put together
in memory that is there once for the whole batch. Synonym: micro-batching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..capture import adapter_of
from ..codegen import Collector
from ..ir import OpKind, StepGraph, TensorType, chunk_like
from ..options import Readout
from ..schedule import output_names, readout_bytes, state_bytes
from .module import Request
from .program import Program

_ROUNDS_ALIKE = 4  # at batches of multiples of it, library kernels were seen to give the same bits


@dataclass(frozen=True)
class Tiles:
    """Parts of equal size of a batch.

    Attributes:
        count: How many there are.
        size: Samples in each.
        dim: Of the inputs, along which the samples lie.
    """

    count: int
    size: int
    dim: int

    def request(self, whole: Request) -> Request:
        """What a plan for one part is for; the part is a view of the caller's tensor."""
        return replace(whole, inputs=tuple(self._part_of(leaf) for leaf in whole.inputs))

    def _part_of(self, leaf: TensorType) -> TensorType:
        shape = (*leaf.shape[: self.dim], self.size, *leaf.shape[self.dim + 1 :])
        return replace(leaf, shape=shape)


def tilings(inputs: Sequence[TensorType], dim: int, *, reassociate: bool) -> Iterator[Tiles]:
    """The ways to cut a batch into parts of equal size, the fewest parts first; none if the inputs differ in it.

    Args:
        inputs: Types of the caller's tensors.
        dim: Along which the samples lie.
        reassociate: Parts may be of sizes for which library kernels round in another way.
    """
    batches = {leaf.shape[dim] if len(leaf.shape) > dim else 0 for leaf in inputs}
    batch = batches.pop() if len(batches) == 1 else 0
    for count in range(2, batch + 1):
        if batch % count == 0 and (reassociate or batch // count % _ROUNDS_ALIKE == 0):
            yield Tiles(count, batch // count, dim)


class TiledProgram(Program):
    """A program for a part of the batch, which runs it for each part in turn. Takes what `Program` takes, and:

    Args:
        tiles: How many parts of equal size there are.

    Attributes:
        tiles: As given.
    """

    def __init__(self, *args: Any, tiles: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tiles = tiles

    def __call__(self, *inputs: Tensor, into: Sequence[Tensor] = ()) -> Any:
        neurons = [_TiledState(module, value.shape, self.tiles) for module, value in self._stateful.values()]
        rooms = [[room] for room in into] or [[] for _ in self._outputs]
        outputs = [_Joined(self.tiles, dim=self._batch_dim, whole=room) for room in rooms]
        try:
            for tile in range(self.tiles):
                for neuron in neurons:
                    neuron.start(tile)
                self._put(outputs, self.compute(*(self._tile_of(x, tile) for x in inputs)), tile)
                for neuron in neurons:
                    neuron.end(tile)
        except BaseException:
            for neuron in neurons:
                neuron.restore()
            raise
        for neuron in neurons:
            neuron.finish()
        return self._structured(joined.whole[0] for joined in outputs)

    @property
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings, "tiles": self.tiles}

    @property
    def obstacle_to_export(self) -> str:
        return "parts of the batch run one after the other"

    def _output_type(self, name: str) -> TensorType:
        part, dim = super()._output_type(name), self._batch_dim
        shape = (*part.shape[:dim], self.tiles * part.shape[dim], *part.shape[dim + 1 :])
        return replace(part, shape=shape)

    @property
    def _batch_dim(self) -> int:
        return 1 if self._readout == "sequence" else 0

    def _tile_of(self, x: Tensor, tile: int) -> Tensor:
        dim = 0 if self.is_static else 1
        size = x.shape[dim] // self.tiles
        return x.narrow(dim, tile * size, size)

    def _put(self, outputs: Sequence[_Joined], collectors: list[Collector], tile: int) -> None:
        for joined in outputs:
            joined.put(tile, (collectors.pop(0).take(),))


class _TiledState:
    """The state of a neuron or a chain during a call.

    Args:
        module: The neuron or chain.
        shape: Of its input in a part of the batch.
        tiles: How many parts there are.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], tiles: int) -> None:
        self._module = module
        self._adapter = adapter_of(module)
        self._shape = shape
        self._whole_shape = (tiles * shape[0], *shape[1:])
        self._adapter.check(module, self._whole_shape)
        self._before = self._adapter.read(module)
        self._after = _Joined(tiles, dim=0)

    def start(self, tile: int) -> None:
        """Put one part's into the module; what is no tensor for each sample, such as a reset value, is every part's."""
        size = self._shape[0]
        part = tuple(
            state.narrow(0, tile * size, size)
            if isinstance(state, Tensor) and state.shape == self._whole_shape
            else state
            for state in self._before
        )
        self._adapter.write(self._module, part)

    def end(self, tile: int) -> None:
        """Keep what a part left."""
        self._after.put(tile, self._adapter.read(self._module))

    def finish(self) -> None:
        """Leave the whole batch's state in the module."""
        self._adapter.write(self._module, tuple(self._after.whole))

    def restore(self) -> None:
        """Leave the state as it was before the call."""
        self._adapter.write(self._module, self._before)


class _Joined:
    """Tensors of the whole batch, from those of its parts.

    Args:
        tiles: How many parts there are.
        dim: Along which the samples lie.
        whole: Memory for the tensors; none: they get their own.
    """

    def __init__(self, tiles: int, *, dim: int, whole: Sequence[Tensor] = ()) -> None:
        self._tiles = tiles
        self._dim = dim
        self.whole: list[Any] = list(whole)

    def put(self, tile: int, values: Sequence[Any]) -> None:
        if not self.whole:
            self.whole = [self._room_for(value) if isinstance(value, Tensor) else value for value in values]
        for whole, value in zip(self.whole, values, strict=True):
            if isinstance(value, Tensor):
                size = value.shape[self._dim]
                whole.narrow(self._dim, tile * size, size).copy_(value)

    def _room_for(self, value: Tensor) -> Tensor:
        size = self._tiles * value.shape[self._dim]
        if self._dim == 0:
            return chunk_like(value[0], size)
        return value.new_empty((value.shape[0], size, *value.shape[2:]))


def joined_bytes(graph: StepGraph, steps: int, readout: Readout) -> int:
    """Bytes that a part's outputs and states take in those of the whole batch."""
    outputs = sum(readout_bytes(graph, slot, steps, readout) for slot in range(len(output_names(graph))))
    # A module that is called several times in a step has one state.
    neurons = {node.target: node.name for node in graph if node.kind is OpKind.STATEFUL}
    return outputs + sum(state_bytes(graph, name) for name in neurons.values())
