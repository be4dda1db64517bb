"""The benchmarks at toy size: what may have a number, what has a reason instead, and what comes out."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the package, which lies beside the tests and is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def workload(part: Any) -> Any:
    return part("workloads").LinearStacks(steps=6, batch=4, layers=2, width=8)


@pytest.fixture
def systems(part: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The step loop; one that is right, one that forgets a step, one that raises."""
    module, plain = part("systems"), part("systems.plain")
    system = module.System

    def forgetful(case: Any) -> Any:
        right = plain.prepare_loop(case)
        return replace(right, forward=lambda: torch.cat([right.forward()[1:], torch.zeros(1, 4, 8)]))

    def broken(case: Any) -> Any:
        raise ImportError("no module named 'peer' | really")

    toys = {
        "snncompile": system("snncompile", "snncompile", plain.prepare_loop, is_ours=True),
        "plain-steps": system("plain-steps", "plain PyTorch", plain.prepare_loop),
        "forgetful": system("forgetful", "forgetful peer", forgetful),
        "broken": system("broken", "broken peer", broken),
        "missing": system("missing", "missing peer", plain.prepare_loop, imports=("no_such_framework",)),
    }
    for name in ("systems", "worker", "runner", "cli"):
        monkeypatch.setattr(part(name), "SYSTEMS", toys)
    return toys


