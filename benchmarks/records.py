"""What a run leaves: rows of cases, with the machine and the versions they were measured on; kept as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
Status = Literal["ok", "yardstick", "parity", "error"]


@dataclass(frozen=True)
class Row:
    """One system on one workload.

    Attributes:
        system, label: Which.
        status: "ok"; "yardstick" (measured, computes nothing); "parity" (does not compute what the step loop computes,
            so there is no number); "error" (did not run).
        error: Why there are no numbers.
        seconds: Of each timed call.
        setup_seconds: From the network to the first result, less the time of a warm call: compilation and search.
        peak_bytes, reserved_bytes, resident_bytes: As `measure.Peaks`.
        launches: Kernels of one call, on CUDA.
        departure: From the reference, as `outcome.Departure`.
        details: What the system said of itself, such as the chunk length it chose.
        is_ours: Whether it is snncompile.
    """

    system: str
    label: str
    status: Status
    error: str = ""
    seconds: tuple[float, ...] = ()
    setup_seconds: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    resident_bytes: int | None = None
    launches: int | None = None
    departure: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls were faster than the first, a quarter slower than the second."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def without_numbers(self, status: Status, error: str) -> Row:
        """The same row, its measurements gone; how far it departed stays."""
        return Row(self.system, self.label, status, error, departure=self.departure, details={}, is_ours=self.is_ours)


@dataclass(frozen=True)
class CaseResult:
    """All rows of one workload.

    Attributes:
        name, suite, curve, description: Of the workload.
        steps, batch: T and N.
        trains: Whether backward is part of the time.
        firing_rate, neurons, rounding: As in `case.Case`; None if there was no reference.
        moved_bytes: As `Workload.moved_bytes`.
        load: The machine's load average when the case began: above the number of threads, others were at work.
        error: Why there is no row at all.
    """

    name: str
    suite: str
    curve: str
    description: str
    steps: int
    batch: int
    trains: bool
    firing_rate: float | None = None
    neurons: int | None = None
    rounding: Mapping[str, Any] | None = None
    moved_bytes: int | None = None
    load: float | None = None
    error: str = ""
    rows: tuple[Row, ...] = ()

    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.seconds]


@dataclass(frozen=True)
class Results:
    """Of one run.

    Attributes:
        machine, versions: What the numbers depend on.
        settings: The run's arguments.
        date: When it began, in ISO format.
        cases: In the order they were measured.
        until: When the last of them was measured.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    date: str
    cases: tuple[CaseResult, ...] = ()
    until: str = ""

    def with_case(self, case: CaseResult) -> Results:
        return dataclasses.replace(self, cases=(*(old for old in self.cases if old.name != case.name), case))

    def case(self, name: str) -> CaseResult | None:
        return next((case for case in self.cases if case.name == name), None)

    def save(self, path: Path) -> None:
        """Write the file anew, or leave the old one whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        beside.write_text(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)

    @staticmethod
    def load(path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: The file has another schema.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, expected {SCHEMA}; measure again")
        cases = tuple(
            CaseResult(**{**case, "rows": tuple(_row(row) for row in case["rows"])}) for case in data.pop("cases")
        )
        return Results(**data, cases=cases)


def _row(data: dict[str, Any]) -> Row:
    return Row(**{**data, "seconds": tuple(data["seconds"])})


def _finite(value: Any) -> Any:
    """JSON has no infinity: it is written as text."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
