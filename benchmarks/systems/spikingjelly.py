"""SpikingJelly 2.0: step loop, multi-step mode with each backend, the best chunk by hand, its memory optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..case import Case, clear_gradients, run, step_loop
from ..measure import synchronize
from ..networks.dvs_vgg import DvsBlock
from ..networks.sew_resnet import SewBlock
from ..workloads import Workload
from .spikingjelly_network import translated
from .system import Prepared, System, is_inference, is_single_step, prepared

CHUNKS = (1, 2, 4, 8, 16, 32)
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

    def chunked(length: int) -> Callable[[], Tensor]:
        if len(case.inputs) == 1:
            return lambda: read_out(
                case.workload, functional.chunk_multi_step_forward(length, *sequences(case), network)
            )
        # The same loop for networks of several inputs, which the function does not take.
        return lambda: read_out(
            case.workload,
            torch.cat([network(*parts) for parts in zip(*(x.split(length) for x in sequences(case)), strict=True)]),
        )

    def seconds(forward: Callable[[], Tensor]) -> float:
        functional.reset_net(network)
        synchronize(case.inputs[0].device)
        started = time.perf_counter()
        run(forward, case.cotangent)
        synchronize(case.inputs[0].device)
        return time.perf_counter() - started

    lengths = [length for length in CHUNKS if length <= case.workload.steps]
    tried = {length: min(seconds(chunked(length)) for _ in range(2)) for length in lengths}
    best = min(tried, key=lambda length: tried[length])
    details = {"chunk": best, "search": {str(length): value for length, value in tried.items()}}
    return prepared(case, network, chunked(best), details)


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
