"""Random networks under random schedules compute what the step loop computes: outputs, states, buffers, gradients.

Every allocation that emitted programs fill piece by piece is poisoned with NaN here, so a piece that is never written
shows up as a mismatch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import snncompile
from snncompile import Loop, Schedule, Segment, neuron
from snncompile.codegen import kernels, readout
from snncompile.ir import OpKind, StepGraph
from snncompile.runtime import Program
from snncompile.schedule import output_names, uniform_schedule
from snncompile.torch_private import tree_leaves

from .graphs import Calls
from .networks import CurrentLIF, RandomNetwork, networks, random_input, random_schedule

READOUTS = ("sequence", "sum", "mean", "last")
CHUNK = 4
STEPS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 7, 11)


@pytest.fixture(scope="module", autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Fill what programs allocate with NaN (or the dtype's largest number) before they write into it."""

    def poisoned(allocate: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def allocate_and_fill(step: Tensor, length: int) -> Tensor:
            chunk = allocate(step, length)
            if chunk.is_floating_point():
                return chunk.fill_(float("nan"))
            return chunk.fill_(True if chunk.dtype is torch.bool else torch.iinfo(chunk.dtype).max)

        return allocate_and_fill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "chunk_like", poisoned(kernels.chunk_like))
        patch.setattr(readout, "contiguous_chunk", poisoned(readout.contiguous_chunk))
        yield


@dataclass(frozen=True)
class Case:
    """How a network is run."""

    steps: int
    readout: str = "sequence"
    static_input: bool = False
    gradients: bool = False
    input_gradients: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"readout": self.readout, "static_input": self.static_input}


@dataclass(frozen=True)
class Run:
    """What a run leaves behind, by name."""

    forward: dict[str, Any]  # outputs, final states, buffers
    gradients: dict[str, Tensor | None]


def observe(net: nn.Module, call: Callable[[Tensor], Any], x: Tensor, case: Case) -> Run:
    """Call, go backward from a fixed weighted sum of the outputs, and look at everything; random numbers repeat."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_(case.gradients and case.input_gradients)
    net.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(case.gradients):
        outputs = tree_leaves(call(x))
        recorded = [output for output in outputs if output.requires_grad]
        if recorded:
            torch.autograd.backward(recorded, [_weights(output) for output in recorded])
    forward: dict[str, Any] = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    forward |= dict(net.named_buffers()) | dict(states_of(net))
    forward["random numbers drawn"] = torch.get_rng_state()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    return Run(forward, gradients | {"gradient of the input": x.grad})


def _weights(output: Tensor) -> Tensor:
    return torch.rand(output.shape, generator=torch.Generator().manual_seed(2)).to(output)


def states_of(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every state that a module of these networks carries from step to step."""
    for name, module in net.named_modules():
        for state in getattr(module, "state_names", ()):
            yield f"state {name}.{state}", getattr(module, state)
        if hasattr(module, "previous"):
            yield f"state {name}.previous", module.previous


def step_loop(net: nn.Module, x: Tensor, case: Case) -> list[Tensor]:
    """The naive twin: one call a step, outputs stacked, or added up in the order in which they come."""
    steps: list[list[Tensor]] = []
    sums: list[Tensor] = []
    for step in range(case.steps):
        steps.append(tree_leaves(net(x if case.static_input else x[step])))
        if case.readout in ("sum", "mean"):
            sums = [total + value for total, value in zip(sums, steps[-1], strict=True)] if sums else steps[-1]
    if case.readout == "sequence":
        return [torch.stack(column) for column in zip(*steps, strict=True)]
    if case.readout == "last":
        return steps[-1]
    return [total / case.steps for total in sums] if case.readout == "mean" else sums


def assert_same(expected: Run, got: Run, *, exact_gradients: bool, where: str) -> None:
    """Bit for bit in everything that goes forward; gradients within 1e-5, or bit for bit too."""
    assert expected.forward.keys() == got.forward.keys()
    for name, value in expected.forward.items():
        assert _equal(value, got.forward[name]), f"{name} differs\n{where}"
    assert expected.gradients.keys() == got.gradients.keys()
    for name, value in expected.gradients.items():
        other = got.gradients[name]
        if value is None or other is None or exact_gradients:
            assert _equal(value, other), f"{name} differs\n{where}"
        else:
            # Sums over steps are added up in another order: the tolerance is relative to the tensor, not to each entry.
            scale = max(1.0, float(value.abs().max()))
            close = torch.isclose(other, value, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)
            assert close.all(), f"{name} differs by {float((other - value).abs().max())}\n{where}"