@pytest.fixture
def in_one_process(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are objects of this process."""
    worker, process = part("worker"), part("process")

    class Inline:
        def __init__(self, request: Any) -> None:
            self.worker = worker.Worker(request)

        def order(self, name: str, *arguments: Any, limit: float) -> Any:
            try:
                return getattr(self.worker, name)(*arguments)
            except Exception as error:
                raise process.WorkerError(f"{type(error).__name__}: {error}") from error

        def stop(self) -> None:
            del self.worker

    monkeypatch.setattr(part("runner"), "WorkerProcess", Inline)


@pytest.fixture
def toy_run(part: Any, workload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """`python -m benchmarks`, with two toy workloads of one curve."""
    cli = part("cli")
    monkeypatch.setattr(cli, "workloads", lambda device, quick: [workload, replace(workload, steps=3)])
    before = cli.signal.getsignal(cli.signal.SIGTERM)
    yield lambda *argv: cli.main(["--quick", "--threads", "2", "--output", str(tmp_path), *argv])
    cli.signal.signal(cli.signal.SIGTERM, before)


def measure(part: Any, workload: Any, systems: list[Any], tmp_path: Path) -> Any:
    settings = part("runner").Settings(threads=2, rounds=2, round_seconds=0.01, setup_limit=60.0, call_limit=60.0)
    return part("runner").measure_case(workload, systems, settings, tmp_path / "log.txt", lambda text: None)


def test_a_case_in_processes_of_its_own(part: Any, workload: Any, tmp_path: Path) -> None:
    systems = part("systems").SYSTEMS
    case = measure(part, workload, [systems["snncompile"], systems["plain-steps"]], tmp_path)
    assert case.error == ""
    ours, loop = case.rows
    for row in (ours, loop):
        assert row.status == "ok", row.error
        assert len(row.seconds) >= 2
        assert row.departure["is_exact"]
        assert row.peak_bytes > 0
        assert row.setup_seconds >= 0.0
    assert ours.details["predicted_peak_bytes"] >= ours.peak_bytes
    assert 0.0 < case.firing_rate < 1.0
    assert case.neurons == 16

    process, worker = part("process"), part("worker")
    slow = process.WorkerProcess(worker.Request(workload, None, tmp_path / "case.pt", "cpu", 2, tmp_path / "log.txt"))
    try:
        with pytest.raises(process.WorkerError, match="make_case took longer than"):
            slow.order("make_case", limit=0.0)
    finally:
        slow.stop()


@pytest.mark.usefixtures("in_one_process")
def test_a_row_has_numbers_or_a_reason(part: Any, workload: Any, systems: dict[str, Any], tmp_path: Path) -> None:
    case = measure(part, workload, list(systems.values()), tmp_path)
    rows = {row.system: row for row in case.rows}
    assert list(rows) == list(systems)
    assert rows["plain-steps"].status == "ok"

    red = rows["forgetful"]
    assert red.status == "parity"
    assert red.departure["output_mismatch"] > 0.0
    for row in (red, rows["broken"], rows["missing"]):
        numbers = (row.setup_seconds, row.peak_bytes, row.reserved_bytes, row.resident_bytes, row.launches)
        assert row.seconds == ()
        assert numbers == (None,) * 5
        assert row.details == {}
    assert rows["broken"].error == "ImportError: no module named 'peer' | really"
    assert "no_such_framework" in rows["missing"].error

    lines = part("table").rows_table(case).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    (shown,) = (line for line in lines if "forgetful" in line)
    assert "departs from the step loop" in shown
    assert " ms" not in shown
    assert "MiB" not in shown


@pytest.mark.usefixtures("in_one_process", "systems")
def test_a_run_leaves_results_tables_and_plots(
    part: Any, toy_run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert toy_run("--peers", "plain-steps", "broken") == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert [case["name"] for case in data["cases"]] == ["linear-lif L=2 n=8 N=4 T=6", "linear-lif L=2 n=8 N=4 T=3"]
    assert data["machine"]["threads"] == 2
    assert data["versions"]["torch"] == torch.__version__
    assert {row["system"]: row["status"] for row in data["cases"][0]["rows"]} == {
        "snncompile": "ok",
        "plain-steps": "ok",
        "broken": "error",
    }
    text = (tmp_path / "results.md").read_text()
    assert "no module named 'peer' / really" in text
    assert part("records").Results.load(tmp_path / "results.json").cases[0].rows[0].median > 0.0
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == [
        "pareto-linear-lif-l-2-n-8-n-4-t-3.png",
        "pareto-linear-lif-l-2-n-8-n-4-t-6.png",
        "steps-linear-lif-l-2-n-8-n-4.png",
    ]

    capsys.readouterr()
    assert toy_run("--resume") == 0
    assert capsys.readouterr().out.count("measured before") == 2

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark-table -->\nstale\n<!-- /benchmark-table -->\nafter\n")
    assert toy_run("--table", str(tmp_path / "results.json"), "--write", str(readme)) == 0
    written = readme.read_text()
    assert written.startswith("before\n<!-- benchmark-table -->\n")
    assert written.endswith("\n<!-- /benchmark-table -->\nafter\n")
    assert "stale" not in written
    assert "linear-lif L=2 n=8 N=4 T=6" in written
    assert f"PyTorch {torch.__version__}" in written
    assert data["date"] in written

    (tmp_path / "results.json").write_text(json.dumps({**data, "date": "2026-01-02", "until": "2026-01-03"}))
    assert toy_run("--table", str(tmp_path / "results.json"), "--write", str(readme)) == 0
    assert "\n2026-01-02 to 2026-01-03, " in readme.read_text()


@pytest.mark.usefixtures("systems")
def test_an_interrupted_run_keeps_what_it_has(
    part: Any, toy_run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def first_case_only(workload: Any, *arguments: Any) -> Any:
        if workload.steps == 3:
            raise KeyboardInterrupt
        row = part("records").Row("snncompile", "snncompile", "ok", seconds=(1.0,), is_ours=True)
        return replace(part("runner").described(workload), rows=(row,))

    monkeypatch.setattr(part("cli"), "measure_case", first_case_only)
    with pytest.raises(SystemExit) as exit_info:
        toy_run()
    assert exit_info.value.code == 130
    kept = part("records").Results.load(tmp_path / "results.json")
    assert [case.steps for case in kept.cases] == [6]
    assert "T=6" in (tmp_path / "results.md").read_text()


@pytest.mark.usefixtures("in_one_process", "systems")
def test_a_run_out_of_time_says_what_it_did_not_begin(toy_run: Callable[..., int], tmp_path: Path) -> None:
    assert toy_run("--limit", "0") == 1
    assert "not begun within 0 s" in (tmp_path / "results.md").read_text()


def test_the_comparison_names_the_fastest_peer_and_says_where_we_lose(part: Any) -> None:
    records = part("records")

    def row(system: str, seconds: float, **more: Any) -> Any:
        return records.Row(system, f"the {system}", "ok", seconds=(seconds, seconds), peak_bytes=2**20, **more)

    def case(name: str, *rows: Any) -> Any:
        return records.CaseResult(name, "suite", "curve", "text", 4, 2, False, rows=rows)

    ours = row("snncompile", 0.2, is_ours=True)
    results = records.Results(
        {"platform": "Linux", "processor": "a chip", "threads": 2},
        {"Python": "3.11", "torch": "2.13"},
        {"rounds": 5},
        "2026-01-02",
        (
            case("won", ours, row("slow", 0.6), row("fast", 0.3)),
            case("freed", ours, row("snncompile-reassociate", 0.1, is_ours=True), row("fast", 0.3)),
            case("lost", ours, row("fast", 0.1)),
            case("red", records.Row("snncompile", "snncompile", "parity", "departs", is_ours=True), row("fast", 0.1)),
        ),
    )
    won, kept, freed, lost, red = part("table").comparison_table(results).splitlines()[2:]
    assert [cell.strip() for cell in won.split("|")[4:9]] == ["the fast", "300 ms", "1.00 MiB", "1.50", "1.00"]
    assert "**slower**" not in won
    assert kept.split("|")[1].strip() == "freed"
    assert "1.50" in kept
    assert freed.split("|")[1].strip() == "freed, reassociate=True"
    assert "3.00" in freed
    assert "0.50" in lost
    assert "**slower**" in lost
    assert "departs" in red
    assert " ms" not in red
    setting = part("table").comparison(results).splitlines()[0]
    assert setting == "2026-01-02, Linux, a chip, 2 threads, Python 3.11, PyTorch 2.13."


def test_how_far_rounding_leads_is_how_far_a_system_may_depart(part: Any) -> None:
    outcome = part("outcome")
    expected = outcome.Outcome(torch.ones(4), (torch.zeros(100),), (torch.ones(2),))
    flipped = torch.zeros(100)
    flipped[:2] = 1.0
    departure = outcome.compare(expected, replace(expected, states=(flipped,)))
    exact = outcome.compare(expected, expected)
    assert exact.is_exact
    assert exact.within(exact)
    assert departure.state_mismatch == pytest.approx(0.02)
    assert departure.state_error == 1.0
    assert departure.within(replace(departure, state_mismatch=0.01))
    assert not departure.within(replace(departure, state_mismatch=0.001))
    one_spike = replace(exact, output_mismatch=1e-7, output_error=1e-3)
    assert one_spike.within(exact)
    assert not replace(one_spike, output_mismatch=1e-4).within(replace(exact, output_mismatch=1e-4))
    lost = outcome.compare(expected, replace(expected, states=(), gradients=(torch.full((2,), torch.nan),)))
    assert lost.state_mismatch == 1.0
    assert lost.gradient_error == float("inf")
    assert not lost.within(departure)


def test_a_neuron_of_each_framework_does_the_same(part: Any) -> None:
    workloads, case, systems = part("workloads"), part("case"), part("systems")
    cpu = torch.device("cpu")
    toys = [
        workloads.Converted(4, 4, "resnet18", width=4),
        workloads.LinearStacks(20, 4, 2, 16),
        workloads.SingleLIF(8, 2, 100),
        workloads.IFChain(8, 2, 100),
        workloads.TrainedLIF(8, 2, 100),
        workloads.Recurrent(20, 4, 16),
    ]
    for toy in toys:
        made = case.make_case(toy, cpu)
        for system in systems.chosen(toy, "cpu", True, None):
            is_there = all(importlib.util.find_spec(name.split(".")[0]) for name in system.imports)
            if system.is_ours or system.is_yardstick or not is_there:
                continue
            departure = part("outcome").compare(made.expected, system.prepare(made).outcome())
            assert departure.within(made.rounding), f"{system.name} on {toy.name}: {departure}"


def test_a_converted_network_is_what_the_peer_converts(part: Any) -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import ann2snn

    converted, translated = part("workloads.converted"), part("systems.spikingjelly_network").translated
    toy = converted.Converted(6, 4, "resnet18", width=4)
    torch.manual_seed(0)
    ann, images = converted.NETWORKS["resnet18"](4), converted.images_like_photographs(converted.CALIBRATION_IMAGES)
    converted.settle_batch_norms(ann, images)
    theirs = ann2snn.FXConverter(ann2snn.RateCodingRecipe([images], mode="Max")).convert(ann).eval()
    ours = translated(toy.network(), "s")

    def kinds(network: torch.nn.Module) -> Counter[str]:
        names = Counter(type(module).__name__ for module in network.modules())
        return Counter({name: names[name] for name in ("IFNode", "Conv2d", "Linear", "BatchNorm2d", "VoltageScaler")})

    assert kinds(ours) == kinds(theirs)
    (x,) = toy.inputs()
    with torch.no_grad():
        got, expected = (sum(network(x) for _ in range(toy.steps)) for network in (ours, theirs))
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_training_in_multi_step_mode_is_what_the_peer_computes(part: Any) -> None:
    pytest.importorskip("spikingjelly")
    workloads, case, systems = part("workloads"), part("case"), part("systems")
    for toy in (workloads.SewTraining(3, 2, 16, width=4), workloads.DvsTraining(3, 2, width=2)):
        made = case.make_case(toy, torch.device("cpu"))
        assert len(made.expected.gradients) == len(list(made.network.parameters()))
        for name in ("snncompile", "spikingjelly-multi", "spikingjelly-memopt"):
            departure = part("outcome").compare(made.expected, systems.SYSTEMS[name].prepare(made).outcome())
            assert departure.within(made.rounding), f"{name} on {toy.name}: {departure}"


def test_names_of_workloads_are_unique_and_the_most_telling_come_first(part: Any) -> None:
    for device in ("cpu", "cuda"):
        for quick in (True, False):
            names = [workload.name for workload in part("workloads").workloads(device, quick)]
            assert len(set(names)) == len(names)
    assert part("workloads").workloads("cpu", False)[0].name == "converted resnet18 N=1 T=64"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "moon"], "invalid choice"),
        (["--peers", "moon"], "invalid choice"),
        (["--only", "moon"], "no workload"),
        (["--threads", "0"], "at least 1"),
        (["--write", "README.md"], "--write needs --table"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    part: Any, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        part("cli").main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("systems")
def test_the_gpu_command_takes_the_same_path_in_a_dry_run(
    part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = part("gpu")
    seen: list[list[str]] = []

    def measured(argv: list[str]) -> int:
        seen.append(argv)
        part("records").Results({"platform": "a", "processor": "b", "threads": 2}, {}, {}, "2026-01-02").save(
            tmp_path / "results.json"
        )
        return 0

    monkeypatch.setattr(gpu.cli, "main", measured)
    monkeypatch.setattr(gpu, "run_tests", lambda folder, limit, is_dry: 3 if is_dry else 0)
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--limit", "100"]) == 3
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--skip-tests"]) == 0
    assert "2026-01-02, a, b, 2 threads" in capsys.readouterr().out
    for argv in (*seen, gpu.suite_arguments(tmp_path, 30.0, is_dry=False)):
        arguments = part("cli").parser().parse_args(argv)
        assert 0.0 <= arguments.limit <= gpu.LIMIT - gpu.WORKLOAD_SECONDS
    assert part("cli").selection(arguments)
    assert arguments.device == "cuda"
    if not torch.cuda.is_available():
        assert gpu.main(["--output", str(tmp_path)]) == 2


def test_a_readme_without_markers_is_left_alone(part: Any, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="benchmark-table"):
        part("readme").write_between_markers(readme, "text")
    assert readme.read_text() == "no markers"
    assert all(marker in (ROOT / "README.md").read_text() for marker in part("readme").MARKERS)


def test_budgets_at_toy_size(
    part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = part("budgets")
    monkeypatch.setattr(budgets, "POINTS", 3)
    status = budgets.main(
        ["--network", "vgg16", "--width", "4", "--steps", "4", "--rounds", "1", "--output", str(tmp_path)]
    )
    assert status in (0, 1)  # which of two is faster at this size is up to chance
    (found,) = tmp_path.glob("*.json")
    points = json.loads(found.read_text())["rows"]
    assert len(points) == budgets.POINTS
    assert points[-1]["budget"] is None
    assert all(point["peak"] <= point["budget"] for point in points[:-1])
    assert points[0]["uniform_chunk"] == 1
    assert "best uniform chunk" in capsys.readouterr().out
    slow = budgets.Point(2**20, 2**20, 1.1, 4, 1.0)
    assert "**slower**" in budgets.table([slow])


def test_planning_at_toy_size(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planning = part("planning")
    small = ["--width", "4", "--blocks", "1", "1", "--size", "32", "--steps", "4", "--rounds", "1"]
    assert planning.main([*small, "--output", str(tmp_path)]) == 0
    cold, warm = json.loads((tmp_path / "planning.json").read_text())["rows"]
    assert cold["measuring_seconds"] > 0.0
    assert warm["measuring_seconds"] == 0.0
    assert "beyond both" in capsys.readouterr().out
