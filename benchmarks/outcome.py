"""What a run computed, and how far that is from what another run computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

STATE_TOLERANCE = 1e-4  # volts of the order of the threshold, 1; rounding alone stays far below
VALUE_TOLERANCE = 1e-4

# A system may depart from the step loop by three times what rounding costs, and by one spike or state in a hundred
# thousand, which a smaller sample of rounding may have missed.
ALLOWANCE = 3.0
NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Outcome:
    """Of one run, from states at rest.

    Attributes:
        output: `[T, N, *]`, or what the readout left of it.
        states: The neurons' final potentials, in the order of the network's modules.
        gradients: Of parameters in their order, then of inputs that require them; empty for inference.
    """

    output: Tensor
    states: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Outcome:
        return Outcome(
            self.output.to(device),
            tuple(state.to(device) for state in self.states),
            tuple(gradient.to(device) for gradient in self.gradients),
        )


@dataclass(frozen=True)
class Departure:
    """How far one outcome is from another.

    Attributes:
        output_mismatch: Share of output elements that differ; where a network sends out spikes, of spikes.
        output_error: Euclidean distance of the outputs, relative to their length.
        state_mismatch: Share of final potentials that differ by more than rounding. A neuron that fired at other times
            ends at another potential, so this bounds the share of neurons whose spikes differ in number.
        state_error: Largest difference of a final potential.
        gradient_error: As `output_error`, of all gradients together; None for inference.
        is_exact: Not one bit differs.
    """

    output_mismatch: float
    output_error: float
    state_mismatch: float
    state_error: float
    gradient_error: float | None
    is_exact: bool

    def within(self, rounding: Departure) -> bool:
        """Whether this is no more than rounding explains, given how far rounding alone led.

        The length of the outputs' error counts only where more than a negligible share of them differs: one spike among
        millions is a long way off in it.
        """

        def fits(mine: float | None, allowed: float | None) -> bool:
            return mine is None or mine <= ALLOWANCE * (allowed or 0.0) + NEGLIGIBLE

        return (
            fits(self.output_mismatch, rounding.output_mismatch)
            and (self.output_mismatch <= NEGLIGIBLE or fits(self.output_error, rounding.output_error))
            and fits(self.state_mismatch, rounding.state_mismatch)
            and fits(self.gradient_error, rounding.gradient_error)
        )

    def to_dict(self) -> dict[str, float | bool | None]:
        return asdict(self)


def compare(expected: Outcome, got: Outcome) -> Departure:
    """How far `got` is from `expected`; NaNs, missing states and other shapes are infinitely far."""
    output = _aligned((expected.output,), (got.output,))
    states = _aligned(expected.states, got.states)
    gradients = _aligned(expected.gradients, got.gradients)
    return Departure(
        output_mismatch=_mismatch(output, VALUE_TOLERANCE),
        output_error=_relative_error(output),
        state_mismatch=_mismatch(states, STATE_TOLERANCE),
        state_error=_largest_error(states),
        gradient_error=_relative_error(gradients) if expected.gradients else None,
        is_exact=all(torch.equal(left, right) for left, right in (*output, *states, *gradients)),
    )


_Pairs = list[tuple[Tensor, Tensor]]


def _aligned(expected: Sequence[Tensor], got: Sequence[Tensor]) -> _Pairs:
    """Pairs of tensors of equal shape; what has no partner is paired with NaNs."""
    if len(expected) == len(got) and all(a.shape == b.shape for a, b in zip(expected, got, strict=True)):
        return list(zip(expected, got, strict=True))
    return [(tensor, torch.full_like(tensor, torch.nan)) for tensor in expected]


def _mismatch(pairs: _Pairs, tolerance: float) -> float:
    different = sum(int((~torch.isclose(b, a, rtol=tolerance, atol=tolerance)).sum()) for a, b in pairs)
    return different / max(1, sum(a.numel() for a, _ in pairs))


def _largest_error(pairs: _Pairs) -> float:
    return max((_finite_or_infinite((b - a).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _relative_error(pairs: _Pairs) -> float:
    error = sum((float((b - a).double().square().sum()) for a, b in pairs), 0.0)
    length = sum((float(a.double().square().sum()) for a, _ in pairs), 0.0)
    return _finite_or_infinite(torch.tensor(error / length if length else error).sqrt())


def _finite_or_infinite(value: Tensor) -> float:
    return float(value) if bool(value.isfinite()) else float("inf")
