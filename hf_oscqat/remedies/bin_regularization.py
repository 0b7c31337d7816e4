"""Bin regularization: a loss that makes all weights of a bin gather at its centre.

Han et al., "Improving Low-Precision Network Quantization via Bin Regularization" (ICCV 2021), sec. 3. Dampening
pulls each weight to its bin's centre; this pulls the mean of a bin there and the weights of a bin to their mean, which
is the same pull in other proportions. The paper trains in two stages, first without it; here `anneal_start` is the
length of the first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import broadcast_to_axis, is_frozen
from hf_oscqat.quantization.layers import quantized_weights
from hf_oscqat.remedies.base import Remedy
from hf_oscqat.remedies.schedules import check_anneal_start


def bin_regularization_loss(model: nn.Module) -> Tensor:
    """Sum over layers, channels of scales and bins of `(mean(w) - centre)^2 + var(w)`, over the weights w of a bin.

    The variance is that of a sample (over n - 1), and counts in bins of at least two weights. Clipped weights are in
    no bin, and neither are frozen ones, of which the latent weight means nothing. Scales get no gradient, as in
    dampening.

    Args:
        model: a model that `prepare_qat` has prepared.

    Returns:
        Scalar tensor, differentiable in the latent weights.

    Raises:
        ValueError: if the model has no quantized weight.
    """
    terms = []
    for weight, quantizer in quantized_weights(model):
        axis = quantizer.axis
        w_int = quantizer.to_int(weight)
        # Distances to the centre have the variance of the weights and the mean that is wanted, and lose no digits.
        distance = weight - quantizer.to_real(w_int)
        position = quantizer.to_grid(weight.detach()).round()
        kept = (position >= quantizer.qmin) & (position <= quantizer.qmax)
        if quantizer.frozen_int is not None:
            kept &= ~is_frozen(quantizer.frozen_int)
        in_bin = kept.to(distance.dtype).flatten()
        levels = quantizer.qmax - quantizer.qmin + 1
        index = (w_int - quantizer.qmin).long()
        if quantizer.per_channel:
            channel = torch.arange(weight.shape[axis], device=weight.device)
            index = index + levels * broadcast_to_axis(channel, weight.ndim, axis)
        index, distance = index.flatten(), distance.flatten()
        zeros = distance.new_zeros(levels * quantizer.scale.numel())
        count = zeros.index_add(0, index, in_bin)
        mean = zeros.index_add(0, index, distance * in_bin) / count.clamp(min=1)
        spread = zeros.index_add(0, index, (distance - mean[index]).square() * in_bin)
        terms.append((mean.square() + spread / (count - 1).clamp(min=1)).sum())
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class BinRegularizationSettings:
    """Settings of bin regularization.

    Args:
        weight: factor on the loss in the second stage. The paper's is not known to us; re-implementations take 0.1
            to 10.
        anneal_start: share of training before the second stage, in [0, 1).

    Raises:
        ValueError: if a value is out of range.
    """

    weight: float = 1.0
    anneal_start: float = 0.25

    def __post_init__(self) -> None:
        check_anneal_start(self.anneal_start)
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"got bin_regularization weight={self.weight!r}, expected a finite number of at least 0: a negative "
                "one pushes weights to the thresholds, where they oscillate"
            )


class BinRegularization(Remedy):
    """Adds the loss in the second stage."""

    name = "bin_regularization"
    Settings = BinRegularizationSettings
    settings: BinRegularizationSettings

    def weight(self, step: int, total_steps: int) -> float:
        """Factor on the loss at `step`."""
        return 0.0 if step < self.settings.anneal_start * total_steps else self.settings.weight

    def loss(self, model: nn.Module, step: int, total_steps: int) -> Tensor | None:
        """Return the weighted loss; None in the first stage."""
        weight = self.weight(step, total_steps)
        return weight * bin_regularization_loss(model) if weight > 0 else None

    def scalars(self, step: int, total_steps: int) -> dict[str, float]:
        """Return the weight, for the log."""
        return {"bin_regularization_weight": self.weight(step, total_steps)}
