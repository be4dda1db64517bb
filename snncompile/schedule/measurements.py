"""What the scheduler must know of each node: bytes and seconds over a chunk. Measured elsewhere, used here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..ir import Node, StepGraph

if TYPE_CHECKING:
    from .plan import Schedule


SPIKING = 0.125  # the part of a value that is not zero where what is driven by events is timed


@dataclass(frozen=True)
class Footprint:
    """Bytes that one node touches when it runs over a chunk.

    Attributes:
        work_bytes: The most it holds at once beyond what was there before, its output included.
        output_bytes: What stays of it until its output dies, its state apart; 0 for a view of an operand.
        alias_of: The operand whose memory its output shares, or the node itself if that is its state's.
    """

    work_bytes: int
    output_bytes: int
    alias_of: str | None = None


class Measurements(Protocol):
    """Bytes and seconds of nodes.

    `steps` is the chunk length; `chunked` tells whether the node stands in a loop of a chunk longer than 1 and so takes
    tensors `[C, N, *]`, even where a last chunk is one step long.

    Attributes:
        first_step_bytes: The most that a first step holds that the network runs itself because a register is empty.
    """

    first_step_bytes: int

    def footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
        """Bytes over a chunk."""

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        """Seconds over a chunk; steps = 1 is the step loop's own call."""

    def put_seconds(self, size: int) -> float:
        """Seconds to copy a piece of `size` bytes into a buffer."""

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        """Whether a library kernel gives other bits over a chunk than step by step, tried on random operands."""

    def trial_seconds(self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]) -> list[float | None] | None:
        """Seconds of T steps by each of several schedules, run beside each other.

        Args:
            graph: Without gradients.
            estimates: The schedules, with what they are thought to take.

        Returns:
            None for a schedule whose chunks take too long; None for all where a run would tell nothing, or leave
            something behind.
        """

    def within(self, budget: int) -> Measurements:
        """The same for a plan of another budget, in bytes: longer chunks than fit into it are not tried."""

    def training_peak_bytes(self, graph: StepGraph, schedule: Schedule) -> int:
        """The peak of one call and its backward, which keeps what forward computed."""
