"""Every class of the peers' packages, by introspection: how it compiles, that it is right, and that the docs say so.

A class that a new release brings fails here until it has a row in `tests/frameworks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .frameworks import FRAMEWORKS, Row, framework, judge
from .frameworks.table import documented, line

FOUND = {name: found for name in FRAMEWORKS if (found := framework(name)) is not None}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_class_has_a_row(name: str) -> None:
    if name not in FOUND:
        pytest.skip(f"{name} is not installed")
    rows, classes = FOUND[name]
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    assert {name.split(" (")[0] for name in names} == classes


@pytest.fixture(autouse=True)
def distributions_check_their_arguments() -> None:
    """As they do in a fresh process: `torch.compile` turns that off for the whole process."""
    torch.distributions.Distribution.set_default_validate_args(True)


def rows() -> Iterator[Any]:
    """A class with other options than its own, named in parentheses, is a slow test."""
    for found, _ in FOUND.values():
        for row in found:
            yield pytest.param(row, id=row.name, marks=[pytest.mark.slow] if " (" in row.name else [])


@pytest.mark.parametrize("row", rows())
def test_a_class_is_what_the_documented_table_says(row: Row) -> None:
    assert documented().get(row.name) == line(row, judge(row)), "if this is meant: make frameworks, then read it"
