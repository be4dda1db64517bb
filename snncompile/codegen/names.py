"""Names and literals in emitted source."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from .batch_norm import batch_norm_by_step
from .kernels import Buffer, GradBuffer, Still, batched, lift, part_of, per_step, split_steps, step_of

_HOMES = (("torch", torch), ("F", F), ("operator", operator), ("math", math))
_RESERVED = frozenset({"net", "const", "state", "out", "first", "range", "min", "slice", "float", "run", "on_node"})
_PLAIN = (bool, int, str, bytes, type(None), type(Ellipsis))


class Namespace:
    """The global names of one emitted program.

    Args:
        needs_grad: Buffers must be followed by autograd.

    Attributes:
        needs_grad: As given.
    """

    def __init__(self, *, needs_grad: bool) -> None:
        self.needs_grad = needs_grad
        self.globals: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "operator": operator,
            "math": math,
            "batched": batched,
            "batch_norm_by_step": batch_norm_by_step,
            "per_step": per_step,
            "lift": lift,
            "part_of": part_of,
            "step_of": step_of,
            "split_steps": split_steps,
            "Still": Still,
            "Buffer": GradBuffer if needs_grad else Buffer,
        }
        self._bound: dict[int, str] = {}

    def function(self, target: Any) -> str:
        """How to spell a callable."""
        name = getattr(target, "__name__", "")
        for home, module in _HOMES:
            if name.isidentifier() and getattr(module, name, None) is target:
                return f"{home}.{name}"
        return self.bind(target, name if name.isidentifier() else "function")

    def literal(self, value: Any) -> str:
        """How to spell a constant argument."""
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if type(value) in _PLAIN:
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, torch.dtype):
            return str(value)
        return self.bind(value, type(value).__name__)

    def bind(self, value: Any, hint: str) -> str:
        """A global name for an object that has no literal."""
        if id(value) not in self._bound:
            name = f"{hint}__{len(self._bound)}"
            self._bound[id(value)] = name
            self.globals[name] = value
        return self._bound[id(value)]


def variable_names(names: Iterable[str]) -> dict[str, str]:
    """Node name -> variable name, clear of everything else that the program names."""
    taken = set(Namespace(needs_grad=False).globals) | _RESERVED
    variables: dict[str, str] = {}
    for name in names:
        variable = name
        while variable in taken or _is_loop_variable(variable) or _is_reserved_form(variable):
            variable += "_"
        taken.add(variable)
        variables[name] = variable
    return variables


def _is_reserved_form(name: str) -> bool:
    """Whether a buffer, the parts of an input, or a bound object, might be named so."""
    return name.endswith(("_seq", "_parts")) or re.search(r"__\d+$", name) is not None


def _is_loop_variable(name: str) -> bool:
    return name[:1] in ("t", "e") and name[1:].isdigit()
