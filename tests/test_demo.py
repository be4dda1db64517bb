"""The demo at toy size: its table, its claims, its exit status and its report."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = [
    "step loop, plain PyTorch",
    "layer by layer, plain PyTorch",
    "optimize, breadth-first",
    "optimize, depth-first",
    "optimize, smallest budget",
    "optimize, twice that budget",
    "optimize, no budget",
]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("ann2snn_digits")


@pytest.fixture
def side_by_side(demo: Any) -> Any:
    return importlib.import_module("side_by_side")


def toy_row(side_by_side: Any, name: str, peak: int, budget: int | None = None) -> Any:
    return side_by_side.Row(name, 1.0, 1.0, peak, None, budget, 0.5, 0, 0, True)


@pytest.fixture
def good_rows(side_by_side: Any) -> list[Any]:
    return [
        toy_row(side_by_side, side_by_side.STEP_LOOP, 100),
        toy_row(side_by_side, side_by_side.PLAIN_LAYERS, 2000),
        toy_row(side_by_side, side_by_side.BREADTH_FIRST, 1000),
        toy_row(side_by_side, side_by_side.DEPTH_FIRST, 100),
        toy_row(side_by_side, "tight", 100, 100),
    ]


def test_toy_run_prints_every_row_and_holds(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo-table -->\nstale figures\n<!-- /demo-table -->\nafter\n")
    argv = ["--quick", "--test-images", "16", "--epochs", "1", "--output", str(tmp_path / "report")]
    status = demo.main([*argv, "--update-readme", str(readme)])
    printed = capsys.readouterr().out
    assert status == 0, printed

    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ROWS
    assert len({len(line) for line in table}) == 1
    assert "FAILED" not in printed

    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["name"] for row in data["rows"]] == ROWS
    assert len({row["accuracy"] for row in data["rows"]}) == 1
    assert all(row["spike_mismatches"] == 0 for row in data["rows"] if row["name"] == "optimize, depth-first")
    for row in data["rows"]:
        assert row["predicted_peak_bytes"] is None or row["measured_peak_bytes"] <= row["predicted_peak_bytes"]
        assert row["budget_bytes"] is None or row["predicted_peak_bytes"] <= row["budget_bytes"]
    assert list(data["plans"]) == ROWS[2:]

    text = readme.read_text()
    assert text.startswith("before\n<!-- demo-table -->\n")
    assert text.endswith("\n<!-- /demo-table -->\nafter\n")
    assert "\n".join(table) in text
    assert "stale figures" not in text
    assert "\n".join(table) in (tmp_path / "report" / "report.md").read_text()


def test_all_claims_hold_for_good_rows(side_by_side: Any, good_rows: list[Any]) -> None:
    assert [claim.holds for claim in side_by_side.judge(good_rows, 256)] == [True] * 5


@pytest.mark.parametrize(
    ("row", "change", "claim"),
    [
        (4, {"accuracy": 0.25}, "accuracy"),
        (3, {"spike_mismatches": 1}, "depth-first"),
        (3, {"output_mismatches": 1}, "depth-first"),
        (4, {"measured_peak_bytes": 101}, "budgets"),
        (2, {"measured_peak_bytes": 999}, "memory"),
        (4, {"is_recorded": False}, "recording"),
    ],
)
def test_a_broken_claim_is_named(
    side_by_side: Any, good_rows: list[Any], row: int, change: dict[str, Any], claim: str
) -> None:
    good_rows[row] = replace(good_rows[row], **change)
    failed = [str(found) for found in side_by_side.judge(good_rows, 256) if found.holds is False]
    assert len(failed) == 1
    assert failed[0].startswith(f"FAILED  {claim}:")


def test_a_failed_claim_fails_the_run(
    demo: Any, side_by_side: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "judge", lambda rows, steps: [side_by_side.Claim("the moon is full", False)])
    argv = ["--quick", "--steps", "4", "--batch", "4", "--test-images", "4", "--epochs", "1"]
    assert demo.main([*argv, "--budgets", "1MiB", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "FAILED  the moon is full" in printed.out
    assert "1 of 1 claims about the table failed" in printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budgets", "64 parsecs"], "64 parsecs"),
        (["--batch", "2"], "at least 4"),
        (["--steps", "0"], "at least 1"),
        (["--test-images", "3"], "one batch"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    demo: Any, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_budget_that_nothing_fits_into_is_an_error(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--steps", "4", "--epochs", "1", "--budgets", "4KiB", "--output", str(tmp_path / "report")]
    assert demo.main(argv) == 2
    assert "memory_budget 4096 B" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
