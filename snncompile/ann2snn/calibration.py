"""What one spike per step stands for: the range of every ReLU's activations on calibration data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

__all__ = ["CalibrationData", "MaximumRange", "PercentileRange", "observe_activations"]


class MaximumRange:
    """The largest of all values observed; 0 if none was positive."""

    def __init__(self) -> None:
        self.maximum = 0.0

    def observe(self, values: Tensor) -> None:
        """Take in a tensor of any shape, at least one element.

        Raises:
            ValueError: A value is NaN, or the largest is infinite.
        """
        maximum = float(values.max())  # NaN if any value is
        if not math.isfinite(maximum):
            raise ValueError(f"calibration activations must be finite, got {maximum}")
        self.maximum = max(self.maximum, maximum)

    @property
    def scale(self) -> float:
        """What one spike per step is to stand for; 0 if no value was positive."""
        return self.maximum


class PercentileRange(MaximumRange):
    """A percentile of the positive ones among all values observed, in bounded memory.

    A histogram of 8192 bins spans [0, u), with u a power of two above the maximum so far. When a larger value
    comes, u doubles and neighbouring bins merge, which loses no count. So the percentile is off by less than one
    bin, 1/4096 of the maximum, whatever came in whatever order.

    Args:
        percentile: In (0, 100].
    """

    BINS = 8192

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile
        self._upper = 0.0
        self._counts = torch.zeros(self.BINS, dtype=torch.int64)

    def observe(self, values: Tensor) -> None:
        super().observe(values)
        if self.maximum == 0.0:
            return
        self._widen()
        positive = values[values > 0]
        positive = positive.to(torch.promote_types(positive.dtype, torch.float32))
        # Exact, as both factors are powers of two; below BINS, as every value is below the upper end.
        bins = (positive / self._upper * self.BINS).long()
        self._counts += torch.bincount(bins, minlength=self.BINS).cpu()

    @property
    def scale(self) -> float:
        if self.maximum == 0.0:
            return 0.0
        cumulative = self._counts.cumsum(0).double()
        rank = self.percentile / 100.0 * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, rank))
        above = (float(cumulative[index]) - rank) / float(self._counts[index])
        return min((index + 1 - above) * self._upper / self.BINS, self.maximum)

    def _widen(self) -> None:
        if self._upper == 0.0:
            self._upper = math.ldexp(1.0, math.frexp(self.maximum)[1])
        while self._upper <= self.maximum:
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat([merged, torch.zeros_like(merged)])
            self._upper *= 2


class CalibrationData:
    """Batches of inputs, from a tensor or from an iterable of tensors or of sequences that start with one.

    The first batch is read at once, so that bad data is refused before anything else happens.

    Raises:
        TypeError: ``source`` is neither, or a batch is not (a sequence that starts with) a tensor.
        ValueError: There is no batch, or one without elements.
    """

    def __init__(self, source: Any) -> None:
        if isinstance(source, Tensor):
            source = [source]
        if not isinstance(source, Iterable):
            raise TypeError(f"calibration must be a tensor or an iterable of batches, got {type(source).__name__}")
        self.total = len(source) if isinstance(source, Sized) else None
        rest = enumerate(source)
        first = next(rest, None)
        if first is None:
            raise ValueError("calibration has no batch; pass at least one")
        self._batches = itertools.chain([_input_of(*first)], itertools.starmap(_input_of, rest))

    def __iter__(self) -> Iterator[Tensor]:
        return self._batches


def _input_of(index: int, batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"batch {index} of the calibration data must be a tensor or start with one, got {type(batch).__name__}"
        )
    if x.numel() == 0:
        raise ValueError(f"batch {index} of the calibration data is empty, its shape is {tuple(x.shape)}")
    return x


class _Recorder(fx.Interpreter):
    """Runs a network and observes some of its nodes; notes the rank of every tensor as ``meta["ndim"]``."""

    def __init__(self, net: fx.GraphModule, ranges: Mapping[fx.Node, MaximumRange]) -> None:
        super().__init__(net)
        self.ranges = ranges

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["ndim"] = result.ndim
        if n in self.ranges:
            try:
                self.ranges[n].observe(result)
            except ValueError as error:
                raise ValueError(f"{error} at {n.meta['site']}; check the calibration data and the weights") from error
        return result


def observe_activations(
    net: fx.GraphModule, ranges: Mapping[fx.Node, MaximumRange], data: CalibrationData, progress: bool
) -> None:
    """Run ``net`` on all the data, on the device of its parameters; each node's range observes the node's outputs.

    Raises:
        ValueError: An observed output is NaN or infinite.
    """
    recorder = _Recorder(net, ranges)
    device = next((tensor.device for tensor in itertools.chain(net.parameters(), net.buffers())), None)
    with torch.no_grad():
        for x in tqdm(data, total=data.total, desc="calibrate", unit="batch", disable=not progress):
            recorder.run(x.to(device))
