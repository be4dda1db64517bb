"""Which processor this is: what is compiled or timed on one holds on its like only."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

_TOLD = ("model name", "flags", "Features", "CPU part")


@cache
def processor() -> tuple[str, ...]:
    """The architecture, and what the system tells of model and instruction sets."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else [platform.processor()]
    return (platform.machine(), *sorted({line for line in lines if line.startswith(_TOLD)}))


@cache
def accelerator(device: torch.device) -> str:
    """The model of a device beside the processor; its type where that is all that is known."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    return device.type
