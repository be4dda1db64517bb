"""What the numbers depend on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("snncompile", "torch", "spikingjelly", "snntorch", "norse", "triton", "numpy")
PACKAGE_NAMES = {
    "torch": "PyTorch",
    "spikingjelly": "SpikingJelly",
    "snntorch": "snnTorch",
    "norse": "Norse",
    "triton": "Triton",
}
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def machine(device: str, threads: int) -> dict[str, str | int]:
    """Names and sizes; nothing that tells one machine of a kind from another."""
    described: dict[str, str | int] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": threads,
        "cores": os.cpu_count() or 0,
        "memory_bytes": memory_bytes(),
        "device": device,
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return described


def setting() -> str:
    """Machine and versions in one line, for a run on the CPU."""
    threads = torch.get_num_threads()
    about = machine("cpu", threads)
    named = ", ".join(f"{PACKAGE_NAMES.get(name, name)} {version}" for name, version in versions().items())
    return f"{about['platform']}, {about['processor']}, {threads} threads, {named}"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The build of torch, such as +cpu, is not in its metadata.
    found["torch"] = str(torch.__version__)
    return found


def processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or "unknown processor"


def memory_bytes() -> int:
    """Of the machine; 0 if it does not say."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    total = next((line.split()[1] for line in lines if line.startswith("MemTotal")), "0")
    return int(total) * 1024


def load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
