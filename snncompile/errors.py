"""Errors that a user can act on: each says what was expected, what came, where, and what to do."""

from __future__ import annotations

from typing import Any


class SnnCompileError(Exception):
    """Base of every error that snncompile raises about a network, a plan or a result.

    Args:
        message: The fact and the remedy, in one sentence each.
        where: Qualified name of the module or node at fault, if one is known.
    """

    def __init__(self, message: str, *, where: str | None = None) -> None:
        self.message = message
        self.where = where
        super().__init__(message if where is None else f"{message} (at {where})")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the rendered text only and repeat the place in it.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[SnnCompileError], message: str, attributes: dict[str, Any]) -> SnnCompileError:
    error = cls.__new__(cls)
    where = attributes.get("where")
    Exception.__init__(error, message if where is None else f"{message} (at {where})")
    error.__dict__.update(attributes)
    return error


class CaptureError(SnnCompileError):
    """The network cannot be turned into a time x depth graph."""


class VerifyError(SnnCompileError):
    """A graph breaks an invariant of the intermediate representation."""


class PassError(SnnCompileError):
    """A pass failed, broke its promise, or stands in the wrong place of the pipeline."""


class ScheduleError(SnnCompileError, ValueError):
    """A `Schedule` given by the user does not fit the network or T."""


class InfeasibleBudgetError(SnnCompileError):
    """No schedule fits into the memory budget.

    Args:
        message: The fact and the remedy.
        minimum_bytes: The smallest peak, in bytes, that any known schedule reaches.
        where: The segment that sets that minimum.
    """

    def __init__(self, message: str, *, minimum_bytes: int, where: str | None = None) -> None:
        super().__init__(message, where=where)
        self.minimum_bytes = minimum_bytes


class ParityError(SnnCompileError):
    """The optimised module does not compute what the step loop computes."""
