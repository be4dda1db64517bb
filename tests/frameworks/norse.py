"""Norse's classes: cells, whose states pass through forward, containers, encoders, receptive fields."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import norse.torch as norse
import torch
from norse.torch.module import encode
from torch import Tensor, nn

from snncompile import with_states

from .rows import Row, public_modules

_IMAGE = (4, 2, 7, 7)
_SEQUENCES = "takes [T, N, *] with all steps at once: it has no single step; "
_ENCODERS = "makes a whole sequence of one input, before a network runs"
_BASE = "a base class, which has no neuron of its own"


def classes() -> frozenset[str]:
    """The names of all module classes that are defined under `norse.torch.module`."""
    names = [f"norse.torch.module.{found.name}" for found in iter_modules(norse.module.__path__) if not found.ispkg]
    return frozenset(
        f"norse.{cls.__name__}"
        for name in names
        for _, cls in public_modules(import_module(name))
        if cls.__module__ == name
    )


class Dense(nn.Module):
    """A cell behind a linear layer, its state passed through forward."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.linear, self.cell = nn.Linear(6, 5), cell

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.cell(4.0 * self.linear(x), state)


class Recurrent(Dense):
    """The same with a readout of 4 neurons."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__(cell)
        self.readout = nn.Linear(4, 3)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        spikes, state = super().forward(x, state)
        return self.readout(spikes), state


class Correlating(nn.Module):
    """A neuron that takes its weights as arguments; it runs for a batch of 1 only."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = norse.LIFCorrelation(6, 4)
        self.inputs, self.recurrent = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.cell(x, self.inputs, self.recurrent, state)


class Regularized(Dense):
    """A cell whose spikes are counted; the count is kept in the module, and is an output."""

    def __init__(self) -> None:
        super().__init__(norse.LIFExCell())
        self.regularization = norse.RegularizationCell()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        spikes, state = super().forward(x, state)
        spikes, count = self.regularization(spikes, state)
        return spikes, count, state


def _sequential() -> nn.Module:
    return norse.SequentialState(
        nn.Conv2d(2, 3, 3), norse.LIFCell(), nn.Flatten(), nn.Linear(75, 4), norse.LIFRefracCell(), norse.LICell()
    )


def _feed_forward(name: str, *args: Any, case: str = "", **options: Any) -> Row:
    cls = getattr(norse, name)
    return Row(_name(name, case), lambda: with_states(Dense(cls(*args, **options))))


def _recurrent(name: str, *args: Any, case: str = "", **options: Any) -> Row:
    cls = getattr(norse, name)
    return Row(_name(name, case), lambda: with_states(Recurrent(cls(5, 4, *args, **options))))


def _name(name: str, case: str) -> str:
    return f"norse.{name} ({case})" if case else f"norse.{name}"


def _sequence(name: str, instead: str) -> Row:
    return Row(f"norse.{name}", None, remark=f"{_SEQUENCES}{instead}")


def _without_step(names: str, reason: str) -> tuple[Row, ...]:
    return tuple(Row(f"norse.{name}", None, remark=reason) for name in names.split())


def _images(name: str, make: Callable[[], nn.Module], remark: str = "") -> Row:
    return Row(f"norse.{name}", lambda: nn.Sequential(make(), nn.Flatten()), _IMAGE, remark=remark)


def _fields(cls: Any) -> nn.Module:
    scales, angles, ratios = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])
    field: nn.Module = cls(2, 3, scales, angles, ratios, [(0, 0)])
    return field


