"""Every class of SpikingJelly's `neuron` and `layer` packages, by introspection: how it compiles, and that it is right.

A class that a new release brings fails here as unjudged until it has a row in `VERDICTS`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import snncompile
from snncompile import CaptureError

pytest.importorskip("spikingjelly")
from spikingjelly.activation_based import layer, neuron

BATCHED, STEPWISE, REFUSED, OPEN = "batched", "stepwise", "refused", "open"

# Arguments of the classes that need some.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "neuron.GatedLIFNode": {"T": 4},
    "neuron.MPBNLIFNode": {"out_features": 6},
    "neuron.PSN": {"T": 4},
    "neuron.SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "neuron.SlidingPSN": {"k": 2},
    "layer.AdaptiveAvgPool1d": {"output_size": 2},
    "layer.AdaptiveAvgPool2d": {"output_size": 2},
    "layer.AdaptiveAvgPool3d": {"output_size": 2},
    "layer.AvgPool1d": {"kernel_size": 2},
    "layer.AvgPool2d": {"kernel_size": 2},
    "layer.AvgPool3d": {"kernel_size": 2},
    "layer.BatchNorm1d": {"num_features": 3},
    "layer.BatchNorm2d": {"num_features": 3},
    "layer.BatchNorm3d": {"num_features": 3},
    "layer.Conv1d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.Conv2d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.Conv3d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.ConvTranspose1d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.ConvTranspose2d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.ConvTranspose3d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.Delay": {"delay_steps": 2},
    "layer.GroupNorm": {"num_groups": 1, "num_channels": 3},
    "layer.Linear": {"in_features": 6, "out_features": 6},
    "layer.MaxPool1d": {"kernel_size": 2},
    "layer.MaxPool2d": {"kernel_size": 2},
    "layer.MaxPool3d": {"kernel_size": 2},
    "layer.WSConv2d": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
    "layer.WSLinear": {"in_features": 6, "out_features": 6},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "layer.AdaptiveAvgPool2d": (4, 3, 6, 6),
    "layer.AdaptiveAvgPool3d": (4, 3, 6, 6),
    "layer.AvgPool2d": (4, 3, 6, 6),
    "layer.AvgPool3d": (4, 3, 6, 6),
    "layer.BatchNorm1d": (4, 3, 6),
    "layer.BatchNorm2d": (4, 3, 6, 6),
    "layer.BatchNorm3d": (4, 3, 4, 4, 4),
    "layer.Conv1d": (4, 3, 6),
    "layer.Conv2d": (4, 3, 6, 6),
    "layer.Conv3d": (4, 3, 4, 4, 4),
    "layer.ConvTranspose1d": (4, 3, 6),
    "layer.ConvTranspose2d": (4, 3, 6, 6),
    "layer.ConvTranspose3d": (4, 3, 4, 4, 4),
    "layer.GroupNorm": (4, 3, 6, 6),
    "layer.MaxPool2d": (4, 3, 6, 6),
    "layer.MaxPool3d": (4, 3, 6, 6),
    "layer.WSConv2d": (4, 3, 6, 6),
}
# OPEN: abstract, made for another step mode only, or with arguments that nobody has looked into yet.
VERDICTS: dict[str, str] = {
    "neuron.ActivationAwareIFNode": BATCHED,
    "neuron.AdaptBaseNode": OPEN,
    "neuron.BaseNode": OPEN,
    "neuron.CUBALIFNode": BATCHED,
    "neuron.ComplementaryLIFNode": BATCHED,
    "neuron.DSRIFNode": REFUSED,
    "neuron.DSRLIFNode": REFUSED,
    "neuron.EIFNode": BATCHED,
    "neuron.FewSpikeNode": OPEN,
    "neuron.FlexSN": OPEN,
    "neuron.GatedLIFNode": REFUSED,
    "neuron.HGNode": OPEN,
    "neuron.HalfThresholdIFNode": BATCHED,
    "neuron.IFNode": BATCHED,
    "neuron.ILCBaseNode": OPEN,
    "neuron.ILCCUBALIFNode": OPEN,
    "neuron.ILCIFNode": OPEN,
    "neuron.ILCLIFNode": OPEN,
    "neuron.ILIFNode": BATCHED,
    "neuron.IzhikevichNode": BATCHED,
    "neuron.KLIFNode": BATCHED,
    "neuron.LIAFNode": OPEN,
    "neuron.LIFNode": BATCHED,
    "neuron.MPBNBaseNode": OPEN,
    "neuron.MPBNLIFNode": STEPWISE,
    "neuron.MaskedPSN": OPEN,
    "neuron.NoisyBaseNode": OPEN,
    "neuron.NoisyCUBALIFNode": OPEN,
    "neuron.NoisyILCBaseNode": OPEN,
    "neuron.NoisyILCCUBALIFNode": OPEN,
    "neuron.NoisyNonSpikingBaseNode": OPEN,
    "neuron.NoisyNonSpikingIFNode": OPEN,
    "neuron.NonSpikingBaseNode": OPEN,
    "neuron.NonSpikingIFNode": OPEN,
    "neuron.NonSpikingLIFNode": OPEN,
    "neuron.OTTTLIFNode": OPEN,
    "neuron.OutlierAwareThresholdNode": OPEN,
    "neuron.PSN": REFUSED,
    "neuron.ParametricLIFNode": BATCHED,
    "neuron.QIFNode": BATCHED,
    "neuron.RAFNode": BATCHED,
    "neuron.SLTTLIFNode": BATCHED,
    "neuron.STBIFNode": OPEN,
    "neuron.SimpleBaseNode": OPEN,
    "neuron.SimpleIFNode": STEPWISE,
    "neuron.SimpleLIFNode": STEPWISE,
    "neuron.SlidingPSN": BATCHED,
    "neuron.TernaryIFNode": BATCHED,
    "neuron.TernaryLIFNode": BATCHED,
    "layer.AdaptiveAvgPool1d": BATCHED,
    "layer.AdaptiveAvgPool2d": BATCHED,
    "layer.AdaptiveAvgPool3d": BATCHED,
    "layer.AvgPool1d": BATCHED,
    "layer.AvgPool2d": BATCHED,
    "layer.AvgPool3d": BATCHED,
    "layer.BatchNorm1d": BATCHED,
    "layer.BatchNorm2d": BATCHED,
    "layer.BatchNorm3d": BATCHED,
    "layer.BatchNormThroughTime1d": OPEN,
    "layer.BatchNormThroughTime2d": OPEN,
    "layer.BatchNormThroughTime3d": OPEN,
    "layer.ChannelQKAttention": OPEN,
    "layer.Conv1d": BATCHED,
    "layer.Conv2d": BATCHED,
    "layer.Conv3d": BATCHED,
    "layer.ConvTranspose1d": BATCHED,
    "layer.ConvTranspose2d": BATCHED,
    "layer.ConvTranspose3d": BATCHED,
    "layer.Delay": STEPWISE,
    "layer.DropConnectLinear": OPEN,
    "layer.Dropout": BATCHED,
    "layer.Dropout2d": BATCHED,
    "layer.ElementWiseRecurrentContainer": OPEN,
    "layer.Flatten": BATCHED,
    "layer.GradwithTrace": OPEN,
    "layer.GroupNorm": BATCHED,
    "layer.Linear": BATCHED,
    "layer.LinearRecurrentContainer": OPEN,
    "layer.MaxPool1d": BATCHED,
    "layer.MaxPool2d": BATCHED,
    "layer.MaxPool3d": BATCHED,
    "layer.MaxUnpool1d": OPEN,
    "layer.MaxUnpool2d": OPEN,
    "layer.MaxUnpool3d": OPEN,
    "layer.MultiDimensionalAttention": OPEN,
    "layer.MultiStepContainer": REFUSED,
    "layer.NeuNorm": OPEN,
    "layer.OTTTSequential": BATCHED,
    "layer.PrintShapeModule": BATCHED,
    "layer.QKAttention": OPEN,
    "layer.SeqToANNContainer": REFUSED,
    "layer.SpikeCountToBinary": OPEN,
    "layer.SpikeDrivenSelfAttention": OPEN,
    "layer.SpikeTraceOp": OPEN,
    "layer.SpikingSelfAttention": OPEN,
    "layer.StepModeContainer": OPEN,
    "layer.SynapseFilter": BATCHED,
    "layer.TLastMultiStepContainer": REFUSED,
    "layer.TLastSeqToANNContainer": REFUSED,
    "layer.TemporalBinSum": OPEN,
    "layer.TemporalEffectiveBatchNorm1d": OPEN,
    "layer.TemporalEffectiveBatchNorm2d": OPEN,
    "layer.TemporalEffectiveBatchNorm3d": OPEN,
    "layer.TemporalWiseAttention": OPEN,
    "layer.ThresholdDependentBatchNorm1d": OPEN,
    "layer.ThresholdDependentBatchNorm2d": OPEN,
    "layer.ThresholdDependentBatchNorm3d": OPEN,
    "layer.TokenQKAttention": OPEN,
    "layer.Upsample": OPEN,
    "layer.VotingLayer": OPEN,
    "layer.WSConv2d": BATCHED,
    "layer.WSLinear": BATCHED,
}


def _classes() -> dict[str, type[nn.Module]]:
    found = {}
    for package in (neuron, layer):
        for name, cls in vars(package).items():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and not name.startswith("_"):
                found[f"{package.__name__.rpartition('.')[2]}.{name}"] = cls
    return found


CLASSES = _classes()


def _network(name: str) -> nn.Module:
    site = CLASSES[name](**ARGUMENTS.get(name, {}))
    if name.startswith("neuron."):
        return nn.Sequential(nn.Linear(6, 6), site, nn.Linear(6, 3))
    return nn.Sequential(site, neuron.IFNode())


def test_every_class_is_judged() -> None:
    assert VERDICTS.keys() == CLASSES.keys()


@pytest.mark.parametrize("name", sorted(name for name in CLASSES if VERDICTS.get(name) in (BATCHED, STEPWISE)))
def test_a_compiled_class_computes_what_the_step_loop_computes(name: str) -> None:
    shape = SHAPES.get(name, (4, 6))
    for training in (True, False):
        for steps in (1, 5, 16):
            torch.manual_seed(0)
            net = _network(name).train(training)
            x = 2.0 * torch.rand(steps, *shape)
            opt = snncompile.optimize(net, steps, schedule=max(1, steps // 2))
            with torch.set_grad_enabled(training):
                parity = snncompile.verify(net, opt, x)
                opt.plan(x)
            assert parity.ok, f"T = {steps}, training {training}: {parity}"
            kept = [decision for decision in opt.report.decisions if decision.pass_name == "capture"]
            assert bool(kept) is (VERDICTS[name] == STEPWISE)


@pytest.mark.parametrize("name", sorted(name for name in CLASSES if VERDICTS.get(name) == REFUSED))
def test_a_class_that_cannot_be_compiled_is_refused(name: str) -> None:
    net, x = _network(name), torch.rand(5, *SHAPES.get(name, (4, 6)))
    with pytest.raises(CaptureError):
        snncompile.optimize(copy.deepcopy(net), 5)(x)
