"""Random small networks of single-step modules, and random legal schedules for them.

`random_network(seed)` is the plain generator, `networks()` the hypothesis strategy; both make the same choices, the
one from a seeded `random.Random`, the other from hypothesis, which then shrinks them. A network's repr lists its
operations line by line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from snncompile import Loop, Schedule, Segment, neuron
from snncompile.ir import StepGraph

Shape = tuple[int, ...]  # of one step, without the batch: (features,), (tokens, features) or (channels, height, width)

# For a test that plans and measures a network in each example, which takes seconds.
half_as_many = settings(max_examples=settings().max_examples // 2)

BATCH = 4  # from here on, batching over time keeps the bits of convolutions and linear layers


# Modules that networks are built of, beside those of torch and snncompile.


class Feedback(nn.Module):
    """Keeps its previous output in a plain attribute, so it is only right when it is called step by step, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.previous: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x if self.previous is None else x + 0.5 * self.previous)
        self.previous = y
        return y

    def reset(self) -> None:
        self.previous = None


class StepCounter(nn.Module):
    """Counts its calls in a buffer and scales by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return x / self.calls.clone()


class CurrentLIF(neuron.StatefulModule):
    """Two states and two outputs: a synaptic current charges a potential; spikes and current come out."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_state("current", 0.0)
        self.register_state("v", 0.0)

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        current = self.decay * states[0] + inputs[0]
        potential = self.decay * states[1] + current
        spike = torch.sigmoid(4.0 * (potential - 0.5))
        return (spike, current), (current, potential - spike)


