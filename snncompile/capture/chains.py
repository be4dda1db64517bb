"""A neuron chain as one stateful module: the states of its neurons, and all its operations as one step function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..ir import Chain, Node, OpKind, map_refs
from .adapter import Adapter, Leaf, States, Tensors
from .channels_last import ChannelsLastConv2d
from .sequence_module import out_of_place


class NeuronChain(nn.Module):
    """Runs what a chain's node stands for. Its modules are those of the network: states and parameters are theirs.

    Args:
        chain: What it does.
        modules: For each node that calls one, its module.

    Attributes:
        on_neuron: Called with the name of each neuron's node and what it gives, `[N, *]`, where the eager step runs.
    """

    on_neuron: Callable[[str, Any], None] | None = None

    def __init__(self, chain: Chain, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.chain = chain
        self._order = tuple(name for name, _ in modules)
        self.parts = nn.ModuleList(module for _, module in modules)

    @staticmethod
    def of(net: nn.Module, node: Node) -> NeuronChain:
        """The chain of a node of the graph, on the modules of a network or of its twin."""
        assert node.chain is not None
        modules = [
            (part.name, net.get_submodule(part.target))
            for part in node.chain.nodes
            if part.kind in (OpKind.STATEFUL, OpKind.MODULE)
        ]
        return NeuronChain(node.chain, modules)

    def part(self, name: str) -> nn.Module:
        """The module that a node of the chain calls."""
        return self.parts[self._order.index(name)]

    @property
    def neurons(self) -> list[nn.Module]:
        """The modules with a state, in order."""
        return [self.part(node.name) for node in self.chain.neurons]

    def extra_repr(self) -> str:
        return " -> ".join(node.name for node in self.chain.nodes)


class ChainAdapter(Adapter):
    """A chain's step function, put together from those of its neurons by the adapters that know them.

    Args:
        adapters: Of the frameworks.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = tuple(adapters)

    def leaf(self, module: nn.Module) -> Leaf | None:
        return Leaf(OpKind.STATEFUL) if isinstance(module, NeuronChain) else None

    def state_keys(self, module: nn.Module) -> tuple[str, ...]:
        # Of each neuron, for itself; `parts_of` names them.
        return ()

    def reset_values(self, module: nn.Module) -> States:
        return tuple(value for part in _neurons(module) for value in self._of(part).reset_values(part))

    def read(self, module: nn.Module) -> States:
        return tuple(value for part in _neurons(module) for value in self._of(part).read(part))

    def write(self, module: nn.Module, states: States) -> None:
        for part, own in self._split(module, states):
            self._of(part).write(part, own)

    def check(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        for part in _neurons(module):
            self._of(part).check(part, input_shape)

    def materialize(self, module: nn.Module, inputs: Tensors, states: States) -> States:
        # What comes in first is of the shape of what each neuron takes.
        like = inputs[:1]
        return tuple(
            value for part, own in self._split(module, states) for value in self._of(part).materialize(part, like, own)
        )

    def step(self, module: nn.Module, inputs: Tensors, states: States) -> tuple[Tensors, States]:
        chain = _chain(module)
        values: dict[str, Any] = dict(zip(chain.chain.operands, inputs, strict=True))
        held = {id(part): own for part, own in self._split(module, states)}
        after: list[Any] = []
        for node in chain.chain.nodes:
            args, kwargs = map_refs((node.args, dict(node.kwargs)), lambda ref: values[ref.name])
            if node.kind is OpKind.STATEFUL:
                part = chain.part(node.name)
                outputs, own = self._of(part).step(part, args, held[id(part)])
                after += own
                values[node.name] = outputs[0]
                if chain.on_neuron is not None:
                    chain.on_neuron(node.name, outputs[0])
            elif node.kind is OpKind.FUNCTION:
                values[node.name] = node.target(*args, **kwargs)
            elif node.kind is OpKind.METHOD:
                values[node.name] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                values[node.name] = out_of_place(chain.part(node.name))(*args, **kwargs)
        return tuple(values[name] for name in chain.chain.results), tuple(after)

    def _of(self, neuron: nn.Module) -> Adapter:
        return next(adapter for adapter in self._adapters if adapter.leaf(neuron) is not None)

    def _split(self, module: nn.Module, states: States) -> list[tuple[nn.Module, States]]:
        """Each neuron with its own of the states."""
        pairs, begin = [], 0
        for part in _neurons(module):
            end = begin + len(self._of(part).reset_values(part))
            pairs.append((part, tuple(states[begin:end])))
            begin = end
        return pairs


def module_of(net: nn.Module, node: Node) -> nn.Module:
    """The module that a node calls, in a network or in its twin; of a chain's node, the chain."""
    if node.chain is not None:
        return NeuronChain.of(net, node)
    module = net.get_submodule(node.target)
    return ChannelsLastConv2d(module) if node.channels_last else module


def neurons_of(module: nn.Module) -> list[nn.Module]:
    """A neuron itself, or those of a chain."""
    return module.neurons if isinstance(module, NeuronChain) else [module]


def _chain(module: nn.Module) -> NeuronChain:
    assert isinstance(module, NeuronChain)
    return module


def _neurons(module: nn.Module) -> list[nn.Module]:
    return _chain(module).neurons
