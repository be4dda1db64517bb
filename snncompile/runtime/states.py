"""States during a call: read from the network when it starts, held by the program, written back when it ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..capture import Adapter, adapter_of
from ..codegen import Sequences, collect_steps, step_of
from ..ir import TensorType, chunk_like, lie_alike
from .bound_scan import ScanCalls, laid_out_as
from .scan_kernels import ScanKernels


class StateSlot:
    """The step function of one stateful module and its state during one call.

    Args:
        module: The module.
        kernels: Runs chunks of steps where they can; None: the eager step runs.
        original: The module that `module` is a twin of, for whose values the kernels are.
    """

    __slots__ = ("adapter", "bound", "kernels", "module", "original", "states", "touched")

    def __init__(
        self, module: nn.Module, kernels: ScanKernels | None = None, original: nn.Module | None = None
    ) -> None:
        self.module = module
        self.original = original or module
        self.adapter: Adapter = adapter_of(module)
        self.kernels = kernels
        self.bound: ScanCalls | None = None
        self.states = self.adapter.read(module)
        self.touched = False

    def step(self, *inputs: Tensor) -> Any:
        """One time step on `[N, *]`."""
        if (bound := self._bound_for(inputs)) is None:
            return self._eager_step(*inputs)
        outputs, self.states = bound.step(inputs, self.states)
        self.touched = True
        return outputs[0] if len(outputs) == 1 else outputs

    def step_into(self, output: Sequences, begin: int, *inputs: Tensor) -> Any:
        """A time step whose value goes straight to where it leaves the network; its number is `begin`."""
        if (room := self._room_in(output, begin, 1, inputs)) is None:
            value = self.step(*inputs)
            output.put_step(begin, value)
            return value
        assert self.bound is not None
        (value,), self.states = self.bound.step(inputs, self.states, into=room[0])
        self.touched = True
        return value

    def _eager_step(self, *inputs: Tensor) -> Any:
        adapter, module = self.adapter, self.module
        self.states = adapter.materialize(module, inputs, self.states)
        outputs, self.states = adapter.step(module, inputs, self.states)
        self.touched = True
        return outputs[0] if len(outputs) == 1 else outputs

    def scan(self, steps: int, *inputs: Any) -> Any:
        """A chunk of time steps, in order: `[C, N, *]` to `[C, N, *]`."""
        if (bound := self._bound_for(tuple(step_of(value, 0) for value in inputs))) is None:
            return collect_steps(steps, lambda step: self._eager_step(*(step_of(value, step) for value in inputs)))
        outputs, self.states = bound.scan(steps, inputs, self.states)
        self.touched = True
        return outputs[0] if len(outputs) == 1 else outputs

    def scan_into(self, output: Sequences, begin: int, steps: int, *inputs: Any) -> Any:
        """A chunk of time steps from `begin` on, whose values go straight to where they leave the network."""
        first = tuple(step_of(value, 0) for value in inputs)
        if (room := self._room_in(output, begin, steps, first)) is None:
            value = self.scan(steps, *inputs)
            put = output.put if self.bound is None else output.put_own
            put(begin, value)
            return value
        assert self.bound is not None
        (value,), self.states = self.bound.scan(steps, inputs, self.states, into=room)
        self.touched = True
        return value

    def _room_in(self, output: Sequences, begin: int, steps: int, first: tuple[Tensor, ...]) -> Tensor | None:
        """Where a kernel writes the steps from `begin` on of an output; None if they must be put there.

        Args:
            first: A step of each input, as which a kernel lays its value out.
        """
        if self._bound_for(first) is None:
            return None
        room = output.room(begin, steps, first[0])
        if room is None or not lie_alike(first[0].shape, room.stride()[1:], first[0].stride()):
            return None
        return room

    def _bound_for(self, inputs: tuple[Any, ...]) -> ScanCalls | None:
        """The kernel for steps like these, with the states made fit for it; None if the eager step must run."""
        if self.kernels is None:
            return None
        if self.bound is None or not self.bound.takes(inputs):
            states = self.adapter.materialize(self.module, inputs, self.states)
            states = tuple(laid_out_as(inputs[0], state) for state in states)
            self.bound = self.kernels.bind(self.original, self.adapter, inputs, states, self.module)
            if self.bound is None:
                self.kernels = None  # for the rest of the call
            else:
                self.states = states
        return self.bound

    def take_over(self) -> None:
        """Hold the state alone, so that the next one can take its memory."""
        self.adapter.write(self.module, self.adapter.reset_values(self.module))
        self.touched = True

    def write(self) -> None:
        """Put the state into the module."""
        self.adapter.write(self.module, self.states)

    def commit(self) -> None:
        """Leave the state where the step loop would leave it."""
        if self.touched:
            self.write()


class RegisterSlot:
    """A tensor that a module keeps in an attribute from step to step, during one call.

    Args:
        net: The network.
        path: Where it keeps the tensor, as a dotted path.
    """

    __slots__ = ("attribute", "module", "touched", "value")

    def __init__(self, net: nn.Module, path: str) -> None:
        owner, _, self.attribute = path.rpartition(".")
        self.module = net.get_submodule(owner)
        self.value: Any = getattr(self.module, self.attribute, None)
        self.touched = False

    def fits(self, leaf: TensorType) -> bool:
        """Whether it holds what it holds from step to step, and not yet what it was made with."""
        return isinstance(self.value, Tensor) and TensorType.of(self.value).holds_like(leaf)

    def load(self) -> Tensor:
        """What the last step left, `[N, *]`."""
        held: Tensor = self.value
        return held

    def load_chunk(self, steps: int) -> Tensor:
        """The same for each step of a chunk in which it does not change, `[C, N, *]`."""
        return self.load().expand(steps, *self.load().shape)

    def store(self, value: Tensor) -> None:
        """What this step leaves, `[N, *]`."""
        if value.untyped_storage().nbytes() > value.nbytes:
            value = chunk_like(value, 1)[0].copy_(value)  # a part of something larger would keep all of it alive
        self.value = value
        self.touched = True

    def store_chunk(self, chunk: Tensor) -> None:
        """What the last step of a chunk leaves, of `[C, N, *]`."""
        self.store(chunk[-1])

    def take_over(self) -> None:
        """Hold the tensor alone, so that the next one can take its memory."""
        setattr(self.module, self.attribute, None)
        self.touched = True

    def write(self) -> None:
        """Put the tensor into the module."""
        setattr(self.module, self.attribute, self.value)

    def commit(self) -> None:
        """Leave it where the step loop would leave it."""
        if self.touched:
            self.write()
