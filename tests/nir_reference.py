"""NIR graphs run by definition: the value of a node at a step, computed from NIR's equations, in NumPy and float64.

Nothing here knows of an order of nodes: a value is asked for, and asks for what it depends on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Array = Any
Edge = tuple[str, str]


def fire_and_reset(node: Any, h: Array) -> tuple[Array, Array]:
    """z = 1 where v > v_threshold; v = v_reset where z = 1."""
    spike = (h > node.v_threshold).astype(h.dtype)
    return spike, np.where(spike == 1, node.v_reset, h)


def rest_of(node: Any) -> dict[str, Any]:
    """States before the first step: potentials at rest, no current."""
    kind = type(node).__name__
    if kind == "IF":
        return {"v": node.v_reset}
    if kind in ("LI", "LIF", "CubaLI", "CubaLIF"):
        return {"v": node.v_leak, "i": 0.0}
    return {"v": 0.0}


def neuron_step(node: Any, x: Array, state: dict[str, Any], dt: float) -> Array:
    """One step of forward Euler from the derivatives that NIR's docstrings give; updates `state`."""
    kind = type(node).__name__
    if kind in ("CubaLI", "CubaLIF"):
        state["i"] = state["i"] + dt * (-state["i"] + node.w_in * x) / node.tau_syn
        x = state["i"]
    if kind in ("I", "IF"):
        derivative = node.r * x
    else:
        tau = node.tau if kind in ("LI", "LIF") else node.tau_mem
        derivative = ((node.v_leak - state["v"]) + node.r * x) / tau
    h = state["v"] + dt * derivative
    if kind in ("IF", "LIF", "CubaLIF"):
        spike, state["v"] = fire_and_reset(node, h)
        return spike
    state["v"] = h
    return h


NEURONS = ("I", "IF", "LI", "LIF", "CubaLI", "CubaLIF")


def numbers(value: Any) -> Any:
    """A stride or padding as plain numbers."""
    return value if isinstance(value, str) else tuple(int(number) for number in np.asarray(value).ravel())


def stateless(node: Any, x: Array) -> Array:
    """What a node without memory makes of `[N, *]`."""
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return x
    if kind in ("Affine", "Linear"):
        y = np.einsum("oi,ni->no", node.weight, x)
        return y + node.bias if kind == "Affine" else y
    if kind == "Scale":
        return x * node.scale
    if kind == "Threshold":
        return (x > node.threshold).astype(x.dtype)
    if kind == "Flatten":
        shape = list(x.shape[1:])
        end = node.end_dim % len(shape)
        return x.reshape(len(x), *shape[: node.start_dim], -1, *shape[end + 1 :])
    tensor = torch.from_numpy(x)
    if kind in ("Conv1d", "Conv2d"):
        convolution = F.conv1d if kind == "Conv1d" else F.conv2d
        weight, bias = (torch.as_tensor(array, dtype=torch.float64) for array in (node.weight, node.bias))
        hyper = (numbers(node.stride), numbers(node.padding), numbers(node.dilation), int(node.groups))
        return convolution(tensor, weight, bias, *hyper).numpy()
    # A pooling window, cut out and summed.
    (height, width), (down, right), (top, left) = (
        np.broadcast_to(value, 2).tolist() for value in (node.kernel_size, node.stride, node.padding)
    )
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    rows = range(0, padded.shape[2] - height + 1, down)
    columns = range(0, padded.shape[3] - width + 1, right)
    sums = np.stack(
        [np.stack([padded[:, :, r : r + height, c : c + width].sum((2, 3)) for c in columns], -1) for r in rows], -2
    )
    return sums / (height * width) if kind == "AvgPool2d" else sums


class Interpreter:
    """Runs a graph without inner graphs.

    Args:
        graph: The graph.
        inputs: `[T, N, *]` for each Input.
        dt: Length of a step.
        closing: Edges that carry the value of the previous step.
    """

    def __init__(self, graph: Any, inputs: dict[str, Array], dt: float, closing: Collection[Edge] = ()) -> None:
        self.graph, self.inputs, self.dt, self.closing = graph, inputs, dt, set(closing)
        first = next(iter(inputs.values()))
        self.steps, self.batch = first.shape[:2]
        self.values: dict[tuple[str, int], Array] = {}
        self.states = {name: rest_of(node) for name, node in graph.nodes.items() if type(node).__name__ in NEURONS}

    def output(self, name: str = "output") -> Array:
        """`[T, N, *]` of one Output."""
        return np.stack([self.value(name, step) for step in range(self.steps)])

    def value(self, name: str, step: int) -> Array:
        """What a node gives out at a step; zero before the first."""
        node = self.graph.nodes[name]
        if step < 0:
            return np.zeros((self.batch, *np.asarray(node.output_type["output"]).tolist()))
        if (name, step) not in self.values:
            self.values[name, step] = self._compute(name, node, step)
        return self.values[name, step]

    def _compute(self, name: str, node: Any, step: int) -> Array:
        kind = type(node).__name__
        if kind == "Input":
            return self.inputs[name][step]
        if kind == "Delay":
            lags = np.rint(np.asarray(node.delay) / self.dt).astype(int)
            found = np.zeros((self.batch, *lags.shape))
            for lag in set(lags.ravel().tolist()):
                then = self._incoming(name, step - lag) if step >= lag else np.zeros_like(found)
                found = np.where(lags == lag, then, found)
            return found
        if kind in NEURONS:
            if step > 0:
                self.value(name, step - 1)
            return neuron_step(node, self._incoming(name, step), self.states[name], self.dt)
        return stateless(node, self._incoming(name, step))

    def _incoming(self, name: str, step: int) -> Array:
        edges = [edge for edge in self.graph.edges if edge[1] == name]
        return sum(self.value(edge[0], step - 1 if tuple(edge) in self.closing else step) for edge in edges)
