"""snnTorch's classes: neurons that hide their states, the same with states passed through forward, layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from snncompile import with_states

from .rows import Row, public_modules

_SECOND_ORDER = {"alpha": 0.9, "beta": 0.8}
_LEARNABLE = {"learn_beta": True, "learn_threshold": True}
_IMAGE = (4, 2, 6, 6)
_Cases = dict[str, dict[str, Any]]
_RESETS: _Cases = {f'reset_mechanism="{name}"': {"reset_mechanism": name} for name in ("zero", "none")}
_SEQUENCES = "takes [T, N, *] with all steps at once: it has no single step"
_ABSTRACT = "abstract: it has no forward"


def classes() -> frozenset[str]:
    """The names of all module classes that the package offers."""
    return frozenset(name for name, _ in public_modules(snntorch))


class OneState(nn.Module):
    """The network of snnTorch's tutorials: `spk, mem = lif(x, mem)`."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.fc1, self.neuron, self.fc2 = nn.Linear(6, 5), neuron, nn.Linear(5, 3)

    def forward(self, x: Tensor, mem: Any) -> Any:
        spk, mem = self.neuron(self.fc1(x), mem)
        return self.fc2(spk), mem


class TwoStates(OneState):
    """The same for a neuron with two states."""

    def forward(self, x: Tensor, first: Any, mem: Any) -> Any:  # type: ignore[override]
        spk, first, mem = self.neuron(self.fc1(x), first, mem)
        return self.fc2(spk), first, mem


class ThreeStates(OneState):
    """The same for a neuron with three states."""

    def forward(self, x: Tensor, first: Any, second: Any, mem: Any) -> Any:  # type: ignore[override]
        spk, first, second, mem = self.neuron(self.fc1(x), first, second, mem)
        return self.fc2(spk), first, second, mem


class SpikesAreAState(OneState):
    """A recurrent neuron takes its own last spikes, which are its output too."""

    def forward(self, x: Tensor, spk: Any, mem: Any) -> Any:  # type: ignore[override]
        spk, mem = self.neuron(self.fc1(x), spk, mem)
        return self.fc2(spk), spk, mem


class SpikesAndTwoStates(OneState):
    """The same for a neuron with a synapse."""

    def forward(self, x: Tensor, spk: Any, syn: Any, mem: Any) -> Any:  # type: ignore[override]
        spk, syn, mem = self.neuron(self.fc1(x), spk, syn, mem)
        return self.fc2(spk), spk, syn, mem


class Images(nn.Module):
    """A convolutional neuron with two states between convolutions."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.conv1, self.neuron, self.conv2 = nn.Conv2d(2, 2, 3, padding=1), neuron, nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor, syn: Any, mem: Any) -> Any:
        spk, syn, mem = self.neuron(self.conv1(x), syn, mem)
        return self.conv2(spk), syn, mem


class Delta(OneState):
    """DeltaLeaky's state is a pair, and it returns it even where it hides it."""

    def forward(self, x: Tensor, mem: Any = None) -> Any:
        if self.neuron.init_hidden:
            return self.fc2(self.neuron(self.fc1(x))[0])
        spk, mem = self.neuron(self.fc1(x), (None, None) if mem is None else mem)
        return self.fc2(spk), mem


def _hidden(neuron: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), neuron, nn.Linear(5, 3))


def _hidden_images(neuron: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), neuron, nn.Flatten(), nn.Linear(72, 3))


def _neuron(
    name: str, explicit: Callable[[nn.Module], nn.Module], states: int, cases: _Cases, **options: Any
) -> tuple[Row, ...]:
    """A neuron that hides its states, and one whose network passes them through forward; each in all cases."""
    cls = getattr(snntorch, name)
    images = explicit is Images
    around = _hidden_images if images else _hidden
    rows = []
    for case, chosen in {"": {}, **_RESETS, **cases}.items():
        for form in ("", "explicit"):

            def network(form: str = form, chosen: dict[str, Any] = chosen) -> nn.Module:
                if form:
                    return with_states(explicit(cls(**options | chosen)), states)
                return around(cls(init_hidden=True, **options | chosen))

            suffix = ", ".join(filter(None, (form, case)))
            shape = _IMAGE if images else (4, 6)
            modes = (True,) if case else (True, False)
            title = f"snntorch.{name} ({suffix})" if suffix else f"snntorch.{name}"
            rows.append(Row(title, network, shape, scale=3.0, modes=modes))
    return tuple(rows)


ROWS: tuple[Row, ...] = (
    *_neuron("Alpha", ThreeStates, 3, {}, **_SECOND_ORDER),
    Row("snntorch.AssociativeLeaky", None, remark=_SEQUENCES),
    Row("snntorch.DeltaLeaky", lambda: Delta(snntorch.DeltaLeaky(0.3, beta=0.9, init_hidden=True))),
    Row("snntorch.DeltaLeaky (explicit)", lambda: with_states(Delta(snntorch.DeltaLeaky(0.3, beta=0.9)))),
    Row(
        "snntorch.GradedSpikes",
        lambda: nn.Sequential(nn.Linear(6, 6), snntorch.GradedSpikes(5, constant_factor=None)),
        shape=(4, 5, 6),
        remark="its weights are [size, 1]",
    ),
    Row("snntorch.LIF", None, remark=_ABSTRACT),
    *_neuron("Lapicque", OneState, 1, {}, beta=0.9),
    *_neuron(
        "Leaky",
        OneState,
        1,
        {
            "learn_beta, learn_threshold": _LEARNABLE,
            "beta of each neuron": {"beta": torch.linspace(0.1, 0.9, 5)},
            "reset_delay=False": {"reset_delay": False},
        },
        beta=0.9,
    ),
    Row(
        "snntorch.Leaky (output=True)",
        lambda: nn.Sequential(nn.Linear(6, 5), snntorch.Leaky(0.9, init_hidden=True, output=True)),
        scale=3.0,
    ),
    Row("snntorch.LeakyParallel", None, remark=_SEQUENCES),
    Row("snntorch.LinearLeaky", None, remark=_SEQUENCES),
    *_neuron("RLeaky", SpikesAreAState, 2, {"learnable": _LEARNABLE}, beta=0.9, linear_features=5),
    Row(
        "snntorch.RLeaky (all_to_all=False)",
        lambda: _hidden(snntorch.RLeaky(0.9, V=0.5, all_to_all=False, init_hidden=True)),
        scale=3.0,
    ),
    Row(
        "snntorch.RLeaky (conv2d_channels)",
        lambda: _hidden_images(snntorch.RLeaky(0.9, conv2d_channels=2, kernel_size=3, init_hidden=True)),
        shape=_IMAGE,
        scale=3.0,
    ),
    *_neuron("RSynaptic", SpikesAndTwoStates, 3, {}, linear_features=5, **_SECOND_ORDER),
    *_neuron("SConv2dLSTM", Images, 2, {}, in_channels=2, out_channels=2, kernel_size=3),
    *_neuron("SLSTM", TwoStates, 2, {}, input_size=5, hidden_size=5),
    Row("snntorch.SpikingNeuron", None, remark=_ABSTRACT),
    Row("snntorch.StateLeaky", None, remark=_SEQUENCES),
    *_neuron("Synaptic", TwoStates, 2, {"learnable": {"learn_alpha": True, **_LEARNABLE}}, **_SECOND_ORDER),
)
