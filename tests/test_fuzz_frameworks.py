"""Random networks of several frameworks' neurons compute what the step loop computes, or are refused with a reason.

Seeds 0 to 499 are recorded: each is one network, one way to run it and one schedule. A seed that fails is named in
the output; `from tests.test_fuzz_frameworks import check; check(17)` runs it again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, InfeasibleBudgetError, neuron, with_states
from snncompile.report.parity import compare
from snncompile.runtime import OptimizedModule
from snncompile.torch_private import tree_flatten, tree_leaves, tree_unflatten

from .handwritten import AttributeLIF, BufferLIF, ClockedLIF, DequeDelay, InPlaceLIF, ReadsPotential
from .mixed_networks import Mixed, build_mixed_network, mixed_network
from .networks import random_input, random_schedule
from .test_fuzz_parity import poisoned_allocations  # noqa: F401  (used here as well, by being there)

SEEDS, BLOCK = 500, 50
OFTEN = 4  # blocks that every run goes through
SCHEDULES = ("depth-first", "breadth-first", "chunk", "auto", "nest", "budget")
# Why a network may be refused; all else must run, step by step if need be.
DOCUMENTED = ("may not branch or loop on the values of its inputs", "writes in place into memory of")
LEAST = 20  # recorded networks that have an ingredient
INGREDIENTS = (
    *("SpikingJelly", "snnTorch", "Norse", "native", "by hand", "explicit states", "reads another's state"),
    *("branch", "residual", "concatenation", "recurrent container", "feedback across layers"),
    *("delay of one step", "delay of several steps", "module called twice in a step", "layer called twice in a step"),
    *("batch norm in train mode", "batch norm in eval mode", "held dropout", "dropout", "train mode", "eval mode"),
    *("linear", "convolution", "two inputs", "several outputs", "tuple", "dict"),
)


@dataclass(frozen=True)
class Case:
    """How a network is run.

    Attributes:
        calls: Number of steps of each call; states carry over from one to the next.
        schedule: Which kind of schedule.
        gradients, input_gradients: Whether gradients are computed, and those of the inputs too.
        seed: Of inputs and random numbers.
    """

    calls: tuple[int, ...]
    schedule: str
    gradients: bool
    input_gradients: bool
    seed: int


def draw_case(rng: random.Random) -> Case:
    """Any case."""
    steps = rng.choice([1, 2, 5, 7])
    schedule = rng.choice([*SCHEDULES[:-1], *SCHEDULES])
    first = rng.randint(1, steps)
    calls: tuple[int, ...] = (first, steps - first)
    # A call that carries states on may need more than one that starts, so a budget for one is not one for the other.
    if first == steps or schedule == "budget" or rng.random() < 0.6:
        calls = (steps,)
    gradients = rng.random() < 0.6
    return Case(calls, schedule, gradients, gradients and rng.random() < 0.5, rng.randrange(1000))


# Running


Call = Callable[[tuple[Tensor, ...], Any], tuple[Any, Any]]  # `[T, N, *]` inputs, states -> outputs, states


@dataclass(frozen=True)
class Run:
    """What a run leaves behind, by name."""

    forward: dict[str, Any]  # outputs, states wherever they are kept, buffers
    gradients: dict[str, Tensor | None]


def observe(mixed: Mixed, net: nn.Module, calls: list[Call], case: Case) -> Run:
    """Call as often as the case says, go backward once from everything, and look at all there is."""
    torch.manual_seed(case.seed)
    inputs = [
        tuple(
            (2.0 * random_input(shape, steps, case.seed + 10 * number + place)).requires_grad_(case.input_gradients)
            for place, shape in enumerate(mixed.shapes)
        )
        for number, steps in enumerate(case.calls)
    ]
    outputs, states = [], None
    with torch.set_grad_enabled(case.gradients):
        for call, x in zip(calls, inputs, strict=True):
            y, states = call(x, states)
            outputs.append(y)
        drawn = torch.get_rng_state()
        leaves = tree_leaves((outputs, states))
        recorded = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if recorded:
            torch.autograd.backward(recorded, [_weights(leaf) for leaf in recorded])
    _, structure = tree_flatten((outputs, states))
    forward = {f"output {number}": leaf for number, leaf in enumerate(leaves)} | dict(held(net))
    forward |= {"structure of the outputs": str(structure), "random numbers drawn": drawn}
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    gradients |= {f"gradient of input {number}": x.grad for number, x in enumerate(tree_leaves(inputs))}
    return Run(forward, gradients)


def _weights(output: Tensor) -> Tensor:
    return torch.rand(output.shape, generator=torch.Generator().manual_seed(2)).to(output)


def held(net: nn.Module) -> dict[str, Any]:
    """Everything that modules hold beside parameters: tensors and Python values, in attributes and buffers."""
    found: dict[str, Any] = {}
    for prefix, module in net.named_modules():
        places = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}
        for name, value in places.items():
            for number, leaf in enumerate(tree_leaves(value)):
                if leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)):
                    found[f"{prefix}.{name} {number}"] = leaf
    return found


def step_by_step(net: nn.Module, *, explicit: bool) -> Call:
    """The naive twin: one call a step."""

    def call(inputs: tuple[Tensor, ...], states: Any) -> tuple[Any, Any]:
        steps = []
        for x in zip(*inputs, strict=True):
            if explicit:
                y, states = net(*x, states)
            else:
                y = net(*x)
            steps.append(y)
        _, structure = tree_flatten(steps[0])
        columns = zip(*(tree_leaves(step) for step in steps), strict=True)
        return tree_unflatten([torch.stack(column) for column in columns], structure), states

    return call


def compiled(opt: OptimizedModule, *, explicit: bool) -> Call:
    def call(inputs: tuple[Tensor, ...], states: Any) -> tuple[Any, Any]:
        if not explicit:
            return opt(*inputs), None
        y, states = opt(*inputs, states)
        return y, states

    return call


def compile_for(mixed: Mixed, net: nn.Module, case: Case, rng: random.Random) -> list[OptimizedModule]:
    """One optimised module a call, all on the same network."""
    wrapped = with_states(net) if mixed.explicit else net
    opts = {steps: _compile(mixed, wrapped, steps, case, rng) for steps in dict.fromkeys(case.calls)}
    return [opts[steps] for steps in case.calls]


def _compile(mixed: Mixed, net: nn.Module, steps: int, case: Case, rng: random.Random) -> OptimizedModule:
    def optimize(**options: Any) -> OptimizedModule:
        opt = snncompile.optimize(net, steps, **options)
        if net.training == case.gradients:  # in eval mode a plan is for inference, whether or not gradients are on
            with torch.set_grad_enabled(case.gradients):
                opt.plan(*inputs)
        return opt

    inputs: tuple[Any, ...] = tuple(
        random_input(shape, steps).requires_grad_(case.input_gradients) for shape in mixed.shapes
    )
    if case.schedule == "chunk":
        return optimize(schedule=rng.randint(1, steps))
    if case.schedule == "nest":
        # In eval mode a plan is for inference and has chains, whose nodes are apart where gradients are recorded.
        backend = "eager" if case.gradients else "auto"
        planned = snncompile.optimize(net, steps, schedule="depth-first", backend=backend)
        planned.plan(*inputs)
        assert planned.latest_program is not None
        return optimize(schedule=random_schedule(planned.latest_program.graph, steps, rng))
    if case.schedule == "budget":
        with pytest.raises(InfeasibleBudgetError) as infeasible, torch.set_grad_enabled(case.gradients):
            snncompile.optimize(net, steps, memory_budget=1)(*inputs)
        return optimize(memory_budget=infeasible.value.minimum_bytes + rng.choice([0, 1000]))
    return optimize(schedule=case.schedule)


def differences(expected: Run, got: Run, *, rounds: bool) -> list[str]:
    """What is not the same: bit for bit in everything that goes forward, within rounding in gradients.

    Args:
        expected: The step loop's.
        got: The optimised network's.
        rounds: The report names a layer whose library kernel rounds a chunk differently; within rounding everywhere.
    """
    found = []
    for name in expected.forward.keys() | got.forward.keys():
        one, other = expected.forward.get(name), got.forward.get(name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            comparison = compare(name, one.detach(), other.detach())
            if not comparison.close or (comparison.mismatch_rate > 0.0 and not rounds):
                found.append(f"{name} differs by {comparison.max_error}")
        elif type(one) is not type(other) or one != other:
            found.append(f"{name} is {other!r}, expected {one!r}")
    assert expected.gradients.keys() == got.gradients.keys()
    for name, gradient in expected.gradients.items():
        other = got.gradients[name]
        # A chunk is recorded as a whole if one of its steps is: no gradient may come out as one of zeros.
        wanted = torch.zeros_like(other) if gradient is None and other is not None else gradient
        comparison = compare(name, wanted, other, terms=0.0)
        if not comparison.close:
            found.append(f"{name} differs by {comparison.max_error}")
    return sorted(found)


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Attributes:
        mixed: The network.
        refusal: Why it was refused.
        alive: Whether something that it returns is not the same number everywhere.
    """

    mixed: Mixed
    refusal: str | None = None
    alive: bool = False


