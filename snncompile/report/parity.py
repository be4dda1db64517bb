"""Compares an optimised module with the step loop: outputs, final states, statistics and gradients."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import RandomState, is_multi_step, start_from
from ..errors import ParityError
from ..explicit_states import ExplicitStates, describe, map_tensors
from ..runtime import OptimizedModule
from ..torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten

RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Comparison:
    """One tensor on both sides.

    Attributes:
        name: What it is.
        max_error: Largest absolute difference; infinite where shapes or NaNs differ.
        mismatch_rate: Share of elements that differ at all.
        close: Within tolerance.
        where: What differs where, if it is not close.
    """

    name: str
    max_error: float
    mismatch_rate: float
    close: bool
    where: str = ""


@dataclass(frozen=True)
class Parity:
    """The result of `verify`; true if everything is within tolerance.

    Attributes:
        outputs, states, buffers, gradients: Comparisons; gradients only in train mode with gradients enabled. The
            final states of `with_states` are among the states.
        setting: What was compared, and on which versions.
        spike_mismatch_rate: Share of output elements that differ from the step loop's.
    """

    outputs: tuple[Comparison, ...]
    states: tuple[Comparison, ...]
    buffers: tuple[Comparison, ...]
    gradients: tuple[Comparison, ...]
    setting: str = ""

    @property
    def ok(self) -> bool:
        """Whether every tensor is within tolerance."""
        return all(comparison.close for comparison in self.all())

    @property
    def exact(self) -> bool:
        """Whether every tensor has the step loop's bits."""
        return all(comparison.mismatch_rate == 0.0 for comparison in self.all())

    @property
    def spike_mismatch_rate(self) -> float:
        return max((comparison.mismatch_rate for comparison in self.outputs), default=0.0)

    @property
    def max_state_error(self) -> float:
        return max((comparison.max_error for comparison in self.states), default=0.0)

    def all(self) -> Iterator[Comparison]:
        yield from (*self.outputs, *self.states, *self.buffers, *self.gradients)

    def check(self) -> None:
        """Raise `ParityError` unless `ok`."""
        if not self.ok:
            raise ParityError(f"the optimised module departs from the step loop\n{self}")

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"parity {'ok' if self.ok else 'FAILED'}{' (bit for bit)' if self.exact else ''}"]
        lines += [f"  {line}" for line in self.setting.splitlines()]
        for group in ("outputs", "states", "buffers", "gradients"):
            comparisons: tuple[Comparison, ...] = getattr(self, group)
            if not comparisons:
                continue
            worst = max(comparisons, key=lambda comparison: comparison.max_error)
            lines.append(
                f"  {group}: {sum(c.close for c in comparisons)} of {len(comparisons)} within tolerance, "
                f"largest error {worst.max_error:.3g} ({worst.name}), "
                f"largest mismatch rate {max(c.mismatch_rate for c in comparisons):.3g}"
            )
        lines += [f"  FAILED {c.name}: {_difference(c)}" for c in self.all() if not c.close]
        return "\n".join(lines)


def _difference(comparison: Comparison) -> str:
    return f"error {comparison.max_error:.3g}{comparison.where and f', {comparison.where}'}"


def verify(net: nn.Module, opt: OptimizedModule, *x_seq: Any) -> Parity:
    """Compare one call of `opt` with the step loop over `net`, from the states both have now.

    Both run on copies, with the same random numbers; neither changes. In train mode with gradients enabled, the
    gradients of a fixed weighted sum of the outputs, and of the states that `with_states` hands out, are compared too:
    those of parameters, and of inputs and states that require them.

    Args:
        net: The network `opt` was made from, or an equal one.
        opt: From `optimize`.
        x_seq: `[T, N, *]` for each input, or `[N, *]` if static; then the states that a network with explicit states
            starts from, as the call takes them.

    Raises:
        TypeError: `opt` was not made by `optimize`, or only one of the two has explicit states.
    """
    if not isinstance(opt, OptimizedModule):
        raise TypeError(f"verify expects a module from optimize(), got {type(opt).__name__}")
    is_explicit = isinstance(opt.__dict__["_net"], ExplicitStates)
    if isinstance(net, ExplicitStates) != is_explicit:
        raise TypeError("verify needs both networks to be made by with_states(), or neither")
    with_gradients = opt.training and torch.is_grad_enabled()
    reference, candidate = _detached_copy(net), _detached_copy(opt)
    before = _numbers(reference), _numbers(candidate)
    random = RandomState()
    got, got_gradients = _run(candidate, candidate, x_seq, with_gradients)  # first, because it checks its inputs
    random.restore()
    expected, expected_gradients = _run(lambda *x: step_loop(reference, opt, *x), reference, x_seq, with_gradients)
    random.restore()
    handed_out = net.count if isinstance(net, ExplicitStates) else 0
    (expected, expected_states), (got, got_states) = (
        _without_states(expected, handed_out),
        _without_states(got, handed_out),
    )
    return Parity(
        outputs=tuple(_compare_all("output", expected, got)),
        states=(
            *_compare_all("final state", expected_states, got_states),
            *_compare_named(named_states(reference), named_states(candidate)),
            *_counters(before, (_numbers(reference), _numbers(candidate))),
        ),
        buffers=tuple(_compare_named(dict(reference.named_buffers()), dict(candidate.named_buffers()))),
        gradients=tuple(_compare_gradients(expected_gradients, got_gradients)),
        setting=_setting(net, candidate, x_seq),
    )


