"""SpikingJelly's `neuron` and `layer` packages: every class in single-step mode, and the options that matter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor, nn

from .rows import Row, public_modules

Make = Callable[[], nn.Module]

_TRAINING, _EVALUATION = (True,), (False,)
_OWN_BACKWARD = "its own backward fails in SpikingJelly 2.0.0"
_NO_GRADIENTS = "has no gradients"
_LINE, _IMAGE, _VOLUME = (4, 3, 6), (4, 3, 6, 6), (4, 3, 4, 4, 4)
_SHAPES = {"1d": _LINE, "2d": _IMAGE, "3d": _VOLUME}
_TABLE = neuron.FewSpikeTable(theta=[0.8, 0.4, 0.2], h=[0.8, 0.4, 0.2], d=[0.9, 0.5, 0.2])
_COARSE = neuron.FewSpikeTable(theta=[2.0, 1.0, 0.5], h=[2.0, 1.0, 0.5], d=[2.0, 1.0, 0.5])
_LONG = 16  # the most steps that a row runs, for classes that are made for a number of steps


def classes() -> frozenset[str]:
    """The names of all module classes of the two packages."""
    return frozenset(name for name, _ in public_modules(neuron, layer))


class LeakyNode(neuron.SimpleBaseNode):
    """A neuron as SpikingJelly's documentation has users write it: another charge, nothing else."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.9 * self.v + x * x


class QuadraticNode(neuron.BaseNode):
    """A neuron of a user's by the functional contract."""

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        v = 0.9 * states[0] + inputs[0] * inputs[0]
        spike = self.surrogate_function(v - self.v_threshold)
        return (spike,), (functional.voltage_reset(v, spike, self.v_threshold, self.v_reset, self.detach_reset),)


class AdaptiveNode(neuron.AdaptBaseNode):
    """The same with an adaptation current."""

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        v, w = states
        v = v + inputs[0] - w
        w = self.jit_neuronal_adaptation(w, self.tau_w, self.a, self.v_rest, v)
        spike = self.surrogate_function(v - self.v_threshold)
        v = functional.voltage_reset(v, spike, self.v_threshold, self.v_reset, self.detach_reset)
        return (spike,), (v, w + self.b * spike)


class NormalisedNode(neuron.MPBNBaseNode):
    """A user's integrate-and-fire neuron with a batch norm of its potential."""

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        v = self.vbn(states[0] + inputs[0])
        spike = self.surrogate_function(v - self.v_threshold)
        return (spike,), (functional.voltage_reset(v, spike, self.v_threshold, self.v_reset, self.detach_reset),)


class Unpooling(nn.Module):
    """Pools spikes, and puts them back where they were."""

    def __init__(self, dimensions: str) -> None:
        super().__init__()
        self.mix = getattr(layer, f"Conv{dimensions}")(3, 3, 1)
        self.fire = neuron.IFNode(0.2)
        self.pool = getattr(layer, f"MaxPool{dimensions}")(2, return_indices=True)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unpool = getattr(layer, f"MaxUnpool{dimensions}")(2)

    def forward(self, x: Tensor) -> Any:
        pooled, places = self.pool(self.fire(self.mix(x)))
        return self.unpool(pooled * self.scale, places)


class ConvolutionalNet(nn.Module):
    """Two convolutional blocks with batch norms, pooling, dropout and a shortcut, then a classifier that votes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block1 = nn.Sequential(layer.Conv2d(3, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4))
        self.sn1 = neuron.LIFNode(**options)
        self.block2 = nn.Sequential(layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4))
        self.sn2 = neuron.LIFNode(**options)
        self.pool = layer.MaxPool2d(2)
        self.head = nn.Sequential(layer.Flatten(), layer.Dropout(0.3), layer.Linear(36, 6), neuron.LIFNode(**options))
        self.vote = layer.VotingLayer(3)

    def forward(self, x: Tensor) -> Any:
        x = self.sn1(self.block1(x))
        x = self.sn2(self.block2(x)) + x
        return self.vote(self.head(self.pool(x)))


def _soft_if(x: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The core of a `FlexSN`, with a trained leak."""
    v = v + (x - v) * torch.sigmoid(tau)
    spike = surrogate.ATan()(v - 0.4)
    return spike, v - 0.4 * spike


