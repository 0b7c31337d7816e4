"""Oscillation dampening: a loss that pulls latent weights to the centre of their bins.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), sec. 4.1, eq. 6 and 7. Weights
oscillate at the threshold between two bins; in the centre of one they cannot. The pull must not be there from the
start, or nothing would ever change its bin, so its weight grows along a cosine.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.layers import quantized_weights
from hf_oscqat.remedies.base import Remedy
from hf_oscqat.remedies.schedules import check_anneal_start, cosine_anneal


def dampening_loss(model: nn.Module) -> Tensor:
    """Squared distance of each latent weight to the centre of its bin: `(s * w_int - clip(w, s * qmin, s * qmax))^2`.

    Summed over output channels, averaged over the rest, summed over layers (the published "kernel_mean"). The bin's
    centre is a constant here: only latent weights inside the grid get a gradient, scales get none.

    Args:
        model: a model that `prepare_qat` has prepared.

    Returns:
        Scalar tensor, differentiable in the latent weights.

    Raises:
        ValueError: if the model has no quantized weight.
    """
    terms = []
    for weight, quantizer in quantized_weights(model):
        centre = quantizer.to_real(quantizer.to_int(weight))
        ends = [1] * weight.ndim
        low = quantizer.to_real(centre.new_full(ends, quantizer.qmin))
        high = quantizer.to_real(centre.new_full(ends, quantizer.qmax))
        distance = torch.minimum(torch.maximum(weight, low), high) - centre
        terms.append(distance.square().movedim(quantizer.axis, 0).flatten(1).mean(1).sum())
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class DampeningSettings:
    """Settings of oscillation dampening.

    Args:
        weight: factor on the dampening loss until annealing begins.
        weight_final: the same at the end of training.
        anneal_start: share of training before it starts to move, in [0, 1).

    Raises:
        ValueError: if a value is out of range.
    """

    weight: float = 0.0
    weight_final: float = 0.1
    anneal_start: float = 0.25

    def __post_init__(self) -> None:
        check_anneal_start(self.anneal_start)
        for name in ("weight", "weight_final"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"got dampening {name}={value!r}, expected a finite number of at least 0: "
                    "a negative one pushes weights to the thresholds, where they oscillate"
                )


class Dampening(Remedy):
    """Adds the dampening loss with its annealed weight."""

    name = "dampening"
    Settings = DampeningSettings
    settings: DampeningSettings

    def weight(self, step: int, total_steps: int) -> float:
        """Factor on the dampening loss at `step`."""
        s = self.settings
        return cosine_anneal(step, total_steps, s.weight, s.weight_final, s.anneal_start)

    def loss(self, model: nn.Module, step: int, total_steps: int) -> Tensor | None:
        """Return the weighted loss; None while the weight is 0, when it would cost time and change nothing."""
        weight = self.weight(step, total_steps)
        return weight * dampening_loss(model) if weight > 0 else None

    def scalars(self, step: int, total_steps: int) -> dict[str, float]:
        """Return the weight, for the log."""
        return {"dampening_weight": self.weight(step, total_steps)}
