"""Propagates one step through the graph without data: types of every value, and what each node does besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, SnnCompileError
from ..ir import Effects, Node, OpKind, StepGraph, TensorType, map_refs, verify_graph
from ..ir.batching_rules import is_known_pure
from ..torch_private import TorchDispatchMode, no_modes, storage_key, tree_leaves, tree_map
from .chains import module_of
from .copies import copy_network, tensors_of
from .fakes import FakeNetwork
from .leaves import adapter_of, without_hooks
from .sequence_module import SequenceModule


class NodeFailure(CaptureError):
    """A node that cannot be computed as one operation of a step.

    Args:
        message: Says which, and on what.
        node: The node.
        reason: What it raised.
    """

    def __init__(self, message: str, node: Node, reason: str) -> None:
        super().__init__(message, where=node.where)
        self.node = node
        self.reason = reason


def propagate_shapes(
    graph: StepGraph,
    fakes: FakeNetwork,
    inputs: tuple[Tensor, ...],
    net: nn.Module,
    registers: Mapping[str, TensorType] = MappingProxyType({}),
) -> StepGraph:
    """Run one step of every node on data-less tensors.

    Args:
        graph: From `capture`.
        fakes: The twin of the network.
        inputs: One data-less step `[N, *]` for each input of the network.
        net: The network itself; an opaque module that cannot run without data is copied from here and run on zeros.
        registers: What each register holds from step to step.

    Raises:
        NodeFailure: A node fails on inputs of these shapes.
    """
    values: dict[str, Any] = {}
    changes: dict[str, Node] = {}
    with fakes.mode, torch.no_grad():
        for node in graph:
            if node.kind is OpKind.OUTPUT:
                changes[node.name] = replace(node, value=_types(_substitute(node.args[0], values)))
                continue
            operands = [values[name] for name in node.refs if graph[name].kind is not OpKind.CONSTANT]
            with EffectsRecorder(operands) as recorder:
                values[node.name], state = _run(node, values, fakes, inputs, net, recorder, registers)
            value = values[node.name]
            changes[node.name] = replace(
                node,
                value=() if value is None else _types(value),
                state=_types(state),
                effects=recorder.effects,
                shares=_shares(node, values, state, fakes, recorder),
            )
    typed = graph.with_nodes(changes, facts={"shapes"})
    verify_graph(typed)
    return typed


def _run(
    node: Node,
    values: Mapping[str, Any],
    fakes: FakeNetwork,
    inputs: tuple[Tensor, ...],
    net: nn.Module,
    recorder: EffectsRecorder,
    registers: Mapping[str, TensorType],
) -> tuple[Any, Any]:
    """Value and new state of one node at one step."""
    if node.kind is OpKind.LOAD:
        leaf = registers[node.target]
        held = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)
        return held, held
    if node.kind is OpKind.STORE:
        return None, values[node.refs[0]]
    if node.kind is OpKind.INPUT:
        return inputs[node.target], None
    if node.kind is OpKind.CONSTANT:
        return fakes.constant(node.target), None
    args, kwargs = _substitute(node.args, values), _substitute(dict(node.kwargs), values)
    try:
        if _takes_another_path(node, fakes):
            result, _ = _call_for_real(node, net, args, kwargs)
            return tree_map(lambda value: fakes.twin(value) if isinstance(value, Tensor) else value, result), None
        if _mixes_dtypes(node, fakes, args, kwargs):
            _call_for_real(node, net, args, kwargs)
        return _call(node, fakes, args, kwargs)
    except SnnCompileError:
        raise
    except Exception as error:
        if node.kind is OpKind.OPAQUE:
            return _run_on_zeros(node, fakes, net, args, kwargs, recorder), None
        shapes = ", ".join(str(_types(arg)) for arg in args)
        raise NodeFailure(f"{node.where} fails on inputs {shapes}: {error}", node, str(error)) from error


def _shares(
    node: Node, values: Mapping[str, Any], state: Any, fakes: FakeNetwork, recorder: EffectsRecorder
) -> tuple[str, ...]:
    """The operands, or the node itself for its state, whose memory the node's value shares."""
    own = _memory(values[node.name])
    shared = [name for name in node.refs if own & _memory(values[name])]
    if node.kind is OpKind.OPAQUE:
        state = list(tensors_of(fakes.module(node.target)))
    kept = _memory(state)
    written_through = [name for name in node.refs if kept & _memory(values[name])]  # a state that is an operand
    shared += [name for name in written_through if name not in shared]
    if own & kept or written_through or (node.kind is OpKind.OPAQUE and recorder.ran_on_zeros):
        shared.append(node.name)
    return tuple(shared)


