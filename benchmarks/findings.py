"""What a small command of its own found: one table, printed and kept beside its numbers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine


def report(what: str, table: str, rows: Sequence[dict[str, Any]], folder: Path | None, name: str) -> None:
    """Print a table, and write it as `name.md` and its rows as `name.json`.

    Args:
        what: Was measured; date, machine and versions are added.
        table: As Markdown.
        rows: The numbers behind the table.
        folder: Where to; None to print only.
        name: Of the files.
    """
    about = f"{what}, {datetime.date.today().isoformat()}, {machine.setting()}"
    text = f"{about}\n\n{table}\n"
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        found = json.dumps({"about": about, "rows": list(rows)}, indent=2)
        (folder / f"{name}.json").write_text(f"{found}\n", encoding="utf-8")