def _without_states(outputs: Any, count: int) -> tuple[Any, Any]:
    """The outputs, and the final states that are handed out after them."""
    return (outputs[:-count], outputs[-count:]) if count else (outputs, ())


def _setting(net: nn.Module, planned: OptimizedModule, x_seq: tuple[Any, ...]) -> str:
    """What was compared, and on which versions."""
    options, program = planned.options, planned.latest_program
    wish = options.schedule if isinstance(options.schedule, (str, int)) else "given"
    chunks = [] if program is None else sorted({chunk for chunk, _ in program.schedule.segments()})
    inputs, states = x_seq, ""
    if isinstance(net, ExplicitStates):
        count = len(net.input_names)
        inputs, states = x_seq[:count], f", states {describe(x_seq[count:])}"
    static = " at every step" if options.static_input else ""
    name = type(net.wrapped if isinstance(net, ExplicitStates) else net).__name__
    return (
        f"snncompile {version('snncompile')}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}\n"
        f"{name}, {'training' if planned.training else 'evaluation'} mode, T = {options.steps}, "
        f"schedule {wish!r} in chunks of {', '.join(map(str, chunks))}, readout {options.readout}\n"
        f"inputs {describe(inputs)}{static}{states} on {inputs[0].device}"
    )


def step_loop(net: nn.Module, opt: OptimizedModule, *x_seq: Tensor) -> Any:
    """What `opt` computes, by calling `net` once a step, or once if it takes all steps, and combining the outputs."""
    options = opt.options
    if isinstance(net, ExplicitStates):
        count = len(net.input_names)
        x_seq, states = x_seq[:count], x_seq[count:]
        start_from(net, states, tuple(x if options.static_input else x[0] for x in x_seq))
    if is_multi_step(net):
        sequences = (x.expand(options.steps, *x.shape) if options.static_input else x for x in x_seq)
        return tree_map(lambda leaf: _read_out(leaf, options.readout), net(*sequences))
    steps = [net(*(x if options.static_input else x[t] for x in x_seq)) for t in range(options.steps)]
    _, structure = tree_flatten(steps[0])
    columns = zip(*(tree_leaves(step) for step in steps), strict=True)
    read = [_read_out(torch.stack(c), options.readout) if isinstance(c[0], Tensor) else c[0] for c in columns]
    outputs = tree_unflatten(read, structure)
    return (*outputs, *net.take_states()) if isinstance(net, ExplicitStates) else outputs


def _read_out(sequence: Tensor, readout: str) -> Tensor:
    if readout == "sum":
        return sequence.sum(0)
    if readout == "mean":
        return sequence.mean(0)
    return sequence[-1] if readout == "last" else sequence


def named_states(net: nn.Module) -> dict[str, Any]:
    """Every tensor that a module keeps outside parameters and buffers, by qualified name."""
    return {name: leaf.detach() for name, leaf in _kept(net) if isinstance(leaf, Tensor)}


