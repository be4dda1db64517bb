"""Traces one step of a network with torch.fx: stateful and library modules are leaves, the rest is traced through."""

from __future__ import annotations

import inspect
import operator
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, SnnCompileError
from ..explicit_states import ExplicitStates
from ..ir import AutogradCall, OpKind
from ..ir.batching_rules import IN_PLACE_OPERATORS, called_name
from ..torch_private import TraceError, tree_leaves
from .adapter import Leaf
from .copies import copy_sharing_tensors
from .hidden_states import HiddenStates, Place, RandomState, StateRead, places_held_by
from .inputs import input_names
from .known_values import FORM, KnownValues, is_form, is_held
from .leaves import ADAPTERS, STATE_STORES, classify, modules_within_reach, state_holders
from .opaque_code import Untraceable, autograd_functions_as_leaves, modes, traced_values_are_tensors
from .side_effects import AttributeSnapshot, place_of

ROOT = "net"
_LIBRARY = tuple(f"{Path(path).parent}{os.sep}" for path in (torch.__file__, __file__))
_STANDARD_LIBRARY = f"{Path(inspect.__file__).parent}{os.sep}"


class _Root(nn.Module):
    """Holds the network as a child, so that a network that is itself a leaf needs no special case."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any) -> Any:
        return self.net(*inputs)


_COUNTS = "it counts by the shape, or another property, of its input"


class StepProxy(fx.Proxy):
    """A traced value that keeps `x += y` as the write into x that it is; fx alone would trace `x = x + y`."""

    tracer: StepTracer

    def __getattr__(self, name: str) -> Any:
        known = self.tracer.known_value(self.node) if is_form(name) else None
        return getattr(known, name) if isinstance(known, torch.Tensor) else super().__getattr__(name)

    def __len__(self) -> int:
        known = self.tracer.known_value(self.node)
        if isinstance(known, (torch.Tensor, tuple, list)):
            return len(known)
        raise Untraceable("it asks for the length of its input")

    def __eq__(self, other: object) -> Any:
        return False if other is None else super().__eq__(other)  # as a tensor says

    def __ne__(self, other: object) -> Any:
        return True if other is None else super().__ne__(other)

    __hash__ = fx.Proxy.__hash__

    def __index__(self) -> int:
        if not _is_about_form(self.node):
            raise TypeError(f"{self.node.name} is a traced value, whose number is not known")
        # Noted as well, for a library that takes an error here to mean that this is no number.
        tracer: Any = self.tracer
        tracer.counted_in = tracer.stack[-1] if tracer.stack else ""
        raise Untraceable(_COUNTS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise Untraceable(f"it assigns to {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.node.op != "get_attr":
            raise Untraceable("it assigns to a part of a tensor")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(target: Callable[..., Any]) -> Callable[[StepProxy, Any], Any]:
    def write(self: StepProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


for _operator in IN_PLACE_OPERATORS:
    setattr(StepProxy, f"__{_operator.__name__}__", _in_place(_operator))


@dataclass(frozen=True)
class Register:
    """An attribute in which a traced module keeps a tensor from one step to the next.

    Attributes:
        owner: Qualified name of the module.
        attribute: Name of the attribute.
    """

    owner: str
    attribute: str

    @property
    def path(self) -> str:
        """The dotted path from the network."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


def load_register(path: str) -> Any:
    """Marks the value that a register holds when a step begins."""


def store_register(path: str, value: Any) -> None:
    """Marks the value that a register holds when a step ends."""


