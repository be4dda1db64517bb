"""Choose schedule: the nest asked for, or the fastest within the budget; what cannot be had is said with its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import InfeasibleBudgetError, Loop, Schedule, Segment, neuron
from snncompile.ir import Node, StepGraph
from snncompile.passes.choose_schedule import ChooseSchedule
from snncompile.passes.infra import PassResult
from snncompile.pipeline import default_passes
from snncompile.schedule import Candidate, Footprint, chunk_lengths, search_front, simulate_peak, uniform_schedule

from .graphs import Calls, Stage, T, assert_step_loop, first_stage, text_of, vectors

NODES = ("linear_0", "ifnode_1", "linear_2", "lifnode_3")
STEP_BYTES = 4 * 6 * 4  # of one value of the network


@dataclass(frozen=True)
class Costs:
    """Made-up measurements: every call has an overhead and holds its output; backward holds every chunk at once."""

    overhead: float = 1.0
    rounding: frozenset[str] = frozenset()

    def footprint(self, graph: StepGraph, node: Node, steps: int, *, chunked: bool) -> Footprint:
        return Footprint(node.value.nbytes * steps, node.value.nbytes * steps)

    def seconds(self, graph: StepGraph, node: Node, steps: int) -> float:
        return self.overhead + 0.1 * steps

    def trial_seconds(self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]) -> None:
        return None

    def within(self, budget: int) -> Costs:
        return self

    def put_seconds(self, size: int) -> float:
        return 0.0

    def rounds_differently(self, graph: StepGraph, node: Node, steps: int) -> bool:
        return node.name in self.rounding

    def training_peak_bytes(self, graph: StepGraph, schedule: Schedule) -> int:
        return 10_000 + 1_000 * schedule.root.chunk


def network() -> nn.Module:
    """Two neuron layers; every value of a step takes `STEP_BYTES`."""
    return nn.Sequential(nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 6), neuron.LIFNode())


def ready(net: nn.Module | None = None, costs: Costs | None = None, **options: Any) -> Stage:
    """Everything before the pass has run; costs are made up."""
    stage = first_stage(net or network(), **options).after(*default_passes()[:-1])
    return replace(stage, context=replace(stage.context, measurements=costs or Costs()))


def chosen(stage: Stage, **options: Any) -> Schedule:
    schedule = stage.run(ChooseSchedule(**options)).schedule
    assert schedule is not None
    return schedule


def peak_of(stage: Stage, schedule: Schedule) -> int:
    return simulate_peak(stage.graph, schedule, stage.context.measurements, stage.context.options.readout).peak_bytes


def infeasible(stage: Stage) -> InfeasibleBudgetError:
    with pytest.raises(InfeasibleBudgetError) as raised:
        stage.run(ChooseSchedule())
    return raised.value


# What is asked for


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
def test_a_schedule_and_its_reason_are_attached(golden: Callable[[str], None], schedule: str | int) -> None:
    golden(text_of(ready(schedule=schedule).run(ChooseSchedule())))


def test_a_budget_makes_a_nest_of_auto(golden: Callable[[str], None]) -> None:
    net = nn.Sequential(nn.Linear(6, 60), neuron.IFNode(), nn.Linear(60, 6), neuron.LIFNode(), nn.Linear(6, 6))
    golden(text_of(ready(net, memory_budget=7500).run(ChooseSchedule())))


@pytest.mark.parametrize(
    ("asked", "chunk", "label"),
    [
        ("depth-first", 1, "depth-first"),
        ("breadth-first", T, "breadth-first"),
        (1, 1, "chunk 1"),
        (2, 2, "chunk 2"),
        (T, T, f"chunk {T}"),
        (100, T, f"chunk {T}"),
    ],
)
def test_a_chunk_length_by_name_or_number_is_that_of_every_node(asked: str | int, chunk: int, label: str) -> None:
    result = ready(schedule=asked).run(ChooseSchedule())
    assert result.schedule == Schedule(T, Loop(chunk, (Segment(NODES),)), label)
    assert [str(decision) for decision in result.decisions] == [
        f"choose-schedule: network: done: {label}: as asked for"
    ]


def test_a_nest_of_the_users_own_is_taken_as_it_is() -> None:
    nest = Schedule(T, Loop(4, (Loop(2, (Segment(NODES[:2]),)), Segment(NODES[2:]))), "mine")
    result = ready(schedule=nest).run(ChooseSchedule())
    assert result.schedule is nest
    assert result.decisions[0].reason == "mine: as asked for"


@pytest.mark.parametrize(
    ("root", "says"),
    [
        (Loop(T, (Segment(NODES[:3]),)), "leaves out lifnode_3"),
        (Loop(T, (Segment((*NODES, "relu_9")),)), "names relu_9, which the graph does not have to run"),
        (Loop(T, (Segment(NODES), Segment(NODES[3:]))), "runs some node twice"),
        (Loop(T, (Segment((*NODES[1:], NODES[0])),)), "runs ifnode_1 before linear_0, which it waits for"),
        (Loop(T + 1, (Segment(NODES),)), "a loop of chunk 6 stands in 5 steps"),
        (Loop(2, (Loop(3, (Segment(NODES),)),)), "a loop of chunk 3 stands in 2 steps"),
    ],
    ids=["missing", "unknown", "twice", "order", "too long", "too long inside"],
)
def test_a_nest_that_the_graph_does_not_allow_is_refused(root: Loop, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ready(schedule=Schedule(T, root)).run(ChooseSchedule())


def test_a_nest_for_another_number_of_steps_is_refused() -> None:
    stage = ready(schedule=Schedule(T + 1, Loop(1, (Segment(NODES),))))
    with pytest.raises(ValueError, match="the schedule is for T = 6, expected T = 5"):
        stage.run(ChooseSchedule())


def test_a_nest_that_does_not_fit_the_network_is_a_wrong_argument_of_optimize() -> None:
    wrong = Schedule(T, Loop(T, (Segment(NODES[:3]),)))
    with pytest.raises(ValueError, match="the schedule leaves out lifnode_3"):
        snncompile.optimize(network(), T, schedule=wrong, example_input=vectors())


def test_a_nest_for_another_number_of_steps_is_a_wrong_argument_before_any_work() -> None:
    with pytest.raises(ValueError, match="T = 6"):
        snncompile.optimize(network(), T, schedule=Schedule(T + 1, Loop(1, (Segment(NODES),))))


def test_a_recurrent_region_has_a_loop_of_its_own_whatever_is_asked_for() -> None:
    net = Calls(lambda x, site, layer: layer(site(layer(site(x)))), neuron.IFNode(0.4), nn.Linear(6, 6))
    region = ("parts_0", "parts_1", "parts_0_1")
    inner = Loop(1, (Segment(region),))
    assert chosen(ready(net, schedule=3)).root == Loop(3, (inner, Segment(("parts_1_1",))))
    assert chosen(ready(net, schedule="depth-first")).root == Loop(1, (Segment((*region, "parts_1_1")),))
    for _, segment in chosen(ready(net)).segments():
        assert set(region) <= set(segment.nodes) or not set(region) & set(segment.nodes)
    whole = Schedule(T, Loop(T, (Segment((*region, "parts_1_1")),)))
    with pytest.raises(ValueError, match="the recurrent region parts_0, parts_1, parts_0_1 must stand in one segment"):
        ready(net, schedule=whole).run(ChooseSchedule())


def test_what_is_computed_once_is_in_no_segment() -> None:
    stage = ready(schedule="breadth-first", static_input=True)
    assert chosen(stage).root == Loop(T, (Segment(NODES[1:]),))
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    assert list(chosen(ready(net, static_input=True)).segments()) == []


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 2, "auto"])
def test_the_graph_is_handed_on_unchanged(schedule: str | int) -> None:
    stage = ready(schedule=schedule)
    result = ChooseSchedule().run(stage.graph, stage.context)
    assert result.graph is stage.graph
    assert not result.changed
    again = ChooseSchedule().run(result.graph, stage.context)
    assert (again.schedule, again.decisions) == (result.schedule, result.decisions)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        "depth-first",
        "breadth-first",
        3,
        "auto",
        Schedule(T, Loop(4, (Loop(2, (Segment(NODES[:2]),)), Segment(NODES[2:3]), Loop(3, (Segment(NODES[3:]),))))),
    ],
    ids=["depth-first", "breadth-first", "chunk", "auto", "nest"],
)
def test_every_schedule_computes_what_the_step_loop_computes(schedule: Any, training: bool) -> None:
    assert_step_loop(network().train(training), schedule=schedule)


# The search


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.2, 0.5, 100.0])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_auto_is_the_leanest_of_those_within_tolerance_of_the_fastest_that_fits(
    tolerance: float, share: float | None
) -> None:
    front = search_front(ready().graph, T, Costs(), "sequence")
    least, most = front[-1].peak.peak_bytes, front[0].peak.peak_bytes
    budget = None if share is None else round(least + share * (most - least))
    fitting = [candidate for candidate in front if budget is None or candidate.peak.peak_bytes <= budget]
    close = [candidate for candidate in fitting if candidate.seconds <= fitting[0].seconds * (1 + tolerance)]
    assert chosen(ready(memory_budget=budget), tolerance=tolerance) == close[-1].schedule


def test_tolerance_trades_time_for_bytes() -> None:
    stage = ready()
    peaks = [peak_of(stage, chosen(stage, tolerance=tolerance)) for tolerance in (0.0, 0.2, 100.0)]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[2] == search_front(stage.graph, T, Costs(), "sequence")[-1].peak.peak_bytes


def test_auto_says_what_it_chose_from_and_what_it_expects() -> None:
    stage = ready(memory_budget="1KiB")
    result = stage.run(ChooseSchedule())
    assert result.schedule is not None
    front = search_front(stage.graph, T, Costs(), "sequence")
    (seconds,) = (candidate.seconds for candidate in front if candidate.schedule == result.schedule)
    assert result.decisions[0].reason == (
        f"auto: the fastest within 1024 B of {len(front)} on the time-memory front, "
        f"estimated {seconds * 1e3:.1f} ms at {peak_of(stage, result.schedule)} B"
    )


def test_a_network_that_computes_nothing_gets_an_empty_nest() -> None:
    assert list(chosen(ready(nn.Identity())).segments()) == []
    assert_step_loop(nn.Identity(), schedule="auto")


# Budgets in inference


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3])
def test_a_budget_below_what_is_asked_for_names_the_segment_that_needs_it(schedule: str | int) -> None:
    error = infeasible(ready(schedule=schedule, memory_budget=100))
    chunk = {"depth-first": 1, "breadth-first": T}.get(str(schedule), schedule)
    assert error.where is not None
    node, place = error.where.split(", ", 1)
    assert node in NODES
    assert place == f"segment 0, chunk {chunk}"
    assert f"memory_budget 100 B (100 bytes) is below what schedule={schedule!r} needs" in error.message
    assert f"({error.minimum_bytes} bytes); raise memory_budget or lower N" in error.message
    assert error.minimum_bytes == peak_of(ready(), uniform_schedule(ready().graph, T, int(chunk), ""))


def test_a_budget_below_everything_names_the_segment_of_the_leanest_schedule() -> None:
    error = infeasible(ready(memory_budget=100))
    assert "is below the smallest feasible peak" in error.message
    assert error.where is not None
    assert error.where.split(", ")[0] in NODES
    assert error.where.endswith("segment 0, chunk 1")
    assert error.minimum_bytes == search_front(ready().graph, T, Costs(), "sequence")[-1].peak.peak_bytes


def test_a_segment_inside_a_nest_is_found() -> None:
    nest = Schedule(T, Loop(1, (Segment(NODES[:1]), Segment(NODES[1:2]), Loop(1, (Segment(NODES[2:]),)))))
    error = infeasible(ready(schedule=nest, memory_budget=100))
    assert error.where is not None
    node = error.where.split(", ")[0]
    number = next(number for number, (_, segment) in enumerate(nest.segments()) if node in segment.nodes)
    assert error.where == f"{node}, segment {number}, chunk 1"


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
def test_the_least_budget_is_enough_and_one_byte_less_is_not(schedule: str | int) -> None:
    least = infeasible(ready(schedule=schedule, memory_budget=1)).minimum_bytes
    stage = ready(schedule=schedule, memory_budget=least)
    assert peak_of(stage, chosen(stage)) == least
    assert infeasible(ready(schedule=schedule, memory_budget=least - 1)).minimum_bytes == least


@dataclass(frozen=True)
class Budgeted(Costs):
    """As `Costs`, but the search finds one nest only, so much leaner than the step loop, depending on the budget."""

    saved: tuple[tuple[int, int], ...] = ()  # (up to which bytes saved a budget is, what is saved), tightest last
    budget: int = 0

    def within(self, budget: int) -> Budgeted:
        return replace(self, budget=budget)

    def search(self, graph: StepGraph, steps: int, measurements: Budgeted, readout: Any) -> list[Candidate]:
        schedule = uniform_schedule(graph, steps, 1, "auto")
        peak = simulate_peak(graph, schedule, Costs(), readout)
        tightness = peak.peak_bytes - measurements.budget
        saved = next(saved for limit, saved in self.saved if tightness <= limit)
        return [Candidate(schedule, 1.0, replace(peak, peak_bytes=peak.peak_bytes - saved))]


@pytest.mark.parametrize(
    ("saved", "best"),
    [
        (((9, 0), (10_000, 10)), 10),  # only the tightest budgets find it
        (((9, 10), (10_000, 0)), 10),  # only wide ones do, a budget of just its size among them
        (((9, 0), (10, 10), (10_000, 5)), 5),  # nothing leads to the leanest
        (((6, 0), (9, 3), (12, 7), (10_000, 0)), 0),  # what is found is not found again
        (((0, 5), (5, 9), (9, 9), (10_000, 0)), 9),  # from budget to tighter budget
    ],
)
def test_the_least_budget_is_enough_whatever_the_search_finds_under_another(
    monkeypatch: pytest.MonkeyPatch, saved: tuple[tuple[int, int], ...], best: int
) -> None:
    costs = Budgeted(saved=saved)
    monkeypatch.setattr("snncompile.passes.schedule_candidates.search_front", costs.search)
    ample = ready(costs=costs)
    step_loop = peak_of(ample, uniform_schedule(ample.graph, T, 1, ""))

    def within(budget: int) -> Stage:
        options = replace(ample.context.options, memory_budget=budget)
        return replace(ample, context=replace(ample.context, options=options, measurements=costs.within(budget)))

    for budget in range(step_loop - 20, step_loop):
        try:
            within(budget).run(ChooseSchedule())
            enough = budget
        except InfeasibleBudgetError as error:
            enough = error.minimum_bytes
        assert enough >= budget
        assert within(enough).run(ChooseSchedule()).front[-1].peak.peak_bytes <= enough
    assert infeasible(within(1)).minimum_bytes == step_loop - best


def test_auto_needs_no_more_than_depth_first() -> None:
    least = {name: infeasible(ready(schedule=name, memory_budget=1)).minimum_bytes for name in ("auto", "depth-first")}
    assert least["auto"] <= least["depth-first"]


def test_an_accumulated_readout_needs_less_than_a_sequence() -> None:
    least = {name: infeasible(ready(readout=name, memory_budget=1)).minimum_bytes for name in ("sum", "sequence")}
    assert least["sequence"] - least["sum"] == (T - 1) * STEP_BYTES


# Budgets with gradients


@pytest.mark.parametrize(("budget", "chunk"), [(None, 5), (15_000, 5), (14_999, 4), (12_500, 2), (11_000, 1)])
def test_with_gradients_the_fastest_uniform_chunk_that_fits_is_chosen(budget: int | None, chunk: int) -> None:
    assert chunk in chunk_lengths(T)
    schedule = chosen(ready(needs_grad=True, memory_budget=budget))
    assert schedule == Schedule(T, Loop(chunk, (Segment(NODES),)), "auto")


@pytest.mark.parametrize(("schedule", "needs"), [("auto", 11_000), ("depth-first", 11_000), (3, 13_000)])
def test_with_gradients_an_impossible_budget_says_that_backward_keeps_every_step(
    schedule: str | int, needs: int
) -> None:
    error = infeasible(ready(needs_grad=True, schedule=schedule, memory_budget=100))
    assert error.minimum_bytes == needs
    assert error.where == "backward"
    assert "torch.no_grad()" in error.message
    assert chosen(ready(needs_grad=True, schedule=schedule, memory_budget=needs))


def test_an_operation_without_a_derivative_can_be_planned_with_gradients() -> None:
    net = Calls(lambda x, layer: layer(x) // 0.5, nn.Linear(6, 6))
    expected = torch.stack([net(x) for x in vectors()])
    for schedule in ("breadth-first", "auto"):
        assert torch.equal(snncompile.optimize(net, T, schedule=schedule)(vectors()), expected)


# Rounding


def test_layers_that_round_differently_over_their_chunk_are_noted() -> None:
    def notes(result: PassResult) -> list[str]:
        return [f"{decision.node}: {decision.reason}" for decision in result.decisions[1:]]

    costs = Costs(rounding=frozenset({"linear_2"}))
    assert notes(ready(costs=costs, schedule=3).run(ChooseSchedule())) == [
        "2: its library kernel rounds differently over 3 steps than over one"
    ]
    assert notes(ready(costs=costs, schedule="depth-first").run(ChooseSchedule())) == []
    assert notes(ready(schedule=3).run(ChooseSchedule())) == []


@pytest.mark.parametrize("batch", [1, 4, 5, 7])
def test_where_bits_differ_from_the_step_loop_the_report_says_so(batch: int) -> None:
    net = Calls(lambda x, layer: layer(x * 2.0), nn.Linear(6, 6)).eval()
    x_seq: Tensor = torch.randn(T, batch, 6)
    with torch.no_grad():
        opt = snncompile.optimize(net, T, schedule="breadth-first", example_input=x_seq)
        parity = snncompile.verify(net, opt, x_seq)
    noted = any("rounds differently" in decision.reason for decision in opt.report.decisions)
    assert parity.ok
    assert parity.exact or noted


# What is run to tell


@dataclass(frozen=True)
class Trials(Costs):
    """As `Costs`, but what schedules take when they are run is said by their outermost chunk; others take too long."""

    taken: tuple[tuple[int, float], ...] = ()

    def trial_seconds(  # type: ignore[override]
        self, graph: StepGraph, estimates: Sequence[tuple[Schedule, float]]
    ) -> list[float | None]:
        return [dict(self.taken).get(schedule.root.chunk) for schedule, _ in estimates]


@pytest.mark.parametrize(
    ("taken", "chunk", "seconds"),
    [
        ({5: 9.0, 4: 6.0}, 4, 6.0),
        ({5: 6.0, 4: 9.0}, 5, 6.0),
        ({5: 6.0, 4: 6.06}, 4, 6.06),  # within tolerance, and leaner
        ({5: 9.0}, 5, 9.0),
        ({4: 1.0}, 5, None),  # nothing to compare with
    ],
)
def test_plain_loops_that_may_be_as_fast_are_run_beside_the_fastest(
    taken: dict[int, float], chunk: int, seconds: float | None
) -> None:
    stage = ready(costs=Trials(taken=tuple(taken.items())))
    result = stage.run(ChooseSchedule())
    assert result.schedule is not None
    assert result.schedule.root.chunk == chunk
    own = [each.seconds for each in result.front if each.schedule == result.schedule]
    estimated = [each.seconds for each in search_front(stage.graph, T, Costs(), "sequence")]
    assert own == [min(estimated) if seconds is None else seconds]
    assert ("run beside" in result.decisions[0].reason) is (seconds is not None)
    times = [each.seconds for each in result.front]
    assert times == sorted(times)


def test_only_what_fits_and_takes_long_enough_is_run() -> None:
    taken = Trials(taken=((1, 1.0), (2, 1.0), (4, 1.0), (5, 9.0)))
    stage = ready(costs=taken)
    tight = ready(costs=taken, memory_budget=peak_of(stage, uniform_schedule(stage.graph, T, 2, "")))
    for each in (chosen(tight), chosen(tight, uncertainty=100.0)):
        assert peak_of(tight, each) <= tight.context.options.memory_budget
    assert chosen(stage, worth_a_trial=1e9).root.chunk == T
    assert chosen(stage, most_tried=0).root.chunk == T
    assert chosen(stage, uncertainty=0.0).root.chunk == T


def test_whether_it_takes_long_enough_does_not_depend_on_how_long_a_sequence_is() -> None:
    stage = ready(costs=Trials(taken=((64, 9.0), (32, 1.0))))
    roots = []
    for steps in (64, 1024):
        options = replace(stage.context.options, steps=steps)
        longer = replace(stage, context=replace(stage.context, options=options))
        estimated = chosen(longer, worth_a_trial=1e9)
        assert estimated.root.chunk == 64
        seconds = search_front(stage.graph, 64, Costs(), "sequence")[0].seconds
        assert chosen(longer, worth_a_trial=seconds * 1.01) == estimated
        roots.append(chosen(longer, worth_a_trial=seconds * 0.99).root)
    assert [root.chunk for root in roots] == [32, 32]