ROWS: tuple[Row, ...] = (
    _recurrent("CobaLIFCell"),
    Row(
        "norse.IAFCell",
        # Parameters of its own: its first step would change the default ones, which all cells share.
        lambda: with_states(Dense(norse.IAFCell(norse.IAFParameters(v_reset=torch.zeros(()))))),
        remark="its first step makes its threshold trainable",
    ),
    _feed_forward("IzhikevichCell", norse.tonic_spiking),
    _recurrent("IzhikevichRecurrentCell", norse.tonic_spiking),
    *(
        _feed_forward(name)
        for name in ("LIBoxCell", "LICell", "LIFAdExCell", "LIFAdExRefracCell", "LIFBoxCell", "LIFCell", "LIFExCell")
    ),
    _feed_forward("LIFCell", norse.LIFParameters(method="tanh", v_th=torch.tensor(0.4)), case='method="tanh"'),
    _feed_forward("LIFRefracCell"),
    _feed_forward("LSNNCell"),
    _feed_forward("LSNNCell", adjoint=True, case="adjoint=True"),
    *(
        _recurrent(name)
        for name in (
            "LIFAdExRecurrentCell",
            "LIFAdExRefracRecurrentCell",
            "LIFExRecurrentCell",
            "LIFMCRecurrentCell",
            "LIFMCRefracRecurrentCell",
            "LIFRecurrentCell",
            "LIFRefracRecurrentCell",
            "LILinearCell",
            "LSNNRecurrentCell",
        )
    ),
    _recurrent("LIFRecurrentCell", autapses=True, case="autapses=True"),
    _recurrent("LSNNRecurrentCell", adjoint=True, case="adjoint=True"),
    Row("norse.LIFCorrelation", lambda: with_states(Correlating()), shape=(1, 6)),
    Row(
        "norse.RegularizationCell",
        lambda: with_states(Regularized()),
        remark="its count has a type of its own at the start",
    ),
    Row("norse.SequentialState", lambda: with_states(_sequential()), _IMAGE, scale=4.0),
    Row(
        "norse.SequentialState (return_hidden=True)",
        lambda: with_states(
            norse.SequentialState(nn.Linear(6, 5), norse.LSNNCell(), norse.LICell(), return_hidden=True)
        ),
    ),
    Row(
        "norse.RecurrentSequential",
        lambda: with_states(norse.RecurrentSequential(nn.Linear(6, 6), norse.LIFExCell(), nn.Linear(6, 6))),
    ),
    Row(
        "norse.TemporalReceptiveField",
        lambda: with_states(norse.TemporalReceptiveField((2, 7, 7), 2)),
        _IMAGE,
    ),
    _images(
        "SpatialReceptiveField2d",
        lambda: norse.SpatialReceptiveField2d(2, 3, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]), optimize_fields=False),
        "with optimize_fields=False",
    ),
    _images("SampledSpatialReceptiveField2d", lambda: _fields(norse.SampledSpatialReceptiveField2d)),
    _images("ParameterizedSpatialReceptiveField2d", lambda: _fields(norse.ParameterizedSpatialReceptiveField2d)),
    Row("norse.PoissonEncoderStep", lambda: nn.Sequential(encode.PoissonEncoderStep(300.0), nn.Linear(6, 3))),
    Row(
        "norse.SignedPoissonEncoderStep",
        lambda: nn.Sequential(encode.SignedPoissonEncoderStep(300.0), nn.Linear(6, 3)),
    ),
    Row("norse.PopulationEncoder", lambda: nn.Sequential(norse.PopulationEncoder(3, scale=2), nn.Linear(3, 2))),
    *(_sequence(name, f"use {name}Cell") for name in ("IAF", "Izhikevich", "LI", "LIF", "LIFAdEx", "LIFEx", "LSNN")),
    *(
        _sequence(name, f"use {name}Cell")
        for name in (
            "IzhikevichRecurrent",
            "LIFAdExRecurrent",
            "LIFAdExRefracRecurrent",
            "LIFExRecurrent",
            "LIFRecurrent",
            "LIFRefracRecurrent",
            "LSNNRecurrent",
        )
    ),
    _sequence("ExpFilter", "use LILinearCell"),
    _sequence("LConv2d", "use nn.Conv2d"),
    _sequence("Lift", "use the module that it lifts"),
    _sequence("SpikeLatencyEncoder", "it looks for each neuron's first spike"),
    _sequence("SpikesToTimesDecoder", "it is for the result"),
    *_without_step("ConstantCurrentLIFEncoder PoissonEncoder SignedPoissonEncoder SpikeLatencyLIFEncoder", _ENCODERS),
    *_without_step("SNN SNNCell SNNRecurrent SNNRecurrentCell", _BASE),
)
