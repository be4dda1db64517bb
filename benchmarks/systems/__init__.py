"""Every system that a workload can be given to, by name."""

from __future__ import annotations

from importlib.util import find_spec

from ..workloads import Workload
from . import compiled, cuda_graph, other_frameworks, plain, spikingjelly, torch_compile
from .system import Prepared, System

__all__ = ["SYSTEMS", "Prepared", "System", "chosen"]

SYSTEMS: dict[str, System] = {
    system.name: system
    for module in (compiled, plain, spikingjelly, torch_compile, cuda_graph, other_frameworks)
    for system in module.SYSTEMS
}

# Left out of a quick run: compiling takes minutes, and each of ours plans anew.
SLOW_TO_START = frozenset({"compile-step", "compile-multi", "snncompile-lean", "snncompile-smallest", "snncompile-4x"})


def chosen(workload: Workload, device: str, quick: bool, peers: tuple[str, ...] | None) -> list[System]:
    """The systems of one workload, ours first.

    Args:
        peers: Names, beside which only ours and the yardstick take part; None for all that a run of this kind has.
    """

    def takes_part(system: System) -> bool:
        if device not in system.devices or not system.applies(workload):
            return False
        if peers is not None:
            return system.name in peers or system.is_yardstick or system.name == "snncompile"
        if system.name == "plain-steps":
            return find_spec("spikingjelly") is None
        return not (quick and system.name in SLOW_TO_START)

    return [system for system in SYSTEMS.values() if takes_part(system)]
