"""Initial ranges from data: min-max, running min-max, percentile, and least squared error.

An estimator sees any number of batches and keeps little of them: the exact extremes, and for percentile and MSE an
evenly spaced sample of at most `MAX_SAMPLES` values a batch. The MSE search never quantizes anything. With the values
sorted and their sums accumulated, the error of a candidate follows from where its rounding thresholds fall, so one
candidate costs a few binary searches instead of a pass over the data, and the sum is exact for the values kept.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_oscqat.quantization.quantizer import Quantizer

MAX_SAMPLES = 2**18
"""Values of one batch that percentile and MSE keep; weights are kept whole."""


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
        rows = self._rows(x)
        low, high = rows.amin(1), rows.amax(1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError("got values that are NaN or infinite, expected finite ones: no range can be found")
        self._accumulate(rows, low, high)
        self.batches += 1

    def finish(self) -> GridParameters:
        """Propose a grid from everything seen.

        Raises:
            ValueError: if nothing was seen, or nothing but zeros.
        """
        if self.low is None or self.high is None:
            raise ValueError("got no values, expected at least one batch")
        signed = bool((self.low < 0).any())
        if not bool(torch.maximum(-self.low, self.high).max() > 0):
            raise ValueError("got nothing but zeros, expected values to find a range from")
        if self.quantizer.signed is None:
            signed = self.quantizer.is_signed
        scale, zero_point = self._grid(signed)
        # A channel of zeros (pruned, or dead in the float model) has no range of its own: any step represents it.
        scale = torch.where(scale > 0, scale, scale.max())
        return GridParameters(scale, zero_point, signed)

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
        return scale, torch.where(scale > 0, -low / scale, 0.0)


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
    """Keeps values, evenly spaced so that every image and position has its share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.samples: list[Tensor] = []

    def _accumulate(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super()._accumulate(rows, low, high)
        # An odd stride, because an even one would meet the same columns of an image again and again.
        stride = 1 if self.keep_all else -(-rows.numel() // MAX_SAMPLES)
        self.samples.append(rows[:, :: stride | 1].clone() if stride > 1 else rows.clone())


@dataclass
class Percentile(_Sampling):
    """The values that leave a given share of all values outside, half on each side where both sides are used.

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
            high = values.abs().sort(1).values[:, round(last * self.percentile / 100)]
            return self._grid_of_range(-high, high, signed)
        values = values.sort(1).values
        outside = round(last * (0.5 - self.percentile / 200))
        return self._grid_of_range(values[:, outside], values[:, last - outside], signed)


class MSE(_Sampling):
    """The range with the least squared error between the values and their quantized form.

    The candidates are relative to the data's own range: 100 of them, then 20 between the neighbours of the best. (The
    published search adds a fixed 0.5 to the range, so that only about 9 of its 100 candidates are of use for a layer
    whose weights stay within 0.05.) An asymmetric grid is searched over both ends.
    """

    COARSE = 100
    FINE = 20

    def _grid(self, signed: bool) -> tuple[Tensor, Tensor | None]:
        assert self.low is not None and self.high is not None
        low, high = self.low.double().clamp(max=0), self.high.double().clamp(min=0)
        error_of = _SquaredError(torch.cat(self.samples, 1), self.quantizer.num_bits)
        if self.quantizer.symmetric:
            widest = torch.maximum(-low, high)
            steps = torch.linspace(1 / self.COARSE, 1, self.COARSE).to(widest)
            fine = torch.linspace(-1, 1, 2 * self.FINE + 1).to(widest) / self.COARSE
            best = self._best_symmetric(error_of, widest[:, None] * steps, signed)
            best = self._best_symmetric(error_of, best[:, None] + widest[:, None] * fine, signed)
            return self._grid_of_range(-best, best, signed)

        ends = torch.linspace(0.05, 1, 20).to(low)
        low, high = self._best_asymmetric(error_of, low[:, None] * ends, high[:, None] * ends)
        fine = 1 + torch.linspace(-0.1, 0.1, 21).to(low)
        low, high = self._best_asymmetric(error_of, low[:, None] * fine, high[:, None] * fine)
        return self._grid_of_range(low, high, signed)

    def _best_symmetric(self, error_of: "_SquaredError", limits: Tensor, signed: bool) -> Tensor:
        scale, _ = self._grid_of_range(-limits, limits, signed)
        qmin = -(2 ** (self.quantizer.num_bits - 1)) if signed else 0
        error = error_of(scale, torch.full_like(scale, -qmin))
        error = torch.where(scale > 0, error, torch.inf)
        return limits.gather(1, error.argmin(1, keepdim=True)).squeeze(1)

    def _best_asymmetric(self, error_of: "_SquaredError", lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        count = lows.shape[1]
        low = lows.repeat_interleave(count, 1)
        high = highs.repeat(1, count)
        scale, zero_point = self._grid_of_range(low, high, signed=False)
        assert zero_point is not None
        error = torch.where(scale > 0, error_of(scale, zero_point.round()), torch.inf)
        best = error.argmin(1, keepdim=True)
        return low.gather(1, best).squeeze(1), high.gather(1, best).squeeze(1)


class _SquaredError:
    """Squared error of rounding fixed values to any grid, from their sorted order and running sums.

    Args:
        values: `[rows, count]`.
        num_bits: width of the grid.
    """

    def __init__(self, values: Tensor, num_bits: int) -> None:
        self.sorted = values.double().sort(1).values
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


RANGE_ESTIMATORS: dict[str, type[RangeEstimator]] = {
    "mse": MSE,
    "minmax": MinMax,
    "running_minmax": RunningMinMax,
    "percentile": Percentile,
}
"""Names that `range_estimator` takes."""
