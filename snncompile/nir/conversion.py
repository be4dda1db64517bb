"""From a NIR graph to a network of single-step modules."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from operator import add, getitem
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn

from snncompile.errors import CaptureError
from snncompile.nir.cycles import RecurrentNode, RecurrentRegion, closing_edges, order_of_step
from snncompile.nir.delay import Delay
from snncompile.nir.flat_graph import Edge, FlatGraph, Key, flatten, path_of
from snncompile.nir.membrane import time_step
from snncompile.nir.translation import TRANSLATIONS, Settings, Shape, Site, declared_shape

__all__ = ["from_nir"]


def from_nir(
    graph: Any,
    *,
    dt: float = 1e-4,
    surrogate_function: Callable[[Tensor], Tensor] | None = None,
    detach_reset: bool = False,
) -> fx.GraphModule:
    """Turn a NIR graph into a network of single-step modules, which `optimize` takes.

    One call is one step of length dt, by Euler's forward method: for LIF, v += dt/tau·((v_leak - v) + r·x), then fire
    and reset (module ``snncompile.nir.neurons`` has every equation). Several edges into one node add up. A cycle
    without a delay takes one step: what it feeds back is the value of the previous step, zero at first (module
    ``snncompile.nir.cycles`` says on which edge); its nodes become one `RecurrentRegion`. A delay must be a whole
    number of steps.

    Every node is a submodule under its name in the graph, those of an inner graph under ``<graph>_<node>``, with what
    is no identifier replaced. All arrays of weights and neurons are parameters, in torch's default dtype.

    Args:
        graph: A ``nir.NIRGraph``, or the path of a file that ``nir.read`` reads.
        dt: Length of a step, in the unit of the graph's time constants and delays, seconds by convention.
        surrogate_function: Θ with a gradient for everything that fires, a callable tensor -> tensor with Θ(0) = 1;
            None stands for ``snncompile.surrogate.Sigmoid()``. As NIR's neurons do not fire at the threshold itself, it
            is called with the distance to the threshold, the sign turned, so its gradient should be symmetric.
        detach_reset: Keep the gradient out of the neurons' resets.

    Returns:
        A ``torch.fx.GraphModule`` whose forward takes one tensor ``[N, *]`` for each Input, sorted by name, and returns
        the value at the Output ``[N, *]``, or a tuple of them, sorted by name.

    Raises:
        ImportError: The package ``nir`` is not installed.
        TypeError, ValueError: An argument is wrong.
        CaptureError: The file holds no graph that ``nir`` can read, or the graph has a node without translation, a
            shape that does not fit, a delay of no whole number of steps, or a node that is not connected; it names the
            node.

    Source: the equations are those in the docstrings of the package ``nir``.
    """
    step = time_step(dt)
    if surrogate_function is not None and not callable(surrogate_function):
        raise TypeError(f"surrogate_function must be callable, got {type(surrogate_function).__name__}")
    if not isinstance(detach_reset, bool):
        raise TypeError(f"detach_reset must be True or False, got {type(detach_reset).__name__}")
    flat = flatten(_read(graph), TRANSLATIONS)
    shapes, modules = _translate(flat, Settings(step, surrogate_function, detach_reset))
    return _Assembly(flat, shapes, modules).network()


def _read(graph: Any) -> Any:
    try:
        import nir
    except ImportError as error:
        raise ImportError("from_nir needs the package nir; install it with pip install nir") from error
    if isinstance(graph, (str, os.PathLike)):
        try:
            # Its own check of types rejects grouped convolutions and kernels that are not square; ours does not.
            graph = nir.read(graph, type_check=False)
        except OSError:
            raise
        except Exception as error:
            raise CaptureError(f"nir cannot read a graph from {graph}: {error or type(error).__name__}") from error
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"graph must be a nir.NIRGraph or the path of one, got {type(graph).__name__}")
    return graph


def _translate(flat: FlatGraph, settings: Settings) -> tuple[dict[Key, Shape], dict[Key, nn.Module | None]]:
    """The shape of each node's input, and its module; shapes spread from the Inputs along the edges."""
    given: dict[Key, Shape] = {}
    made: dict[Key, Shape] = {}
    modules: dict[Key, nn.Module | None] = {}
    for key in flat.inputs:
        shape = declared_shape(flat.nodes[key].input_type)
        if shape is None:
            raise CaptureError(f"the Input {path_of(key)!r} declares no shape; give it one", where=path_of(key))
        given[key] = shape
    waiting = list(flat.inputs)
    while waiting:
        key = waiting.pop(0)
        node = flat.nodes[key]
        modules[key], made[key] = TRANSLATIONS[type(node).__name__](Site(node, path_of(key), given[key]), settings)
        for source, target in flat.edges:
            if source == key and target not in given:
                given[target] = made[key]
                waiting.append(target)
    for source, target in flat.edges:
        if made[source] != given[target]:
            raise CaptureError(
                f"edges of different shapes lead to {path_of(target)!r}: {made[source]} from {path_of(source)!r}, "
                f"{given[target]} from another node; what adds up must have one shape",
                where=path_of(target),
            )
    return given, modules


