"""The table of `docs/frameworks.md`: written, and read back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from . import FRAMEWORKS, Judgement, Row

PATH = Path(__file__).parents[2] / "docs" / "frameworks.md"

_HEAD = """# What becomes of each class

Written by `make frameworks`; do not edit. Every row is a small network around one class, compiled in chunks of T / 2
steps and compared with the step loop: outputs, final states and, in training mode, gradients. T is 5 and 16, in
training and in evaluation mode; the run of 5 steps starts from the states that a call before has left.

- **batched**: the layers take a chunk of steps in one call; a neuron scans over the chunk.
- **step by step**: exact, one step after the other, for the reason given; the rest of a network is batched around it.
- **all steps at once**: the class takes the whole sequence in one call, for the reason given; the rest of a network in
  multi-step mode is scheduled around it.
- **refused**: `optimize` raises `CaptureError`.
- **no step**: nothing to compile, for the reason given.
"""
_ROW = re.compile(r"\| `(?P<name>[^`]+)` \| (?P<verdict>[^|]+) \| (?P<reason>.*) \|")


def clean(text: str) -> str:
    """A reason for a table: one line, without places on this machine."""
    text = re.sub(r", at [^ ]+:\d+: .*?(?=: )", "", " ".join(text.split()))
    return text.replace("|", "\\|")


def render(judged: Mapping[str, Iterable[tuple[Row, Judgement]]]) -> str:
    """The document."""
    parts = [_HEAD]
    for name, rows in judged.items():
        parts.append(f"## {FRAMEWORKS[name]} {version(name)}\n")
        parts.append("| class | what becomes of it | why, and what to know |\n|---|---|---|")
        parts.append("\n".join(line(row, judgement) for row, judgement in rows) + "\n")
    return "\n".join(parts)


def line(row: Row, judgement: Judgement) -> str:
    """The line of the table that a row should have."""
    told = "; ".join(dict.fromkeys(clean(text) for text in (judgement.reason, row.remark) if text))
    return f"| `{row.name}` | {judgement.verdict.value} | {told} |"


def documented() -> Mapping[str, str]:
    """Class -> the line of the table."""
    lines = PATH.read_text(encoding="utf-8").splitlines()
    return {match["name"]: text for text in lines if (match := _ROW.fullmatch(text))}
