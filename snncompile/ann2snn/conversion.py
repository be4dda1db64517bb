"""convert(): a trained ReLU network in, a single-step spiking network out."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from snncompile.ann2snn.calibration import CalibrationData, MaximumRange, PercentileRange, observe_activations
from snncompile.ann2snn.tracing import check_supported, relu_sites, trace
from snncompile.neuron import IFNode

__all__ = ["VoltageScaler", "convert"]


class VoltageScaler(nn.Module):
    """y = scale · x, any shape; ``scale`` is a buffer, a scalar, so it moves with the module and is saved with it."""

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def convert(
    ann: nn.Module,
    calibration: Tensor | Iterable[Any],
    *,
    percentile: float = 100.0,
    progress: bool = True,
) -> fx.GraphModule:
    """Convert a ReLU network to a rate-coded network of integrate-and-fire neurons.

    Show the result the same input ``[N, *]`` at every step and average its output ``[N, *]`` over the steps; call
    ``functional.reset_net`` before the next input. The more steps, the closer it comes to the ANN.

    Every call of a ReLU gets neurons of its own, at the ReLU's qualified name (``layer1.relu``, then ``layer1.relu_1``;
    for a functional one ``layer1.relu`` if ``layer1`` called it): a ``Sequential`` of ``scale_in``, ``neuron`` and
    ``scale_out``. Batch norm is folded into a convolution or linear layer that nothing else reads, dropout is removed,
    every other module stays where it was.

    Args:
        ann: The network, of ReLU and of operations affine in the activations, with one input, traceable by
            ``torch.fx``. It is not changed; its copy is converted in eval mode. As ``torch.fx`` reads ``y += z`` as
            ``y = y + z``, the old tensor must not be read under another name afterwards.
        calibration: Inputs as the network will see them, on any device: a tensor ``[N, *]``, or an iterable of batches
            (a ``DataLoader``, a list), each a tensor or a sequence that starts with one. It is read once.
        percentile: What one spike per step stands for: this percentile, in (0, 100], of a ReLU's positive outputs over
            all calibration data. 100 is their maximum; a little less cuts outliers off, and more neurons fire.
            Below 100 it is read off a histogram, to 1/4096 of the maximum.
        progress: Show a progress bar over the batches.

    Returns:
        A ``torch.fx.GraphModule`` of single-step modules in eval mode, on the device of ``ann``.

    Raises:
        TypeError: ``ann`` is no module, ``percentile`` no number, or ``calibration`` holds no tensors.
        ValueError: ``percentile`` is out of range, the data is empty, or an activation is NaN or infinite.
        CaptureError: The network cannot be traced, or holds something that rates cannot carry, such as another
            activation.

    Warns:
        UserWarning: A ReLU was never active on the calibration data; its scale is 1.

    Sources: Diehl et al., 2015 (maximum); Rueckauer et al., 2017 (percentile, soft reset).
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)):
        raise TypeError(f"percentile must be a number, got {type(percentile).__name__}")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    data = CalibrationData(calibration)
    net = trace(copy.deepcopy(ann))
    check_supported(net)
    ranges = {site: MaximumRange() if percentile == 100.0 else PercentileRange(percentile) for site in relu_sites(net)}
    observe_activations(net, ranges, data, progress)
    _fold_batch_norms(net)
    for site, observed in ranges.items():
        _replace_by_neurons(net, site, observed.scale)
    net.delete_all_unused_submodules()
    net.graph.lint()
    net.recompile()
    return net.eval()


def _replace_by_neurons(net: fx.GraphModule, site: fx.Node, scale: float) -> None:
    name = _free_name(net, site.meta["site"])
    if scale == 0.0:
        warnings.warn(f"{name} was never active on the calibration data; its scale is set to 1", stacklevel=3)
        scale = 1.0
    neurons = nn.Sequential(
        OrderedDict(
            scale_in=VoltageScaler(1.0 / scale),
            neuron=IFNode(v_threshold=1.0, v_reset=None),
            scale_out=VoltageScaler(scale),
        )
    )
    reference = next(itertools.chain(net.parameters(), net.buffers()), None)
    net.add_submodule(name, neurons if reference is None else neurons.to(reference.device))
    with net.graph.inserting_after(site):
        call = net.graph.call_module(name, site.args)
    site.replace_all_uses_with(call)
    net.graph.erase_node(site)


def _free_name(net: nn.Module, wanted: str) -> str:
    candidates = itertools.chain([wanted], (f"{wanted}_{count}" for count in itertools.count(1)))
    return next(name for name in candidates if not _exists(net, name))


def _exists(net: nn.Module, name: str) -> bool:
    parent, _, attribute = name.rpartition(".")
    try:
        return hasattr(net.get_submodule(parent), attribute)
    except AttributeError:
        return False


def _fold_batch_norms(net: fx.GraphModule) -> None:
    """Fold each batch norm into the layer before it, where that layer feeds nothing else and both are called once."""
    calls = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
    for node in list(net.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        if calls[node.target] != 1 or calls[source.target] != 1:
            continue
        layer, norm = (net.get_submodule(str(called.target)) for called in (source, node))
        folded = _fold(layer, norm, source.meta["ndim"])
        if folded is not None:
            net.add_submodule(str(source.target), folded)
            node.replace_all_uses_with(source)
            net.graph.erase_node(node)


def _fold(layer: nn.Module, norm: nn.Module, ndim: int) -> nn.Module | None:
    # Subclasses and hooks, weight norm among them, may compute the weight anew at every call.
    is_plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and not any(
        (layer._forward_pre_hooks, layer._forward_hooks, norm._forward_pre_hooks, norm._forward_hooks)
    )
    if not is_plain or not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return fuse_conv_bn_eval(layer, norm)
    # On [N, L, C] a batch norm works along L, which a linear layer does not touch.
    if isinstance(layer, nn.Linear) and ndim == 2 and norm.affine:
        return fuse_linear_bn_eval(layer, norm)
    return None
