"""What the user asked for, checked once and frozen; and the only reader of environment variables."""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

Readout = Literal["sequence", "sum", "mean", "last"]
Backend = Literal["auto", "eager", "cpp", "triton"]

READOUTS = ("sequence", "sum", "mean", "last")
BACKENDS = ("auto", "eager", "cpp", "triton")
NAMED_SCHEDULES = ("auto", "depth-first", "breadth-first")

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Options:
    """The arguments of `optimize`, parsed.

    Attributes:
        steps: Number of time steps T.
        memory_budget: Peak bytes one call may hold (DESIGN: outputs, states and temporaries), or None.
        schedule: "auto", "depth-first", "breadth-first", a chunk length, or a `Schedule`.
        static_input: Every step sees the same `[N, *]` input.
        readout: How the outputs of the steps are combined.
        backend: What runs the step functions.
        reassociate: Passes may change the order of floating-point operations.
    """

    steps: int
    memory_budget: int | None = None
    schedule: Any = "auto"
    static_input: bool = False
    readout: Readout = "sequence"
    backend: Backend = "auto"
    reassociate: bool = False

    @staticmethod
    def parse(
        steps: object,
        memory_budget: object = None,
        *,
        schedule: object = "auto",
        static_input: object = False,
        readout: object = "sequence",
        backend: object = "auto",
        reassociate: object = False,
    ) -> Options:
        """Check every argument; raise `TypeError` or `ValueError` before any work starts."""
        parsed_steps = _integer("T", steps, minimum=1)
        return Options(
            steps=parsed_steps,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            schedule=_schedule(schedule, parsed_steps),
            static_input=_flag("static_input", static_input),
            readout=cast(Readout, _choice("readout", readout, READOUTS)),
            backend=cast(Backend, _choice("backend", backend, BACKENDS)),
            reassociate=_flag("reassociate", reassociate),
        )


def parse_bytes(value: object) -> int:
    """Bytes from an int or from a string such as "64MiB" or "1.5GB" (KB = 1000 bytes, KiB = 1024).

    Raises:
        TypeError: `value` is neither an int nor a string.
        ValueError: `value` is not positive, or is no number followed by a unit.
    """
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f'memory_budget must be a number and a unit, such as "64MiB" or "1.5GB" '
                f"(units: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), got {value!r}"
            )
        value = int(float(match.group(1)) * unit)
    return _integer("memory_budget", value, minimum=1)


def render_bytes(count: int) -> str:
    """Bytes for people: MiB where that is a readable number."""
    if count < 10 * 2**10:
        return f"{count} B"
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.2f} GiB"


def _integer(name: str, value: object, *, minimum: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    try:
        number = operator.index(value)
    except TypeError as error:  # a tensor or array that does not hold one integer
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}") from error
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r} of type {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _schedule(value: object, steps: int) -> object:
    """A name, a chunk length clipped to T, or any other object for the schedule layer to judge."""
    if isinstance(value, str):
        return _choice("schedule", value, NAMED_SCHEDULES)
    if isinstance(value, (int, float)) or hasattr(value, "__index__"):
        return min(_integer("schedule (a chunk length)", value, minimum=1), steps)
    return value


@dataclass(frozen=True)
class Environment:
    """Debugging switches; none of them changes a result.

    Attributes:
        debug: `SNNCOMPILE_DEBUG`, 0 to 5: summary, decisions, graph differences, generated source, liveness.
        dump_directory: `SNNCOMPILE_DUMP`, where each pass writes the graph it leaves.
        cache_directory: `SNNCOMPILE_CACHE`, where code and costs are kept; `~/.cache/snncompile` if it is not set.
    """

    debug: int = 0
    dump_directory: Path | None = None
    cache_directory: Path = Path("~/.cache/snncompile")

    @staticmethod
    def read() -> Environment:
        """Read the process environment; a malformed switch is a `ValueError`."""
        level = os.environ.get("SNNCOMPILE_DEBUG", "0") or "0"
        if level not in {"0", "1", "2", "3", "4", "5"}:
            raise ValueError(f"SNNCOMPILE_DEBUG must be a digit from 0 to 5, got {level!r}")
        dump = os.environ.get("SNNCOMPILE_DUMP", "")
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        cache = Path(os.environ.get("SNNCOMPILE_CACHE") or base / "snncompile").expanduser()
        return Environment(int(level), Path(dump) if dump else None, cache)
