"""Which workloads a run measures: a quick and a full list for the CPU, and one for a GPU."""

from __future__ import annotations

from itertools import product

from .converted import Converted
from .single_layer import IFChain, SingleLIF, TrainedLIF
from .spiking_layers import LinearStacks, Recurrent
from .training import DvsTraining, SewStepTraining, SewTraining
from .workload import Workload

__all__ = [
    "FAMILIES",
    "Converted",
    "DvsTraining",
    "IFChain",
    "LinearStacks",
    "Recurrent",
    "SewStepTraining",
    "SewTraining",
    "SingleLIF",
    "TrainedLIF",
    "Workload",
    "workloads",
]

FAMILIES: dict[str, type[Workload]] = {
    family.suite: family
    for family in (
        *(Converted, LinearStacks, SingleLIF, IFChain, TrainedLIF),
        *(SewTraining, SewStepTraining, DvsTraining, Recurrent),
    )
}


def workloads(device: str, quick: bool) -> list[Workload]:
    """All workloads of a run, the most telling first: a time limit cuts off the end of the list."""
    if device == "cuda":
        return _quick_gpu() if quick else _gpu()
    return _quick_cpu() if quick else _cpu()


def _quick_cpu() -> list[Workload]:
    return [
        Converted(32, 1, "resnet18"),
        Converted(8, 8, "resnet18"),
        SingleLIF(16, 1, 524288),
        IFChain(16, 1, 524288),
        LinearStacks(100, 16, 4, 1024),
        TrainedLIF(16, 1, 524288),
        Recurrent(200, 16, 256),
        SewTraining(4, 2, 32),
    ]


def _cpu() -> list[Workload]:
    return [
        Converted(64, 1, "resnet18"),
        Converted(32, 8, "resnet18"),
        SingleLIF(16, 1, 524288),
        IFChain(16, 1, 524288),
        TrainedLIF(16, 1, 524288),
        *(LinearStacks(500, 16, layers, 1024) for layers in (1, 4, 16)),
        Recurrent(1000, 16, 512),
        SewTraining(4, 8, 32),
        SewStepTraining(4, 8, 32),
        DvsTraining(10, 4),
        Converted(64, 1, "vgg16"),
        Converted(32, 8, "vgg16"),
        Converted(32, 1, "resnet18"),
        Converted(256, 1, "resnet18"),
        Converted(32, 1, "vgg16"),
        Converted(256, 1, "vgg16"),
        *(Converted(1024, 1, network) for network in ("resnet18", "vgg16")),
        *(Converted(steps, 8, network) for steps, network in product((64, 256, 1024), ("resnet18", "vgg16"))),
    ]


def _quick_gpu() -> list[Workload]:
    return [
        SingleLIF(16, 16, 524288),
        Converted(64, 1, "resnet18"),
        LinearStacks(500, 16, 1, 4096),
        TrainedLIF(16, 16, 524288),
    ]


def _gpu() -> list[Workload]:
    return [
        *_quick_gpu(),
        Converted(64, 64, "resnet18"),
        IFChain(16, 16, 524288),
        SewTraining(4, 32, 224),
        LinearStacks(500, 16, 1, 16384),
        DvsTraining(10, 8),
        LinearStacks(500, 16, 4, 4096),
        Recurrent(1000, 16, 1024),
        Converted(256, 8, "vgg16"),
    ]