def check(seed: int) -> Outcome:
    """Draw a network, a case and a schedule, run both sides, and compare.

    Raises:
        AssertionError: The optimised network departs from the step loop.
        CaptureError: It is refused for a reason that is not documented.
    """
    rng = random.Random(seed)
    reference = mixed_network(seed).net  # not a deep copy: some modules hold tensors with a history
    mixed = build_mixed_network(rng)
    case = draw_case(rng)
    single = step_by_step(reference, explicit=mixed.explicit)
    expected = observe(mixed, reference, [single] * len(case.calls), case)
    try:
        opts = compile_for(mixed, mixed.net, case, rng)
        got = observe(mixed, mixed.net, [compiled(opt, explicit=mixed.explicit) for opt in opts], case)
    except CaptureError as error:
        if not any(documented in str(error) for documented in DOCUMENTED):
            raise
        return Outcome(mixed, refusal=str(error))
    rounds = any("rounds differently" in decision.reason for opt in opts for decision in opt.report.decisions)
    found = differences(expected, got, rounds=rounds)
    sources = [f"{case}", *(opt.code for opt in opts)]
    assert not found, "\n".join([f"check({seed}) fails", *found, f"{mixed.net}", *sources])
    outputs = [value for name, value in expected.forward.items() if name.startswith("output")]
    return Outcome(mixed, alive=any(isinstance(y, Tensor) and bool((y != y.flatten()[0]).any()) for y in outputs))


