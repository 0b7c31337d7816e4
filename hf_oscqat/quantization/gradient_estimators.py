"""How a gradient passes through rounding: the straight-through estimator and the alternatives to it.

Rounding has slope 0 almost everywhere, so training replaces its slope. All estimators here work in grid units,
`u = x / scale`, where neighbouring integers are 1 apart, and differ in two things only: the slope that they put in
place of 0, and, for the random ones, what they round to while training.

One that only changes the slope changes the gradient's size and not its sign, so a weight is still driven back and
forth across the threshold between two integers (Nagel et al., ICML 2022, sec. 2.2); `oscqat study toy` shows it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GradientEstimator:
    """The straight-through estimator: rounding has slope 1.

    Formula: `dL/du = g`, for an upstream gradient g with respect to the rounded value.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432).

    Attributes:
        name: its key in `GRADIENT_ESTIMATORS` and in the config.
        for_inputs: whether it is used for the inputs of layers too; otherwise those are straight-through.
    """

    name: ClassVar[str] = "ste"
    for_inputs: ClassVar[bool] = True

    # By all attributes, fields or not, because kernels are made for an estimator and found again by it.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    def noise(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Draw what a random estimator needs for one forward pass, shaped like `x`; None for the others."""
        return None

    def round(self, u: Tensor, noise: Tensor | None) -> Tensor:
        """Round `u`, given in grid units, into a new tensor; where noise is equal, in the order of the values."""
        return u.round()

    def slope(self, residual: Tensor, grad: Tensor, levels: int) -> Tensor | None:
        """Slope in place of that of rounding.

        Args:
            residual: `u - round(u)`, in [-0.5, 0.5].
            grad: upstream gradient with respect to the real value, same shape.
            levels: steps of the grid, `qmax - qmin`.

        Returns:
            A factor on the gradient, same shape; None for 1.
        """
        return None

    @property
    def has_slope(self) -> bool:
        """Whether the slope is ever another than 1."""
        return type(self).slope is not GradientEstimator.slope

    @property
    def is_random(self) -> bool:
        """Whether training rounds at random; evaluation, tracking and packing never do."""
        return type(self).noise is not GradientEstimator.noise


@dataclass(frozen=True, eq=False)
class EWGS(GradientEstimator):
    """Element-wise gradient scaling: larger where the step leads towards the integer, smaller where it leads away.

    Formula: `dL/du = g * (1 + delta * sign(g) * (u - round(u)))`.

    Units: the paper normalises values to [0, 1] before it rounds, so that neighbouring levels are `1 / (2**bits - 1)`
    apart. Its delta is `(2**bits - 1)` times that of grid units: `delta_grid = delta_unit / (2**bits - 1)`. With
    `units="unit_interval"` the paper's number is taken and converted here. The paper also re-estimates delta from the
    Hessian each epoch; here it is fixed, which the paper offers too (1e-3, unit interval).

    Args:
        scaling_factor: delta, at least 0; the default is that of the published code of Nagel et al., in grid units.
        units: "integer" (grid units) or "unit_interval".

    Raises:
        ValueError: if a value is out of range.

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling" (CVPR 2021), eq. 5.
    """

    name = "ewgs"
    scaling_factor: float = 0.2
    units: str = "integer"

    def __post_init__(self) -> None:
        _check_number("ewgs scaling_factor", self.scaling_factor, minimum=0)
        if self.units not in ("integer", "unit_interval"):
            raise ValueError(f"got ewgs units={self.units!r}, expected 'integer' or 'unit_interval'")

    def slope(self, residual: Tensor, grad: Tensor, levels: int) -> Tensor:
        """See the class."""
        delta = self.scaling_factor if self.units == "integer" else self.scaling_factor / levels
        return 1 + delta * grad.sign() * residual


@dataclass(frozen=True, eq=False)
class StackedSigmoid(GradientEstimator):
    """The slope of a staircase of sigmoids, each scaled to lead exactly from one integer to the next.

    Formula: with `t = u - floor(u)` and the logistic function S,
    `slope = a * S'(a * (t - 1/2)) / (S(a / 2) - S(-a / 2))`; its mean over a bin is 1.

    Args:
        alpha: steepness a, not 0; its sign does not matter. Near 0 it is the straight-through estimator.

    Raises:
        ValueError: if `alpha` is 0 or not finite.

    Source: published code of Nagel et al. (ICML 2022), whose default is 1. It is `dsq` with k = a / 2.
    """

    name = "stacked_sigmoid"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_number("stacked_sigmoid alpha", self.alpha)
        if self.alpha == 0:
            raise ValueError("got stacked_sigmoid alpha=0, expected another number: use 'ste' for a slope of 1")

    def slope(self, residual: Tensor, grad: Tensor, levels: int) -> Tensor:
        """See the class."""
        return _staircase_slope(residual, abs(self.alpha) / 2)


