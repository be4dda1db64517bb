"""A choice of the compiler as data: who made it, about what, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What was decided."""

    DONE = "done"
    REFUSED = "refused"
    NOTE = "note"


@dataclass(frozen=True)
class Decision:
    """One line of the report.

    Attributes:
        pass_name: The pass or stage that decided.
        node: Name of the node or qualified name of the module; "" for the whole network.
        verdict: Done, refused, or a note.
        reason: One sentence for the user.
    """

    pass_name: str
    node: str
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.node or 'network'}: {self.verdict.value}: {self.reason}"
