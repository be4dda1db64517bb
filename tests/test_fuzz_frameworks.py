"""Random networks of several frameworks' neurons compute what the step loop computes, or are refused with a reason.

Seeds 0 to 499 are recorded: each is one network, one way to run it and one schedule. A seed that fails is named in
the output; `from tests.test_fuzz_frameworks import check; check(17)` runs it again.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, InfeasibleBudgetError, Schedule, with_states
from snncompile.report.parity import compare
from snncompile.runtime import OptimizedModule
from snncompile.torch_private import tree_flatten, tree_leaves, tree_unflatten

from .mixed_networks import Mixed, build_mixed_network, mixed_network
from .networks import random_input, random_schedule
from .test_fuzz_parity import poisoned_allocations  # noqa: F401  (used here as well, by being there)

SEEDS, BLOCK = 500, 50
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
    first = rng.randint(1, steps)
    calls = (steps,) if first == steps or rng.random() < 0.5 else (first, steps - first)
    gradients = rng.random() < 0.6
    return Case(
        calls,
        rng.choice([*SCHEDULES[:-1], *SCHEDULES]),
        gradients,
        gradients and rng.random() < 0.5,
        rng.randrange(1000),
    )


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
    return [_compile(mixed, wrapped, steps, case, rng) for steps in case.calls]


def _compile(mixed: Mixed, net: nn.Module, steps: int, case: Case, rng: random.Random) -> OptimizedModule:
    def optimize(**options: Any) -> OptimizedModule:
        opt = snncompile.optimize(net, steps, **options)
        with torch.set_grad_enabled(case.gradients):
            opt.plan(*inputs)
        return opt

    inputs: tuple[Any, ...] = tuple(
        random_input(shape, steps).requires_grad_(case.input_gradients) for shape in mixed.shapes
    )
    if case.schedule == "chunk":
        return optimize(schedule=rng.randint(1, steps))
    if case.schedule == "nest":
        return optimize(schedule=_nest(optimize(schedule="depth-first"), steps, rng))
    if case.schedule == "budget":
        # By a call, not a plan: in eval mode a plan is for inference, whether or not gradients are on.
        with pytest.raises(InfeasibleBudgetError) as infeasible, torch.set_grad_enabled(case.gradients):
            snncompile.optimize(net, steps, memory_budget=1)(*inputs)
        return optimize(memory_budget=infeasible.value.minimum_bytes + rng.choice([0, 1000]))
    return optimize(schedule=case.schedule)


def _nest(opt: OptimizedModule, steps: int, rng: random.Random) -> Schedule:
    assert opt.latest_program is not None
    return random_schedule(opt.latest_program.graph, steps, rng)


def differences(expected: Run, got: Run) -> list[str]:
    """What is not the same: bit for bit in everything that goes forward, within rounding in gradients."""
    found = []
    for name in expected.forward.keys() | got.forward.keys():
        one, other = expected.forward.get(name), got.forward.get(name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            comparison = compare(name, one.detach(), other.detach())
            if comparison.mismatch_rate > 0.0:
                found.append(f"{name} differs by {comparison.max_error}")
        elif type(one) is not type(other) or one != other:
            found.append(f"{name} is {other!r}, expected {one!r}")
    assert expected.gradients.keys() == got.gradients.keys()
    for name, gradient in expected.gradients.items():
        comparison = compare(name, gradient, got.gradients[name], is_sum=True)
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


def check_drawn(rng: random.Random, where: str) -> Outcome:
    """Draw a network, a case and a schedule, and compare.

    Raises:
        AssertionError: The optimised network departs from the step loop.
    """
    twin = build_mixed_network(copy.deepcopy(rng))  # not a deep copy: some modules hold tensors with a history
    mixed = build_mixed_network(rng)
    case = draw_case(rng)
    reference, candidate = twin.net, mixed.net
    try:
        opts = compile_for(mixed, candidate, case, rng)
    except CaptureError as error:
        if not any(documented in str(error) for documented in DOCUMENTED):
            raise
        return Outcome(mixed, refusal=str(error))
    single = step_by_step(reference, explicit=mixed.explicit)
    expected = observe(mixed, reference, [single] * len(case.calls), case)
    got = observe(mixed, candidate, [compiled(opt, explicit=mixed.explicit) for opt in opts], case)
    found = differences(expected, got)
    assert not found, "\n".join([where, *found, f"{mixed.net}", f"{case}", *(opt.code for opt in opts)])
    outputs = [value for name, value in expected.forward.items() if name.startswith("output")]
    return Outcome(mixed, alive=any(isinstance(y, Tensor) and bool((y != y.flatten()[0]).any()) for y in outputs))


def check(seed: int) -> Outcome:
    """Run a recorded seed."""
    return check_drawn(random.Random(seed), f"check({seed}) fails")


@pytest.mark.parametrize("block", range(SEEDS // BLOCK))
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


@given(st.randoms(use_true_random=False))
def test_fresh_networks_agree_with_the_step_loop(rng: random.Random) -> None:
    outcome = check_drawn(rng, "a fresh network fails")
    note(f"{outcome}")
