"""Initial ranges from data: min-max, running min-max, percentile, and least squared error.

An estimator sees any number of batches and keeps little of them: the exact extremes, and for percentile and MSE an
evenly spaced sample of at most `MAX_SAMPLES` values a batch. The MSE search never quantizes anything. With the values
sorted and their sums accumulated, the error of a candidate follows from where its rounding thresholds fall, so one
candidate costs a few binary searches instead of a pass over the data, and the sum is exact for the values kept.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_oscqat.quantization.quantizer import Quantizer

MAX_SAMPLES = 200_000
"""Values of one batch that percentile and MSE keep; weights are kept whole."""


class NoRangeError(ValueError):
    """The values have no range: there are none but zeros."""


class GridParameters(NamedTuple):
    """What `Quantizer.set_range` takes: scale and zero-point of shape `(rows,)`, and whether there are negatives."""

    scale: Tensor
    zero_point: Tensor | None
    signed: bool


@dataclass
class RangeEstimator(ABC):
    """Watches values and proposes a grid for them.

    Args:
        quantizer: the quantizer to find a range for; its width, symmetry and channel axis are read, nothing is set.
        keep_all: keep every value instead of a sample; for weights.
    """

    quantizer: Quantizer
    keep_all: bool = False

    def __post_init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.batches = 0

    def update(self, x: Tensor) -> None:
        """Look at one batch of values, any shape and floating dtype.

        Raises:
            ValueError: if there are no values or one is not finite.
        """
        if x.numel() == 0:
            raise ValueError("got no values, expected a batch that is not empty")
        rows = self._rows(x.cpu() if x.device.type == "mps" else x)  # which has no float64
        low, high = rows.amin(1), rows.amax(1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError("got values that are NaN or infinite, expected finite ones: no range can be found")
        self._accumulate(rows, low, high)
        self.batches += 1

    def finish(self) -> GridParameters:
        """Propose a grid from everything seen.

        Raises:
            ValueError: if nothing was seen.
            NoRangeError: if nothing but zeros was seen, or nothing else lies within a percentile.
        """
        if self.low is None or self.high is None:
            raise ValueError("got no values, expected at least one batch")
        signed = bool((self.low < 0).any())
        if not bool(torch.maximum(-self.low, self.high).max() > 0):
            raise NoRangeError("got nothing but zeros, expected values to find a range from")
        if self.quantizer.signed is None:
            signed = self.quantizer.is_signed
        scale, zero_point = self._grid(signed)
        if not bool(scale.max() > 0):
            raise NoRangeError("got so many zeros that the range leaves out everything else, expected more values")
        # A channel of zeros (pruned, or dead in the float model) has no range of its own: any step represents it.
        scale = torch.where(scale > 0, scale, scale.max())
        return GridParameters(scale, zero_point, signed)

    def unit_grid(self) -> GridParameters:
        """Propose the grid of values between -1 and 1, for a quantizer whose values say nothing."""
        ones = torch.ones_like(self.quantizer.scale.detach())
        signed = self.quantizer.is_signed if self.quantizer.signed is None else True
        scale, zero_point = self._grid_of_range(-ones, ones, signed)
        return GridParameters(scale, zero_point, signed)

    @property
    def is_constant(self) -> bool:
        """Whether all values seen were the same."""
        return self.low is not None and self.high is not None and bool((self.low == self.high).all())

    def _rows(self, x: Tensor) -> Tensor:
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        return x.movedim(self.quantizer.axis, 0).flatten(1) if self.quantizer.per_channel else x.reshape(1, -1)

    def _accumulate(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @abstractmethod
    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]: ...

    def _grid_of_range(self, low: Tensor, high: Tensor, signed: bool) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-point of the grid that spans `[low, high]`, 0 always included."""
        levels = 2**self.quantizer.num_bits - 1
        if self.quantizer.symmetric:
            # As published: the range spans -qmax to qmax, and the lowest integer lies one step beyond it.
            return torch.maximum(-low, high) / (levels // 2 if signed else levels), None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / levels
        return scale, torch.where(scale > 0, (-low / scale).round(), 0.0)


class MinMax(RangeEstimator):
    """Smallest and largest value seen."""

    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]:
        assert self.low is not None and self.high is not None
        return self._grid_of_range(self.low, self.high, signed)


