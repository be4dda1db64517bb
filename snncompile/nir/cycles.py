"""Recurrent graphs: where a cycle takes its step of time, and the module that runs one.

Within a step every node runs once, so a value that comes around a cycle has to wait for the next step. A `Delay` of at
least one step in the cycle makes it wait already. A cycle without one is closed by an edge that carries the value of
the previous step, zero at first: the edge that a depth-first walk from the Inputs, along the edges in the order in
which the graph lists them, finds leading back to a node that it came from. Where the value on that edge comes from the
cycle alone, through operations without memory that feed nothing else, such as recurrent weights, the wait is put before
these: then what is carried is the spike, and a recurrent bias counts from the first step on, as it does in the
equations and in the recurrent layers of snnTorch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, TypeVar, cast

import networkx as nx
from torch import Tensor, nn

from snncompile.nir.delay import Delay
from snncompile.nir.flat_graph import Edge, Key
from snncompile.stateful import StatefulModule

__all__ = ["RecurrentNode", "RecurrentRegion", "closing_edges", "order_of_step"]

State = TypeVar("State")


def closing_edges(edges: Sequence[Edge], inputs: Sequence[Key], modules: Mapping[Key, nn.Module | None]) -> list[Edge]:
    """The edges that must carry the value of the previous step so that the nodes of one step can be put in order.

    Args:
        edges: Of the graph, in order.
        inputs: Where the walk starts.
        modules: What each node does.
    """
    registers = [key for key, module in modules.items() if is_register(module)]
    graph: Any = nx.DiGraph(edges)
    graph.add_nodes_from(modules)
    forward = graph.copy()
    forward.remove_edges_from(list(graph.in_edges(registers)))
    closing = set(_back_edges(forward, (*inputs, *registers)))
    component = {key: number for number, keys in enumerate(nx.strongly_connected_components(graph)) for key in keys}
    waiting = sorted({source for source, _ in closing})
    done: set[Key] = set()
    while waiting:
        key = waiting.pop()
        before, after = set(graph.in_edges(key)), set(graph.out_edges(key))
        alone = all(component[source] == component[key] for source, _ in before)
        if isinstance(modules[key], StatefulModule) or key in done or not (alone and after <= closing):
            continue
        if closing.isdisjoint(before):
            closing = (closing - after) | before
            waiting += sorted(source for source, _ in before)
            done.add(key)
    return [edge for edge in edges if edge in closing]


def _back_edges(graph: Any, starts: Iterable[Key]) -> Iterator[Edge]:
    finished: set[Key] = set()
    for start in starts:
        if start in finished:
            continue
        path: dict[Key, None] = {start: None}  # ordered, and quick to ask
        successors = [iter(graph.successors(start))]
        while successors:
            here = next(reversed(path))
            there = next(successors[-1], None)
            if there is None:
                finished.add(here)
                del path[here]
                successors.pop()
            elif there in path:
                yield here, there
            elif there not in finished:
                path[there] = None
                successors.append(iter(graph.successors(there)))


def order_of_step(keys: Collection[Key], edges: Sequence[Edge], modules: Mapping[Key, nn.Module | None]) -> list[Key]:
    """The nodes of closed cycles in the order in which a step runs them: no node waits for the input of a register."""
    registers = {key for key in keys if is_register(modules[key])}
    graph: Any = nx.DiGraph()
    graph.add_nodes_from(keys)
    graph.add_edges_from(edge for edge in edges if edge[0] in keys and edge[1] in keys and edge[1] not in registers)
    return list(nx.lexicographical_topological_sort(graph))


def is_register(module: nn.Module | None) -> bool:
    """Whether it gives out a value that does not depend on the input of the same step."""
    return isinstance(module, Delay) and module.is_register


@dataclass(frozen=True)
class RecurrentNode:
    """One node of a cycle.

    Attributes:
        name: A name for its value.
        module: What it does, None where it hands on its input.
        sources: Names of the values that add up to its input: of other nodes, or of the region's inputs.
        shape: Of its input, for one sample.
    """

    name: str
    module: nn.Module | None
    sources: tuple[str, ...]
    shape: tuple[int, ...]


class RecurrentRegion(StatefulModule):
    """The nodes of one or more interlocked cycles, as one module with one step.

    A step reads the delays of at least one step first, which need no input for that; runs the other nodes in order;
    and then hands the delays what they are to give out later. The states are those of the nodes, under the names
    ``<node>_<state>``; the neurons inside keep none of their own.

    Shapes:
        One input ``[N, *]`` for each name in ``inputs``, of floating point and one batch size, to one output for each
        name in ``outputs``. The shapes of states are those of the nodes, with the batch of the first input.

    Args:
        inputs: Names of the values that come in.
        nodes: In the order of a step, as :func:`order_of_step` has it.
        outputs: Names of the nodes whose values go out.
    """

    def __init__(self, inputs: Sequence[str], nodes: Sequence[RecurrentNode], outputs: Sequence[str]) -> None:
        super().__init__()
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._order = tuple(node.name for node in nodes)
        self._sources = {node.name: node.sources for node in nodes}
        self._shapes = {node.name: node.shape for node in nodes}
        self._registers = tuple(node.name for node in nodes if is_register(node.module))
        for node in nodes:
            if node.module is not None:
                self.add_module(node.name, node.module)
        self._slots = {
            node.name: tuple(self._register_state_of(node.name, node.module))
            for node in nodes
            if isinstance(node.module, StatefulModule)
        }

    def _register_state_of(self, node: str, module: StatefulModule) -> Iterator[str]:
        for state, reset_value in zip(module.state_names, module.reset_values, strict=True):
            name = f"{node}_{state}"
            while hasattr(self, name):
                name += "_"
            self.register_state(name, reset_value)
            yield name

    def check_states(self, shape: tuple[int, ...]) -> None:
        self._check_states(shape, tuple(self._states.values()))

    def _check_states(self, shape: tuple[int, ...], states: tuple[float | Tensor, ...]) -> None:
        for name, own in self._by_node(states).items():
            expected = (*shape[:1], *self._shapes[name])
            for slot, state in zip(self._slots[name], own, strict=True):
                if isinstance(state, Tensor) and state.shape != expected:
                    raise ValueError(
                        f"state {slot} of {type(self).__name__} has shape {tuple(state.shape)}, an input of shape "
                        f"{tuple(shape)} needs {expected}; call reset() before a new batch shape"
                    )

    def materialize_states(self, inputs: tuple[Tensor, ...], states: tuple[float | Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        self._check_states(tuple(x.shape), states)
        found: list[Tensor] = []
        for name, own in self._by_node(states).items():
            like = x.new_empty(()).expand(len(x), *self._shapes[name])
            found += self._stateful(name).materialize_states((like,), own)
        return tuple(found)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values = dict(zip(self._inputs, inputs, strict=True))
        old = self._by_node(states)
        new: dict[str, tuple[Tensor, ...]] = {}
        for name in self._registers:
            values[name] = cast(Delay, self._stateful(name)).read((old[name][0], *old[name]))
        for name in self._order:
            if name in self._registers:
                continue
            x, module = self._sum(name, values), self._modules.get(name)
            if isinstance(module, StatefulModule):
                (values[name],), new[name] = module.step((x,), old[name])
            else:
                values[name] = x if module is None else module(x)
        for name in self._registers:
            _, new[name] = self._stateful(name).step((self._sum(name, values),), old[name])
        outputs = tuple(values[name] for name in self._outputs)
        return outputs, tuple(state for name in self._slots for state in new[name])

    def _sum(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return reduce(add, (values[source] for source in self._sources[name]))

    def _stateful(self, name: str) -> StatefulModule:
        return cast(StatefulModule, self._modules[name])

    def _by_node(self, states: tuple[State, ...]) -> dict[str, tuple[State, ...]]:
        rest = iter(states)
        return {name: tuple(islice(rest, len(slots))) for name, slots in self._slots.items()}
