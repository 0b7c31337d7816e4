"""The learned quantizer: a grid whose scale, and zero-point where it has one, are trained with the network.

Freezing lives here because it belongs to the integers and not to the latent weights: a frozen weight keeps its
integer whatever weight decay and momentum do to the latent value, and the scale goes on learning from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import (
    Activation,
    broadcast_to_axis,
    fake_quantize,
    frozen_dtype,
    grid_zero,
    is_frozen,
    live_sentinel,
    lsq_gradient_scale,
    positive_scale,
    to_int,
)
from hf_oscqat.quantization.gradient_estimators import (
    STRAIGHT_THROUGH,
    GradientEstimator,
    make_gradient_estimator,
)


class Quantizer(nn.Module):
    """Fake-quantizes one tensor with a learned scale and, where asymmetric, a learned zero-point.

    The scale is NaN until `set_range` gives it a value: a quantizer that was never calibrated refuses to run.

    Args:
        num_bits: width of an integer, 2 to 8.
        symmetric: whether 0.0 is the integer 0; otherwise the grid is `[0, 2**num_bits - 1]` with a zero-point.
        signed: whether a symmetric grid reaches below 0. None lets the data decide in `set_range`; until then, and in
            an asymmetric grid, nothing is below 0.
        channels: number of scales, along `axis`; None for one scale.
        axis: channel dimension of what is quantized.
        lsq_gradient_scaling: whether the gradients of scale and zero-point carry LSQ's `1 / sqrt(count * qmax)`.
        gradient_estimator: how the gradient passes through the rounding, by name or with settings of its own.
        range_estimator: how `calibrate` finds the initial range.
        device: where the parameters are made.
        dtype: their dtype, float32 or wider.

    Attributes:
        scale: parameter, `(1,)` or `(channels,)`, float32 or wider whatever the model is cast to.
        zero_point: parameter like `scale`, or None.
        frozen_int: buffer shaped like the weight once `allow_freezing` was called, else None.
        calibrated: whether the scale has a value.
    """

    zero_point: nn.Parameter | None
    frozen_int: Tensor | None
    signed: Tensor | None

    def __init__(
        self,
        num_bits: int,
        *,
        symmetric: bool = True,
        signed: bool | None = None,
        channels: int | None = None,
        axis: int = 0,
        lsq_gradient_scaling: bool = False,
        gradient_estimator: str | GradientEstimator = "ste",
        range_estimator: str = "mse",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.symmetric = symmetric
        self.axis = axis
        self.per_channel = channels is not None
        self.lsq_gradient_scaling = lsq_gradient_scaling
        if isinstance(gradient_estimator, str):
            gradient_estimator = make_gradient_estimator(gradient_estimator)
        self.gradient_estimator = gradient_estimator
        self.range_estimator = range_estimator
        self.calibrated = False
        self.has_frozen = False
        shape = (1 if channels is None else channels,)
        self._make_scale(torch.full(shape, torch.nan, device=device, dtype=dtype))
        if symmetric:
            self.register_parameter("zero_point", None)
        else:
            self.zero_point = nn.Parameter(torch.full(shape, torch.nan, device=device, dtype=dtype))
        # Which side of zero a symmetric grid covers is found in the data, so it must travel with the checkpoint; the
        # plain bool beside the buffer spares every forward pass a look at the device.
        self._is_signed = bool(signed) and symmetric
        found_in_data = symmetric and signed is None
        self.register_buffer("signed", torch.zeros(1, dtype=torch.uint8, device=device) if found_in_data else None)
        self.register_buffer("frozen_int", None)

    @property
    def is_signed(self) -> bool:
        """Whether the grid reaches below 0."""
        return self._is_signed

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return -(2 ** (self.num_bits - 1)) if self._is_signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return self.qmin + 2**self.num_bits - 1

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor | None = None, *, signed: bool | None = None) -> None:
        """Give the grid its initial values.

        Args:
            scale: positive and finite, `(1,)` or `(channels,)`, or broadcastable to it.
            zero_point: like `scale`; wanted exactly where the quantizer is asymmetric.
            signed: whether the data has values below 0; needed where the constructor left it open.

        Raises:
            ValueError: if a scale is not positive and finite, or zero_point or signed is missing or not wanted.
        """
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"got scale {scale.flatten().tolist()[:8]}, expected finite positive numbers")
        if (zero_point is None) != self.symmetric:
            wanted = "no zero_point: the grid is symmetric" if self.symmetric else "a zero_point: it is asymmetric"
            raise ValueError(f"got zero_point={zero_point!r}, expected {wanted}")
        if self.signed is not None:
            if signed is None:
                raise ValueError("got signed=None, expected True or False: this symmetric grid learns it from data")
            self.signed.fill_(int(signed))
            self._is_signed = signed
        self._fill_scale(scale.reshape(-1).expand_as(self.scale))
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point.reshape(-1).expand_as(self.zero_point))
        self.calibrated = True

    def allow_freezing(self, like: Tensor) -> Tensor:
        """Give the weights of this quantizer a place for frozen integers; does nothing if they have one.

        Args:
            like: the latent weight.

        Returns:
            `frozen_int`, shaped like the weight, `live_sentinel` everywhere when new.
        """
        if self.frozen_int is None:
            dtype = frozen_dtype(self.num_bits)
            self.frozen_int = torch.full_like(like, live_sentinel(dtype), dtype=dtype, requires_grad=False)
        return self.frozen_int

    def to_int(self, x: Tensor) -> Tensor:
        """Integers of `x` on this grid, frozen ones included; see `functional.to_int`."""
        grid = (self.scale, self.zero_point, self.qmin, self.qmax)
        return to_int(x, *grid, axis=self.axis, frozen_int=self.frozen_if_any)

    @torch.no_grad()
    def to_real(self, x_int: Tensor) -> Tensor:
        """Real values of integers of this grid, `scale * (x_int - zero_point)`; no gradient."""
        scale = positive_scale(self.scale, self.scale.dtype, x_int.ndim, self.axis)
        if self.zero_point is None:
            return x_int * scale
        return (x_int - self._grid_zero(x_int.ndim)) * scale

    def to_grid(self, x: Tensor) -> Tensor:
        """Where `x` lies between the integers of this grid: `x / scale + zero_point`, neither rounded nor clamped."""
        position = x / positive_scale(self.scale, self.scale.dtype, x.ndim, self.axis)
        if self.zero_point is None:
            return position
        return position + self._grid_zero(x.ndim)

    def _grid_zero(self, ndim: int) -> Tensor:
        assert self.zero_point is not None
        return grid_zero(broadcast_to_axis(self.zero_point, ndim, self.axis), self.qmin, self.qmax)

    @property
    def rounds_at_random(self) -> bool:
        """Whether a forward in the present mode draws random numbers."""
        return self.training and self.gradient_estimator.is_random

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """Fake-quantize `x`.

        Args:
            x: any shape; its dimension `axis` has as many entries as there are scales, where there are several.
            activation: bounds to clamp `x` to first; see `fake_quantize`.

        Returns:
            Tensor shaped and typed like `x`.

        Raises:
            RuntimeError: if the quantizer was never calibrated.
        """
        if not self.calibrated and not self.scale.is_meta:
            self.refresh()  # some models read weights while they are being loaded
        if not self.calibrated:
            raise RuntimeError(
                "this quantizer has no range yet: run hf_oscqat.calibrate(model, batches) before the model is used"
            )
        at_nearest = self.gradient_estimator.is_random and not self.rounds_at_random
        gradient_scale = lsq_gradient_scale(x, self.scale, self.qmax) if self.lsq_gradient_scaling else 1.0
        return fake_quantize(
            x,
            self.scale,
            self.zero_point,
            self.qmin,
            self.qmax,
            axis=self.axis,
            frozen_int=self.frozen_if_any,
            gradient_scale=gradient_scale,
            gradient_estimator=STRAIGHT_THROUGH if at_nearest else self.gradient_estimator,
            activation=activation,
        )

    def refresh(self) -> None:
        """Read the plain attributes anew from the tensors; called after something else has filled them."""
        if self.signed is not None:
            self._is_signed = bool(self.signed.item())
        self.calibrated = bool(torch.isfinite(self.scale).all())
        # What was looked at before still is: see `__setstate__`.
        frozen_int = self.frozen_int
        self.has_frozen = frozen_int is not None and (self.has_frozen or bool(is_frozen(frozen_int).any()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Averages of weights (EMA) write into the tensors of their copy, which therefore looks at frozen integers in
        # every forward.
        self.has_frozen = self.frozen_int is not None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        granularity = "per_channel" if self.per_channel else "per_tensor"
        return f"num_bits={self.num_bits}, qmin={self.qmin}, qmax={self.qmax}, {granularity}"

    def _make_scale(self, values: Tensor) -> None:
        self.scale = nn.Parameter(values)

    def _fill_scale(self, values: Tensor) -> None:
        self.scale.copy_(values)

    @property
    def frozen_if_any(self) -> Tensor | None:
        """`frozen_int` where a weight is frozen; otherwise None, which costs no forward a look at it."""
        return self.frozen_int if self.has_frozen else None

    def check_frozen(self, frozen_int: Tensor) -> None:
        """Refuse frozen integers that come from a grid of another width.

        Raises:
            ValueError: if their dtype is not that of this grid, or one of them lies outside of it.
        """
        expected = frozen_dtype(self.num_bits)
        outside = is_frozen(frozen_int) & ((frozen_int < self.qmin) | (frozen_int > self.qmax))
        if frozen_int.dtype != expected or bool(outside.any()):
            raise ValueError(
                f"got frozen integers in {frozen_int.dtype}, {int(outside.sum())} of them outside of the grid, "
                f"expected {expected} in [{self.qmin}, {self.qmax}]: they are of a grid of another width"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.scale.is_meta:
            return
        self.refresh()
        loaded = state_dict.get(f"{prefix}frozen_int")
        if loaded is not None and self.frozen_int is not None:
            self.check_frozen(loaded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)


class LogScaleQuantizer(Quantizer):
    """A quantizer that learns the logarithm of its scale: `scale = 2 ** log2_scale`.

    No step of the optimizer makes the scale negative, and each changes it by a share of itself: with Adam by about
    `0.69 * learning_rate`, where a linear scale s changes by about `learning_rate / s`. So take a larger rate than for
    linear scales, some 1e-3 where those have 1e-5. For the gradient of the linear quantizer,
    `dL/dlog2_scale = dL/dscale * scale * ln(2)`.

    Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep
    Neural Networks" (MLSys 2020), sec. 3.3; without their restriction to powers of two.

    Attributes:
        log2_scale: parameter in place of `scale`, `(1,)` or `(channels,)`.
    """

    log2_scale: nn.Parameter

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Step of the grid, differentiable in `log2_scale`."""
        return torch.exp2(self.log2_scale)

    def _make_scale(self, values: Tensor) -> None:
        self.log2_scale = nn.Parameter(values)

    def _fill_scale(self, values: Tensor) -> None:
        self.log2_scale.copy_(values.log2())