@dataclass
class RunningMinMax(MinMax):
    """Exponential moving average of each batch's smallest and largest value.

    Args:
        quantizer: see `RangeEstimator`.
        keep_all: see `RangeEstimator`.
        momentum: weight of the past in [0, 1).
    """

    momentum: float = 0.9

    def _accumulate(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else self.momentum * self.low + (1 - self.momentum) * low
        self.high = high if self.high is None else self.momentum * self.high + (1 - self.momentum) * high


class _Sampling(RangeEstimator):
    """Keeps values, evenly spread so that every image and position has its share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.samples: list[Tensor] = []

    def _accumulate(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super()._accumulate(rows, low, high)
        stretch = 1 if self.keep_all else -(-rows.numel() // MAX_SAMPLES)
        if stretch == 1:
            self.samples.append(rows.clone())
            return
        # One at random from each stretch: a fixed stride would meet the same columns of every image.
        starts = torch.arange(0, rows.shape[1], stretch)
        positions = starts + (stretch * _random_offsets()[: len(starts)]).long()
        self.samples.append(rows.index_select(1, positions.clamp_(max=rows.shape[1] - 1).to(rows.device)))


@functools.cache
def _random_offsets() -> Tensor:
    """Fixed random numbers in [0, 1), drawn once and without touching anybody's generator."""
    return torch.rand(MAX_SAMPLES, generator=torch.Generator().manual_seed(0))


@dataclass
class Percentile(_Sampling):
    """The values that leave a given share of all values outside; of an asymmetric grid, half of it at each end.

    Args:
        quantizer: see `RangeEstimator`.
        keep_all: see `RangeEstimator`.
        percentile: share of values inside, in percent.
    """

    percentile: float = 99.99

    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]:
        values = torch.cat(self.samples, 1)
        last = values.shape[1] - 1
        if self.quantizer.symmetric:
            high = _sorted(values.abs())[:, round(last * self.percentile / 100)]
            return self._grid_of_range(-high, high, signed)
        values = _sorted(values)
        outside = round(last * (0.5 - self.percentile / 200))
        return self._grid_of_range(values[:, outside], values[:, last - outside], signed)