class StepTracer(fx.Tracer):
    """One tracing run.

    Args:
        forced: Qualified names to keep as opaque leaves, and how.
        registers: Attributes to treat as values carried from step to step.
        known: Computes what is known of the values, if the inputs' types are.
        blames_random: Find the modules whose forward draws random numbers, which takes a look at each border.

    Attributes:
        leaves: Qualified name -> treatment of every leaf met.
        traced: Qualified names of the modules traced through.
        drew_random: Qualified names of those whose forward drew random numbers while it was traced.
        switched_modes: Qualified names of those that compute under `no_grad`, `autocast` and the like.
    """

    # A buffer becomes a node, so that writing into it shows up in the graph instead of happening while tracing.
    proxy_buffer_attributes = True
    carries_tensors = True  # whether a tensor kept in an attribute may become a register
    keeps_what_fails = False  # whether a module whose forward cannot be traced becomes an opaque leaf

    def __init__(
        self,
        forced: Mapping[str, Leaf],
        registers: Iterable[Register] = (),
        known: KnownValues | None = None,
        *,
        blames_random: bool = False,
    ) -> None:
        super().__init__()
        self.known = known
        self.forced = forced
        self.registers = tuple(registers)
        self._loads: dict[Register, fx.Proxy] = {}
        self.leaves: dict[str, Leaf] = {}
        self.traced: list[str] = []
        self.drew_random: list[str] = []
        self.switched_modes: list[str] = []
        self._thread = threading.get_ident()
        self._modes = modes()
        self._random = RandomState() if blames_random else None
        self.stack: list[str] = []
        self._names: dict[int, str] | None = None  # of parameters and buffers, by their ids
        self.counted_in: str | None = None  # the module whose forward needed a number that follows from a shape
        self.failed_in: str | None = None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # The root takes *inputs; one placeholder for each positional argument that the network requires.
        assert isinstance(self.root, _Root)
        names = input_names(self.root.net)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]
        for position, proxy in enumerate(inputs):
            if self.known is not None:
                self.known.expect_input(proxy.node, position)
        for register in self.registers:
            load = self.create_proxy("call_function", load_register, (register.path,), {})
            self._loads[register] = self._attributes(register)[register.attribute] = load
        return root_fn, [self.root, *inputs]

    def _attributes(self, register: Register) -> dict[str, Any]:
        assert isinstance(self.root, _Root)
        return place_of(self.root.net.get_submodule(register.owner), register.attribute)

    def store_registers(self) -> list[Register]:
        """Write at the end of the step what the registers hold then; returns those that do not hold a tensor."""
        wrong = []
        output = next(node for node in self.graph.nodes if node.op == "output")
        for register in self.registers:
            value = self._attributes(register).get(register.attribute)
            if type(value) is not StepProxy:
                wrong.append(register)
            elif value is not self._loads[register]:
                with self.graph.inserting_before(output):
                    node = self.graph.call_function(store_register, (register.path, value.node))
                node.meta["scope"] = register.owner
        return wrong

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        """One node, with what is known of its value; a question that the known values answer makes none."""
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if self.known is None:
            return proxy
        node = proxy.node
        if kind == "get_attr":
            self.known.expect_constant(node, strip_root(str(target)))
        elif kind in ("call_function", "call_method", "call_module"):
            module = strip_root(str(target)) if kind == "call_module" else ""
            # What an opaque module returns may depend on how often it was called.
            repeats = kind != "call_module" or self.leaves[module].kind is not OpKind.OPAQUE
            by_step = bool(node.meta.get("by_step"))
            self.known.expect_result(node, module, by_step=by_step, repeats=repeats)
            if is_form(getattr(target, "__name__", target)):
                answer = self.known.of(node)
                if type(answer) in (int, bool, torch.Size):
                    self.graph.erase_node(node)
                    return answer
        return proxy

    def known_value(self, node: fx.Node) -> Any:
        """A node's value without data; None if it is not known."""
        return None if self.known is None else self.known.of(node)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return StepProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is StepProxy else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = strip_root(module_qualified_name)
        if name in self.forced:
            self.leaves[name] = self.forced[name]
            return True
        leaf = classify(m)
        if leaf is None:
            self.traced.append(name)
            return False
        self.leaves[name] = leaf
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._is_elsewhere():
            return forward(*args, **kwargs)
        self._blame_random()
        self.stack.append(strip_root(self.path_of_module(m)))
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._blame_random()
            return result
        except Exception:
            self.failed_in = self.failed_in if self.failed_in is not None else self.stack[-1]
            raise
        finally:
            self.stack.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._is_elsewhere():
            return attr_val
        # torch.fx walks through all modules for each tensor that is read.
        name = self._name_of(attr_val) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _is_elsewhere(self) -> bool:
        """Whether the module at work is not under trace.

        While torch.fx traces, other threads come here too with whatever they run, and so does the network's twin on
        which values are computed.
        """
        return threading.get_ident() != self._thread or (self.known is not None and self.known.is_computing)

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        """The qualified name of a parameter or buffer, where it stands now."""
        if self._names is None:
            named = [*self.root.named_buffers(), *self.root.named_parameters()]
            self._names = {id(held): name for name, held in reversed(named)}
        name = self._names.get(id(tensor))
        if name is None:
            return None
        path, _, attribute = name.rpartition(".")
        owner = self.root.get_submodule(path)
        held = owner._parameters.get(attribute, owner._buffers.get(attribute))
        return name if held is tensor else None

    def _blame_random(self) -> None:
        """Note the innermost module at work if random numbers were drawn since the last look."""
        if self._random is not None and self._random.has_moved():
            self.drew_random.append(self.stack[-1] if self.stack else "")
            self._random = RandomState()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack[-1] if self.stack else ""
        if modes() != self._modes:
            # A leaf's node is created on the leaf's own account; it is the forward around it that switched.
            around = self.stack[:-1] if node.op == "call_module" else self.stack
            self.switched_modes.append(around[-1] if around else "")
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch under trace. One on shapes and the like is no branch on values: its module is called as it is.

        Raises:
            Untraceable: The branch depends on what is known of a tensor without its values.
            TraceError: It depends on values.
        """
        if _is_about_form(obj.node):
            raise Untraceable("it branches on the shape, or another property, of its input")
        if is_held(obj.node):
            raise Untraceable("it branches on the value of a buffer")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Unpacking under trace; a shape that is unpacked counts as a branch on it.

        Raises:
            Untraceable: The number of dimensions decides how many values there are.
            TraceError: How many there are is not known.
        """
        known = self.known_value(obj.node)
        if isinstance(known, (torch.Tensor, tuple, list)):
            value: Any = obj
            return iter([value[index] for index in range(len(known))])
        try:
            values: Iterator[fx.Proxy] = super().iter(obj)
            return values
        except TraceError as error:
            if _is_about_form(obj.node):
                raise Untraceable("it unpacks the shape, or another property, of its input") from error
            raise

    def call_autograd_function(self, function: AutogradCall, args: tuple[Any, ...]) -> Any:
        """One node for a call of a user's autograd function."""
        return self.create_proxy("call_function", function, args, {})


