"""Results as Markdown: every row of every workload, and the short comparison that stands in README."""

from __future__ import annotations

from collections.abc import Sequence

from .machine import PACKAGE_NAMES
from .records import CaseResult, Results, Row

OURS = {
    "snncompile": "",
    "snncompile-reassociate": ", reassociate=True",
    "snncompile-lean": ", reassociate=True, lean",
    "snncompile-out": ", out=",
}
LEVEL = 0.02  # closer than this, neither of two is called faster


def render(results: Results) -> str:
    """Everything that was measured."""
    parts = ["# Benchmark results", setting(results), comparison_table(results), legend(results)]
    for case in results.cases:
        parts.append(f"## {case.name}")
        parts.append("\n".join(case_lines(case)))
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison(results: Results) -> str:
    """What stands in README: the setting, the ratios, and what they mean."""
    return f"{setting(results)}\n\n{comparison_table(results)}\n\n{legend(results)}"


def setting(results: Results) -> str:
    """Date, machine and versions, in one sentence."""
    machine = results.machine
    processor = f"{machine['gpu']}, {machine['processor']}" if "gpu" in machine else str(machine["processor"])
    named = [f"{PACKAGE_NAMES.get(package, package)} {version}" for package, version in results.versions.items()]
    days = results.date if results.until in ("", results.date) else f"{results.date} to {results.until}"
    return f"{days}, {machine['platform']}, {processor}, {machine['threads']} threads, {', '.join(named)}."


def legend(results: Results) -> str:
    rounds = results.settings.get("rounds")
    return (
        "Each ratio is the fastest peer's median time over that of snncompile, with its defaults unless it says\n"
        "otherwise, and that peer's peak over ours: above 1, snncompile is the faster or the smaller. Lean is under a\n"
        "budget of twice the peak of the plain step loop. Every system ran in a process of its own, and they took\n"
        f"turns in {rounds} rounds (fewer for calls of more than 10 s). A system that departs from the step loop by\n"
        "more than rounding does has no number. Training is forward and backward, the rest inference."
    )


def comparison_table(results: Results) -> str:
    """A line for each workload, or two where order may change: ours, the fastest peer, the ratios."""
    header = ["workload", "snncompile", "peak", "fastest peer", "its time", "its peak", "time ratio", "peak ratio", ""]
    lines = [line for case in results.cases for line in _comparison_lines(case)]
    return markdown([header, *lines], numbers=(1, 2, 4, 5, 6, 7))


def _comparison_lines(case: CaseResult) -> list[list[str]]:
    """With defaults and, where that was measured too, with an option."""
    lines = []
    for system, suffix in OURS.items():
        row = next((row for row in case.measured() if row.system == system), None)
        if row is not None:
            lines.append(_comparison_line(f"{case.name}{suffix}", row, case))
        elif not suffix:
            own = next((row.error for row in case.rows if row.system == system), "")
            lines.append([case.name, *["–"] * 7, _cell(case.error or own or "not measured")])
    return lines


def _comparison_line(name: str, ours: Row, case: CaseResult) -> list[str]:
    peers = [row for row in case.measured() if not row.is_ours and row.status == "ok"]
    mine = [name, _time(ours.median), _bytes(ours.peak_bytes)]
    if not peers:
        return [*mine, *["–"] * 5, "no peer ran"]
    best = min(peers, key=lambda row: row.median)
    ratio = best.median / ours.median
    return [
        *mine,
        best.label,
        _time(best.median),
        _bytes(best.peak_bytes),
        f"{ratio:.2f}",
        _peak_ratio(ours, best),
        verdict(ratio),
    ]


def verdict(ratio: float) -> str:
    """In words, so that a loss is seen."""
    if abs(ratio - 1.0) <= LEVEL:
        return "level"
    return "faster" if ratio > 1.0 else "**slower**"


