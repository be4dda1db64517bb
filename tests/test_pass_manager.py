"""The pass manager checks order, promises and invariants, and names the guilty pass; debugging changes no result."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import CaptureError, InfeasibleBudgetError, neuron
from snncompile.errors import PassError
from snncompile.ir import Decision, OpKind, Ref, StepGraph, Verdict, print_graph
from snncompile.options import Environment
from snncompile.passes.canonicalise import Canonicalise
from snncompile.passes.choose_schedule import ChooseSchedule
from snncompile.passes.infra import Numerics, Pass, PassContext, PassResult
from snncompile.passes.manager import PassManager, PipelineResult
from snncompile.pipeline import GIVEN_FACTS, default_passes

from .graphs import N, Stage, T, assert_step_loop, first_stage, vectors

ALL = [
    "canonicalise",
    "eliminate-dead",
    "mark-time-coupling",
    "find-recurrent-regions",
    "hoist-static",
    "choose-layout",
    "drive-by-events",
    "fuse-neuron-chains",
    "keep-spikes-as-bits",
    "write-into-outputs",
    "choose-schedule",
]
# Those that run where arithmetic must not be reordered.
DEFAULT = [name for name in ALL if name not in ("choose-layout", "drive-by-events")]


@dataclass(frozen=True)
class Rename(Pass):
    """Does what it is told; stands for a pass of a contributor's."""

    name: ClassVar[str] = "rename"
    requires: ClassVar[frozenset[str]] = frozenset({"shapes"})
    provides: ClassVar[frozenset[str]] = frozenset({"renamed"})
    rewrite: Callable[[StepGraph], StepGraph] = lambda graph: graph

    def run(self, graph: StepGraph, context: PassContext) -> PassResult:
        result = self.rewrite(graph)
        return PassResult(result, result is not graph, (self.decide("", Verdict.DONE, "it was told to do so"),))


@dataclass(frozen=True)
class Reorder(Rename):
    """A pass that changes the order of floating-point operations."""

    name: ClassVar[str] = "reorder"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATES


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.ReLU(inplace=True), neuron.LIFNode(v_threshold=0.3)).eval()


def run(*passes: Pass, stage: Stage | None = None, environment: Environment | None = None) -> PipelineResult:
    """Run some passes before those of the default pipeline."""
    stage = stage or first_stage(network(), schedule=3)
    manager = PassManager((*passes, *default_passes()), GIVEN_FACTS)
    return manager.run(stage.graph, stage.context, environment)


# Order


def test_the_default_pipeline_is_in_order() -> None:
    manager = PassManager(default_passes(), GIVEN_FACTS)
    assert [one.name for one in manager.passes] == ALL


@pytest.mark.parametrize("late", DEFAULT[:-1])
def test_a_pass_behind_one_that_needs_it_raises_when_the_pipeline_is_built(late: str) -> None:
    passes = sorted(default_passes(), key=lambda one: one.name == late)
    (provided,) = passes[-1].provides
    with pytest.raises(PassError, match=f"requires .*{provided}.*, which no pass before it provides"):
        PassManager(passes, GIVEN_FACTS)


def test_a_wrong_order_names_the_pass_its_place_and_what_is_missing() -> None:
    with pytest.raises(PassError, match=re.escape("pass 0 (choose-schedule) requires bits, chains, coupling, inv")):
        PassManager([ChooseSchedule()], GIVEN_FACTS)


def test_facts_that_nobody_gives_are_missed_when_the_pipeline_is_built() -> None:
    with pytest.raises(PassError, match=re.escape("pass 0 (canonicalise) requires shapes")):
        PassManager(default_passes())


def test_two_passes_of_one_name_are_refused() -> None:
    with pytest.raises(PassError, match="two passes share a name: canonicalise, canonicalise"):
        PassManager([Canonicalise(), Canonicalise()], GIVEN_FACTS)