def _is_about_form(node: fx.Node) -> bool:
    """Whether a traced value follows from the properties of tensors that have no values of theirs."""
    name = node.args[1] if node.target is getattr else node.target
    if node.op in ("call_function", "call_method") and name in FORM:
        return True
    inputs = node.all_input_nodes
    return node.op in ("call_function", "call_method") and bool(inputs) and all(map(_is_about_form, inputs))


def strip_root(qualified_name: str) -> str:
    """A qualified name as the user's network spells it."""
    return "" if qualified_name == ROOT else qualified_name.removeprefix(f"{ROOT}.")


def trace_step(
    net: nn.Module,
    rejected: frozenset[str] = frozenset(),
    forced: Mapping[str, Leaf] = MappingProxyType({}),
    known: KnownValues | None = None,
    tracer_class: type[StepTracer] = StepTracer,
) -> tuple[fx.Graph, StepTracer]:
    """Trace one call of a network, which is one step.

    A tensor that a forward keeps in an attribute becomes a register: loaded when the step begins, stored when it ends.
    What tracing would freeze is not traced: a module whose forward changes other Python state, writes into its buffers,
    draws random numbers from no input or reads the state of another module is kept as an opaque leaf. The trace is
    repeated until nothing new is found.

    Raises:
        CaptureError: The forward cannot be traced; names module and line.
    """
    found = _Findings(rejected, forced)
    if isinstance(net, ExplicitStates):
        found.expect_states(net)
    while True:
        copied = copy_sharing_tensors(net)
        tracer = tracer_class(found.forced, found.registers, known, blames_random=found.draws)
        before = found.size
        graph = _trace_once(copied, tracer, found)
        if graph is not None and found.size == before:
            # What modules that run as they are hold is hidden now, so that whoever reads it is found.
            found.see_opaque(tracer)
            before = found.size
            again = tracer_class(found.forced, found.registers, known, blames_random=found.draws)
            differs = _difference(graph, tracer, _trace_once(copied, again, found, hides_unset=True), again)
            if differs is None and found.size == before:
                return graph, tracer
            if differs is not None and not _looks_into_opaque(copied, graph, tracer, differs, found):
                _keep_changing(net, graph, tracer, differs, found)
        if found.size == before:
            raise CaptureError("tracing one step comes to no end", where=tracer.failed_in)


