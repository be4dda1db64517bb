"""torch.compile of SpikingJelly's network: of one step, called in a loop, and of all steps at once."""

from __future__ import annotations

import torch

from ..case import Case, step_loop
from .spikingjelly import IMPORTS, peer_network, read_out, sequences
from .system import Prepared, System, is_single_step, prepared

MOST_STEPS = 100  # compiling a converted ResNet-18 takes minutes for 64


def prepare_step(case: Case) -> Prepared:
    network = peer_network(case, "s")
    compiled = torch.compile(network)
    return prepared(case, network, lambda: step_loop(case.workload, compiled, case.inputs))


def prepare_all_steps(case: Case) -> Prepared:
    if case.workload.steps > MOST_STEPS:
        raise ValueError(f"not tried: all of T = {case.workload.steps} steps are unrolled, which takes too long")
    network = peer_network(case, "m")
    compiled = torch.compile(network)
    return prepared(case, network, lambda: read_out(case.workload, compiled(*sequences(case))))


SYSTEMS = (
    System("compile-step", "torch.compile of the step", prepare_step, is_single_step, imports=IMPORTS),
    System("compile-multi", "torch.compile of multi-step", prepare_all_steps, imports=IMPORTS),
)
