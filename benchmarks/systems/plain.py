"""Plain PyTorch: the step loop, which is the reference; and a copy of the data, which is the yardstick of bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..case import Case, step_loop
from ..workloads import Workload
from .system import Prepared, System, is_single_step, prepared


def prepare_loop(case: Case) -> Prepared:
    return prepared(case, case.network, lambda: step_loop(case.workload, case.network, case.inputs))


def prepare_copy(case: Case) -> Prepared:
    """Half the bytes read and as many written, into memory that is there already."""
    moved = case.workload.moved_bytes()
    assert moved is not None
    source = torch.ones(moved // 2 // 4, device=case.inputs[0].device)
    target = torch.zeros_like(source)

    def forward() -> Tensor:
        with torch.no_grad():
            return target.copy_(source)

    # A copy has no gradient to start backward with.
    return _Copy(case, forward, nn.Module(), lambda: None, list, {"moved_bytes": moved})


class _Copy(Prepared):
    def run(self) -> Tensor:
        return self.forward()


def moves_bytes(workload: Workload) -> bool:
    return workload.moved_bytes() is not None


SYSTEMS = (
    System("plain-steps", "plain PyTorch, step loop", prepare_loop, is_single_step),
    System("copy", "a copy of the same bytes", prepare_copy, moves_bytes, is_yardstick=True),
)