@dataclass
class MSE(_Sampling):
    """The range with the least squared error between the values and their quantized form.

    The candidates are relative to the data's own range, 100 of them, and around the best few 41 each; an asymmetric
    grid is searched over both ends. Those of the published search are among them. (It adds 0.5 to the range, so
    that only about 9 of its 100 candidates are of use for a layer whose weights stay within 0.05; but the error has
    several minima, and now and then one of them is the lowest.)

    Args:
        quantizer: see `RangeEstimator`.
        keep_all: see `RangeEstimator`.
        num_candidates: widths that the published search tries.
        range_margin: what it adds to the largest absolute value, in the units of the data.
    """

    COARSE = 100
    FINE = 20
    REFINED = 5
    """Candidates whose neighbourhood is searched."""

    num_candidates: int = 100
    range_margin: float = 0.5

    def _accumulate(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.batches == 0:
            self.lowest = low.min().double() - self.range_margin
            self.highest = high.max().double() + self.range_margin
        super()._accumulate(rows, low, high)

    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]:
        assert self.low is not None and self.high is not None
        low, high = self.low.double().clamp(max=0), self.high.double().clamp(min=0)
        error_of = _SquaredError(torch.cat(self.samples, 1), self.quantizer.num_bits)
        widest = torch.maximum(-low, high)[:, None]
        has_range = (widest > 0).double()  # a channel of zeros leaves all candidates at 0
        if self.quantizer.symmetric:
            coarse = widest * torch.linspace(1 / self.COARSE, 1, self.COARSE).to(widest)
            limits = torch.cat([coarse, has_range * self._published_limits()], 1)
            best = limits.gather(1, self._symmetric_error(error_of, limits, signed).argsort(1)[:, : self.REFINED])
            fine = torch.linspace(-1, 1, 2 * self.FINE + 1).to(widest) / self.COARSE
            around = (best[..., None] + widest[..., None] * fine).flatten(1)
            limit = self._best_symmetric(error_of, torch.cat([best, around], 1), signed)
            return self._grid_of_range(-limit, limit, signed)

        lows, highs = self._around(low, high, torch.linspace(0.05, 1, 20))
        if not (self.quantizer.per_channel and self.quantizer.num_bits > 4):  # thousands of shifts for each channel
            published = [has_range * ends for ends in self._published_ends()]
            lows, highs = torch.cat([lows, published[0]], 1), torch.cat([highs, published[1]], 1)
        low, high = self._best_asymmetric(error_of, lows, highs)
        lows, highs = self._around(low, high, 1 + torch.linspace(-0.1, 0.1, 21))
        lows, highs = torch.cat([low[:, None], lows], 1), torch.cat([high[:, None], highs], 1)
        low, high = self._best_asymmetric(error_of, lows, highs)
        return self._grid_of_range(low, high, signed)

    def _around(self, low: Tensor, high: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        lows, highs = low[:, None] * steps.to(low), high[:, None] * steps.to(low)
        return lows.repeat_interleave(len(steps), 1), highs.repeat(1, len(steps))

    def _published_limits(self) -> Tensor:
        widest = torch.maximum(-self.lowest, self.highest)
        return widest * torch.arange(1, self.num_candidates + 1).to(widest) / self.num_candidates

    def _published_ends(self) -> tuple[Tensor, Tensor]:
        limits = self._published_limits()
        if self.lowest + self.range_margin >= 0:
            return torch.zeros_like(limits).float(), limits.float()
        most = 2**self.quantizer.num_bits // 4 - 1
        shifts = torch.arange(-most, most + 1).to(limits) * 2 / (2**self.quantizer.num_bits - 1)
        lows = torch.outer(limits, shifts - 1).flatten().clamp(min=self.lowest)
        highs = torch.outer(limits, shifts + 1).flatten().clamp(max=self.highest)
        # In float32, as published: a range that is not cut puts zero halfway between two steps of the grid, and which
        # of them it is rounded to is decided by the last digit.
        return lows.float(), highs.float()

    def _symmetric_error(self, error_of: "_SquaredError", limits: Tensor, signed: bool) -> Tensor:
        scale, _ = self._grid_of_range(-limits, limits, signed)
        qmin = -(2 ** (self.quantizer.num_bits - 1)) if signed else 0
        return torch.where(scale > 0, error_of(scale, torch.full_like(scale, -qmin)), torch.inf)

    def _best_symmetric(self, error_of: "_SquaredError", limits: Tensor, signed: bool) -> Tensor:
        best = self._symmetric_error(error_of, limits, signed).argmin(1, keepdim=True)
        return limits.gather(1, best).squeeze(1)

    def _best_asymmetric(self, error_of: "_SquaredError", lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self._grid_of_range(lows, highs, signed=False)
        assert zero_point is not None
        error = torch.where(scale > 0, error_of(scale, zero_point), torch.inf)
        best = error.argmin(1, keepdim=True)
        return lows.gather(1, best).squeeze(1), highs.gather(1, best).squeeze(1)


class PublishedMSE(MSE):
    """The published search for the least squared error: `num_candidates` equal steps of the first batch's range.

    It chooses what the published code chooses, by the same fast sums as `MSE`, and from the same sample where a batch
    is large. All channels share the candidates. Take `MSE` unless you need the published numbers.

    Asymmetric grids: each candidate range `[-t, t]` is also shifted by whole steps of its grid to either side, by less
    than a quarter of them, and cut to the data's range with its margin. Data without negatives takes `[0, t]`.

    Source: published code of Nagel et al. (ICML 2022).
    """

    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]:
        error_of = _SquaredError(torch.cat(self.samples, 1), self.quantizer.num_bits)
        rows = len(self.samples[0])
        if self.quantizer.symmetric:
            best = self._best_symmetric(error_of, self._published_limits().expand(rows, -1), signed)
            return self._grid_of_range(-best, best, signed)
        lows, highs = (ends.expand(rows, -1) for ends in self._published_ends())
        low, high = self._best_asymmetric(error_of, lows, highs)
        return self._grid_of_range(low, high, signed)


class _SquaredError:
    """Squared error of rounding fixed values to any grid, from their sorted order and running sums.

    Args:
        values: `[rows, count]`.
        num_bits: width of the grid.
    """

    def __init__(self, values: Tensor, num_bits: int) -> None:
        self.sorted = _sorted(values).double()
        zero = self.sorted.new_zeros(len(values), 1)
        self.sums = torch.cat([zero, self.sorted.cumsum(1)], 1)
        self.total_square = self.sorted.square().sum(1)
        self.steps = torch.arange(2**num_bits, device=values.device, dtype=torch.float64)

    def __call__(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Error of each candidate.

        Args:
            scale: `[rows, candidates]`.
            zero_point: `[rows, candidates]`, the step of the grid, counted from its lowest, that stands for 0.0.

        Returns:
            Sum of squared errors, `[rows, candidates]`, float64.
        """
        # 8-bit grids of many channels would take gigabytes at once.
        chunk = max(1, 2**22 // (scale.shape[0] * len(self.steps)))
        parts = [self._error(s, z) for s, z in zip(scale.split(chunk, 1), zero_point.split(chunk, 1), strict=True)]
        return torch.cat(parts, 1)

    def _error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        rows, count = self.sorted.shape
        levels = (self.steps - zero_point[..., None]) * scale[..., None]
        thresholds = (levels[..., 1:] + levels[..., :-1]) / 2
        ends = torch.searchsorted(self.sorted, thresholds.flatten(1))
        sums = self.sums.gather(1, ends).view(thresholds.shape)
        ends = ends.view(thresholds.shape)
        edge = torch.zeros_like(scale)[..., None]
        counts = torch.cat([edge, ends.double(), edge + count], -1).diff(dim=-1)
        sums = torch.cat([edge, sums, edge + self.sums[:, -1].view(rows, 1, 1)], -1).diff(dim=-1)
        return self.total_square[:, None] + (levels * (levels * counts - 2 * sums)).sum(-1)


def _sorted(values: Tensor) -> Tensor:
    """Sort each row. On a CPU this is most of the work of a search, and numpy's sort is many times faster there."""
    if values.device.type != "cpu":
        return values.sort(1).values
    array = values.numpy().copy()
    array.sort(axis=1)
    return torch.from_numpy(array)


RANGE_ESTIMATORS: dict[str, type[RangeEstimator]] = {
    "mse": MSE,
    "mse_published": PublishedMSE,
    "minmax": MinMax,
    "running_minmax": RunningMinMax,
    "percentile": Percentile,
}
"""Names that `range_estimator` takes."""