def _peak_ratio(ours: Row, peer: Row) -> str:
    """Of tracked bytes; of resident ones, marked so, where a peer's allocations cannot be tracked."""
    if ours.peak_bytes and peer.peak_bytes:
        return f"{peer.peak_bytes / ours.peak_bytes:.2f}"
    if ours.resident_bytes and peer.resident_bytes:
        return f"{peer.resident_bytes / ours.resident_bytes:.2f} (resident)"
    return "–"


def case_lines(case: CaseResult) -> list[str]:
    """A description, and the table of a workload's rows."""
    if case.error:
        return [_cell(case.error)]
    facts = [case.description, f"T = {case.steps}", f"N = {case.batch}"]
    if case.neurons is not None and case.firing_rate is not None:
        facts.append(f"{case.neurons:,} neurons a sample, of which {case.firing_rate:.1%} fire in a step")
    if case.rounding is not None:
        facts.append(
            "changing weights and inputs in their last bits changes "
            f"{_share(case.rounding['output_mismatch'])} of the outputs and "
            f"{_share(case.rounding['state_mismatch'])} of the final states"
        )
    if case.load is not None:
        facts.append(f"load average {case.load:.1f} at the start")
    return ["; ".join(facts) + ".", "", rows_table(case)]


def rows_table(case: CaseResult) -> str:
    counts_launches = any(row.launches is not None for row in case.rows)
    on_device = any(row.reserved_bytes is not None for row in case.rows)
    header = ["system", "median", "quartiles", "peak", "reserved" if on_device else "resident", "setup"]
    header += ["launches"] if counts_launches else []
    header += ["GB/s"] if case.moved_bytes else []
    header += ["differing outputs", "output error", "differing states", "largest state error"]
    header += ["gradient error"] if case.trains else []
    lines = [header]
    for row in case.rows:
        lines.append(_row_cells(row, case, counts_launches, on_device))
    return markdown(lines, numbers=tuple(range(1, len(header))))


def _row_cells(row: Row, case: CaseResult, counts_launches: bool, on_device: bool) -> list[str]:
    label = row.label if "chunk" not in row.details else f"{row.label} ({row.details['chunk']})"
    if not row.seconds:
        numbers = [_cell(row.error), *["–"] * (4 + counts_launches + bool(case.moved_bytes))]
    else:
        low, high = row.quartiles
        numbers = [
            _time(row.median),
            f"{_time(low)} to {_time(high)}",
            _bytes(row.peak_bytes),
            _bytes(row.reserved_bytes if on_device else row.resident_bytes),
            "–" if row.setup_seconds is None else f"{row.setup_seconds:.1f} s",
        ]
        numbers += [f"{row.launches:,}" if row.launches is not None else "–"] if counts_launches else []
        numbers += [f"{case.moved_bytes / row.median / 1e9:.1f}"] if case.moved_bytes else []
    return [label, *numbers, *_departure_cells(row, case.trains)]


def _departure_cells(row: Row, trains: bool) -> list[str]:
    count = 5 if trains else 4
    found = row.departure
    if found is None:
        return ["–"] * count
    cells = [
        _share(found["output_mismatch"]),
        _error(found["output_error"]),
        _share(found["state_mismatch"]),
        _error(found["state_error"]),
    ]
    return [*cells, _error(found["gradient_error"])] if trains else cells


def _time(seconds: float) -> str:
    milliseconds = seconds * 1e3
    if milliseconds >= 10_000:
        return f"{seconds:.1f} s"
    if milliseconds >= 100:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def _bytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.2f} MiB"


def _share(value: object) -> str:
    share = float(str(value))
    return "0" if share == 0.0 else f"{share:.2%}" if share >= 1e-4 else f"{share:.0e}"


def _error(value: object) -> str:
    return "0" if value == 0.0 else f"{float(str(value)):.1e}"


def _cell(text: str) -> str:
    """Without what would end a cell."""
    return " ".join(text.replace("|", "/").split())


def markdown(lines: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table that lines up in a terminal too; the columns named are right-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * (width - 1) + ":" if column in numbers else "-" * width for column, width in enumerate(widths)]
    padded = [
        [cell.rjust(width) if column in numbers else cell.ljust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))
