"""Calls find the memory that calls before them have freed: few pages are fresh from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch, snncompile
from torch import nn
from snncompile import neuron

layers = [layer for _ in range(3) for layer in (nn.Linear(384, 384), neuron.IFNode())]
net, x = nn.Sequential(*layers).eval(), torch.rand(8, 1024, 384)  # blocks of 12 MiB
with torch.no_grad():
    opt = snncompile.optimize(net, 8, schedule="breadth-first", readout="sum")
    for _ in range(3):
        opt(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        opt(x)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
print(faults * resource.getpagesize() / opt.report.predicted_peak_bytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_a_call_takes_little_fresh_memory() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1 / 4  # of the peak; more than half of it where glibc is left to itself
