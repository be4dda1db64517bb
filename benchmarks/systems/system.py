"""A system: one way to run a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from snncompile import functional

from ..case import Case, clear_gradients, gradients, potentials, run
from ..outcome import Outcome
from ..workloads import Workload


@dataclass(frozen=True)
class Prepared:
    """A case made ready to run.

    Attributes:
        case: What it was made from.
        forward: Computes the output, as the workload's readout wants it, from the states it finds.
        network: The module whose parameters get the gradients.
        reset: Puts the states back to rest.
        states: The final potentials, in the order of the case's network.
        details: What preparing found out, such as the best chunk length.
    """

    case: Case
    forward: Callable[[], Tensor]
    network: nn.Module
    reset: Callable[[], None]
    states: Callable[[], list[Tensor]]
    details: Mapping[str, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Back to where every run starts."""
        self.reset()
        clear_gradients(self.network, self.case.inputs)

    def run(self) -> Tensor:
        """What is timed."""
        return run(self.forward, self.case.cotangent)

    def outcome(self) -> Outcome:
        """Run once from rest and hand out everything that was computed."""
        self.clear()
        output = self.run().detach()
        trains = self.case.workload.trains
        return Outcome(output, tuple(self.states()), tuple(gradients(self.network, self.case.inputs)) if trains else ())


def prepared(
    case: Case,
    network: nn.Module,
    forward: Callable[[], Tensor],
    details: Mapping[str, Any] | None = None,
) -> Prepared:
    """For networks whose neurons keep their potential in `v` and have `reset()`."""
    return Prepared(
        case, forward, network, lambda: functional.reset_net(network), lambda: potentials(network), details or {}
    )


@dataclass(frozen=True)
class System:
    """How to run any workload that the system can run.

    Attributes:
        name: As `--peers` takes it.
        label: As tables show it.
        prepare: Makes a case ready; whatever it raises becomes the text of the row.
        applies: Whether a workload has a row for it.
        devices: Where it runs.
        environment: Variables that its process starts with.
        imports: Modules to import before any clock runs; one that is missing becomes the text of the row.
        is_ours: snncompile, which always takes part.
        is_yardstick: Computes nothing; its time is what moving the data costs.
    """

    name: str
    label: str
    prepare: Callable[[Case], Prepared]
    applies: Callable[[Workload], bool] = lambda workload: True
    devices: tuple[str, ...] = ("cpu", "cuda")
    environment: Mapping[str, str] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    is_ours: bool = False
    is_yardstick: bool = False


def is_inference(workload: Workload) -> bool:
    return not workload.trains


def is_single_step(workload: Workload) -> bool:
    return not workload.is_multi_step
