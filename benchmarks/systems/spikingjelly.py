"""SpikingJelly 2.0: step loop, multi-step mode with each backend, the best chunk by hand, its memory optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..case import Case, clear_gradients, run, step_loop
from ..measure import seconds_of
from ..networks.dvs_vgg import DvsBlock
from ..networks.sew_resnet import SewBlock
from ..workloads import Workload
from .spikingjelly_network import translated
from .system import Prepared, System, is_inference, is_single_step, prepared

CHUNKS = (1, 2, 4, 8, 16, 32)
SEARCH_STEPS = 64  # a chunk costs the same wherever it lies in time
IMPORTS = ("spikingjelly.activation_based.functional", "spikingjelly.activation_based.layer")


def sequences(case: Case) -> tuple[Tensor, ...]:
    """The inputs `[T, N, *]`; a static one as a view of one step."""
    if not case.workload.static_input:
        return case.inputs
    return tuple(x.expand(case.workload.steps, *x.shape) for x in case.inputs)


def read_out(workload: Workload, output: Tensor) -> Tensor:
    return output.sum(0) if workload.readout == "sum" else output


def peer_network(case: Case, step_mode: str) -> nn.Module:
    """SpikingJelly's network for a case; one in multi-step mode is so already."""
    return case.network if case.workload.is_multi_step else translated(case.network, step_mode)


def prepare_steps(case: Case) -> Prepared:
    network = peer_network(case, "s")
    return prepared(case, network, lambda: step_loop(case.workload, network, case.inputs))


def prepare_multi_step(case: Case) -> Prepared:
    network = peer_network(case, "m")
    return prepared(case, network, lambda: read_out(case.workload, network(*sequences(case))))


def prepare_best_chunk(case: Case) -> Prepared:
    """`chunk_multi_step_forward` with the chunk length that is the fastest in two tries, as one finds it by hand."""
    from spikingjelly.activation_based import functional

    network = peer_network(case, "m")
    whole = sequences(case)

    def chunked(length: int, parts: tuple[Tensor, ...]) -> Tensor:
        if len(parts) == 1:
            output: Tensor = functional.chunk_multi_step_forward(length, parts[0], network)
        else:  # the same loop, for networks of several inputs, which the function does not take
            split = zip(*(x.split(length) for x in parts), strict=True)
            output = torch.cat([network(*chunk) for chunk in split])
        return read_out(case.workload, output)

    def seconds(length: int) -> float:
        functional.reset_net(network)
        first_steps = tuple(x[:SEARCH_STEPS] for x in whole)
        return seconds_of(lambda: run(lambda: chunked(length, first_steps), case.cotangent), whole[0].device)

    lengths = [length for length in CHUNKS if length <= case.workload.steps]
    tried = {length: min(seconds(length) for _ in range(2)) for length in lengths}
    best = min(tried, key=lambda length: tried[length])
    details = {"chunk": best, "search": {str(length): value for length, value in tried.items()}}
    return prepared(case, network, lambda: chunked(best, whole), details)


def prepare_memopt(case: Case) -> Prepared:
    """`memopt.optimize_memory`: all four levels on CUDA; level 1, the only one there is, on the CPU."""
    from spikingjelly.activation_based import memopt

    network = peer_network(case, "m")
    level = 4 if case.inputs[0].is_cuda else 1
    memopt.optimize_memory(
        network,
        (SewBlock, DvsBlock),
        lambda model: model(*case.inputs),
        level=level,
        split_fn=lambda block: list(block.children()),
        can_chunk=lambda module: False,
    )
    clear_gradients(network, case.inputs)
    return prepared(case, network, lambda: network(*case.inputs), {"level": level})


def is_trained_network(workload: Workload) -> bool:
    return workload.trains and workload.is_multi_step


def _backend(name: str) -> dict[str, str]:
    """SpikingJelly chooses the implementation of a neuron per process."""
    return {"SJ_LIF_CUDA_IMPLEMENTATION": name, "SJ_IF_CUDA_IMPLEMENTATION": name}


SYSTEMS = (
    System("spikingjelly-steps", "SpikingJelly, step loop", prepare_steps, is_single_step, imports=IMPORTS),
    System(
        "spikingjelly-multi",
        "SpikingJelly, multi-step",
        prepare_multi_step,
        environment=_backend("torch"),
        imports=IMPORTS,
    ),
    System(
        "spikingjelly-triton",
        "SpikingJelly, multi-step, Triton",
        prepare_multi_step,
        devices=("cuda",),
        environment=_backend("triton"),
        imports=IMPORTS,
    ),
    # What took the place of CuPy kernels in SpikingJelly 2.0.
    System(
        "spikingjelly-cuda",
        "SpikingJelly, multi-step, CUDA kernels",
        prepare_multi_step,
        devices=("cuda",),
        environment=_backend("cuda"),
        imports=IMPORTS,
    ),
    System("spikingjelly-chunk", "SpikingJelly, best chunk", prepare_best_chunk, is_inference, imports=IMPORTS),
    System("spikingjelly-memopt", "SpikingJelly, memopt", prepare_memopt, is_trained_network, imports=IMPORTS),
)
