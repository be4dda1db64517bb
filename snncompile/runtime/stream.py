"""Feeds a network chunk after chunk: outputs chunk by chunk, or one readout over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codegen import Collector
from ..errors import ScheduleError
from ..explicit_states import ExplicitStates
from ..ir import Batching, TensorType
from ..options import Options
from ..schedule import Schedule
from .locks import running

if TYPE_CHECKING:
    from .module import OptimizedModule, Plan


def stream(module: OptimizedModule, chunks: Iterable[Any]) -> Iterator[Any]:
    """See `OptimizedModule.stream`; checks what can be checked before the first chunk comes."""
    if isinstance(chunks, Tensor):
        raise TypeError(
            "stream expects an iterable of chunks [C, N, *], got a tensor, which would come apart into single steps; "
            "pass x_seq.split(C)"
        )
    if isinstance(module.network, ExplicitStates):
        raise ValueError(
            "a network that takes its states as arguments cannot be streamed, because there is nowhere to return them; "
            "call the optimised network once for each chunk"
        )
    return _outputs(_Feed(module), iter(chunks))


def _outputs(feed: _Feed, chunks: Iterator[Any]) -> Iterator[Any]:
    if feed.options.readout == "sequence":
        for chunk in chunks:
            # Nothing here holds a chunk or its outputs while the next one runs.
            yield feed.outputs(chunk)
            del chunk
        return
    for chunk in chunks:
        feed.run(chunk)
        del chunk
    yield feed.readout()


class _Feed:
    """One stream: what its chunks must be like, and what was read out so far.

    Args:
        module: What runs them.
    """

    def __init__(self, module: OptimizedModule) -> None:
        self.options = module.options
        self._module = module
        self._names = module.network_inputs
        self._types: tuple[TensorType, ...] = ()
        self._count = 0
        self._plan: Plan | None = None
        self._collectors: list[Collector] = []

    def outputs(self, chunk: Any) -> Any:
        """Run a chunk and return the outputs of its steps."""
        self.run(chunk)
        return self.readout()

    def run(self, chunk: Any) -> None:
        """Run a chunk, going on with what was read out so far."""
        inputs = chunk if isinstance(chunk, tuple) else (chunk,)
        steps = self._steps_of(inputs)
        options = self._options_for(steps)
        with self._module.lock.held(), torch.no_grad():
            # What is read out goes on from chunk to chunk, so all samples must be there at once.
            request = replace(self._module.request(inputs, needs_grad=False), whole_batch=True)
            plan = self._module.plan_for(request, options)
            for node in plan.program.graph:
                if node.batching is Batching.WHOLE:
                    raise ValueError(
                        f"{node.where} takes all steps of a sequence at once, so a network with it cannot be streamed; "
                        "call it with whole sequences"
                    )
            if self.options.readout == "last":
                self._collectors = []  # of an earlier chunk nothing is read out
            with running():
                self._collectors = plan.program.compute(*inputs, before=self._collectors)
        self._plan = plan
        self._types = self._types or tuple(TensorType.of(value) for value in inputs)
        self._count += 1

    def readout(self) -> Any:
        """What was read out since the last time."""
        if self._plan is None:
            raise ValueError(f"the stream had no chunks, so there is nothing to read out as {self.options.readout!r}")
        collectors, self._collectors = self._collectors, []
        with torch.no_grad():
            return self._plan.program.collect(collectors)

    def _steps_of(self, inputs: tuple[Any, ...]) -> int:
        """The number of steps of a chunk, which is checked."""
        where = f"chunk {self._count} of the stream"
        if len(inputs) != len(self._names):
            raise TypeError(
                f"{where}: the network takes {len(self._names)} inputs ({', '.join(self._names)}), got {len(inputs)}"
            )
        for name, value in zip(self._names, inputs, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"{where}: input {name} must be a tensor, got {type(value).__name__}")
        for name, value, like in zip(self._names, inputs, self._types, strict=False):
            self._check_like(f"{where}: input {name}", value, like)
        if self.options.static_input:
            return self.options.steps
        if any(value.dim() == 0 for value in inputs):
            raise ValueError(f"{where}: inputs must be [C, N, *], got a tensor without dimensions")
        lengths = [int(value.shape[0]) for value in inputs]
        if min(lengths) != max(lengths) or min(lengths) == 0:
            raise ValueError(f"{where}: inputs must be [C, N, *] with one C of at least 1, got C = {lengths}")
        return lengths[0]

    def _check_like(self, what: str, value: Tensor, like: TensorType) -> None:
        """Check that a tensor is like that of the first chunk, but for its length."""
        first = 0 if self.options.static_input else 1
        expected = (like.shape[first:], like.dtype, like.device)
        got = (tuple(value.shape[first:]), value.dtype, value.device)
        if value.dim() != len(like.shape) or got != expected:
            shape = [*([] if self.options.static_input else ["C"]), *map(str, like.shape[first:])]
            raise ValueError(
                f"{what} must be [{', '.join(shape)}] of {like.dtype} on {like.device} as in the first chunk, "
                f"got {tuple(value.shape)} of {value.dtype} on {value.device}"
            )

    def _options_for(self, steps: int) -> Options:
        """The options of a plan for this many steps."""
        schedule = self.options.schedule
        if isinstance(schedule, Schedule) and schedule.steps != steps:
            raise ScheduleError(
                f"chunk {self._count} of the stream has {steps} steps and the schedule is for T = {schedule.steps}; "
                "send chunks of that length, or ask for a schedule by name or chunk length"
            )
        if isinstance(schedule, int):
            schedule = min(schedule, steps)
        return replace(self.options, steps=steps, schedule=schedule)