@pytest.mark.parametrize(
    "block", [pytest.param(block, marks=[pytest.mark.slow] * (block >= OFTEN)) for block in range(SEEDS // BLOCK)]
)
def test_recorded_networks_agree_with_the_step_loop(block: int) -> None:
    outcomes = []
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        print(f"check({seed})")  # pytest shows it where something fails
        outcomes.append(check(seed))
    refused = [outcome for outcome in outcomes if outcome.refusal is not None]
    assert len(refused) <= BLOCK // 10, refused
    assert sum(outcome.alive for outcome in outcomes) >= BLOCK * 3 // 4


def test_the_recorded_networks_are_as_mixed_as_they_should_be() -> None:
    found: Counter[str] = Counter()
    for seed in range(SEEDS):
        ingredients = mixed_network(seed).ingredients
        if "branch on values" not in ingredients:  # may be refused
            found.update(ingredients.keys())
    assert {name: found[name] for name in INGREDIENTS if found[name] < LEAST} == {}


@given(st.integers(min_value=SEEDS, max_value=2**32))
def test_fresh_networks_agree_with_the_step_loop(seed: int) -> None:
    check(seed)


# Cases that failed once.


class ReturnsToo(nn.Module):
    """Returns what a part holds beside what the part returns."""

    def __init__(self, part: nn.Module, attribute: str) -> None:
        super().__init__()
        self.part, self.attribute = part, attribute

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.part(x)
        return y, 1.0 * getattr(self.part, self.attribute)


def with_a_hook(module: nn.Module) -> nn.Module:
    """The module with a hook that does nothing, for which it is kept as it is."""
    module.register_forward_hook(lambda *_: None)
    return module


class DetachedOutput(nn.Module):
    """Keeps an activation, which its backward needs, without the history."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        late = y if self.kept is None else y + self.kept
        self.kept = y.detach()
        return late


READ: dict[str, Callable[[], nn.Module]] = {
    "snncompile": neuron.LIFNode,
    "an attribute": lambda: AttributeLIF(0.9),
    "a clock beside it": lambda: ClockedLIF(0.9),
    "a tensor written in place": lambda: InPlaceLIF(0.9),
    "a buffer": lambda: BufferLIF(0.9),
    "a hook": lambda: with_a_hook(AttributeLIF(0.9)),
}


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
@pytest.mark.parametrize("name", READ)
def test_a_module_that_asks_whether_another_holds_a_tensor_yet_reads_its_state(name: str, schedule: str) -> None:
    source = READ[name]()
    parity_of(nn.Sequential(nn.Linear(6, 6), source, ReadsPotential(source)), schedule).check()


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
@pytest.mark.parametrize("name", [name for name in READ if name != "a hook"])
def test_a_network_may_return_what_a_neuron_holds(name: str, schedule: str) -> None:
    parity_of(ReturnsToo(READ[name](), "v"), schedule).check()


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
def test_a_network_may_return_the_membrane_of_snntorchs_neurons(schedule: str) -> None:
    snntorch = pytest.importorskip("snntorch")
    parity_of(ReturnsToo(snntorch.Leaky(0.9, init_hidden=True), "mem"), schedule).check()


class HeldBackByShape(ReadsPotential):
    """Looks at the shape of what it reads, for which it is kept as it is: its read is not seen in a trace."""

    def forward(self, x: Tensor) -> Tensor:
        v: Any = self.source[0].v
        return x - 0.1 * v if isinstance(v, Tensor) and v.shape == x.shape else x


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
@pytest.mark.parametrize("name", READ)
def test_a_module_that_is_called_as_it_is_may_read_the_modules_that_it_refers_to(name: str, schedule: str) -> None:
    source = READ[name]()
    parity_of(nn.Sequential(nn.Linear(6, 6), HeldBackByShape(source), source, nn.Linear(6, 6)), schedule).check()


def parity_of(net: nn.Module, schedule: str) -> Any:
    x = 2.0 * torch.rand(5, 4, 6)
    return snncompile.verify(net, snncompile.optimize(net, 5, schedule=schedule), x)


@pytest.mark.parametrize(
    "make", [lambda: InPlaceLIF(0.9), lambda: AttributeLIF(0.9), lambda: DequeDelay(2), DetachedOutput]
)
def test_planning_between_two_calls_leaves_the_history_of_carried_states_alone(make: Callable[[], nn.Module]) -> None:
    x = 2.0 * torch.rand(5, 4, 6)
    gradients = []
    for planned_before in (True, False):
        torch.manual_seed(0)
        net = make()
        first, second = snncompile.optimize(net, 2), snncompile.optimize(net, 3)
        if planned_before:
            second.plan(x[2:])
        inputs = x.clone().requires_grad_()
        (first(inputs[:2]).sum() + second(inputs[2:]).sum()).backward()
        gradients.append(inputs.grad)
    assert gradients[0] is not None
    assert torch.equal(gradients[0], gradients[1])
