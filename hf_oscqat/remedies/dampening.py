"""Oscillation dampening: a loss that pulls latent weights to the centre of their bins.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), sec. 4.1, eq. 6 and 7. Weights
oscillate at the threshold between two bins; in the centre of one they cannot. The pull must not be there from the
start, or nothing would ever change its bin, so its weight grows along a cosine.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_oscqat.quantization.functional import broadcast_to_axis, grid_zero, positive_scale, to_int
from hf_oscqat.quantization.kernels import one_pass
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
    tensors: list[Tensor | None] = []
    bounds = []
    for weight, q in quantized_weights(model):
        tensors += [weight, q.frozen_if_any, q.scale, q.zero_point]
        bounds.append((q.qmin, q.qmax, q.axis))
    return _Dampening.apply(tuple(bounds), *tensors)


def squared_distance(tensors: Any, parameters: Any, bounds: Any, axis: int) -> tuple[Tensor, ...]:
    """Sum of squared distances, as a function for `one_pass`.

    Args:
        tensors: weight, frozen integers or None.
        parameters: scale, zero-point or None.
        bounds: qmin and qmax.
        axis: channel dimension.

    Returns:
        The sum, 0-d.
    """
    return (_distance(tensors, parameters, bounds, axis)[0].square_().sum(),)


def squared_distance_backward(
    tensors: Any, parameters: Any, bounds: Any, axis: int, out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The gradient of `squared_distance` in the weight: twice the distance inside the grid, 0 outside.

    The third of the parameters is the upstream gradient, `(1,)`.
    """
    distance, inside = _distance(tensors, parameters[:2], bounds, axis)
    return (torch.mul(distance.mul_(inside), 2 * parameters[2], out=out),)


def _distance(tensors: Any, parameters: Any, bounds: Any, axis: int) -> tuple[Tensor, Tensor]:
    """Distance of the clipped weight to its bin's centre; and 1 where nothing was clipped, 0 elsewhere."""
    weight, frozen_int = tensors
    scale, zero_point = parameters
    qmin, qmax = bounds
    w_int = to_int(weight, scale, zero_point, qmin, qmax, axis=axis, frozen_int=frozen_int)
    step = positive_scale(scale, w_int.dtype, weight.ndim, axis)
    low, high = step * qmin, step * qmax
    if zero_point is not None:
        zero = grid_zero(broadcast_to_axis(zero_point.to(w_int.dtype), weight.ndim, axis), qmin, qmax)
        w_int, low, high = w_int - zero, (qmin - zero) * step, (qmax - zero) * step
    clipped = torch.minimum(torch.maximum(weight, low), high)
    inside = clipped.clone().eq_(weight)
    return clipped - w_int.mul_(step), inside


class _Dampening(torch.autograd.Function):
    """The dampening loss of all weights at once; keeps the weights and nothing else for backward."""

    @staticmethod
    def forward(ctx: Any, bounds: tuple[tuple[int, int, int], ...], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.bounds = bounds
        terms = [
            one_pass(squared_distance, of_one[:2], of_one[2:], limits, axis=axis, shaped=0)[0]
            for of_one, limits, axis in _each(tensors, bounds)
        ]
        torch._foreach_mul_(terms, _factors(tensors, bounds))
        return torch.stack(terms).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors, bounds = ctx.saved_tensors, ctx.bounds
        upstream = torch._foreach_mul([grad_output.reshape(1)] * len(bounds), _factors(tensors, bounds))
        grads: list[Tensor | None] = [None]
        for (of_one, limits, axis), grad in zip(_each(tensors, bounds), upstream, strict=True):
            parameters = (*of_one[2:], grad)
            grads += [*one_pass(squared_distance_backward, of_one[:2], parameters, limits, axis=axis), *[None] * 3]
        return tuple(grads)


def _each(tensors: Any, bounds: Any) -> Iterator[tuple[Any, tuple[int, int], int]]:
    """Yield for each weight: it, frozen integers, scale and zero-point; qmin and qmax; its channel dimension."""
    for i, (qmin, qmax, axis) in enumerate(bounds):
        yield tensors[4 * i : 4 * i + 4], (qmin, qmax), axis


def _factors(tensors: Any, bounds: Any) -> list[float]:
    """What averages over all but the output channels."""
    return [of_one[0].shape[axis] / of_one[0].numel() for of_one, _, axis in _each(tensors, bounds)]


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