def test_nothing_is_reordered() -> None:
    result = run(Rename(), Reorder(), stage=first_stage(network(), reassociate=True))
    assert [name for name, _ in result.seconds] == ["rename", "reorder", *ALL]


def test_a_graph_without_the_facts_it_was_said_to_have_is_refused() -> None:
    stage = first_stage(network())
    bare = StepGraph(stage.graph, stage.graph.carried)
    with pytest.raises(PassError, match="pass rename requires shapes, which the graph does not have"):
        run(Rename(), stage=replace(stage, graph=bare))


def test_a_pipeline_that_chooses_no_schedule_is_refused() -> None:
    stage = first_stage(network())
    with pytest.raises(PassError, match="no pass of the pipeline chose a schedule"):
        PassManager(default_passes()[:-1], GIVEN_FACTS).run(stage.graph, stage.context)


# Promises


def test_a_pass_that_reassociates_is_skipped_unless_allowed() -> None:
    def fail(graph: StepGraph) -> StepGraph:
        raise AssertionError("it ran")

    result = run(Reorder(rewrite=fail))
    assert result.decisions[0] == Decision(
        "reorder", "", Verdict.REFUSED, "it reorders arithmetic and reassociate=False"
    )
    assert [name for name, _ in result.seconds] == DEFAULT


def test_a_pass_that_reassociates_runs_where_allowed() -> None:
    result = run(Reorder(), stage=first_stage(network(), schedule=3, reassociate=True))
    assert result.decisions[0] == Decision("reorder", "", Verdict.DONE, "it was told to do so")
    assert "renamed" in result.graph.facts


def test_what_a_skipped_pass_would_provide_is_missed() -> None:
    @dataclass(frozen=True)
    class Needs(Rename):
        name: ClassVar[str] = "needs"
        requires: ClassVar[frozenset[str]] = frozenset({"renamed"})

    stage = first_stage(network())
    manager = PassManager([Reorder(), Needs()], GIVEN_FACTS)
    with pytest.raises(PassError, match="pass needs requires renamed, which the graph does not have"):
        manager.run(stage.graph, stage.context)


@pytest.mark.parametrize(
    ("rewrite", "rule"),
    [
        (lambda graph: StepGraph([*graph][:-1], graph.carried, graph.facts), "one output, at the end"),
        (lambda graph: StepGraph([*graph][1:], graph.carried, graph.facts), "references resolve"),
        (lambda graph: StepGraph(graph, (), graph.facts), "states are carried"),
        (
            lambda graph: StepGraph([*reversed([*graph][:-1]), graph.output], graph.carried, graph.facts),
            "program order",
        ),
    ],
    ids=["no output", "no input", "no state", "backwards"],
)
def test_a_pass_that_breaks_the_graph_is_named_with_the_rule(
    rewrite: Callable[[StepGraph], StepGraph], rule: str
) -> None:
    with pytest.raises(PassError, match=f"pass rename left a broken graph: .*'{rule}"):
        run(Rename(rewrite=rewrite))


def test_a_fact_that_a_pass_provides_is_checked_at_once() -> None:
    @dataclass(frozen=True)
    class Claims(Rename):
        name: ClassVar[str] = "claims"
        provides: ClassVar[frozenset[str]] = frozenset({"coupling"})

    with pytest.raises(PassError, match=r"pass claims left a broken graph: .*'couplings are marked'"):
        run(Claims())


def test_a_pass_that_fails_is_named_with_its_error() -> None:
    def fail(graph: StepGraph) -> StepGraph:
        raise ZeroDivisionError("by what?")

    with pytest.raises(PassError, match=r"pass rename failed: ZeroDivisionError: by what\?") as raised:
        run(Rename(rewrite=fail))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_what_a_pass_says_about_the_network_or_the_budget_is_handed_on() -> None:
    with pytest.raises(InfeasibleBudgetError, match="memory_budget 1 B"):
        run(stage=first_stage(network(), memory_budget=1))
    with pytest.raises(CaptureError, match="the static input that every later step sees"):
        run(stage=first_stage(nn.ReLU(inplace=True), static_input=True))