class _Assembly:
    """Puts the modules of a graph together.

    Args:
        flat: The graph.
        shapes: Of each node's input.
        modules: What each node does.
    """

    def __init__(self, flat: FlatGraph, shapes: Mapping[Key, Shape], modules: Mapping[Key, nn.Module | None]) -> None:
        self.flat = flat
        self.shapes, self.modules = dict(shapes), dict(modules)
        self.edges = self._close_cycles()
        self.names = _Names()
        self.name_of = {key: self.names.take(key, type(node).__name__) for key, node in flat.nodes.items()}
        for key in self.modules:
            if key not in flat.nodes:
                self.name_of[key] = self.names.take((self.name_of[key[:-1]], "previous"), "Delay")

    def _close_cycles(self) -> list[Edge]:
        """The edges, with a delay of one step on those that close a cycle."""
        closing = set(closing_edges(self.flat.edges, self.flat.inputs, self.modules))
        edges = []
        for source, target in self.flat.edges:
            previous = (*source, "previous")
            if (source, target) not in closing:
                edges.append((source, target))
                continue
            if previous not in self.modules:
                self.modules[previous], self.shapes[previous] = Delay(1), self.shapes[target]
                edges.append((source, previous))
            edges.append((previous, target))
        return edges

    def network(self) -> fx.GraphModule:
        root, graph = nn.Module(), fx.Graph()
        values = {key: graph.placeholder(self.name_of[key]) for key in self.flat.inputs}
        for keys in self._components():
            key = next(iter(keys))
            if len(keys) > 1 or (key, key) in self.edges:
                values |= self._call_region(keys, values, root, graph)
            elif key not in values:
                values[key] = self._call(key, values, root, graph)
        results = tuple(values[key] for key in self.flat.outputs)
        graph.output(results[0] if len(results) == 1 else results)
        return fx.GraphModule(root, graph, "NIRNetwork")

    def _components(self) -> list[set[Key]]:
        """Single nodes, and the nodes of interlocked cycles, in an order in which they can run."""
        graph: Any = nx.DiGraph(self.edges)
        graph.add_nodes_from(self.modules)
        condensed = nx.condensation(graph)
        members = dict(condensed.nodes(data="members"))
        order = nx.lexicographical_topological_sort(condensed, key=lambda number: min(members[number]))
        return [members[number] for number in order]

    def _sources(self, key: Key) -> list[Key]:
        return [source for source, target in self.edges if target == key]

    def _call(self, key: Key, values: Mapping[Key, fx.Node], root: nn.Module, graph: fx.Graph) -> fx.Node:
        operands = (values[source] for source in self._sources(key))
        x = reduce(lambda left, right: graph.call_function(add, (left, right)), operands)
        module = self.modules[key]
        if module is None:
            return x
        root.add_module(self.name_of[key], module)
        return graph.call_module(self.name_of[key], (x,))

    def _call_region(
        self, keys: Collection[Key], values: Mapping[Key, fx.Node], root: nn.Module, graph: fx.Graph
    ) -> dict[Key, fx.Node]:
        order = order_of_step(keys, self.edges, self.modules)
        sources = {key: self._sources(key) for key in order}
        outside = list(dict.fromkeys(source for key in order for source in sources[key] if source not in keys))
        read = [key for key in order if any(source == key and target not in keys for source, target in self.edges)]
        nodes = [
            RecurrentNode(
                self.name_of[key],
                self.modules[key],
                tuple(self.name_of[source] for source in sources[key]),
                self.shapes[key],
            )
            for key in order
        ]
        region = RecurrentRegion(self._named(outside), nodes, self._named(read))
        name = self.names.take(("recurrent",), "RecurrentRegion")
        root.add_module(name, region)
        call = graph.call_module(name, tuple(values[key] for key in outside))
        if len(read) == 1:
            return {read[0]: call}
        return {key: graph.call_function(getitem, (call, number)) for number, key in enumerate(read)}

    def _named(self, keys: Iterable[Key]) -> list[str]:
        return [self.name_of[key] for key in keys]


class _Names:
    """Makes unique names of submodules and arguments, which must be identifiers that nothing else has."""

    def __init__(self) -> None:
        self._taken = {"self"}
        self._owners = (fx.GraphModule(nn.Module(), fx.Graph()), RecurrentRegion((), (), ()))

    def take(self, key: Key, kind: str) -> str:
        """A new name for the node of that key and NIR type."""
        wish = re.sub(r"[^0-9a-zA-Z_]+", "_", "_".join(key)).strip("_")
        if not wish or wish[0].isdigit():
            wish = f"{kind.lower()}_{wish}".rstrip("_")
        name, number = wish, 1
        while name in self._taken or keyword.iskeyword(name) or any(hasattr(owner, name) for owner in self._owners):
            name, number = f"{wish}_{number}", number + 1
        self._taken.add(name)
        return name