def _looks_into_opaque(net: nn.Module, graph: fx.Graph, tracer: StepTracer, name: str, found: _Findings) -> bool:
    """Whether traces differ only if unset attributes of opaque leaves are hidden; if so, all these keep their order."""
    if not found.opaque:
        return False
    plain = type(tracer)(found.forced, found.registers, tracer.known)
    if _difference(graph, tracer, _trace_once(net, plain, found), plain) is not None:
        return False
    found.forced.update((other, replace(leaf, ordered=True)) for other, leaf in found.opaque.items())
    found.forced[name] = Leaf(OpKind.OPAQUE, "it asks whether a module that runs step by step holds a state yet", True)
    return True


def _keep_changing(net: nn.Module, graph: fx.Graph, tracer: StepTracer, name: str, found: _Findings) -> None:
    """Keep a module as it is whose traces differ, though no attribute of it was seen to change.

    Raises:
        CaptureError: What changes is outside the network, so that tracing has changed it for good.
    """
    afresh = type(tracer)(found.forced, found.registers, tracer.known)
    if _difference(graph, tracer, _trace_once(copy_sharing_tensors(net), afresh, found), afresh) is not None:
        raise CaptureError(
            f"{name or 'the network'} computes something else at every step, from what is no part of the network (a "
            "variable of a class, of a module or of a function around it); keep it in an attribute",
            where=name or None,
        )
    found.forced[name] = _opaque("it computes something else at every step than it did at the last")


def _difference(one: fx.Graph, tracer: StepTracer, other: fx.Graph | None, again: StepTracer) -> str | None:
    """The module in which two traces of one step part, if they do: it keeps state where none was looked for."""
    if other is None:
        return None
    position = {node: index for graph in (one, other) for index, node in enumerate(graph.nodes)}
    for a, b in zip_longest(one.nodes, other.nodes):
        if a is None or b is None or not _is_same(a, tracer, b, again, position):
            scope: str = (a or b).meta.get("scope", "")
            return scope if scope not in again.leaves else scope.rpartition(".")[0]
    return None


def _is_same(a: fx.Node, tracer: StepTracer, b: fx.Node, again: StepTracer, position: Mapping[fx.Node, int]) -> bool:
    if (a.op, a.target, a.meta.get("scope")) != (b.op, b.target, b.meta.get("scope")):
        return False
    if a.op == "get_attr":
        first, second = (getattr(t.root, str(a.target), None) for t in (tracer, again))
        if first is not None and second is not None and not torch.equal(first, second):
            return False
    left, right = (
        tree_leaves(fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda leaf: _comparable(leaf, position)))
        for node in (a, b)
    )
    return repr(left) == repr(right)


def _comparable(leaf: Any, position: Mapping[fx.Node, int]) -> Any:
    return ("node", position[leaf]) if isinstance(leaf, fx.Node) else leaf


class _Findings:
    """What the traces so far have found out.

    Attributes:
        forced: Qualified name -> why it must be an opaque leaf.
        registers: Attributes to carry from step to step.
        rejected: Attributes that cannot be carried so, and make an opaque leaf of the module that changes them.
        changing: Qualified module name and attribute of other Python state.
        opaque: Opaque leaves met so far: what they hold is hidden.
        draws: Random numbers were drawn, so that the next trace has to find where.
    """

    def __init__(self, rejected: Iterable[str], forced: Mapping[str, Leaf]) -> None:
        self.opaque: dict[str, Leaf] = {}
        self.forced: dict[str, Leaf] = dict(forced)
        self.registers: dict[Register, None] = {}
        self.rejected = {Register(*path.rpartition(".")[::2]) for path in rejected}
        self.changing: set[tuple[str, str]] = set()
        self.draws = False

    @property
    def size(self) -> int:
        """Grows with everything found."""
        return len(self.forced) + len(self.registers) + 2 * len(self.rejected) + len(self.opaque) + self.draws

    def see_opaque(self, tracer: StepTracer) -> None:
        """Take note of the opaque leaves that a trace has met."""
        self.opaque.update((name, leaf) for name, leaf in tracer.leaves.items() if leaf.kind is OpKind.OPAQUE)

    def expect_states(self, net: ExplicitStates) -> None:
        """Explicit states are carried from the start, so that what a forward does without states is not traced."""
        found = (Register("", name) for name in net.state_attributes)
        self.registers.update(dict.fromkeys(register for register in found if register not in self.rejected))
        if net.own_changes:
            names = ", ".join(map(repr, net.own_changes))
            self.forced[""] = _opaque(f"{names} of the network changes at every step")
            self.registers.clear()

    def reject(self, registers: Iterable[Register]) -> None:
        for register in list(registers):
            self.registers.pop(register, None)
            self.rejected.add(register)


