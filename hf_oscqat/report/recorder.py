"""Measure what the pictures of a run show."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_oscqat.quantization.layers import quantized_layers

BINS = 40


@dataclass(frozen=True)
class DistanceHistogram:
    """How far latent weights lie from their nearest grid point, in steps of the grid.

    Attributes:
        counts: weights in each of the equal bins between `low` and `high`.
        low: -0.5, halfway to the grid point below.
        high: 0.5.
    """

    counts: list[int]
    low: float = -0.5
    high: float = 0.5

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"counts": self.counts, "low": self.low, "high": self.high}


@torch.no_grad()
def distance_histogram(model: nn.Module, max_bits: int = 4, bins: int = BINS) -> DistanceHistogram:
    """Count the distances `w / scale - round(w / scale)` of the low-bit weights of a prepared model.

    Oscillating weights gather at both edges, halfway between two grid points (Nagel et al., ICML 2022, fig. 3).
    Weights beyond the ends of the grid, which cannot oscillate, are left out, and frozen ones are counted where their
    latent weight lies.

    Args:
        model: a model that `prepare_qat` has prepared.
        max_bits: leave out wider weights.
        bins: number of bins.
    """
    counts = torch.zeros(bins)
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.num_bits > max_bits:
            continue
        position = quantizer.to_grid(layer.float_weight)
        inside = position[(position >= quantizer.qmin) & (position <= quantizer.qmax)].float()
        counts += torch.histc((inside - inside.round()).cpu(), bins=bins, min=-0.5, max=0.5)
    return DistanceHistogram([int(count) for count in counts])
