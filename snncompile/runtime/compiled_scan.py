"""What every target of generated kernels offers: it compiles a step function into a scan over a chunk of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..codegen import StepFunction, StepGradient, Totals
from ..errors import SnnCompileError


class BuildError(SnnCompileError):
    """A kernel could not be built."""


@dataclass(frozen=True)
class Layout:
    """How to walk an operand in the order in which the neurons lie in memory, the outermost dimension first.

    Attributes:
        sizes: Of the neurons' dimensions, those that the operand steps through evenly taken as one.
        strides: The operand's, in elements; 0 where it is broadcast.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def flat(self) -> list[int]:
        """How many dimensions, their sizes and the strides."""
        return [len(self.sizes), *self.sizes, *self.strides]


class ScanCall(Protocol):
    """A compiled scan with a neuron's numbers and tables as they are in one call, for steps of one type."""

    def run(
        self,
        steps: int,
        inputs: Sequence[Tensor],
        strides: Sequence[int],
        states: Sequence[Tensor],
        outputs: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        """Run a chunk of steps.

        Args:
            steps: How many.
            inputs: Each at its first step.
            strides: Of each input, in elements from step to step; 0 where it is the same at every step.
            states: `[N, *]` before the first step.
            outputs: `[C, N, *]`, dense, each step laid out as the states are; written.
            after: The states `[N, *]` after the last step; written.
        """


class CompiledScan(Protocol):
    """A step function, compiled for chunks of any length and any number of neurons."""

    def bind(self, size: int, layouts: Sequence[Layout | None], numbers: Sequence[float]) -> ScanCall:
        """Make it ready for one call. Looks up, or computes, the step function's tables.

        Args:
            size: How many neurons there are.
            layouts: Of each input, and behind them of each table; None for what lies in memory as the neurons do.
            numbers: The step function's numbers as they are now.
        """

    def reserve(self, like: Tensor) -> Any:
        """Take the memory that `bind` takes, for predictions.

        Args:
            like: A step without data, on the device and in the mode to allocate in.

        Returns:
            What a `ScanCall` holds on to.
        """


@dataclass(frozen=True)
class ReverseOperands:
    """What a chunk of steps is run backward from. All strides are in elements from step to step.

    Attributes:
        like: A step `[N, *]` that lies in memory as the neurons do.
        inputs, strides: Each at its first step; stride 0 where it is the same at every step. None: it is not read.
        states: `[N, *]` before the first step.
        tables: Those of the step and, behind them, those of its gradient, as they were forward.
        numbers: Those of the step and those of its gradient, as they were forward.
        given, given_strides: Gradients of the outputs, at their first step; None: zero.
        after: Gradients of the states after the last step; None: zero.
    """

    like: Tensor
    inputs: Sequence[Tensor | None]
    strides: Sequence[int]
    states: Sequence[Tensor]
    tables: Sequence[tuple[Tensor, Layout]]
    numbers: tuple[Sequence[float], Sequence[float]]
    given: Sequence[Tensor | None]
    given_strides: Sequence[int]
    after: Sequence[Tensor | None]


@dataclass(frozen=True)
class ReverseResults:
    """Where the gradients are written to; None: not wanted.

    Attributes:
        of_inputs, strides: Gradients of the inputs. Stride 0: the sum over all steps.
        of_states: Gradients of the states before the first step.
    """

    of_inputs: Sequence[Tensor | None]
    strides: Sequence[int]
    of_states: Sequence[Tensor | None]


class CompiledReverse(Protocol):
    """A step's gradient, compiled for chunks of any length and any number of neurons."""

    def run(self, steps: int, operands: ReverseOperands, results: ReverseResults) -> Totals:
        """Run a chunk of steps backward; the sums that gradients of parameters are made of.

        On tensors without data it takes the memory that it would take, and computes nothing.
        """


class KernelTarget(Protocol):
    """Generates, compiles and runs kernels for the tensors of one kind of device."""

    def __hash__(self) -> int:
        """Equal for targets whose kernels are the same."""

    @property
    def name(self) -> str:
        """As `backend` names it."""

    @property
    def title(self) -> str:
        """As reports call its kernels."""

    @property
    def compiled_by(self) -> str:
        """Which compiler it uses, in the version it has: timings of kernels hold for that one only."""

    @property
    def max_dims(self) -> int:
        """The most dimensions of a step of which it can lay out an operand anew."""

    def operand_obstacle(self, values: Sequence[Any]) -> str:
        """Why inputs and states like these cannot be given to its kernels; empty if they can."""

    def obstacle(self, function: StepFunction) -> str:
        """Why it has no kernel of a step function; empty if it has one."""

    def as_stored(self, function: StepFunction) -> StepFunction:
        """The step with the bits of the eager one, which may compute in less than float32."""

    def build(self, function: StepFunction, gathered: frozenset[int]) -> CompiledScan:
        """Compile a step function, if nothing like it has been compiled yet.

        Args:
            function: The step; its tables follow its inputs.
            gathered: The inputs that do not lie in memory as the neurons do: broadcast, or with other strides.

        Raises:
            BuildError: It cannot be compiled here.
        """

    def build_reverse(self, function: StepFunction, gradient: StepGradient) -> CompiledReverse:
        """Compile the way back over a chunk, if nothing like it has been compiled yet.

        Args:
            function: The step, whose inputs, but not its tables, all lie in memory as the neurons do.
            gradient: Its gradient.

        Raises:
            BuildError: It cannot be compiled here.
        """
