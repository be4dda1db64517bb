"""Small NIR graphs with random arrays, in which everything fires now and then."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import nir
import numpy as np

DT = 1e-3

# Of one neuron: name of each parameter -> the range it is drawn from.
LEAKY = {"r": (0.5, 2.0), "v_leak": (-0.2, 0.2)}
FIRING = {"r": (4.0, 9.0), "v_leak": (-0.2, 0.2), "v_threshold": (0.3, 0.8), "v_reset": (-0.2, 0.1)}
SYNAPSE = {"tau_syn": (2e-3, 8e-3), "tau_mem": (3e-3, 2e-2), "w_in": (1.0, 3.0)}
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "I": {"r": (20.0, 200.0)},
    "IF": {"r": (300.0, 900.0), "v_threshold": (0.5, 1.5), "v_reset": (-0.3, 0.3)},
    "LI": {"tau": (3e-3, 2e-2), **LEAKY},
    "LIF": {"tau": (3e-3, 2e-2), **FIRING},
    "CubaLI": {**SYNAPSE, **LEAKY},
    "CubaLIF": {**SYNAPSE, **FIRING},
}


class Draw:
    """Random NIR nodes."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def neuron(self, kind: str, *shape: int, uniform: bool = False) -> Any:
        """A neuron whose parameters differ from element to element, or not."""
        drawn = {name: self.rng.uniform(*limits, () if uniform else shape) for name, limits in RANGES[kind].items()}
        return getattr(nir, kind)(**{name: np.broadcast_to(value, shape).copy() for name, value in drawn.items()})

    def linear(self, inputs: int, outputs: int, gain: float = 2.0) -> Any:
        return nir.Linear(weight=self.rng.normal(0, gain / inputs**0.5, (outputs, inputs)))

    def affine(self, inputs: int, outputs: int, gain: float = 2.0) -> Any:
        weight = self.linear(inputs, outputs, gain).weight
        return nir.Affine(weight=weight, bias=self.rng.normal(0, 0.3, outputs))

    def conv(self, size: tuple[int, ...], inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> Any:
        axes = len(size)
        options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
        kernels = tuple(np.broadcast_to(kernel, axes).tolist())
        weight = self.rng.normal(0, 0.5, (outputs, inputs // options["groups"], *kernels))
        kind = nir.Conv1d if axes == 1 else nir.Conv2d
        return kind(size[0] if axes == 1 else size, weight=weight, bias=self.rng.normal(0, 0.2, outputs), **options)

    def delay(self, steps: Any) -> Any:
        return nir.Delay(delay=np.asarray(steps) * DT)


def graph_of(nodes: dict[str, Any], edges: str, *, inputs: Any = 6, outputs: Any = 5, type_check: bool = True) -> Any:
    """A graph with the nodes "input" and "output" added, from edges such as "input>a>output a>b>a"."""
    nodes = {**nodes, "input": nir.Input(np.atleast_1d(inputs)), "output": nir.Output(np.atleast_1d(outputs))}
    pairs = [pair for chain in edges.split() for pair in zip(chain.split(">"), chain.split(">")[1:], strict=False)]
    return nir.NIRGraph(nodes, pairs, type_check=type_check)


def conv_graph() -> Any:
    draw = Draw(1)
    return graph_of(
        {
            "conv1": draw.conv((6, 7), 2, 4, padding=1),
            "if1": draw.neuron("IF", 4, 6, 7),
            "pool": nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
            "conv2": draw.conv((3, 3), 4, 6, kernel=2, stride=1),
            "scale": nir.Scale(draw.rng.uniform(0.5, 2, (6, 2, 2))),
            "lif1": draw.neuron("LIF", 6, 2, 2),
            "mean": nir.AvgPool2d(np.array([1, 2]), np.array([1, 2]), np.array([0, 0])),
            "flatten": nir.Flatten({"input": np.array([6, 2, 1])}, 0, -1),
            "fc": draw.affine(12, 5),
            "li": draw.neuron("LI", 5),
        },
        "input>conv1>if1>pool>conv2>scale>lif1>mean>flatten>fc>li>output",
        inputs=(2, 6, 7),
        type_check=False,  # NIR computes the output of a pooling window that is not square as if it were
    )


def residual_graph() -> Any:
    draw = Draw(2)
    nodes = {"fc1": draw.affine(6, 5), "lif1": draw.neuron("LIF", 5), "fc2": draw.affine(5, 5)}
    nodes |= {"lif2": draw.neuron("CubaLIF", 5), "skip": draw.linear(6, 5), "out": draw.neuron("CubaLI", 5)}
    return graph_of(nodes, "input>fc1>lif1>fc2>lif2>out>output input>skip>lif2 lif1>out lif1>lif2")


def recurrent_graph() -> Any:
    draw = Draw(3)
    nodes = {"fc": draw.affine(6, 5), "lif": draw.neuron("LIF", 5), "back": draw.affine(5, 5)}
    nodes |= {"out": draw.affine(5, 5), "li": draw.neuron("LI", 5)}
    return graph_of(nodes, "input>fc>lif>back>lif>out>li>output")


def interlocked_graph() -> Any:
    """Two loops that share a neuron, one of them through another size, and a loop on a neuron itself."""
    draw = Draw(4)
    nodes = {"fc": draw.affine(6, 5), "a": draw.neuron("LIF", 5), "ab": draw.affine(5, 3), "b": draw.neuron("IF", 3)}
    nodes |= {"ba": draw.affine(3, 5), "own": nir.Scale(draw.rng.normal(0, 1, 5)), "out": draw.affine(3, 5)}
    return graph_of(nodes, "input>fc>a>ab>b>ba>a a>own>a b>b b>out>output a>output")


def delay_graph() -> Any:
    draw = Draw(5)
    nodes = {"fc1": draw.affine(6, 5), "lif1": draw.neuron("LIF", 5), "even": draw.delay([3] * 5)}
    nodes |= {"fc2": draw.affine(5, 4), "uneven": draw.delay([0, 2, 7, 2]), "lif2": draw.neuron("LIF", 4)}
    nodes |= {"fc3": draw.affine(4, 5)}
    return graph_of(nodes, "input>fc1>lif1>even>fc2>uneven>lif2>fc3>output lif1>output")


def delayed_loop_graph() -> Any:
    """A loop with a delay of two and three steps in it, which is all the time it takes."""
    draw = Draw(6)
    nodes = {"fc": draw.affine(6, 5), "lif": draw.neuron("LIF", 5), "delay": draw.delay([2, 3, 2, 3, 2])}
    nodes |= {"back": draw.affine(5, 5)}
    return graph_of(nodes, "input>fc>lif>delay>back>lif>output delay>output")


# Name -> graph, shape of a sample, and the edges that carry the value of the previous step.
GRAPHS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[tuple[str, str], ...]]] = {
    "conv": (conv_graph, (2, 6, 7), ()),
    "residual": (residual_graph, (6,), ()),
    "recurrent": (recurrent_graph, (6,), (("lif", "back"),)),
    "interlocked": (interlocked_graph, (6,), (("b", "ba"), ("a", "own"), ("b", "b"))),
    "delay": (delay_graph, (6,), ()),
    "delayed loop": (delayed_loop_graph, (6,), ()),
}


def one_node(node: Any, *shape: int) -> Any:
    return graph_of({"node": node}, "input>node>output", inputs=shape, outputs=shape, type_check=False)


def nested_graph() -> Any:
    """`recurrent_graph` with the loop in an inner graph, as snnTorch and others write it."""
    flat = recurrent_graph()
    five = np.array([5])
    inner = nir.NIRGraph(
        {"in": nir.Input(five), "lif": flat.nodes["lif"], "back": flat.nodes["back"], "out": nir.Output(five)},
        [("in", "lif"), ("lif", "back"), ("back", "lif"), ("lif", "out")],
    )
    nodes = {name: flat.nodes[name] for name in ("fc", "out", "li")} | {"rnn": inner}
    return graph_of(nodes, "input>fc>rnn>out>li>output")


def random_graph(rng: random.Random) -> Any:
    draw = Draw(rng.randrange(10**6))
    makers: list[Callable[[], Any]] = [
        lambda: draw.affine(5, 5, gain=1.0),
        lambda: nir.Scale(draw.rng.normal(0, 0.5, 5)),
        lambda: draw.neuron("LIF", 5),
        lambda: draw.neuron("CubaLI", 5),
        lambda: draw.delay(draw.rng.integers(0, 3, 5)),
        lambda: draw.delay(draw.rng.integers(1, 3, 5)),
    ]
    names = [f"n{number}" for number in range(rng.randint(2, 7))]
    nodes = {name: rng.choice(makers)() for name in names}
    edges = dict.fromkeys(zip(["input", *names], [*names, "output"], strict=True))
    edges |= dict.fromkeys((rng.choice(names), rng.choice(names)) for _ in range(rng.randint(0, 6)))
    chains = list(edges)
    rng.shuffle(chains)
    return graph_of(nodes, " ".join(f"{a}>{b}" for a, b in chains), inputs=5)