def _trace_once(net: nn.Module, tracer: StepTracer, found: _Findings, *, hides_unset: bool = False) -> fx.Graph | None:
    """The graph; what must be treated differently in the next trace is added to the findings."""
    random = RandomState()
    if tracer.known is not None:
        tracer.known.start()
    with HiddenStates(_places_of_state(net, found, hides_unset=hides_unset)):
        snapshot = AttributeSnapshot(dict(net.named_modules()))
        try:
            with autograd_functions_as_leaves(tracer.call_autograd_function), traced_values_are_tensors(_is_library):
                graph = tracer.trace(_Root(net))
            found.reject(tracer.store_registers())
        except Untraceable as error:
            found.forced[tracer.failed_in or ""] = _opaque(str(error))
            return None
        except StateRead as read:
            found.forced.update(_readers(net, tracer, read))
            return None
        except SnnCompileError as error:
            raise type(error)(error.message, where=error.where or _qualified(tracer)) from error
        except Exception as error:
            if isinstance(error, TypeError) and "cannot assign" in str(error) and tracer.failed_in is not None:
                reason = "it assigns to a registered buffer or parameter at every step"
                found.forced[tracer.failed_in] = _opaque(reason)
                return None
            if tracer.counted_in is not None and tracer.counted_in == (tracer.failed_in or ""):
                found.forced[tracer.counted_in] = _opaque(_COUNTS)
                return None
            if tracer.registers:  # perhaps it looks into the value that it carries
                own = [register for register in tracer.registers if register.owner == tracer.failed_in]
                found.reject(own or tracer.registers)
                return None
            known = found.size
            found.see_opaque(tracer)
            if found.size > known:  # perhaps it reads what one of these holds
                return None
            failure = _untraceable(error, tracer)
            if not tracer.keeps_what_fails:
                raise failure from error
            found.forced[tracer.failed_in or ""] = _opaque(failure.message)
            return None
        finally:
            changed = list(snapshot.changed())
            carried = [change for change in changed if _is_carried(net, snapshot, *change)]
            snapshot.restore(changed)
            found.draws |= random.has_moved()
            random.restore()
    for name in tracer.drew_random:
        found.forced[name] = Leaf(OpKind.OPAQUE, "it draws random numbers from no input", True)
    for name in tracer.switched_modes:
        found.forced[name] = _opaque("it computes under no_grad, autocast or the like")
    for name, attribute in changed:
        register = Register(name, attribute)
        if register in tracer.registers:
            continue
        if tracer.carries_tensors and (name, attribute) in carried and register not in found.rejected:
            found.registers[register] = None
        else:
            found.changing.add((name, attribute))
            found.forced[_changer(name, tracer)] = _opaque(
                f"{attribute!r} of {name or 'the network'} changes at every step"
            )
    found.forced.update(_buffer_writers(graph, tracer, found))
    found.forced.update(_shared_with_opaque(net, tracer))
    owned = _owned_by_opaque(net, tracer)
    found.reject(owned)
    found.changing.update((register.owner, register.attribute) for register in owned)
    return graph


def _is_carried(net: nn.Module, snapshot: AttributeSnapshot, name: str, attribute: str) -> bool:
    """Whether an attribute that a trace has changed held a tensor, a number or nothing yet, and was given a tensor."""
    before = snapshot.value(name, attribute)
    after = place_of(net.get_submodule(name), attribute).get(attribute)
    return (before is None or isinstance(before, (torch.Tensor, int, float))) and type(after) is StepProxy


def _owned_by_opaque(net: nn.Module, tracer: StepTracer) -> list[Register]:
    """Registers of modules that an opaque leaf contains or refers to, which would find an old value there."""
    inside = {
        id(part)
        for name, leaf in tracer.leaves.items()
        if leaf.kind is OpKind.OPAQUE
        for part in modules_within_reach(net.get_submodule(name))
    }
    return [register for register in tracer.registers if id(net.get_submodule(register.owner)) in inside]


def _opaque(reason: str) -> Leaf:
    return Leaf(OpKind.OPAQUE, reason)


