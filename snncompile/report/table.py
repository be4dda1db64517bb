"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def shortened(names: Sequence[str]) -> str:
    """Names in a row; of many, the first and the last."""
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, … {len(names) - 5} more …, {', '.join(names[-2:])}"
