"""Arguments are checked once, before any work, and environment variables are read in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snncompile.options import Environment, Options, parse_bytes, render_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64MiB", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" 10 kb ", 10_000),
        ("1KiB", 1024),
        (".5MiB", 2**19),
        ("7B", 7),
        (123, 123),
    ],
)
def test_bytes_are_parsed(text: Any, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["64 parsecs", "", "MiB", "-1MiB", "1e3MiB", "0B", "0.0001B", 0, -1])
def test_bytes_that_make_no_sense_are_value_errors(text: Any) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [1.5, True, None, b"1MiB", [1]])
def test_bytes_of_other_types_are_type_errors(value: Any) -> None:
    with pytest.raises(TypeError, match="memory_budget"):
        parse_bytes(value)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_number_of_steps(steps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="T must be"):
        Options.parse(steps)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"schedule": "fastest"}, ValueError),
        ({"schedule": 0}, ValueError),
        ({"schedule": 2.5}, TypeError),
        ({"schedule": True}, TypeError),
        ({"readout": "max"}, ValueError),
        ({"readout": 1}, TypeError),
        ({"backend": "cuda"}, ValueError),
        ({"static_input": 1}, TypeError),
        ({"reassociate": "yes"}, TypeError),
    ],
)
def test_other_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        Options.parse(4, **arguments)


def test_a_chunk_longer_than_the_steps_is_all_of_them() -> None:
    assert Options.parse(4, schedule=9).schedule == 4


@pytest.mark.parametrize(
    ("count", "text"), [(9, "9 B"), (20480, "20.0 KiB"), (3 * 2**20, "3.0 MiB"), (20 * 2**30, "20.00 GiB")]
)
def test_bytes_are_rendered_for_people(count: int, text: str) -> None:
    assert render_bytes(count) == text


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNNCOMPILE_DEBUG", raising=False)
    monkeypatch.delenv("SNNCOMPILE_DUMP", raising=False)
    monkeypatch.delenv("SNNCOMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert Environment.read() == Environment(cache_directory=Path("/caches/snncompile"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Environment.read() == Environment(cache_directory=Path("~/.cache/snncompile").expanduser())
    monkeypatch.setenv("SNNCOMPILE_CACHE", "~/kernels")
    monkeypatch.setenv("SNNCOMPILE_DEBUG", "3")
    monkeypatch.setenv("SNNCOMPILE_DUMP", "somewhere")
    assert Environment.read() == Environment(3, Path("somewhere"), Path("~/kernels").expanduser())
    monkeypatch.setenv("SNNCOMPILE_DEBUG", "loud")
    with pytest.raises(ValueError, match="SNNCOMPILE_DEBUG"):
        Environment.read()