def _equal(expected: Any, got: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return type(expected) is type(got) and expected == got
    if expected.dtype != got.dtype or expected.shape != got.shape:
        return False
    return bool(((expected == got) | ((expected != expected) & (got != got))).all())


def graph_of(net: nn.Module, x: Tensor, case: Case) -> StepGraph:
    """The graph that the compiler schedules for this call."""
    opt = snncompile.optimize(net, case.steps, schedule="depth-first", **case.options)
    with torch.set_grad_enabled(case.gradients):
        opt.plan(x.clone().requires_grad_(case.gradients and case.input_gradients))
    assert opt.latest_program is not None
    return opt.latest_program.graph


def works_once(graph: StepGraph) -> bool:
    """Whether some operation is computed, or some output handed out, once for all steps."""
    if any(graph[name].invariant for name in output_names(graph)):
        return True
    return any(node.invariant and node.kind not in (OpKind.INPUT, OpKind.CONSTANT) for node in graph)


def assert_parity(net: nn.Module, shape: tuple[int, ...], case: Case, rng: random.Random, schedules: int = 3) -> None:
    """Compare the step loop with the named schedules and some random ones, each on a copy of its own."""
    x = random_input(shape, None if case.static_input else case.steps, rng.randrange(100))
    reference = copy.deepcopy(net)
    expected = observe(reference, lambda value: step_loop(reference, value, case), x, case)
    graph = graph_of(copy.deepcopy(net), x, case)
    tried = [
        uniform_schedule(graph, case.steps, chunk, f"chunk {chunk}")
        for chunk in {1, CHUNK, case.steps}
        if chunk <= case.steps
    ]
    tried += [random_schedule(graph, case.steps, rng) for _ in range(schedules)]
    for schedule in tried:
        candidate = copy.deepcopy(net)
        needs_grad = case.gradients and (case.input_gradients or any(True for _ in net.parameters()))
        program = Program(
            candidate, graph, schedule, case.readout, needs_grad=needs_grad, static_input=case.static_input
        )
        got = observe(candidate, program, x, case)
        where = f"{net}\n{case}\n{schedule}\n{program.source}"
        # A running sum and what is there once for all steps add gradients up in an order of their own.
        exact = schedule.label == "chunk 1" and case.readout in ("sequence", "last") and not works_once(graph)
        assert_same(expected, got, exact_gradients=exact, where=where)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    gradients = draw(st.booleans())
    return Case(
        draw(st.sampled_from(STEPS)),
        draw(st.sampled_from(READOUTS)),
        draw(st.booleans()),
        gradients,
        gradients and draw(st.booleans()),
    )


@given(networks(), cases(), st.randoms(use_true_random=False))
def test_random_networks_under_random_schedules_agree_with_the_step_loop(
    drawn: tuple[RandomNetwork, tuple[int, ...]], case: Case, rng: random.Random
) -> None:
    net, shape = drawn
    note(repr(net))
    assert_parity(net, shape, case, rng)


# Cases that failed once.


def run_schedule(net: nn.Module, case: Case, root: Loop | None = None, shape: tuple[int, ...] = (4, 6)) -> None:
    """Compare the step loop with one nest (or the usual schedules), through the public interface."""
    x = random_input(shape, None if case.static_input else case.steps)
    reference, candidate = copy.deepcopy(net), copy.deepcopy(net)
    expected = observe(reference, lambda value: step_loop(reference, value, case), x, case)
    schedule = "breadth-first" if root is None else Schedule(case.steps, root)
    opt = snncompile.optimize(candidate, case.steps, schedule=schedule, **case.options)
    got = observe(candidate, opt, x, case)
    assert_same(expected, got, exact_gradients=False, where=opt.code)


def test_a_neuron_called_twice_in_a_step_is_a_recurrent_region() -> None:
    net = Calls(lambda x, site: site(0.5 * site(x)), neuron.LIFNode())
    run_schedule(net, Case(5))
    run_schedule(net, Case(5, gradients=True, input_gradients=True))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_static_input_may_feed_a_neuron(gradients: bool) -> None:
    net = nn.Sequential(neuron.IFNode(), nn.Linear(6, 3), neuron.IFNode())
    run_schedule(net, Case(5, static_input=True, gradients=gradients))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_loop_inside_a_loop_of_single_steps_reads_whole_steps(gradients: bool) -> None:
    # With N = T a slice along the batch would have passed for one along time.
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    outer_first = Loop(1, (Segment(("linear_0", "relu_1")), Loop(1, (Segment(("linear_2",)),))))
    inner_first = Loop(1, (Loop(1, (Segment(("linear_0", "relu_1")),)), Segment(("linear_2",))))
    both = Loop(3, (Loop(1, (Loop(1, (Segment(("linear_0",)),)), Segment(("relu_1",)))), Segment(("linear_2",))))
    for root in (outer_first, inner_first, both):
        run_schedule(net, Case(4, gradients=gradients), root, shape=(4, 4))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_outputs_of_a_neuron_with_two_are_read_across_loops(gradients: bool) -> None:
    net = Calls(lambda x, site: site(x)[1] * 2.0, CurrentLIF(0.5))
    filled = Loop(4, (Loop(1, (Segment(("parts_0",)),)), Segment(("getitem", "mul"))))
    refilled = Loop(4, (Loop(3, (Segment(("parts_0",)),)), Loop(2, (Segment(("getitem", "mul")),))))
    sliced = Loop(4, (Segment(("parts_0",)), Loop(1, (Segment(("getitem", "mul")),))))
    for root in (filled, refilled, sliced):
        run_schedule(net, Case(6, gradients=gradients), root)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_value_is_read_beside_the_loop_that_makes_it_and_after_the_one_around_both(
    chunk: int, gradients: bool
) -> None:
    def forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        y = first(x)
        return second(y) + y

    net = Calls(forward, nn.Linear(6, 6), nn.Linear(6, 6))
    inner = Loop(3, (Loop(chunk, (Segment(("parts_0",)),)), Segment(("parts_1",))))
    run_schedule(net, Case(7, gradients=gradients), Loop(7, (inner, Segment(("add",)))))
    inner = Loop(3, (Loop(chunk, (Segment(("parts_0",)),)), Loop(1, (Segment(("parts_1",)),))))
    run_schedule(net, Case(7, gradients=gradients), Loop(7, (inner, Segment(("add",)))))


def test_augmented_assignment_writes_into_the_tensor_under_all_its_names() -> None:
    def forward(x: Tensor, layer: nn.Module) -> Tensor:
        y = also_y = layer(x)
        y += x
        return also_y * 2.0 + y

    run_schedule(Calls(forward, nn.Linear(6, 6)), Case(3))


@pytest.mark.parametrize(
    "function", [torch.sigmoid, nn.functional.silu, nn.functional.softplus, nn.functional.elu, lambda x: x.abs() ** 1.5]
)
def test_elementwise_functions_round_as_they_do_in_single_steps(function: Callable[[Tensor], Tensor]) -> None:
    # 4 * 7 elements leave a rest beside the vectors, which torch computes by another formula.
    run_schedule(Calls(function), Case(33), shape=(4, 7))


def test_a_value_keeps_the_strides_of_its_steps_from_loop_to_loop() -> None:
    # A linear layer rounds a slice of features otherwise than a contiguous copy of it.
    net = Calls(lambda x, layer: layer(x[:, :30]), nn.Linear(30, 5))
    for root in (
        Loop(1, (Loop(1, (Segment(("getitem",)),)), Segment(("parts_0",)))),
        Loop(4, (Loop(1, (Segment(("getitem",)),)), Segment(("parts_0",)))),
        Loop(4, (Loop(3, (Segment(("getitem",)),)), Loop(2, (Segment(("parts_0",)),)))),
    ):
        run_schedule(net, Case(5), root, shape=(4, 60))
        run_schedule(net, Case(5, gradients=True), root, shape=(4, 60))


def test_a_static_input_may_be_an_output_beside_what_is_computed_from_it() -> None:
    # Its gradients as an output are added up over the steps before those of the neuron: last bits may differ.
    net = Calls(
        lambda x, first, second, layer: (layer(second(2.0 * first(x) - 0.25)), x),
        neuron.NonSpikingIFNode(),
        neuron.IFNode(v_threshold=0.25, v_reset=None, detach_reset=True),
        nn.Linear(4, 7),
    )
    case = Case(5, static_input=True, gradients=True, input_gradients=True)
    for seed in range(3):
        assert_parity(net, (3, 4), case, random.Random(seed))


def test_gradients_are_added_up_in_the_order_of_the_step_loop() -> None:
    # A neuron whose state is its output, called twice: three gradients meet in one value.
    site = neuron.NonSpikingLIFNode(2.0, True, v_reset=0.1)
    net = Calls(lambda x, site: site(2.0 * site(x) - 0.25), site)
    case = Case(3, gradients=True, input_gradients=True)
    x = random_input((4, 4), case.steps)
    reference, candidate = copy.deepcopy(net), copy.deepcopy(net)
    expected = observe(reference, lambda value: step_loop(reference, value, case), x, case)
    opt = snncompile.optimize(candidate, case.steps, schedule="depth-first", backend="eager")
    assert_same(expected, observe(candidate, opt, x, case), exact_gradients=True, where=opt.code)
