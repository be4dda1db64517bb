"""What a step does to tensors, operation by operation, written down by `make_fx` on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..torch_private import make_fx, tree_leaves, tree_map

# Whatever tells a step how large its tensors are, by the name of the function or attribute.
_SIZE_READS = frozenset(
    """shape size numel nelement __len__ nbytes stride unbind __iter__ __reversed__ split chunk tensor_split
    data_ptr untyped_storage storage tolist item""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class StepTrace:
    """ATen operations of a step.

    Attributes:
        graph: The operations; its `get_attr` nodes name constants.
        constants: The tensors that the step reads beside its arguments, such as parameters.
        asks_sizes: The step's code asked how large a tensor is, so that it may do something else for other sizes.
    """

    graph: fx.Graph
    constants: Mapping[str, Any]
    asks_sizes: bool = False

    def with_tensors(self, others: Mapping[int, Tensor]) -> StepTrace:
        """The same operations on other tensors.

        Args:
            others: What takes a tensor's place, by the `id` of the tensor.
        """
        return replace(self, constants={name: others.get(id(value), value) for name, value in self.constants.items()})

    def is_for_all_sizes(self, sizes: Sequence[int], tensors: Sequence[Tensor]) -> bool:
        """Whether the step does the same where other sizes stand in the place of these.

        Args:
            sizes: Those of the arguments and of `tensors` that are neither 0 nor 1.
            tensors: The constants that have those sizes.
        """
        known, own = {0, 1, *sizes}, {id(tensor) for tensor in tensors}
        others = [value for value in self.constants.values() if isinstance(value, Tensor) and id(value) not in own]
        if self.asks_sizes or any(value.numel() != 1 for value in others):
            return False
        for node in self.graph.nodes:
            lists = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, (list, tuple))]
            if node.op == "call_function" and node.users and any(isinstance(n, int) for each in lists for n in each):
                return False  # a list of numbers may be a shape
            values = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
            if not all(known.issuperset(value.shape) for value in values):
                return False
        return True

    def resized(self, sizes: Mapping[int, int]) -> StepTrace:
        """The same operations on values of other sizes, which must be for all sizes.

        Args:
            sizes: What takes a size's place, of all that are neither 0 nor 1.
        """

        def of_other_size(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = [sizes.get(size, size) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="meta")

        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            nodes[node] = copied = graph.node_copy(node, nodes.__getitem__)
            if "val" in node.meta:
                copied.meta["val"] = tree_map(of_other_size, node.meta["val"])
        return replace(self, graph=graph)


class _SizeReads(TorchFunctionMode):
    """Notes whether code asks how large a tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "shape")
        self.found |= name in _SIZE_READS
        return func(*args, **(kwargs or {}))


def trace_step(step: Callable[..., Any], *arguments: Any) -> StepTrace:
    """The trace of a step.

    Args:
        step: Any function of these arguments.
        arguments: Examples; only their types are looked at.

    Raises:
        Exception: Whatever a step raises that looks at values.
    """

    reads = _SizeReads()

    def plain(*given: Any) -> Any:
        with reads:
            return step(*given)  # make_fx counts the arguments of a bound method wrongly

    with torch.no_grad():
        traced = make_fx(plain, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    return StepTrace(traced.graph, {name: getattr(traced, name) for name in names}, reads.found)