def _places_of_state(net: nn.Module, found: _Findings, *, hides_unset: bool) -> Iterator[Place]:
    for name in found.opaque:
        yield from places_held_by(name, net.get_submodule(name), unset=hides_unset)
    for name, module in net.named_modules():
        for adapter in ADAPTERS:
            store = adapter.state_store(module)
            yield from ((name, store, key) for key in adapter.state_keys(module))
    for name, attribute in found.changing:
        attributes = vars(net.get_submodule(name))
        if attribute in attributes and attribute not in STATE_STORES:
            yield name, attributes, attribute


def _readers(net: nn.Module, tracer: StepTracer, read: StateRead) -> dict[str, Leaf]:
    """The module whose forward reads a state; and the owner, if it runs elsewhere and so must keep order with it."""
    reader = tracer.failed_in or ""
    if any(part is net.get_submodule(read.owner) for part in net.get_submodule(reader).modules()):
        return {reader: _opaque(str(read))}
    return {
        reader: Leaf(OpKind.OPAQUE, str(read), ordered=True),
        read.owner: Leaf(OpKind.OPAQUE, f"its state is read by {reader or 'the network'}", ordered=True),
    }


def _changer(name: str, tracer: StepTracer) -> str:
    """The traced module to blame for a change in a module: itself, or the nearest one around it."""
    while name not in tracer.traced:
        if not name:
            raise CaptureError(
                "a forward changes Python attributes of a module that it does not contain; keep state in the module "
                "that changes it"
            )
        name = name.rpartition(".")[0]
    return name


def _shared_with_opaque(net: nn.Module, tracer: StepTracer) -> dict[str, Leaf]:
    """Stateful leaves that an opaque leaf contains too: their state must stay where that one finds it."""
    holders = {
        id(part): name
        for name, leaf in tracer.leaves.items()
        if leaf.kind is OpKind.OPAQUE
        for part in state_holders(net.get_submodule(name))
    }
    return {
        name: _opaque(f"it is a part of {holders[id(module)] or 'the network'} too")
        for name, leaf in tracer.leaves.items()
        if leaf.kind is OpKind.STATEFUL and id(module := net.get_submodule(name)) in holders
    }


def _buffer_writers(graph: fx.Graph, tracer: StepTracer, found: _Findings) -> dict[str, Leaf]:
    """Modules whose traced forward writes into a buffer or parameter; registers written in place are rejected."""
    writers = {}
    for node in graph.nodes:
        written = [node.kwargs.get("out")]
        if _writes_first_argument(node):
            written += tree_leaves(node.args[:1])
        for value in written:
            if not isinstance(value, fx.Node):
                continue
            if value.op == "get_attr":
                scope = node.meta.get("scope", "")
                writers[scope] = _opaque(f"it writes into {_written_name(value, scope, tracer)!r} at every step")
            if value.target is load_register:
                found.reject(register for register in found.registers if register.path == value.args[0])
    return writers


def _written_name(node: fx.Node, scope: str, tracer: StepTracer) -> str:
    """The path of a tensor as the user spells it; a tensor in a list has the list's name."""
    assert isinstance(tracer.root, _Root)
    held = getattr(tracer.root, str(node.target), None)
    for name, value in vars(tracer.root.net.get_submodule(scope)).items():
        if held is not None and any(leaf is held for leaf in tree_leaves(value)):
            return f"{scope}.{name}" if scope else name
    return strip_root(str(node.target))


def _writes_first_argument(node: fx.Node) -> bool:
    name = called_name(node.target)
    if node.op not in ("call_method", "call_function"):
        return False
    marked = name.endswith("_") and not name.endswith("__")
    return marked or name in _WRITING_OPERATORS or node.kwargs.get("inplace") is True


_WRITING_OPERATORS = frozenset({target.__name__ for target in IN_PLACE_OPERATORS} | {"setitem"})


def _qualified(tracer: StepTracer) -> str | None:
    return tracer.failed_in if tracer.failed_in else None


def _is_library(filename: str) -> bool:
    is_standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return is_standard or filename.startswith(_LIBRARY)


def _untraceable(error: Exception, tracer: StepTracer) -> CaptureError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown line"
    module = tracer.failed_in or "the network itself"
    return CaptureError(
        f"cannot trace one step of {module}, at {line}: {error}. "
        "A forward may not branch or loop on the values of its inputs; keep such code in a module of its own "
        "with state of its own, or write it with tensor operations (torch.where)",
        where=_qualified(tracer),
    )
