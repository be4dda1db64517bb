"""What is run: a network, its input, and how its outputs are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

SEED = 0  # of weights and inputs


@dataclass(frozen=True)
class Workload:
    """One family of workloads is a subclass, one workload an instance; its fields say all there is to say about it.

    Attributes:
        suite: Name of the family, as `--suite` takes it.
        description: The family in a few words, for tables.
        steps: T.
        batch: N.
        static_input: Every step sees the same input.
        readout: What is made of the outputs of the steps: all of them, or their sum.
        trains: Gradients are computed, too.
        is_multi_step: The step loop is not the reference but the network in multi-step mode: the batch norms of a
            network that is trained so see the statistics of all steps.
        frameworks: Other frameworks that have the network's layers, beside SpikingJelly.
    """

    suite: ClassVar[str]
    description: ClassVar[str]
    static_input: ClassVar[bool] = False
    readout: ClassVar[Literal["sequence", "sum"]] = "sequence"
    trains: ClassVar[bool] = False
    is_multi_step: ClassVar[bool] = False
    frameworks: ClassVar[frozenset[str]] = frozenset()

    steps: int
    batch: int

    @property
    def name(self) -> str:
        """Unique among workloads; the same for the same fields."""
        return f"{self.suite} {self.size}N={self.batch} T={self.steps}"

    @property
    def size(self) -> str:
        """What the name says of the network's size, with a blank after it; empty if nothing."""
        return ""

    @property
    def curve(self) -> str:
        """The name without T: workloads that share it are points of one curve over time."""
        return self.name.rpartition(" ")[0]

    def network(self) -> nn.Module:
        """A single-step network of `torch.nn` and `snncompile.neuron`, in the mode in which it is to run."""
        raise NotImplementedError

    def inputs(self) -> tuple[Tensor, ...]:
        """`[T, N, *]` each, or `[N, *]` if static."""
        raise NotImplementedError

    def moved_bytes(self) -> int | None:
        """The least that can be read and written, inputs once and outputs once, where that is what limits the time."""
        return None