def _kept(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the modules of a network keep in plain attributes, items of lists and dicts one by one."""
    root = net.__dict__["_net"] if isinstance(net, OptimizedModule) else net
    own = [("", root.wrapped)] if isinstance(root, ExplicitStates) else []
    for prefix, module in (*root.named_modules(), *own):
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for number, leaf in enumerate(tree_leaves(value)):
                yield f"{prefix}.{attribute}.{number}", leaf


_Numbers = dict[str, float]
_Tensors = Mapping[str, Tensor | None]


def _counters(before: tuple[_Numbers, _Numbers], after: tuple[_Numbers, _Numbers]) -> Iterator[Comparison]:
    """Plain numbers that the step loop or the optimised module has changed, where they differ afterwards."""
    expected, got = after
    for name in sorted(expected.keys() & got.keys()):
        is_changed = any(then.get(name) != now[name] for then, now in zip(before, after, strict=True))
        if is_changed and expected[name] != got[name]:
            yield Comparison(name, abs(expected[name] - got[name]), 1.0, False)


def _numbers(net: nn.Module) -> _Numbers:
    return {name: leaf for name, leaf in _kept(net) if type(leaf) in (bool, int, float)}


def _detached_copy(module: nn.Module) -> Any:
    """A deep copy without graphs or gradients; a carried state that has a graph cannot be copied with it."""
    memo: dict[int, Any] = {}
    root = module.__dict__["_net"] if isinstance(module, OptimizedModule) else module
    own = [root.wrapped] if isinstance(root, ExplicitStates) else []
    for child in (*root.modules(), *own):
        for value in vars(child).values():
            for leaf in tree_leaves(value) if isinstance(value, (dict, list, tuple, Tensor)) else ():
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    twin = copy.deepcopy(module, memo)
    twin.zero_grad(set_to_none=True)
    return twin


def _run(
    call: Any, net: nn.Module, x_seq: tuple[Tensor, ...], with_gradients: bool
) -> tuple[Any, dict[str, Tensor | None]]:
    inputs = map_tensors(x_seq, lambda x: x.detach().clone().requires_grad_(x.requires_grad and with_gradients))
    if not with_gradients:
        with torch.no_grad():
            return call(*inputs), {}
    outputs = call(*inputs)
    differentiable = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(leaf.shape, generator=generator).to(leaf) for leaf in differentiable]
        torch.autograd.backward(differentiable, weights)
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.requires_grad}
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    gradients |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves) if x.requires_grad}
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs), gradients


def _compare_all(name: str, expected: Any, got: Any) -> Iterator[Comparison]:
    left, right = tree_leaves(expected), tree_leaves(got)
    if len(left) != len(right):
        yield Comparison(f"{name} (number of tensors)", float("inf"), 1.0, False)
        return
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            yield compare(f"{name} {number}", _tensor_or_none(a), _tensor_or_none(b))
        elif a is not b and a != b:
            yield Comparison(f"{name} {number}", float("inf"), 1.0, False, f"{a!r} in the step loop, {b!r} here")


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _compare_named(expected: _Tensors, got: _Tensors) -> Iterator[Comparison]:
    for name in sorted(expected.keys() | got.keys()):
        yield compare(name, expected.get(name), got.get(name))


def _compare_gradients(expected: _Tensors, got: _Tensors) -> Iterator[Comparison]:
    """The gradients of one module's parameters are sums of the same terms, so they share their size.

    In front of a batch norm in train mode the terms of a bias's gradient cancel: what is left is rounding.
    """
    terms: dict[str, float] = {}
    for name, gradient in expected.items():
        module = name.rpartition(".")[0]
        terms[module] = max(terms.get(module, 0.0), _largest(gradient))
    for name in sorted(expected.keys() | got.keys()):
        module = name.rpartition(".")[0]
        yield compare(name, expected.get(name), got.get(name), terms=terms.get(module, 0.0) if module else 0.0)


def _largest(tensor: Tensor | None) -> float:
    """The largest size of a finite entry."""
    finite = tensor.detach()[tensor.isfinite()].abs() if tensor is not None else None
    return float(finite.max()) if finite is not None and finite.numel() else 0.0


def compare(name: str, expected: Tensor | None, got: Tensor | None, *, terms: float | None = None) -> Comparison:
    """Compare two tensors; NaNs in the same places are equal.

    Args:
        name: What is compared.
        expected: The step loop's.
        got: The optimised module's.
        terms: The tensor is added up over the steps, as gradients are, from terms of about this size at least. A small
            entry may be what is left of large ones, so the tolerance is relative to the largest entry or to this size.
    """
    if expected is None and (got is None or (terms is not None and not got.any())):
        # A chunk of steps that is recorded as a whole gives zeros where the step loop records nothing.
        return Comparison(name, 0.0, 0.0, True)
    if expected is None or got is None or expected.shape != got.shape or expected.dtype != got.dtype:
        where = f"{describe(expected)} in the step loop, {describe(got)} here"
        return Comparison(name, float("inf"), 1.0, False, where)
    if expected.numel() == 0:
        return Comparison(name, 0.0, 0.0, True)
    left, right = expected.double(), got.double()
    both_nan = left.isnan() & right.isnan()
    same = (left == right) | both_nan
    difference = torch.where(same, 0.0, (left - right).abs().nan_to_num(nan=float("inf")))
    scale = 1.0 if terms is None else max(1.0, terms, _largest(left))
    close = torch.isclose(left, right, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE * scale, equal_nan=True)
    mismatches = 1.0 - same.double().mean().item()
    where = "" if close.all() else _first_difference(close, left, right)
    return Comparison(name, difference.max().item(), mismatches, not where, where)


def _first_difference(close: Tensor, expected: Tensor, got: Tensor) -> str:
    """How many elements differ, and the first of them: in a sequence, at the earliest step."""
    places = (~close).nonzero()
    first = tuple(places[0].tolist())
    return (
        f"{len(places)} of {close.numel()} elements, the first at {list(first)}: "
        f"{expected[first].item():.9g} in the step loop, {got[first].item():.9g} here"
    )
