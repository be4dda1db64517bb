"""Every class of the frameworks that snncompile compiles, and the table of what becomes of them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from .rows import Judgement, Row, Verdict, judge

__all__ = ["FRAMEWORKS", "Judgement", "Row", "Verdict", "framework", "judge"]

# Installed name -> as it is written. Each has a file here: `ROWS`, and `classes()`, found by introspection.
FRAMEWORKS = {"spikingjelly": "SpikingJelly", "snntorch": "snnTorch", "norse": "Norse"}


def framework(name: str) -> tuple[tuple[Row, ...], frozenset[str]] | None:
    """The rows of a framework and the names of its classes; None where it is not installed."""
    if find_spec(name) is None:
        return None
    rows = import_module(f".{name}", __name__)
    return rows.ROWS, rows.classes()