class Scale(nn.Module):
    """Multiplies by a gate computed from a parameter, which no step changes, and adds a buffer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(shape))
        self.register_buffer("offset", 0.1 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate) + self.offset


class FunctionalDropout(nn.Module):
    """`F.dropout` by the mode of the module around it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class SelfAttention(nn.Module):
    """Attention among the tokens of one step."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(features, features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).transpose(-2, -1)) * 0.1 @ x


# The network: a list of operations on numbered values.


@dataclass(frozen=True)
class Operation:
    """One line of a network: a module (by position) or a function of earlier values (by number; 0 is the input)."""

    name: str
    operands: tuple[int, ...]
    module: int | None = None


class RandomNetwork(nn.Module):
    """Runs its operations in order; a value of several tensors counts as several values."""

    def __init__(self, operations: Iterable[Operation], modules: Iterable[nn.Module], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.operations = tuple(operations)
        self.parts = nn.ModuleList(modules)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [x]
        for operation in self.operations:
            operands = [values[number] for number in operation.operands]
            if operation.module is not None:
                result = self.parts[operation.module](*operands)
            else:
                result = FUNCTIONS[operation.name](*operands)
            if operation.name in PAIRS:
                values += [result[0], result[1]]
            else:
                values.append(result)
        results = tuple(values[number] for number in self.outputs)
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        lines, number = [], 1
        for operation in self.operations:
            call = operation.name if operation.module is None else f"{operation.module}: {self.parts[operation.module]}"
            results = f"v{number}, v{number + 1}" if operation.name in PAIRS else f"v{number}"
            number += 2 if operation.name in PAIRS else 1
            lines.append(f"  {results} = ({call})({', '.join(f'v{operand}' for operand in operation.operands)})")
        mode = "train" if self.training else "eval"
        return "\n".join([f"network in {mode} mode:", *lines, f"  return {', '.join(f'v{n}' for n in self.outputs)}"])


def _in_place_relu_function(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def _in_place_add(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=1)
    return first, second


PAIRS = frozenset({"halves", "current_lif"})
FUNCTIONS: dict[str, Callable[..., object]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh(),
    "clamp": lambda x: x.clamp(-1.0, 1.0),
    "scale": lambda x: 2.0 * x - 0.25,
    "square": lambda x: x * x,
    "softmax": lambda x: x.softmax(-1),
    "clone": lambda x: x.clone(),
    "in_place_relu": lambda x: x.relu_(),
    "in_place_relu_function": _in_place_relu_function,
    "in_place_scale": lambda x: x.mul_(0.5),
    "flatten": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "flip_image": lambda x: x.permute(0, 1, 3, 2),
    "to_tokens": lambda x: x.flatten(2).transpose(1, 2),
    "token_mean": lambda x: x.mean(1),
    "image_mean": lambda x: x.mean((2, 3)),
    "unsqueezed": lambda x: x.unsqueeze(1).squeeze(1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "first_half": lambda x: x[:, : x.shape[1] // 2],
    "halves": _halves,
    "gate_by_mean": lambda x: x * x.mean(1, keepdim=True),
    "add": lambda x, y: x + y,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > 0.0, x, y),
    "in_place_add": _in_place_add,
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat_by_keyword": lambda x, y: torch.cat((x, y), dim=1),
    "couple_batch": lambda x, y: 0.1 * (x @ y.transpose(0, 1) @ y),
}


class Builder:
    """Draws a network; every choice comes from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.operations: list[Operation] = []
        self.modules: list[nn.Module] = []
        self.shapes: list[Shape] = []
        # Values that may be written in place: fresh, read by no one yet, and not needed by their producer's backward.
        self.writable = -1

    def function(self, name: str, operands: tuple[int, ...], *shapes: Shape) -> int:
        self.operations.append(Operation(name, operands))
        return self._append(shapes, writable=name in ("add", "scale"))

    def module(self, module: nn.Module, operand: int, *shapes: Shape, name: str = "module") -> int:
        self.modules.append(module)
        return self.call(len(self.modules) - 1, operand, *shapes, name=name)

    def call(self, module: int, operand: int, *shapes: Shape, name: str = "module") -> int:
        self.operations.append(Operation(name, (operand,), module))
        return self._append(shapes, writable=isinstance(self.modules[module], (nn.Linear, nn.Conv2d, nn.AvgPool2d)))

    def _append(self, shapes: tuple[Shape, ...], *, writable: bool) -> int:
        first = len(self.shapes)
        self.shapes += shapes
        self.writable = first if writable else -1
        return first

    def neuron(self) -> nn.Module:
        """A neuron with drawn options."""
        rng = self.rng
        options = {
            "v_threshold": rng.choice([0.25, 0.5, 1.0]),
            "v_reset": rng.choice([None, 0.0, -0.1]),
            "detach_reset": rng.random() < 0.5,
        }
        decay_input = rng.random() < 0.5
        kind = rng.randrange(6)
        if kind == 0:
            return neuron.NonSpikingIFNode()
        if kind == 1:
            return neuron.NonSpikingLIFNode(2.0, decay_input, v_reset=0.1)
        if kind == 2:
            return neuron.LIFNode(1.5, decay_input, **options)
        if kind == 3:
            return neuron.ParametricLIFNode(3.0, decay_input, **options)
        return neuron.IFNode(**options)

    def grow(self) -> None:
        """Add one operation, or a few that belong together."""
        recent = max(0, len(self.shapes) - 4)
        operand = self.rng.randrange(recent, len(self.shapes))
        shape = self.shapes[operand]
        kinds = {1: self._vector, 2: self._tokens, 3: self._image}
        draw = self.rng.randrange(12)
        if draw < 3:
            self._neuron_site(operand, shape)
        elif draw < 5:
            self._join(operand, shape)
        elif draw < 7:
            self._anything(operand, shape)
        else:
            kinds[len(shape)](operand, shape)

    def _neuron_site(self, operand: int, shape: Shape) -> None:
        draw = self.rng.randrange(8)
        if draw == 0:  # one neuron, two call sites: its state ties them into a recurrent region
            first = self.module(self.neuron(), operand, shape)
            site = len(self.modules) - 1
            self.call(site, self.function("scale", (first,), shape), shape)
        elif draw == 1:
            self.module(Feedback(), operand, shape)
        elif draw == 2:
            self.module(CurrentLIF(0.75), operand, shape, shape, name="current_lif")
        elif draw == 3:  # neurons in a row
            self.module(self.neuron(), self.module(self.neuron(), operand, shape), shape)
        else:
            self.module(self.neuron(), operand, shape)

    def _join(self, operand: int, shape: Shape) -> None:
        """Two values: a residual connection, a branch or a concatenation."""
        candidates = [number for number, other in enumerate(self.shapes) if other == shape]
        other = self.rng.choice(candidates)
        if self.rng.random() < 0.3 and shape[0] <= 4:
            name = self.rng.choice(["cat", "cat_by_keyword"])
            self.function(name, (operand, other), (2 * shape[0], *shape[1:]))
        elif self.writable not in (-1, other) and self.shapes[self.writable] == shape and self.rng.random() < 0.5:
            self.function("in_place_add", (self.writable, other), shape)
        else:
            names = ["add", "add", "add", "subtract", "multiply", "maximum", "where"]
            names += ["couple_batch"] if len(shape) == 1 else []
            self.function(self.rng.choice(names), (operand, other), shape)

    def _anything(self, operand: int, shape: Shape) -> None:
        """An operation that takes any shape."""
        rng = self.rng
        if self.writable >= 0 and rng.random() < 0.4:
            names = ["in_place_relu", "in_place_relu_function", "in_place_scale"]
            if rng.random() < 0.3:
                self.module(nn.ReLU(inplace=True), self.writable, self.shapes[self.writable])
            else:
                self.function(rng.choice(names), (self.writable,), self.shapes[self.writable])
            return
        draw = rng.randrange(8)
        if draw == 0:
            self.module(rng.choice([nn.Dropout(0.3), FunctionalDropout(), nn.Identity()]), operand, shape)
        elif draw == 1:
            self.module(StepCounter(), operand, shape)
        elif draw == 2:
            self.module(Scale(shape), operand, shape)
        elif draw == 3 and shape[0] % 2 == 0:
            half = (shape[0] // 2, *shape[1:])
            if rng.random() < 0.5:
                self.function("first_half", (operand,), half)
            else:
                self.function("halves", (operand,), half, half)
        else:
            names = ["relu", "sigmoid", "tanh", "clamp", "scale", "square", "softmax", "clone", "unsqueezed"]
            self.function(rng.choice([*names, "gate_by_mean"]), (operand,), shape)

    def _vector(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        (features,) = shape
        draw = rng.randrange(8)
        if draw < 4:
            wanted = rng.randint(2, 8)
            self.module(nn.Linear(features, wanted, bias=rng.random() < 0.7), operand, (wanted,))
        elif draw == 4:
            self.module(nn.BatchNorm1d(features), operand, shape)
        elif draw == 5:
            self.module(nn.LayerNorm(features), operand, shape)
        elif draw == 6:  # one layer, two call sites
            first = self.module(nn.Linear(features, features), operand, shape)
            self.call(len(self.modules) - 1, first, shape)
        else:
            self.module(nn.Unflatten(1, (features, 1, 1)), operand, (features, 1, 1))

    def _tokens(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        tokens, features = shape
        draw = rng.randrange(5)
        if draw == 0:
            wanted = rng.randint(2, 6)
            self.module(nn.Linear(features, wanted), operand, (tokens, wanted))
        elif draw == 1:
            self.module(SelfAttention(features), operand, shape)
        elif draw == 2:
            self.module(nn.LayerNorm(features), operand, shape)
        elif draw == 3:
            self.function("token_mean", (operand,), (features,))
        else:
            self.function(rng.choice(["flatten", "reshape"]), (operand,), (tokens * features,))

    def _image(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        channels, height, width = shape
        draw = rng.randrange(14)
        if draw < 5:
            self._convolution(operand, shape)
        elif draw < 7:
            self.module(nn.BatchNorm2d(channels, affine=rng.random() < 0.7), operand, shape)
        elif draw == 7 and height >= 2 and width >= 2:
            pooled = (channels, height // 2, width // 2)
            if rng.random() < 0.5:
                self.module(rng.choice([nn.AvgPool2d(2), nn.MaxPool2d(2)]), operand, pooled)
            else:
                self.function(rng.choice(["avg_pool", "max_pool"]), (operand,), pooled)
        elif draw == 8:
            self.module(nn.AdaptiveAvgPool2d(1), operand, (channels, 1, 1))
        elif draw == 9:
            self.module(nn.GroupNorm(1, channels), operand, shape)
        elif draw == 10:
            self.function("flip_image", (operand,), (channels, width, height))
        elif draw == 11 and height * width <= 16:
            self.function("to_tokens", (operand,), (height * width, channels))
        elif draw == 12:
            self.function("image_mean", (operand,), (channels,))
        else:
            self._flatten(operand, shape)

    def _convolution(self, operand: int, shape: Shape) -> None:
        rng = self.rng
        channels, height, width = shape
        kernel = rng.choice([1, 3])
        stride = 2 if height >= 4 and width >= 4 and rng.random() < 0.3 else 1
        groups = channels if rng.random() < 0.2 else 1
        wanted = channels if groups > 1 else rng.randint(2, 4)
        convolution = nn.Conv2d(
            channels, wanted, kernel, stride, padding=kernel // 2, groups=groups, bias=rng.random() < 0.7
        )
        self.module(convolution, operand, (wanted, -(-height // stride), -(-width // stride)))

    def _flatten(self, operand: int, shape: Shape) -> None:
        features = shape[0] * shape[1] * shape[2]
        if features > 64:
            self.module(nn.AdaptiveAvgPool2d(1), operand, (shape[0], 1, 1))
        elif operand == self.writable:
            self.function("view", (operand,), (features,))
        elif self.rng.random() < 0.5:
            self.module(nn.Flatten(), operand, (features,))
        else:
            self.function(self.rng.choice(["flatten", "reshape"]), (operand,), (features,))

    def build(self) -> tuple[RandomNetwork, Shape]:
        rng = self.rng
        torch.manual_seed(rng.randrange(2**31))
        input_shape = (rng.randint(2, 6),) if rng.random() < 0.4 else (rng.randint(1, 3), *rng.choice([(4, 4), (6, 5)]))
        self.shapes.append(input_shape)
        for _ in range(rng.randint(1, 9)):
            self.grow()
        last = len(self.shapes) - 1
        outputs = (last,)
        if rng.random() < 0.25:
            outputs = (last, rng.randrange(len(self.shapes)))
        net = RandomNetwork(self.operations, self.modules, outputs)
        net.train(rng.random() < 0.5)
        return net, (BATCH, *input_shape)


def build_network(rng: random.Random) -> tuple[RandomNetwork, Shape]:
    """A network in a drawn mode, and the shape `[N, *]` of one step's input."""
    return Builder(rng).build()


def random_network(seed: int) -> tuple[RandomNetwork, Shape]:
    """The network of a seed, and the shape `[N, *]` of one step's input."""
    return build_network(random.Random(seed))


def networks() -> st.SearchStrategy[tuple[RandomNetwork, Shape]]:
    """Networks as `random_network` makes them, with choices that hypothesis can shrink."""
    return st.randoms(use_true_random=False).map(build_network)


def random_input(shape: Shape, steps: int | None, seed: int = 0) -> Tensor:
    """`[T, N, *]`, or `[N, *]` for a static input; values that make some neurons fire."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape if steps is None else (steps, *shape), generator=generator) + 0.25


# Schedules.


def random_schedule(graph: StepGraph, steps: int, rng: random.Random) -> Schedule:
    """Any legal nest: a random topological order, cut at random, with chunk lengths that need not divide."""
    units = list(_random_order(graph, rng))
    chunk = rng.choice([1, steps, rng.randint(1, steps)])
    return Schedule(steps, Loop(chunk, _random_body(units, chunk, rng, depth=0)), "random")


def _random_order(graph: StepGraph, rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Scheduled nodes, regions as wholes, in an order that every edge between them allows."""
    unit_of = {node.name: (node.name,) for node in graph.scheduled}
    unit_of |= {name: region for region in graph.regions for name in region}
    waits_for: dict[tuple[str, ...], set[tuple[str, ...]]] = {unit: set() for unit in unit_of.values()}
    for edge in graph.edges:
        if edge.source in unit_of and edge.target in unit_of and unit_of[edge.source] != unit_of[edge.target]:
            waits_for[unit_of[edge.target]].add(unit_of[edge.source])
    done: set[tuple[str, ...]] = set()
    while len(done) < len(waits_for):
        unit = rng.choice(sorted(unit for unit, others in waits_for.items() if unit not in done and others <= done))
        done.add(unit)
        yield unit


def _random_body(
    units: list[tuple[str, ...]], chunk: int, rng: random.Random, depth: int
) -> tuple[Segment | Loop, ...]:
    body: list[Segment | Loop] = []
    while units:
        count = rng.randint(1, len(units))
        part, units = units[:count], units[count:]
        has_region = any(len(unit) > 1 for unit in part)
        if rng.random() < 0.5 and (chunk == 1 or not has_region):
            body.append(Segment(tuple(name for unit in part for name in unit)))
        elif depth < 3:
            inner = rng.randint(1, chunk)
            body.append(Loop(inner, _random_body(part, inner, rng, depth + 1)))
        else:
            body.append(Loop(1, (Segment(tuple(name for unit in part for name in unit)),)))
    return tuple(body)