def _memory(value: Any) -> set[int]:
    return {storage_key(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def _takes_another_path(node: Node, fakes: FakeNetwork) -> bool:
    """Whether a module of torch returns something else on real tensors than on ones without data."""
    return node.kind is OpKind.MODULE and isinstance(fakes.module(node.target), nn.MultiheadAttention)


def _mixes_dtypes(node: Node, fakes: FakeNetwork, args: Any, kwargs: Any) -> bool:
    """Whether a pure operation meets several dtypes, which tensors without data would let pass where real ones fail."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if node.kind is OpKind.MODULE:
        tensors += fakes.module(node.target).parameters()
    elif node.kind is not OpKind.FUNCTION or not is_known_pure(node.target):
        return False
    return len({tensor.dtype for tensor in tensors}) > 1


def _call_for_real(node: Node, net: nn.Module, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """Call a function, or a copy of a module, on real zeros; also says whether it drew random numbers."""
    rng = torch.get_rng_state()
    try:
        with no_modes():
            function = node.target
            if node.kind is not OpKind.FUNCTION:
                function = without_hooks(copy_network(net.get_submodule(node.target), {}))
                if callable(reset := getattr(function, "reset", None)):
                    reset()
                if isinstance(function, SequenceModule):
                    function = function.step
            result = function(*tree_map(zeros_for, args), **tree_map(zeros_for, kwargs))
            return result, not torch.equal(rng, torch.get_rng_state())
    finally:
        torch.set_rng_state(rng)


def zeros_for(value: Any) -> Any:
    """Real zeros in the place of a tensor without data; anything else as it is."""
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, Tensor) else value


def _call(node: Node, fakes: FakeNetwork, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if node.kind is OpKind.FUNCTION:
        return node.target(*args, **kwargs), None
    if node.kind is OpKind.METHOD:
        return getattr(args[0], node.target)(*args[1:], **kwargs), None
    module = module_of(fakes.net, node)
    if isinstance(module, SequenceModule):
        return module.step(*args), None
    if node.kind is OpKind.MODULE:
        return module(*args, **kwargs), None
    if node.kind is OpKind.OPAQUE:
        buffers = {id(buffer) for buffer in module.buffers()}
        result = module(*args, **kwargs)
        return result, [*_kept_tensors(module), *(b for b in module.buffers() if id(b) not in buffers)]
    adapter = adapter_of(module)
    states = adapter.materialize(module, args, adapter.reset_values(module))
    outputs, states = adapter.step(module, args, states)
    return outputs[0] if len(outputs) == 1 else outputs, states


def _run_on_zeros(
    node: Node, fakes: FakeNetwork, net: nn.Module, args: Any, kwargs: Any, recorder: EffectsRecorder
) -> Any:
    """Run a copy of an opaque module on real zeros, for one whose code needs data; its twin's types come back."""
    try:
        result, is_random = _call_for_real(node, net, args, kwargs)
    except Exception as error:
        raise NodeFailure(f"{node.where} fails on zeros of its input's shape: {error}", node, str(error)) from error
    recorder.ran_on_zeros = True
    if is_random:
        recorder.effects = replace(recorder.effects, random=True)
    return tree_map(lambda value: fakes.twin(value) if isinstance(value, Tensor) else value, result)


def _kept_tensors(module: nn.Module) -> list[Tensor]:
    """What a module keeps from call to call beside parameters, and buffers that stay the same tensors."""
    kept = (
        value
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in ("_parameters", "_buffers", "_modules")
    )
    return [leaf for leaf in tree_leaves(list(kept)) if isinstance(leaf, Tensor)]


def _substitute(structure: Any, values: Mapping[str, Any]) -> Any:
    return map_refs(structure, lambda ref: values[ref.name])


def _types(value: Any) -> Any:
    return tree_map(lambda leaf: TensorType.of(leaf) if isinstance(leaf, Tensor) else leaf, value)


class EffectsRecorder(TorchDispatchMode):
    """Watches the operations that run inside it for randomness, writes into older tensors and batch statistics.

    Args:
        operands: The values that the node under watch reads.

    Attributes:
        effects: What was seen so far.
        ran_on_zeros: The node could not be watched on data-less tensors, so that the memory it shares is not known.
    """

    def __init__(self, operands: Any = ()) -> None:
        super().__init__()
        self._operands = {storage_key(leaf) for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)}
        self._created: dict[int, Tensor] = {}
        self.effects = Effects()
        self.ran_on_zeros = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        named = [arguments.get(argument.name) for argument in func._schema.arguments if _is_written(argument)]
        written = {storage_key(leaf) for leaf in tree_leaves(named) if isinstance(leaf, Tensor)}
        self.effects = Effects(
            random=self.effects.random or torch.Tag.nondeterministic_seeded in func.tags,
            mutates=self.effects.mutates or not written <= self._created.keys(),
            writes_operand=self.effects.writes_operand or not written.isdisjoint(self._operands),
            statistics=self.effects.statistics
            or ("batch_norm" in func.__name__ and bool(arguments.get("training") or arguments.get("train"))),
        )
        older = {storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            # Held, so that the address of a freed storage is not taken for a new one's.
            if isinstance(leaf, Tensor) and (key := storage_key(leaf)) not in older:
                self._created.setdefault(key, leaf)
        return result


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
