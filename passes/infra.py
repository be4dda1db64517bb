"""What a pass is: a frozen record that maps a graph to a graph and says what it did and why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from torch import nn

from ..capture import Leaf
from ..ir import Decision, Node, StepGraph, TensorType, Verdict
from ..options import Options
from ..schedule import Candidate, Measurements, Schedule


class Numerics(Enum):
    """What a pass may do to the results."""

    BITWISE = "bitwise"
    REASSOCIATES = "reassociates"  # runs only where the user allowed it


class BatchProbe(Protocol):
    """Tries a batching on data-less tensors before it is believed."""

    def batching_error(self, graph: StepGraph, node: Node) -> str | None:
        """Why the node does not run over a chunk as marked; None if shapes and dtypes come out right."""


class KernelProbe(Protocol):
    """Tries what kernels can do before a pass relies on it."""

    def obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why a stateful node has no kernel for inputs of these types `[N, *]`; empty if it has one."""

    def pointwise_obstacle(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> str:
        """Why what a chain's node does cannot be part of a kernel; empty if it can."""

    def largest(
        self, net: nn.Module, node: Node, inputs: Sequence[TensorType], read: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        """For each result of a stateful node, the largest it may be of the whole numbers from 0 on; None: anything.

        Nothing at all where nothing can be kept as bits.

        Args:
            net: The network.
            node: The node.
            inputs: Types `[N, *]` of what it reads.
            read: The same of what it reads.
        """

    def keeps(self, net: nn.Module, node: Node, inputs: Sequence[TensorType]) -> frozenset[int]:
        """Which of what a stateful node reads, inputs of these types, is kept for its backward."""

    def event_obstacle(self, net: nn.Module, node: Node) -> str:
        """Why there is no event-driven kernel of a linear layer or a 2d convolution; empty if there is one."""


@dataclass(frozen=True)
class PassContext:
    """What passes may know besides the graph.

    Attributes:
        options: The user's options.
        net: The network, to look at its modules; passes change nothing in it.
        leaves: Qualified name -> how capture treats the module.
        needs_grad: Gradients are recorded in the calls this plan is for.
        probe: Tries batchings.
        measurements: Bytes and seconds of nodes over chunks.
        kernels: Those of this plan; None if eager steps run.
        retype: The same graph with the types of its values computed anew, after what nodes do has changed.
        input_gradients: Gradients of the inputs are among those that are recorded.
    """

    options: Options
    net: nn.Module
    leaves: Mapping[str, Leaf]
    needs_grad: bool
    probe: BatchProbe
    measurements: Measurements
    kernels: KernelProbe | None = None
    retype: Callable[[StepGraph], StepGraph] = field(default=lambda graph: graph)
    input_gradients: bool = False

    def acts_like(self, node: Node) -> type[nn.Module] | None:
        """The torch class whose treatment of a batch the module of a node shares, if one is known."""
        leaf = self.leaves.get(str(node.target))
        return None if leaf is None else leaf.acts_like


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves.

    Attributes:
        graph: The new graph; the input graph itself where nothing changed.
        changed: Whether anything matched.
        decisions: What was done and what was refused.
        schedule: Set by the pass that chooses it.
        front: The schedules that it chose from, fastest first, where it searched.
    """

    graph: StepGraph
    changed: bool
    decisions: tuple[Decision, ...] = field(default=())
    schedule: Schedule | None = None
    front: tuple[Candidate, ...] = field(default=())


class Pass(ABC):
    """Base of all passes; a subclass is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = Numerics.BITWISE
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        """Map the graph; the input graph is left untouched."""

    def decide(self, node: str, verdict: Verdict, reason: str) -> Decision:
        """A decision under this pass's name."""
        return Decision(self.name, node, verdict, reason)