def _folded(**options: Any) -> nn.Module:
    """A neuron with batch norm in its threshold, as `re_parameterize_v_threshold` leaves it."""
    node = neuron.MPBNLIFNode(out_features=6)
    node.vbn.running_var.fill_(0.5)
    node.re_parameterize_v_threshold(**options)
    return node


def _row(name: str, case: str, network: Make, **judged: Any) -> Row:
    return Row(f"{name} ({case})" if case else name, network, **judged)


def _node(
    name: str,
    case: str = "",
    make: Make | None = None,
    remark: str = "",
    modes: tuple[bool, ...] = (True, False),
    **options: Any,
) -> Row:
    """A neuron between linear layers."""
    made = make or (lambda: getattr(neuron, name)(**options))

    def network() -> nn.Module:
        return nn.Sequential(layer.Linear(6, 6), made(), layer.Linear(6, 3))

    return _row(f"neuron.{name}", case, network, remark=remark, modes=modes, scale=3.0)


def _unbiased_attention() -> nn.Module:
    """Without the bias in front of a batch norm, whose gradient is nothing but rounding."""
    attention = layer.SpikeDrivenSelfAttention(3, 1)
    attention.proj_conv.bias = None
    return attention


def _noisy(name: str, **options: Any) -> Row:
    """A neuron that has its noise drawn before an episode."""

    def make() -> nn.Module:
        node = getattr(neuron, name)(T=_LONG, **options)
        node.reset_noise(64)
        return node

    return _node(name, make=make)


def _dense(name: str, *args: Any, case: str = "", make: Make | None = None, remark: str = "", **options: Any) -> Row:
    """A layer for `[N, 6]` between a linear one and a neuron."""
    made = make or (lambda: getattr(layer, name)(*args, **options))
    return _row(f"layer.{name}", case, lambda: _in_a_net(nn.Linear(6, 6), made()), remark=remark)


def _spatial(
    name: str,
    *args: Any,
    shape: tuple[int, ...] = (),
    case: str = "",
    make: Make | None = None,
    remark: str = "",
    **options: Any,
) -> Row:
    """A layer for feature maps of as many dimensions as its name or `shape` says, in a net of the same."""
    shape = shape or _SHAPES[name[-2:]]
    conv = getattr(layer, f"Conv{len(shape) - 2}d")
    made = make or (lambda: getattr(layer, name)(*args, **options))
    return _row(f"layer.{name}", case, lambda: _in_a_net(conv(3, 3, 1, bias=False), made()), shape=shape, remark=remark)


def _in_a_net(mix: nn.Module, site: nn.Module) -> nn.Module:
    return nn.Sequential(mix, site, neuron.LIFNode(v_threshold=0.2))


def _online(name: str, case: str, *modules: Callable[[], nn.Module], container: Any = layer.OTTTSequential) -> Row:
    """A network of online training through time: its neuron hands on its spikes and their trace."""
    return _row(
        name,
        case,
        lambda: container(nn.Linear(6, 6), neuron.OTTTLIFNode(v_threshold=0.4), *(make() for make in modules)),
        modes=_TRAINING,
        remark="a layer for training only",
    )