def test_a_pass_that_changes_its_input_graph_is_named() -> None:
    def spoil(graph: StepGraph) -> StepGraph:
        node = graph["linear_0"]
        graph.networkx.nodes["linear_0"]["node"] = replace(node, args=(Ref("x"), 1))
        return graph

    with pytest.raises(PassError, match="pass rename changed its input graph; it must return a new one"):
        run(Rename(rewrite=spoil))


def test_the_input_graph_of_the_pipeline_is_left_untouched() -> None:
    stage = first_stage(network(), schedule=3)
    before = print_graph(stage.graph)
    result = run(stage=stage)
    assert print_graph(stage.graph) == before
    assert print_graph(result.graph) != before
    assert result.graph.facts == GIVEN_FACTS.union(*(one.provides for one in default_passes() if one.name in DEFAULT))


class Assigns(nn.Module):
    """Keeps a trace of its input in a buffer that it assigns at every step."""

    trace: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("trace", torch.zeros(N, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.trace = 0.5 * self.trace + x
        return self.trace * 1.0


class Adds(Assigns):
    """Keeps the sum of its input, written as an augmented assignment."""

    def forward(self, x: Tensor) -> Tensor:
        self.trace += x
        return self.trace * 1.0


@pytest.mark.parametrize("kind", [Assigns, Adds])
def test_compiling_leaves_the_buffers_of_the_network_alone(kind: type[Assigns]) -> None:
    net = kind().eval()
    before = net.trace
    snncompile.optimize(net, T)
    assert net.trace is before
    assert_step_loop(net, schedule="breadth-first")


# What a pass is


@pytest.mark.parametrize("one", default_passes(), ids=ALL)
def test_a_pass_is_a_frozen_record_with_its_options_as_fields(one: Pass) -> None:
    assert type(one)() == one
    for option in fields(one):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(one, option.name, None)
    with pytest.raises(FrozenInstanceError):
        one.name = "another"  # type: ignore[misc]


@pytest.mark.parametrize("one", default_passes(), ids=ALL)
def test_a_pass_is_named_as_its_file_and_its_class(one: Pass) -> None:
    assert type(one).__module__ == f"snncompile.passes.{one.name.replace('-', '_')}"
    assert re.sub(r"(?<!^)([A-Z])", r"-\1", type(one).__name__).lower() == one.name
    assert type(one).__doc__
    assert (one.numerics is Numerics.BITWISE) is (one.name in DEFAULT)


# Results


def test_every_pass_is_timed() -> None:
    result = run()
    assert [name for name, _ in result.seconds] == DEFAULT
    assert all(seconds >= 0.0 for _, seconds in result.seconds)


def test_the_time_of_a_slow_pass_is_its_own() -> None:
    def sleep(graph: StepGraph) -> StepGraph:
        time.sleep(0.02)
        return graph

    assert 0.02 <= dict(run(Rename(rewrite=sleep)).seconds)["rename"] < 10.0


def test_the_report_has_the_time_of_every_pass_and_of_all() -> None:
    report = snncompile.optimize(network(), T, example_input=vectors()).report
    seconds = dict(report.pass_seconds)
    assert list(seconds) == [*DEFAULT, "measuring", "compiling", "total"]
    assert seconds["total"] >= sum(seconds[name] for name in DEFAULT)


def test_decisions_come_in_the_order_of_the_passes() -> None:
    result = run(Rename())
    assert [decision.pass_name for decision in result.decisions] == [
        "rename",
        "canonicalise",
        "canonicalise",
        "choose-layout",
        "drive-by-events",
        "write-into-outputs",
        "choose-schedule",
    ]


# Debugging


def compiled(static_input: bool = False) -> snncompile.OptimizedModule:
    torch.manual_seed(0)
    net = nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    x = vectors()[0] if static_input else vectors()
    return snncompile.optimize(net, T, schedule=3, static_input=static_input, example_input=x)


def test_a_dump_has_one_numbered_file_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNCOMPILE_DUMP", str(tmp_path / "deep" / "inside"))
    opt = compiled()
    files = sorted((tmp_path / "deep" / "inside").iterdir())
    assert [path.name for path in files] == [
        f"{number:02d}_{name}.txt" for number, name in enumerate(ALL) if name in DEFAULT
    ]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert all(text.startswith("graph [") for text in texts)
    assert "# canonicalise: identity_0_1: done: does nothing here and was removed\n" in texts[0]
    assert "region" not in texts[1]
    assert opt.latest_program is not None
    assert texts[-1].startswith(print_graph(opt.latest_program.graph))
    assert texts[-1].endswith(f"# choose-schedule: network: done: chunk 3: as asked for\n{opt.report.schedule}\n")


def test_a_dump_keeps_the_numbers_of_passes_that_are_skipped(tmp_path: Path) -> None:
    run(Reorder(), environment=Environment(dump_directory=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "01_canonicalise.txt"


def test_a_dump_and_the_highest_level_of_debugging_change_no_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, watched = run(), run(environment=Environment(5, tmp_path))
    assert print_graph(watched.graph) == print_graph(plain.graph)
    assert (watched.schedule, watched.decisions) == (plain.schedule, plain.decisions)
    assert capsys.readouterr().out == ""


LADDER: dict[int, list[str]] = {
    1: ["snncompile: T = 5, no budget", "predicted peak", "segment  chunk"],
    2: ["mark-time-coupling: 1: note: it draws random numbers at each step, in order"],
    3: ["--- before\n+++ canonicalise", "\n-  %identity_0_1", "+++ mark-time-coupling"],
    4: ["def run(", "schedule chunk 3, T = 5\n  loop 3:"],
    5: ["local deaths {", "buffers {"],
}


@pytest.mark.parametrize("level", range(6))
def test_each_level_of_debugging_prints_what_those_below_print_and_more(
    level: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SNNCOMPILE_DEBUG", str(level))
    compiled()
    printed = capsys.readouterr()
    assert printed.out == ""
    for step, texts in LADDER.items():
        for text in texts:
            assert (text in printed.err) == (step <= level), f"level {step}: {text!r}"


@pytest.mark.parametrize("static_input", [False, True])
@pytest.mark.parametrize("level", range(1, 6))
def test_debugging_changes_no_result(level: int, static_input: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> tuple[list[Tensor], str, list[str]]:
        opt = compiled(static_input)
        torch.manual_seed(1)
        y = opt(vectors()[0] if static_input else vectors())
        y.sum().backward()
        gradients = [parameter.grad for parameter in opt.parameters()]
        return [y, opt.get_submodule("0.3").v, *gradients], opt.code, [str(each) for each in opt.report.decisions]

    monkeypatch.delenv("SNNCOMPILE_DEBUG", raising=False)
    expected, code, decisions = outcome()
    monkeypatch.setenv("SNNCOMPILE_DEBUG", str(level))
    got, debugged_code, debugged_decisions = outcome()
    assert all(torch.equal(left, right) for left, right in zip(expected, got, strict=True))
    assert debugged_code == code
    assert debugged_decisions == decisions


def test_a_pass_that_changes_nothing_prints_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    stage = first_stage(nn.Sequential(nn.Linear(6, 6), neuron.IFNode()), schedule=3)
    run(stage=stage, environment=Environment(3))
    printed = capsys.readouterr().err
    assert "+++ mark-time-coupling" in printed
    assert "+++ canonicalise" not in printed
    assert "+++ hoist-static" not in printed


def test_a_graph_of_inputs_only_passes_through() -> None:
    result = run(stage=first_stage(nn.Identity(), schedule=3))
    assert [node.kind for node in result.graph] == [OpKind.INPUT, OpKind.OUTPUT]
