"""Read networks in the Neuromorphic Intermediate Representation (NIR) as single-step modules.

NIR (Pedersen et al., "Neuromorphic intermediate representation: A unified instruction set for interoperable
brain-inspired computing", 2024) describes a spiking network as a graph of differential equations, which Norse,
snnTorch, SpikingJelly and others export. `from_nir` turns such a graph into what `optimize` takes::

    net = snncompile.from_nir("network.nir", dt=1e-4)
    opt = snncompile.optimize(net, T=100)

Equations become steps of length dt by Euler's forward method, in the order charge, fire, reset (module `neurons`).
An operation without memory passes its value on within the step, so a spike reaches the last layer in the step in which
it is fired; only a cycle of the graph takes time, one step (module `cycles`).
"""

from __future__ import annotations

from snncompile.nir.conversion import from_nir
from snncompile.nir.cycles import RecurrentRegion
from snncompile.nir.delay import Delay
from snncompile.nir.neurons import IF, LI, LIF, CubaLI, CubaLIF, Integrator, Scale, Threshold

__all__ = [
    "IF",
    "LI",
    "LIF",
    "CubaLI",
    "CubaLIF",
    "Delay",
    "Integrator",
    "RecurrentRegion",
    "Scale",
    "Threshold",
    "from_nir",
]