_NEURONS = (
    _node("ActivationAwareIFNode", v_threshold=0.4, v_offset=0.1),
    _node(
        "ActivationAwareIFNode",
        "one threshold a channel",
        v_threshold=torch.linspace(0.2, 0.7, 6),
        v_offset=torch.linspace(-0.1, 0.1, 6),
        v_reset=0.0,
    ),
    _node(
        "AdaptBaseNode",
        make=lambda: AdaptiveNode(a=0.1, b=0.2),
        remark="abstract; tried as a subclass of a user's with a step function",
    ),
    _node("BaseNode", make=QuadraticNode, remark="abstract; tried as a subclass of a user's with a step function"),
    _node("CUBALIFNode"),
    _node("ComplementaryLIFNode", v_threshold=0.5),
    _node("DSRIFNode", modes=_EVALUATION, remark=_OWN_BACKWARD),
    _node("DSRLIFNode", modes=_EVALUATION, remark=_OWN_BACKWARD),
    _node("EIFNode"),
    _node("FewSpikeNode", table=_TABLE, remark="the node's own K steps pass within one call"),
    _node(
        "FlexSN",
        make=lambda: neuron.FlexSN(
            _soft_if, num_states=1, static_inputs=(nn.Parameter(torch.tensor(0.3)),), step_mode="s"
        ),
    ),
    _node("GatedLIFNode", T=_LONG),
    _node("HGNode", tables=(_TABLE, _COARSE), gate_thresholds=(0.7,)),
    _node("HalfThresholdIFNode", v_threshold=0.5),
    _node("IFNode"),
    _node("IFNode", "v_reset=None", v_reset=None),
    _node("IFNode", "detach_reset=True", detach_reset=True),
    _node("IFNode", "store_v_seq=True", store_v_seq=True),
    Row("neuron.ILCBaseNode", None, remark="abstract"),
    _node("ILCCUBALIFNode", act_dim=3, dec_pop_dim=2),
    _node("ILCIFNode", act_dim=3, dec_pop_dim=2),
    _node("ILCLIFNode", act_dim=3, dec_pop_dim=2),
    _node("ILIFNode"),
    _node("IzhikevichNode", a=0.1, b=0.1),
    _node("KLIFNode", v_threshold=0.5),
    _node("KLIFNode", "scale_reset=True", v_threshold=0.5, scale_reset=True, v_reset=None),
    _node("LIAFNode", act=torch.relu, threshold_related=True, v_threshold=0.5),
    _node("LIAFNode", "threshold_related=False", act=torch.tanh, threshold_related=False, v_threshold=0.5),
    _node("LIFNode", v_threshold=0.5),
    _node("LIFNode", "v_reset=None", v_threshold=0.5, v_reset=None, decay_input=False),
    _node("LIFNode", "detach_reset=True", v_threshold=0.5, detach_reset=True),
    _node("LIFNode", "store_v_seq=True", v_threshold=0.5, store_v_seq=True),
    _node("LIFNode", "v_reset=-0.2", v_threshold=0.5, v_reset=-0.2, surrogate_function=surrogate.ATan()),
    _row(
        "neuron.LIFNode",
        "convolutional net with batch norm, dropout and votes",
        lambda: ConvolutionalNet(v_threshold=0.2, v_reset=None, detach_reset=True),
        shape=_IMAGE,
    ),
    _node(
        "MPBNBaseNode", make=lambda: NormalisedNode(out_features=6), remark="abstract; tried as a subclass of a user's"
    ),
    _node("MPBNLIFNode", out_features=6),
    _node("MPBNLIFNode", "learnable_vth=True", out_features=6, learnable_vth=True),
    _node("MPBNLIFNode", "after re_parameterize_v_threshold", make=_folded),
    _node(
        "MPBNLIFNode",
        "after re_parameterize_v_threshold with running statistics",
        make=lambda: _folded(running_stats=True, normalize_residual=True),
    ),
    _node("MaskedPSN", k=3, T=_LONG, lambda_init=1.0),
    Row("neuron.NoisyBaseNode", None, remark="abstract"),
    _noisy("NoisyCUBALIFNode", num_node=6),
    Row("neuron.NoisyILCBaseNode", None, remark="abstract"),
    _noisy("NoisyILCCUBALIFNode", act_dim=3, dec_pop_dim=2),
    Row("neuron.NoisyNonSpikingBaseNode", None, remark="abstract"),
    _noisy("NoisyNonSpikingIFNode", num_node=6, decode="mean-mem"),
    Row("neuron.NonSpikingBaseNode", None, remark="abstract"),
    _node("NonSpikingIFNode", decode="max-mem"),
    _node("NonSpikingLIFNode", decode="max-mem"),
    _node("OTTTLIFNode", "in evaluation", modes=_EVALUATION, v_threshold=0.5),
    _online("neuron.OTTTLIFNode", "", lambda: nn.Linear(6, 3)),
    _node("OutlierAwareThresholdNode", table=_TABLE, outlier_table=_COARSE, split_threshold=0.8, clamp_value=2.0),
    _node("PSN", T=_LONG),
    _node("ParametricLIFNode", v_threshold=0.5),
    _node("ParametricLIFNode", "decay_input=False", v_threshold=0.5, init_tau=1.5, decay_input=False, v_reset=None),
    _node("QIFNode"),
    _node("RAFNode", v_threshold=0.5),
    _node("SLTTLIFNode", v_threshold=0.5),
    _node("STBIFNode", q_threshold=0.3, level=8, modes=_EVALUATION, remark=_NO_GRADIENTS),
    _node("STBIFNode", "sym=True", q_threshold=0.3, level=8, sym=True, modes=_EVALUATION, remark=_NO_GRADIENTS),
    _node("SimpleBaseNode", make=LeakyNode, remark="abstract; tried as a subclass of a user's with a charge"),
    _node("SimpleIFNode"),
    _node("SimpleLIFNode", tau=2.0, decay_input=True),
    _node("SlidingPSN", k=3),
    _node("TernaryIFNode", v_threshold=0.5),
    _node("TernaryLIFNode", v_threshold=0.3),
)
_LAYERS = (
    *(_spatial(f"AdaptiveAvgPool{n}d", 2) for n in (1, 2, 3)),
    *(_spatial(f"AvgPool{n}d", 2) for n in (1, 2, 3)),
    *(_spatial(f"BatchNorm{n}d", 3) for n in (1, 2, 3)),
    _spatial("BatchNorm2d", 3, case="momentum=None", momentum=None),
    _spatial("BatchNorm2d", 3, case="track_running_stats=False", track_running_stats=False),
    *(_spatial(f"BatchNormThroughTime{n}d", _LONG, 3) for n in (1, 2, 3)),
    _spatial("ChannelQKAttention", 3, 1, shape=_LINE),
    *(_spatial(f"Conv{n}d", 3, 3, 3, padding=1) for n in (1, 2, 3)),
    _spatial("Conv2d", 3, 6, 3, case="groups=3", groups=3, stride=2, padding=2, padding_mode="circular"),
    *(_spatial(f"ConvTranspose{n}d", 3, 3, 2, stride=2) for n in (1, 2, 3)),
    _dense("Delay", 2),
    _dense("DropConnectLinear", 6, 6),
    _dense("DropConnectLinear", 6, 6, case="invariant=True", invariant=True, activation=None),
    _dense("Dropout", 0.4),
    _spatial("Dropout2d", 0.4, shape=_IMAGE),
    _dense(
        "ElementWiseRecurrentContainer",
        make=lambda: layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add),
    ),
    _dense(
        "ElementWiseRecurrentContainer",
        case="of a layer",
        make=lambda: layer.ElementWiseRecurrentContainer(nn.Linear(6, 6), torch.add),
    ),
    _spatial("Flatten", shape=_IMAGE),
    _online("layer.GradwithTrace", "", lambda: layer.GradwithTrace(nn.Linear(6, 3)), container=nn.Sequential),
    _spatial("GroupNorm", 3, 3, shape=_IMAGE),
    _dense("Linear", 6, 6),
    _dense(
        "LinearRecurrentContainer", make=lambda: layer.LinearRecurrentContainer(neuron.LIFNode(v_threshold=0.2), 6, 6)
    ),
    _dense(
        "LinearRecurrentContainer",
        case="of several modules",
        make=lambda: layer.LinearRecurrentContainer(
            nn.Sequential(nn.Linear(6, 4), neuron.ParametricLIFNode(v_threshold=0.2), layer.Dropout(0.3)), 6, 4
        ),
    ),
    *(_spatial(f"MaxPool{n}d", 2) for n in (1, 2, 3)),
    *(
        _row(f"layer.MaxUnpool{d}", "", lambda d=d: Unpooling(d), shape=shape)  # type: ignore[misc]
        for d, shape in _SHAPES.items()
    ),
    _spatial("MultiDimensionalAttention", 16, 3, shape=_IMAGE, reduction_c=1),
    _dense("MultiStepContainer", make=lambda: layer.MultiStepContainer(nn.Linear(6, 6), neuron.IFNode())),
    _spatial("NeuNorm", 3, 6, 6, shape=_IMAGE),
    _spatial("NeuNorm", 3, 6, 6, shape=_IMAGE, case="shared_across_channels=True", shared_across_channels=True),
    _online("layer.OTTTSequential", "", lambda: nn.Linear(6, 5), lambda: neuron.OTTTLIFNode(v_threshold=0.3)),
    _row(
        "layer.OTTTSequential",
        "without OTTTLIFNode",
        lambda: layer.OTTTSequential(nn.Linear(6, 6), neuron.SLTTLIFNode(v_threshold=0.5), nn.Linear(6, 3)),
    ),
    _dense("PrintShapeModule"),
    _spatial("QKAttention", 3, 1, shape=_LINE),
    _dense("SeqToANNContainer", make=lambda: layer.SeqToANNContainer(nn.Linear(6, 6))),
    _dense("SpikeCountToBinary", 2),
    _spatial("SpikeDrivenSelfAttention", shape=_IMAGE, make=_unbiased_attention),
    _online(
        "layer.SpikeTraceOp",
        "",
        lambda: layer.SpikeTraceOp(nn.AvgPool1d(2)),
        lambda: layer.GradwithTrace(nn.Linear(3, 3)),
        container=nn.Sequential,
    ),
    _spatial("SpikingSelfAttention", 3, 1, shape=_LINE),
    _dense("StepModeContainer", make=lambda: layer.StepModeContainer(True, "s", nn.Linear(6, 6), neuron.IFNode(0.3))),
    _dense(
        "StepModeContainer",
        case="stateful=False",
        make=lambda: layer.StepModeContainer(False, "s", nn.Linear(6, 6), nn.ReLU()),
    ),
    _dense("SynapseFilter", 3.0),
    _dense("SynapseFilter", 3.0, case="learnable=True", learnable=True),
    _dense(
        "TLastMultiStepContainer",
        remark="takes time last, not first",
        make=lambda: layer.TLastMultiStepContainer(nn.Linear(6, 6), neuron.IFNode()),
    ),
    _dense(
        "TLastSeqToANNContainer",
        remark="takes time last, not first",
        make=lambda: layer.TLastSeqToANNContainer(nn.Linear(6, 6)),
    ),
    _dense("TemporalBinSum", 2),
    *(_spatial(f"TemporalEffectiveBatchNorm{n}d", 16, 3) for n in (1, 2, 3)),
    _spatial("TemporalWiseAttention", 16, shape=_IMAGE),
    *(_spatial(f"ThresholdDependentBatchNorm{n}d", 1.0, 1.0, 3) for n in (1, 2, 3)),
    _spatial("TokenQKAttention", 3, 1, shape=_LINE),
    _spatial("Upsample", shape=_IMAGE, scale_factor=2),
    _dense("VotingLayer", 2),
    _spatial("WSConv2d", 3, 3, 3),
    _dense("WSLinear", 6, 6),
)


def _as_called(row: Row) -> Row:
    """A class that takes whole sequences only, in a network in multi-step mode; one made for T steps, at that T."""
    if row.network is None:
        return row
    make, parts = row.network, list(row.network().modules())
    if all(_takes_steps(part) for part in parts if isinstance(part, base.StepModule)):
        return row

    def network() -> nn.Module:
        net = make()
        functional.set_step_mode(net, "m")
        return net

    return replace(row, network=network, steps=(_LONG,) if _FOR_ONE_T.search(row.name) else ())


def _takes_steps(part: Any) -> bool:
    return "s" in part.supported_step_mode() and part.step_mode == "s"


_FOR_ONE_T = re.compile(r"\.(PSN|GatedLIF|Noisy|TemporalEffective|TemporalWise|MultiDimensional)")


ROWS: tuple[Row, ...] = tuple(map(_as_called, _NEURONS + _LAYERS))
