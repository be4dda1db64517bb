"""What the cost of an operation depends on, as a text: equal texts, equal costs, in this process and in later ones.

Numbers that a step function computes with (thresholds, time constants) are left out, but for 0 and 1, which code may
treat apart; so neurons that differ in nothing else are measured once.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture import NeuronChain
from ..ir import MODULE_KINDS, AutogradCall, Node, OpKind, Ref, StepGraph, TensorType, map_refs
from .processor import accelerator, processor

_NUMBER = re.compile(r"(?<![\w.])(?!(?:0|1)\.0(?![\w.]))\d+\.\d+(?:e[+-]?\d+)?")
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
_LIBRARIES = ("torch", "operator", "_operator", "math", "builtins")
# Variables that say how memory is handed out: fresh pages cost as much as the arithmetic.
_OF_ALLOCATORS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_", "THP_MEM_ALLOC")
_OWN_FOLDERS = ("codegen", "runtime")


@dataclass(frozen=True)
class CostKey:
    """What a cost depends on.

    Attributes:
        text: All of it.
        is_lasting: Whether the text means the same in another process.
    """

    text: str
    is_lasting: bool = True

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


def signature(net: nn.Module, graph: StepGraph, node: Node, inputs: tuple[TensorType, ...], *, is_static: bool) -> str:
    """Equal for nodes that do the same: same operation, same configuration, same operand types.

    Args:
        net: Holds the modules.
        graph: Where the node stands.
        node: The node.
        inputs: Types of the caller's sequences `[T, N, *]` (of one step if static).
        is_static: Inputs are those of every step.
    """
    return f"{_form(net, node, repr)} {_operands(graph, node, inputs, is_static=is_static)}"


def cost_key(
    net: nn.Module, graph: StepGraph, node: Node, inputs: tuple[TensorType, ...], *, is_static: bool, kernel: str
) -> CostKey:
    """What the cost of a node over any number of steps depends on.

    Args:
        net, graph, node, inputs, is_static: As for `signature`.
        kernel: What runs the node instead of the eager step; empty if that does.
    """
    form = _form(net, node, repr if node.kind is OpKind.OPAQUE else _without_numbers)
    operands = _operands(graph, node, inputs, is_static=is_static)
    codes = [_code_of(value) for value in dict.fromkeys(_runs(net, node))]
    lasts = None not in codes and _ADDRESS.search(form) is None
    devices = {leaf.device for leaf in inputs}
    return CostKey("\n".join([*surroundings(*devices), f"kernel {kernel}", *map(str, codes), form, operands]), lasts)


def surroundings(*devices: torch.device) -> list[str]:
    """What every cost depends on beside the operation."""
    return [
        f"torch {torch.__version__}, snncompile {_own_digest()}",
        f"threads {torch.get_num_threads()}, matmul {torch.get_float32_matmul_precision()}, "
        f"mkldnn {torch.backends.mkldnn.enabled}, deterministic {torch.are_deterministic_algorithms_enabled()}",
        *processor(),
        f"memory {[(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(_OF_ALLOCATORS)]}",
        *sorted(accelerator(device) for device in devices),
    ]


def _form(net: nn.Module, node: Node, spell: Callable[[nn.Module], str]) -> str:
    """What a node does, whatever it is called."""
    if node.kind in (OpKind.FUNCTION, OpKind.METHOD):
        arguments = (node.args, sorted(node.kwargs.items(), key=lambda item: item[0]))
        numbers = {name: str(number) for number, name in enumerate(node.refs)}
        target = f"{_name_of(node.target)} {map_refs(arguments, lambda ref: Ref(numbers[ref.name]))}"
    elif node.chain is not None:
        target = _chain_form(net, node, spell)
    else:
        module = net.get_submodule(node.target)
        parameters = [(tuple(p.shape), p.stride(), p.dtype) for p in module.parameters()]
        own = node.target if node.kind is OpKind.OPAQUE else ""
        target = f"{type(module).__qualname__} {spell(module)} {parameters} {module.training} {own}"
    layout = "channels-last, packed" if node.channels_last else ""
    events = "driven by events" if node.events_below else ""
    output = "" if node.output_slot is None else "written into an output"
    return f"{node.kind} {node.batching} {target} {layout} {events} {output}"


def _chain_form(net: nn.Module, node: Node, spell: Callable[[nn.Module], str]) -> str:
    assert node.chain is not None
    names = (*node.chain.operands, *(part.name for part in node.chain.nodes))
    numbers = {name: str(number) for number, name in enumerate(names)}
    lines = []
    for part in node.chain.nodes:
        is_module = part.kind in MODULE_KINDS
        does = spell(net.get_submodule(part.target)) if is_module else _name_of(part.target)
        lines.append(f"{does} {map_refs((part.args, dict(part.kwargs)), lambda ref: Ref(numbers[ref.name]))}")
    return f"{lines} -> {[numbers[name] for name in node.chain.results]}"


def _operands(graph: StepGraph, node: Node, inputs: tuple[TensorType, ...], *, is_static: bool) -> str:
    values = [(graph[name].value, graph[name].invariant, graph[name].kind is OpKind.INPUT) for name in node.refs]
    read = [inputs[graph[name].target] for name in node.refs if graph[name].kind is OpKind.INPUT]
    return f"{values} {'' if is_static else read}"


def _without_numbers(module: nn.Module) -> str:
    return _NUMBER.sub("number", repr(module))


def _name_of(target: Any) -> str:
    """A method's name, or what a callable is called where it is defined."""
    if isinstance(target, (str, AutogradCall)):
        return str(target)
    names = (getattr(target, attribute, "") for attribute in ("__module__", "__qualname__", "__name__"))
    return " ".join(map(str, names))


def _runs(net: nn.Module, node: Node) -> list[Any]:
    """The classes and functions whose code a node runs."""
    parts = (node,) if node.chain is None else node.chain.nodes
    found: list[Any] = [part.target for part in parts if part.kind is OpKind.FUNCTION]
    for part in parts:
        if part.kind in MODULE_KINDS:
            found += [type(module) for module in net.get_submodule(part.target).modules()]
    return [*found, *([] if node.chain is None else [NeuronChain])]


def _code_of(value: Any) -> str | None:
    """The code of a class or function, by content; "" where a version says it, None where only this process knows."""
    if isinstance(value, AutogradCall):
        return None if value.objects else _code_of(value.function)
    if isinstance(value, type):
        codes = [_code_in_file(each) for each in value.__mro__ if not _is_of_a_library(each)]
        return None if None in codes else " ".join(map(str, codes))
    return "" if _is_of_a_library(value) else _code_in_file(value)


def _is_of_a_library(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


def _code_in_file(value: Any) -> str | None:
    """Name and content of the file that defines it; None for what a function makes, which may hold other values."""
    name = getattr(value, "__qualname__", "<locals>")
    if "<locals>" in name:
        return None
    try:
        path = inspect.getsourcefile(value)
        return None if path is None else f"{value.__module__}.{name} {_file_digest(path)}"
    except (OSError, TypeError):
        return None


@cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@cache
def _own_digest() -> str:
    """The content of what runs nodes."""
    package = Path(__file__).parent.parent
    files = sorted(path for folder in _OWN_FOLDERS for path in (package / folder).glob("*.py"))
    return hashlib.sha256("".join(_file_digest(str(path)) for path in files).encode()).hexdigest()[:16]