@dataclass(frozen=True, eq=False)
class DSQ(GradientEstimator):
    """Differentiable soft quantization: the slope of a staircase of hyperbolic tangents; forward rounds.

    Formula: with `t = u - floor(u)`, `phi(t) = tanh(k * (t - 1/2)) / tanh(k / 2)` leads from -1 to 1 across a bin, and
    `slope = phi'(t) / 2 = k / (2 * tanh(k / 2)) / cosh(k * (t - 1/2))**2`.

    Args:
        k: steepness in grid units, above 0. The paper's alpha gives `k = log(2 / alpha - 1)`; the default is that of
            alpha = 0.2. The paper learns alpha and the clipping range; here k is fixed and the scale is learned.

    Raises:
        ValueError: if `k` is not positive and finite.

    Source: Gong et al., "Differentiable Soft Quantization" (ICCV 2019), sec. 3.2.
    """

    name = "dsq"
    k: float = math.log(9.0)

    def __post_init__(self) -> None:
        _check_number("dsq k", self.k, minimum=0)
        if self.k == 0:
            raise ValueError("got dsq k=0, expected a positive number: use 'ste' for a slope of 1")

    def slope(self, residual: Tensor, grad: Tensor, levels: int) -> Tensor:
        """See the class."""
        return _staircase_slope(residual, self.k)


@dataclass(frozen=True, eq=False)
class PSG(GradientEstimator):
    """Position-based scaled gradient: the smaller, the nearer a weight is to its integer.

    Formula: `slope = strength * (|u - round(u)| + epsilon)`.

    Units: the paper measures the distance in weight units, with a factor lambda_s: `strength = lambda_s * scale`. The
    default gives a mean slope of 1 over a bin. The paper uses it in float training, before rounding; here, as in
    comparisons with it, forward rounds. Used for weights only, since inputs are not what is trained.

    Args:
        strength: factor, above 0.
        epsilon: what is left of the gradient of a weight exactly on an integer, at least 0, in grid units.

    Raises:
        ValueError: if a value is out of range.

    Source: Kim et al., "Position-based Scaled Gradient for Model Quantization and Pruning" (NeurIPS 2020), sec. 3.
    """

    name = "psg"
    for_inputs = False
    strength: float = 4.0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        _check_number("psg strength", self.strength, minimum=0)
        _check_number("psg epsilon", self.epsilon, minimum=0)
        if self.strength == 0:
            raise ValueError("got psg strength=0, expected a positive number: nothing would be trained")

    def slope(self, residual: Tensor, grad: Tensor, levels: int) -> Tensor:
        """See the class."""
        return self.strength * (residual.abs() + self.epsilon)


@dataclass(frozen=True, eq=False)
class StochasticRounding(GradientEstimator):
    """Round up with the probability of the remainder while training; straight-through gradient.

    Formula: `floor(u + xi)` with xi uniform in [0, 1), so that its mean is u; slope 1.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision" (ICML 2015), sec. 3.1.
    """

    name = "stochastic_rounding"

    def noise(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw xi."""
        return torch.rand_like(x, dtype=dtype)

    def round(self, u: Tensor, noise: Tensor | None) -> Tensor:
        """Round up or down at random."""
        return u.round() if noise is None else (u + noise).floor()


@dataclass(frozen=True, eq=False)
class AdditiveNoise(GradientEstimator):
    """Add what rounding would, as noise, instead of rounding while training; the gradient is exact.

    Formula: `u + xi` with xi uniform in [-0.5, 0.5); slope 1. The range still clamps.

    Source: Defossez et al., "Differentiable Model Compression via Pseudo Quantization Noise" (TMLR 2022), eq. 4.
    """

    name = "additive_noise"

    def noise(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw xi."""
        return torch.rand_like(x, dtype=dtype) - 0.5

    def round(self, u: Tensor, noise: Tensor | None) -> Tensor:
        """Add the noise."""
        return u.round() if noise is None else u + noise


GRADIENT_ESTIMATORS: dict[str, type[GradientEstimator]] = {
    estimator.name: estimator
    for estimator in (GradientEstimator, EWGS, StackedSigmoid, DSQ, PSG, StochasticRounding, AdditiveNoise)
}
"""Names that `gradient_estimator` takes: how a gradient passes through the rounding."""

STRAIGHT_THROUGH = GradientEstimator()


def make_gradient_estimator(name: str, args: Mapping[str, Any] | None = None) -> GradientEstimator:
    """Make an estimator from its name and arguments.

    Raises:
        ValueError: if the name or an argument is unknown, or a value out of range; valid ones are listed.
    """
    if name not in GRADIENT_ESTIMATORS:
        raise ValueError(f"got gradient_estimator={name!r}, expected one of {', '.join(GRADIENT_ESTIMATORS)}")
    cls = GRADIENT_ESTIMATORS[name]
    if not args:
        return cls()
    valid = [f.name for f in fields(cls)]
    for key in args:
        if key not in valid:
            raise ValueError(
                f"got argument {key!r} for gradient_estimator={name!r}, expected {', '.join(valid) or 'none'}"
            )
    return cls(**args)


def _staircase_slope(residual: Tensor, k: float) -> Tensor:
    from_threshold = 0.5 - residual.abs()
    return k / (2 * math.tanh(k / 2)) / torch.cosh(k * from_threshold).square()


def _check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value >= minimum):
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"got {name}={value!r}, expected a finite number{bound}")
