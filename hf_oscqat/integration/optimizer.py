"""Two optimizers that look like one: weights by SGD or AdamW, scales and zero-points by Adam.

Trainer, its scheduler and its checkpoints each handle a single optimizer. This one holds the parameter groups and the
state of both and lets each take its own step. Scales have another size and meaning than weights, which is why the
published method trains them with Adam at a small constant rate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Adam, Optimizer

from hf_oscqat.quantization.functional import MIN_SCALE

SCALE_SCHEDULES = ("constant", "as_weights")
"""Schedules of the scales' rate: the published one, and that of the weights' rate."""


class OscQATOptimizer(Optimizer):
    """Steps the weights with one optimizer and the scales with another.

    Args:
        weights: optimizer over everything but scales and zero-points.
        scales: optimizer over `scales_to_bound` and zero-points.
        scales_to_bound: the scales, kept positive.
    """

    def __init__(self, weights: Optimizer, scales: Optimizer, scales_to_bound: list[torch.nn.Parameter]) -> None:
        self.weights = weights
        self.scales = scales
        self._scales_to_bound: list[torch.Tensor] = list(scales_to_bound)
        # Some schedules of transformers look for the rate there.
        defaults = {"lr": weights.defaults["lr"]}
        super().__init__([*weights.param_groups, *scales.param_groups], defaults)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step both.

        Raises:
            ValueError: if a closure is given; neither optimizer could evaluate it for the other.
        """
        if closure is not None:
            raise ValueError("got a closure, expected None: compute the loss and gradients before step()")
        self.weights.step()
        self.scales.step()
        with torch.no_grad():
            if self._scales_to_bound:
                torch._foreach_clamp_min_(self._scales_to_bound, MIN_SCALE)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, for both."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Make both optimizers work on the groups and the state of this one, so that a scheduler reaches them."""
        count = len(self.weights.param_groups)
        self.weights.param_groups = self.param_groups[:count]
        self.scales.param_groups = self.param_groups[count:]
        self.weights.state = self.scales.state = self.state


def create_optimizer(
    weight_groups: list[dict[str, Any]],
    scale_parameters: list[torch.nn.Parameter],
    scales_to_bound: list[torch.nn.Parameter],
    *,
    weight_optimizer: str,
    learning_rate: float,
    momentum: float,
    adam_betas: tuple[float, float],
    adam_epsilon: float,
    scale_learning_rate: float,
) -> OscQATOptimizer:
    """Make the optimizer of the published method, or the one with AdamW for the weights.

    Args:
        weight_groups: parameter groups of the weights, each with its `weight_decay`.
        scale_parameters: scales and zero-points.
        scales_to_bound: the scales among them.
        weight_optimizer: "sgd" or "adamw".
        learning_rate: of the weights.
        momentum: of SGD.
        adam_betas: of AdamW for weights.
        adam_epsilon: of AdamW for weights.
        scale_learning_rate: of the scales; Adam without weight decay.

    Raises:
        ValueError: if `weight_optimizer` is unknown.
    """
    weights: Optimizer
    if weight_optimizer == "sgd":
        weights = torch.optim.SGD(weight_groups, lr=learning_rate, momentum=momentum)
    elif weight_optimizer == "adamw":
        weights = torch.optim.AdamW(weight_groups, lr=learning_rate, betas=adam_betas, eps=adam_epsilon)
    else:
        raise ValueError(f"got weight_optimizer={weight_optimizer!r}, expected 'sgd' or 'adamw'")
    # A hundred tensors of one value each: all in one call, or Adam costs as much as a layer.
    fused = all(p.device.type in ("cpu", "cuda") for p in scale_parameters)
    return OscQATOptimizer(weights, Adam(scale_parameters, lr=scale_learning_rate, fused=fused), scales_to_bound)
