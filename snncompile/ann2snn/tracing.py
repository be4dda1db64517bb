"""Trace an ANN into a graph that has one form for each thing, and refuse what rates cannot carry."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from snncompile.errors import CaptureError

__all__ = ["check_supported", "relu_sites", "trace"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Affine in their input, or, for max pooling, kept by the field's convention.
_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_BATCH_NORMS),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)

# Targets of functions are the functions themselves, those of methods are names.
_AFFINE_IN_ALL = {operator.add, torch.add, "add", operator.sub, torch.sub, "sub"} | {
    *(torch.cat, torch.concat, torch.concatenate, torch.stack)
}
_AFFINE_IN_ONE = {operator.mul, torch.mul, "mul"}
_AFFINE_IN_FIRST = {
    *(operator.truediv, torch.div, "div", operator.neg, torch.neg, "neg", operator.getitem),
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.pad),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(torch.mean, "mean", torch.sum, "sum", torch.flatten, "flatten", torch.reshape, "reshape", "view", "contiguous"),
    *(torch.permute, "permute", torch.transpose, "transpose", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"),
    *(torch.chunk, "chunk", torch.split, "split"),
}
_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}

_SUPPORTED = (
    "supported are ReLU, convolutions, Linear, BatchNorm, average, adaptive average and max pooling, Flatten, Dropout, "
    "additions, concatenations and changes of shape"
)


class _Tracer(fx.Tracer):
    """Notes for every node in which module's forward it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.owners = [""]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.owners.append(self.path_of_module(m))
        output = super().call_module(m, forward, args, kwargs)
        # Not in a `finally`: where tracing fails, the last owner is the module at fault.
        self.owners.pop()
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.owners[-1]
        return node


def trace(ann: nn.Module) -> fx.GraphModule:
    """The graph of ``ann``, in eval mode: nothing in place, no dropout or identity, every ReLU a call of ``F.relu``.

    Every node has ``meta["owner"]``, the qualified name of the module in whose forward it was called, and every ReLU
    ``meta["site"]``, a name for what takes its place.

    Args:
        ann: The network; the graph shares its modules.

    Raises:
        CaptureError: ``torch.fx`` cannot trace the network, or it takes more than one input.
    """
    ann.eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(ann)
    except Exception as error:
        raise CaptureError(
            f"{type(ann).__name__} cannot be traced: {error}. Its forward must not branch or loop on values of "
            "tensors; move such code out of the network",
            where=tracer.owners[-1] or type(ann).__name__,
        ) from error
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise CaptureError(
            f"{type(ann).__name__} takes {len(inputs)} inputs ({', '.join(inputs)}), conversion needs exactly one; "
            "wrap the network in a module that supplies the others"
        )
    net = fx.GraphModule(ann, graph, type(ann).__name__)
    _remove_in_place(net)
    _remove_identities(net)
    _unify_relus(net)
    net.delete_all_unused_submodules()
    net.recompile()
    return net


def relu_sites(net: fx.GraphModule) -> list[fx.Node]:
    """The ReLU calls of a traced network, in order."""
    return [node for node in net.graph.nodes if node.target is F.relu]


def check_supported(net: fx.GraphModule) -> None:
    """Refuse a traced network of which some operation is neither ReLU nor affine in the activations.

    Raises:
        CaptureError: It names the operation and the module that it stands in.
    """
    signals: set[fx.Node] = set()
    for node in net.graph.nodes:
        carried = [operand for operand in _operands(node) if operand in signals]
        if node.op == "placeholder":
            signals.add(node)
        elif not carried or node.op == "output" or _asks_for_shape(node):
            # What does not depend on the input, such as a shape or a weight, is the same at every step.
            continue
        elif node.target is F.relu or _is_affine(net, node, carried):
            signals.add(node)
        else:
            raise CaptureError(
                f"{_describe(net, node)} cannot be converted: {_SUPPORTED}. Replace it, an activation by ReLU, and "
                "fine-tune the network before converting",
                where=node.meta["owner"] or type(net).__name__,
            )


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, nested ones included, each as often as it occurs: twice in ``x * x``."""
    operands: list[fx.Node] = []
    map_arg((node.args, node.kwargs), operands.append)
    return operands


def _asks_for_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def _is_affine(net: fx.GraphModule, node: fx.Node, carried: list[fx.Node]) -> bool:
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        # Without running statistics, a batch norm divides by the batch's own even in eval mode.
        own_statistics = isinstance(module, _BATCH_NORMS) and module.running_mean is None
        return isinstance(module, _MODULES) and not own_statistics
    if node.target in _AFFINE_IN_ALL:
        return True
    if node.target in _AFFINE_IN_ONE:
        return len(carried) == 1
    first = node.args[0] if node.args else node.kwargs.get("input")
    return node.target in _AFFINE_IN_FIRST and carried == [first]


def _describe(net: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return str(net.get_submodule(str(node.target)))
    if node.op == "call_method":
        return f"the method {node.target}"
    return f"the function {getattr(node.target, '__name__', node.target)}"


def _remove_in_place(net: fx.GraphModule) -> None:
    """Let every later reader of a value that is changed in place read the change instead."""
    position = {node: index for index, node in enumerate(net.graph.nodes)}
    for node in net.graph.nodes:
        if not _make_out_of_place(net, node):
            continue
        changed = node.all_input_nodes[0]
        for user in list(changed.users):
            if position[user] > position[node]:
                user.replace_input_with(changed, node)


def _make_out_of_place(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node was in place."""
    if node.op == "call_module":
        return bool(getattr(net.get_submodule(str(node.target)), "inplace", False))
    if node.target is torch.relu_:
        node.target = torch.relu
        return True
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        node.target = str(node.target)[:-1]
        return True
    return node.target is F.relu and node.kwargs.get("inplace") is True


def _remove_identities(net: fx.GraphModule) -> None:
    for node in list(net.graph.nodes):
        is_module = node.op == "call_module" and isinstance(net.get_submodule(node.target), _IDENTITIES)
        if is_module or node.target in _DROPOUTS:
            node.replace_all_uses_with(node.all_input_nodes[0])
            net.graph.erase_node(node)


def _unify_relus(net: fx.GraphModule) -> None:
    for node in list(net.graph.nodes):
        is_module = node.op == "call_module" and isinstance(net.get_submodule(node.target), nn.ReLU)
        if is_module or node.target in (F.relu, torch.relu) or (node.op == "call_method" and node.target == "relu"):
            owner = node.meta["owner"]
            with net.graph.inserting_before(node):
                relu = net.graph.call_function(F.relu, (node.all_input_nodes[0],))
            relu.meta.update(owner=owner, site=node.target if is_module else f"{owner}.relu".lstrip("."))
            node.replace_all_uses_with(relu)
            net.graph.erase_node(node)
