"""Random small networks that mix the neurons of frameworks with neurons written by hand.

`mixed_network(seed)` draws one. They are built as `networks` builds its own, with more ways to keep state: attributes,
buffers, lists, Python numbers, states that go through `forward`, and what the frameworks do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .handwritten import (
    HAND_WRITTEN,
    AttributeDelay,
    DequeDelay,
    ExplicitLIF,
    KeepsState,
    LateralLIF,
    ListDelay,
    ReadsMembrane,
    ReadsPotential,
    RingDelay,
    SilentLIF,
)
from .networks import BATCH, FUNCTIONS, PAIRS, Builder, Feedback, Operation, Shape, StepCounter


@dataclass(frozen=True)
class Kept:
    """A value that the network keeps in an attribute and adds to another one a step later.

    Attributes:
        source: Number of the value; before the place where it is added, this is a delay, after it, feedback.
        detached: Kept without its history.
    """

    source: int
    detached: bool


class MixedNetwork(nn.Module):
    """Runs its operations in order; a value of several tensors counts as several values.

    Args:
        operations: "kept" adds what `kept[module]` kept, "explicit" passes a state; the rest as in `RandomNetwork`.
        modules: The parts, by position.
        kept: Values that are kept in attributes.
        outputs: Numbers of the values that are returned.
        form: How they are returned: "plain" (a tensor, or a tuple), "dict" or "nested".
    """

    inputs = 1

    def __init__(
        self,
        operations: Iterable[Operation],
        modules: Iterable[nn.Module],
        kept: Iterable[Kept],
        outputs: tuple[int, ...],
        form: str,
    ) -> None:
        super().__init__()
        self.operations, self.kept = tuple(operations), tuple(kept)
        self.parts = nn.ModuleList(modules)
        self.outputs, self.form = outputs, form
        for slot in range(len(self.kept)):
            setattr(self, f"kept_{slot}", None)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)[0]

    def run(self, *inputs: Tensor, states: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """One step: outputs, and the states of the cells that pass theirs through `forward`."""
        values = list(inputs)
        states = {} if states is None else dict(states)
        for operation in self.operations:
            operands = [values[number] for number in operation.operands]
            result: Any
            if operation.name == "kept":
                late = getattr(self, f"kept_{operation.module}")
                result = operands[0] if late is None else operands[0] + 0.5 * late
            elif operation.name == "explicit":
                name = f"cell_{operation.module}"
                result, states[name] = self._part(operation)(*operands, states.get(name))
            elif operation.module is not None:
                result = self._part(operation)(*operands)
            else:
                result = FUNCTIONS[operation.name](*operands)
            values += [result[0], result[1]] if operation.name in PAIRS else [result]
        for slot, kept in enumerate(self.kept):
            value = values[kept.source]
            setattr(self, f"kept_{slot}", value.detach() if kept.detached else value)
        return self._result([values[number] for number in self.outputs]), states

    def _part(self, operation: Operation) -> nn.Module:
        assert operation.module is not None
        return self.parts[operation.module]

    def _result(self, outputs: list[Tensor]) -> Any:
        if self.form == "dict":
            return {f"y{number}": value for number, value in enumerate(outputs)}
        if self.form == "nested":
            return outputs[0], {"all": outputs}
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def __repr__(self) -> str:
        number = self.inputs
        lines = [f"  v{number} = input" for number in range(self.inputs)]
        for operation in self.operations:
            results = f"v{number}, v{number + 1}" if operation.name in PAIRS else f"v{number}"
            number += 2 if operation.name in PAIRS else 1
            call = operation.name
            if call == "kept":
                assert operation.module is not None
                call = f"adds {self.kept[operation.module]}"
            elif operation.module is not None:
                call = f"{call} {operation.module}: {self.parts[operation.module]}"
            lines.append(f"  {results} = ({call})({', '.join(f'v{operand}' for operand in operation.operands)})")
        mode = "train" if self.training else "eval"
        returned = ", ".join(f"v{n}" for n in self.outputs)
        return "\n".join([f"{type(self).__name__} in {mode} mode:", *lines, f"  return {self.form} {returned}"])


class TwoInputs(MixedNetwork):
    inputs = 2

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(x, y)[0]


class WithStates(MixedNetwork):
    """Passes the states of some cells through `forward`: a dictionary, None at first."""

    def forward(self, x: Tensor, states: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        return self.run(x, states=states)


class TwoInputsWithStates(MixedNetwork):
    inputs = 2

    def forward(self, x: Tensor, y: Tensor, states: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        return self.run(x, y, states=states)


_CLASSES = {(1, False): MixedNetwork, (2, False): TwoInputs, (1, True): WithStates, (2, True): TwoInputsWithStates}


@dataclass(frozen=True)
class Mixed:
    """A drawn network.

    Attributes:
        net: The network.
        shapes: `[N, *]` of one step of each input.
        explicit: Whether it passes states through `forward`.
        ingredients: What it is made of, with how often.
    """

    net: MixedNetwork
    shapes: tuple[Shape, ...]
    explicit: bool
    ingredients: Counter[str]


class Frameworks:
    """The packages whose modules are mixed; a test that needs them is skipped where one is not installed."""

    def __init__(self) -> None:
        for package in ("spikingjelly", "snntorch", "norse"):
            pytest.importorskip(package)
        self.snntorch, self.norse = import_module("snntorch"), import_module("norse.torch")
        self.layer = import_module("spikingjelly.activation_based.layer")
        self.jelly = import_module("spikingjelly.activation_based.neuron")


class MixedBuilder(Builder):
    """Draws a mixed network; every choice comes from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.frameworks = Frameworks()
        self.ingredients: Counter[str] = Counter()
        self.slots: list[tuple[int, Shape]] = []  # number of the value, shape
        self.explicit = rng.random() < 0.2
        self.readable: list[tuple[nn.Module, Shape]] = []  # neurons whose `v` another module may read

    def grow(self) -> None:
        """Add one operation, or a few that belong together: more state than in the other networks."""
        recent = max(0, len(self.shapes) - 4)
        operand = self.rng.randrange(recent, len(self.shapes))
        shape = self.shapes[operand]
        draw = self.rng.randrange(15)
        if draw < 5:
            self._neuron_site(operand, shape)
        elif draw == 5:
            self._delay(operand, shape)
        elif draw == 6:
            self._keep(operand, shape)
        elif draw == 7:
            self._recurrent(operand, shape)
        elif draw == 8:
            self._dropout_or_statistics(operand, shape)
        elif draw < 11:
            self._join(operand, shape)
        elif draw == 11:
            self._anything(operand, shape)
        else:
            {1: self._vector, 2: self._tokens, 3: self._image}[len(shape)](operand, shape)

    def _neuron_site(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        draw = rng.randrange(12)
        if draw == 0:
            self.ingredients["module called twice in a step"] += 1
            first = self.module(self._neuron(shape), operand, shape)
            site = len(self.modules) - 1
            self.call(site, self.function("scale", (first,), shape), shape)
        elif draw == 1:
            self._reader(operand, shape)
        elif draw == 2:
            self.module(rng.choice([Feedback, StepCounter])(), operand, shape)
        elif draw == 3:
            self.module(self.frameworks.snntorch.Leaky(0.8, init_hidden=True, output=True), operand, shape, shape,
                        name="current_lif")  # fmt: skip
            self.ingredients["snnTorch"] += 1
        elif self.explicit and draw < 9:
            self.module(self._explicit_cell(shape), operand, shape, name="explicit")
            self.ingredients["explicit states"] += 1
            if rng.random() < 0.2:
                self.call(len(self.modules) - 1, len(self.shapes) - 1, shape, name="explicit")
                self.ingredients["module called twice in a step"] += 1
        else:
            self.module(self._neuron(shape), operand, shape)

    def _neuron(self, shape: Shape) -> nn.Module:
        """A neuron of any origin."""
        origin = self.rng.choice(["SpikingJelly", "SpikingJelly", "snnTorch", "Norse", "native", "by hand", "by hand"])
        makers = {
            "SpikingJelly": self._jelly_neuron,
            "snnTorch": self._snntorch_neuron,
            "Norse": self._norse_neuron,
            "native": lambda _: self.neuron(),
            "by hand": self._hand_written,
        }
        self.ingredients[origin] += 1
        made = makers[origin](shape)
        if self._reader_of(made) is not None:
            self.readable.append((made, shape))
        return made

    def _jelly_neuron(self, shape: Shape) -> nn.Module:
        rng, jelly = self.rng, self.frameworks.jelly
        options: dict[str, Any] = {"detach_reset": rng.random() < 0.5}
        basic = {"v_threshold": rng.choice([0.25, 0.5]), "v_reset": rng.choice([None, 0.0]), **options}
        makers: list[Callable[[], nn.Module]] = [
            lambda: jelly.IFNode(**basic),
            lambda: jelly.LIFNode(tau=1.5, decay_input=rng.random() < 0.5, **basic),
            lambda: jelly.LIFNode(tau=1.5, store_v_seq=True, **basic),
            lambda: jelly.ParametricLIFNode(init_tau=2.0, decay_input=rng.random() < 0.5, **basic),
            lambda: jelly.KLIFNode(scale_reset=rng.random() < 0.5, **options),
            lambda: jelly.QIFNode(**options),
            lambda: jelly.EIFNode(**options),
            lambda: jelly.IzhikevichNode(**options),
            lambda: jelly.CUBALIFNode(v_threshold=0.5),
            lambda: jelly.LIAFNode(torch.relu, rng.random() < 0.5, **options),
            lambda: self.frameworks.layer.SynapseFilter(tau=2.0, learnable=rng.random() < 0.5),
        ]
        made = rng.choice(makers)()
        made.step_mode = "s"
        return made

    def _snntorch_neuron(self, shape: Shape) -> nn.Module:
        rng, package = self.rng, self.frameworks.snntorch
        options: dict[str, Any] = {
            "init_hidden": True,
            "threshold": rng.choice([0.3, 0.5]),
            "learn_beta": rng.random() < 0.3,
            "reset_mechanism": rng.choice(["subtract", "zero", "none"]),
        }
        kind = rng.choice(["Leaky", "Leaky", "Synaptic", "Alpha", "Lapicque", "RLeaky", "RSynaptic"])
        decay = {"alpha": 0.9, "beta": 0.8} if kind in ("Synaptic", "Alpha", "RSynaptic") else {"beta": 0.8}
        if kind == "Alpha":
            del options["learn_beta"]
        if kind.startswith("R"):
            options |= {"linear_features": shape[-1]}
        made: nn.Module = getattr(package, kind)(**decay, **options)
        return made

    def _norse_neuron(self, shape: Shape) -> nn.Module:
        rng, norse = self.rng, self.frameworks.norse
        kinds = ["LIFCell", "LIFCell", "LICell", "IAFCell", "LIFBoxCell", "LIFAdExCell", "LSNNCell", "LIFRefracCell"]
        if len(shape) == 1 and rng.random() < 0.3:
            return KeepsState(norse.LIFRecurrentCell(shape[0], shape[0], p=norse.LIFParameters(v_th=torch.tensor(0.1))))
        if rng.random() < 0.3:  # several cells in Norse's own container
            parts = [norse.LIFCell(), nn.LayerNorm(shape[-1]), norse.LICell()]
            return KeepsState(norse.SequentialState(*parts))
        return KeepsState(getattr(norse, rng.choice(kinds))())

    def _hand_written(self, shape: Shape) -> nn.Module:
        rng = self.rng
        decay = rng.choice([0.5, 0.9])
        draw = rng.randrange(20)
        if draw == 0:
            self.ingredients["branch on values"] += 1
            return SilentLIF(decay)
        return LateralLIF(decay, shape[-1]) if draw < 5 else rng.choice(HAND_WRITTEN)(decay)

    def _explicit_cell(self, shape: Shape) -> nn.Module:
        rng = self.rng
        draw = rng.randrange(4)
        if draw == 0:
            self.ingredients["Norse"] += 1
            return getattr(self.frameworks.norse, rng.choice(["LIFCell", "LICell", "LIFBoxCell"]))()
        if draw == 1:
            self.ingredients["snnTorch"] += 1
            return self.frameworks.snntorch.Leaky(beta=0.8, threshold=0.4)
        self.ingredients["by hand"] += 1
        return ExplicitLIF(rng.choice([0.5, 0.9]))

    def _reader(self, operand: int, shape: Shape) -> None:
        """A neuron's potential is read elsewhere: before its step in the loop, after it, or of the very next module."""
        candidates = [made for made, other in self.readable if other == shape]
        if candidates:
            self._read(self.rng.choice(candidates), operand, shape)
            return
        made = self._neuron(shape)
        if self._reader_of(made) is not None and self.rng.random() < 0.5:
            operand = self._read(made, operand, shape)
        self.module(made, operand, shape)

    def _read(self, source: nn.Module, operand: int, shape: Shape) -> int:
        reader = self._reader_of(source)
        assert reader is not None
        self.ingredients["reads another's state"] += 1
        return self.module(reader(source), operand, shape)

    @staticmethod
    def _reader_of(source: nn.Module) -> type[ReadsPotential | ReadsMembrane] | None:
        if hasattr(source, "mem"):
            return ReadsMembrane
        return ReadsPotential if hasattr(source, "v") else None

    def _delay(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        steps = rng.choice([1, 1, 2, 3])
        self.ingredients["delay of one step" if steps == 1 else "delay of several steps"] += 1
        kinds = [ListDelay, DequeDelay, AttributeDelay, RingDelay, self.frameworks.layer.Delay]
        self.module(rng.choice(kinds)(steps), operand, shape)

    def _keep(self, operand: int, shape: Shape) -> None:
        """What is kept is chosen when all values are there."""
        self.operations.append(Operation("kept", (operand,), len(self.slots)))
        self.slots.append((self._append((shape,), writable=False), shape))

    def _recurrent(self, operand: int, shape: Shape) -> None:
        """SpikingJelly's recurrent containers."""
        rng, layer = self.rng, self.frameworks.layer
        self.ingredients["recurrent container"] += 1
        inside = self._jelly_neuron(shape) if rng.random() < 0.7 else nn.Sigmoid()
        if rng.random() < 0.5:
            part = layer.ElementWiseRecurrentContainer(inside, rng.choice([torch.add, torch.maximum]))
            self.module(part, operand, shape)
        else:
            wanted = rng.randint(3, 6) if len(shape) == 1 else shape[-1]
            part = nn.Sequential(nn.Linear(shape[-1], wanted), inside)
            part = layer.LinearRecurrentContainer(part, shape[-1], wanted)
            self.module(part, operand, (*shape[:-1], wanted))

    def _dropout_or_statistics(self, operand: int, shape: Shape) -> None:
        rng, layer = self.rng, self.frameworks.layer
        draw = rng.randrange(4)
        if draw == 0:
            self.module(layer.Dropout(0.3), operand, shape)
        elif draw == 1:
            self.module(nn.Dropout(0.3), operand, shape)
        elif len(shape) == 2:
            self.module(nn.BatchNorm1d(shape[0], momentum=None), operand, shape)
        else:
            package = rng.choice([nn, layer])
            made = package.BatchNorm1d(shape[0]) if len(shape) == 1 else package.BatchNorm2d(shape[0])
            self.module(made, operand, shape)

    def build_mixed(self) -> Mixed:
        """The network in a drawn mode."""
        rng = self.rng
        torch.manual_seed(rng.randrange(2**31))
        shape: Shape = (rng.randint(4, 8),) if rng.random() < 0.5 else (rng.randint(1, 3), 4, 4)
        inputs = 2 if rng.random() < 0.25 else 1
        self.shapes += [shape] * inputs
        for _ in range(rng.randint(2, 6)):
            self.grow()
        last = len(self.shapes) - 1
        outputs = (last, *(rng.randrange(len(self.shapes)) for _ in range(rng.choice([0, 0, 0, 1, 2]))))
        form = rng.choice(["plain", "plain", "dict", "nested"])
        if inputs == 2 and not self._uses(1):  # an input that nothing reads is no input
            outputs = (*outputs, self.function("scale", (1,), shape))
        has_explicit = any(operation.name == "explicit" for operation in self.operations)
        kept = [self._kept(number, shape) for number, shape in self.slots]
        net = _CLASSES[inputs, has_explicit](self.operations, self.modules, kept, outputs, form)
        net.train(rng.random() < 0.6)
        self._count(net, inputs, outputs, form)
        return Mixed(net, ((BATCH, *shape),) * inputs, has_explicit, self.ingredients)

    def _uses(self, value: int) -> bool:
        return any(value in operation.operands for operation in self.operations)

    def _kept(self, number: int, shape: Shape) -> Kept:
        """Any value of the shape of the one that it is added to."""
        source = self.rng.choice([value for value, other in enumerate(self.shapes) if other == shape])
        self.ingredients["delay of one step" if source < number else "feedback across layers"] += 1
        return Kept(source, self.rng.random() < 0.3)

    def _count(self, net: MixedNetwork, inputs: int, outputs: tuple[int, ...], form: str) -> None:
        """What the network has, beside the neurons and delays counted when they were drawn."""
        names = Counter(operation.name for operation in net.operations)
        uses = Counter(operand for operation in net.operations for operand in operation.operands)
        calls = Counter(op.module for op in net.operations if op.module is not None and op.name == "module")
        mode = "train" if net.training else "eval"
        found = {
            f"{mode} mode": True,
            "branch": max(uses.values()) > 1,
            "residual": names["add"] + names["in_place_add"] > 0,
            "concatenation": names["cat"] + names["cat_by_keyword"] > 0,
            "layer called twice in a step": any(
                count > 1 and isinstance(self.modules[module], nn.Linear) for module, count in calls.items()
            ),
            "two inputs": inputs == 2,
            "several outputs": len(outputs) > 1,
            "tuple": len(outputs) > 1 and form == "plain",
            "dict": form != "plain",
        }
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d)
        kinds: dict[str, Any] = {
            f"batch norm in {mode} mode": batch_norm,
            "held dropout": self.frameworks.layer.Dropout,
            "dropout": nn.Dropout,
            "linear": nn.Linear,
            "convolution": nn.Conv2d,
        }
        for name, kind in kinds.items():
            found[name] = any(isinstance(module, kind) for module in net.modules())
        self.ingredients.update(name for name, has in found.items() if has)


def build_mixed_network(rng: random.Random) -> Mixed:
    """A network whose choices come from `rng`."""
    return MixedBuilder(rng).build_mixed()


def mixed_network(seed: int) -> Mixed:
    """The network of a seed."""
    return build_mixed_network(random.Random(seed))
