"""Uniform quantization of one tensor, with the gradients of learned step size quantization (LSQ).

Everything else in the package that needs the integer of a value asks `to_int`: the forward pass, the oscillation
tracker, dampening and packing therefore cannot disagree about where a value is rounded to.

The gradients are those of Esser et al., "Learned Step Size Quantization" (ICLR 2020, eq. 3) with a learned zero-point.
The in-range mask is computed here and not left to `clamp`, whose gradient at its own bounds changed in torch 2.15.

Forward and backward are defined once, in `quantize` and `quantize_backward`. Eager mode runs them in one pass over
memory (`kernels.py`); torch.compile, torch.export and torch.func trace them as they are.
"""

import math
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_oscqat.quantization.gradient_estimators import STRAIGHT_THROUGH, GradientEstimator, make_gradient_estimator
from hf_oscqat.quantization.kernels import in_transform, is_traced, one_pass

Activation = tuple[float, float]
"""Smallest and largest value that an activation lets through: `(0.0, 6.0)` for ReLU6, `(0.0, inf)` for ReLU."""

MIN_SCALE = 1e-8
"""Every computation takes scales at or above this, whatever an optimizer made of them."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_axis(layer: nn.Module) -> int:
    """Dimension of a layer's weight that counts output channels: 1 for transposed convolutions, else 0.

    The weight of a transposed convolution in groups is `[in, out / groups, ..]`: channel i of every group shares an
    entry. A depthwise one has a channel for each entry of dimension 0.
    """
    if not isinstance(layer, TRANSPOSED):
        return 0
    return 0 if layer.groups == layer.in_channels == layer.out_channels else 1


def frozen_dtype(num_bits: int) -> torch.dtype:
    """Smallest integer dtype that holds every integer of `num_bits` and one sentinel besides."""
    return torch.int8 if num_bits < 8 else torch.int16


def live_sentinel(dtype: torch.dtype) -> int:
    """Value that marks a weight as not frozen in a tensor of frozen integers of this dtype."""
    return torch.iinfo(dtype).min


def is_frozen(frozen_int: Tensor) -> Tensor:
    """Boolean mask of the weights that hold a frozen integer."""
    return frozen_int != live_sentinel(frozen_int.dtype)


def broadcast_to_axis(parameter: Tensor, ndim: int, axis: int) -> Tensor:
    """View a scale or zero-point so that it broadcasts against a tensor with `ndim` dimensions.

    Args:
        parameter: 0-d or `(1,)` for one value per tensor, `(channels,)` for one per channel along `axis`, or already
            of `ndim` dimensions.
        ndim: number of dimensions of the tensor to be quantized.
        axis: its channel dimension.

    Returns:
        A view of `parameter`.
    """
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.ndim == ndim:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def positive_scale(scale: Tensor, dtype: torch.dtype, ndim: int, axis: int) -> Tensor:
    """The scale as it is computed with: `MIN_SCALE` at least, in this dtype, broadcasting; see `broadcast_to_axis`."""
    return broadcast_to_axis(scale.to(dtype).clamp(min=MIN_SCALE), ndim, axis)


def grid_zero(zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integer that stands for 0.0: a learned zero-point, rounded and clamped to the grid; shaped like it."""
    return zero_point.round().clamp(qmin, qmax)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """At least float32, because bfloat16 cannot tell neighbouring integers of 8 bits apart after the division."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def to_int(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    *,
    axis: int = 0,
    frozen_int: Tensor | None = None,
) -> Tensor:
    """Integers of `x` on the grid: `clamp(round(x / scale) + zero_point, qmin, qmax)`, or the frozen integer.

    Args:
        x: values, any shape and floating dtype.
        scale: step of the grid, positive; `(1,)` or `(channels,)`.
        zero_point: integer that stands for 0.0, shaped like `scale`; a float is rounded and clamped to the grid.
            None for a symmetric grid.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        axis: channel dimension of `x`, used where `scale` has one value per channel.
        frozen_int: integers of frozen weights, shaped like `x`, with `live_sentinel` where a weight is not frozen.

    Returns:
        Whole numbers in `[qmin, qmax]`, shaped like `x`, float32 or wider. No gradient.
    """
    with torch.no_grad():
        return _round_to_grid(x, scale, zero_point, qmin, qmax, axis, frozen_int, torch.round_, None)


def _round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    frozen_int: Tensor | None,
    rounding: Callable[[Tensor], Tensor],
    activation: Activation | None,
    out: Tensor | None = None,
) -> Tensor:
    """See `to_int`; an activation is clamped to in passing, by a `rounding` that keeps the order of values."""
    dtype = _compute_dtype(x, scale)
    s = positive_scale(scale, dtype, x.ndim, axis)
    x_int = rounding(torch.div(x.to(dtype), s, out=out))
    zero = None if zero_point is None else grid_zero(broadcast_to_axis(zero_point.to(dtype), x.ndim, axis), qmin, qmax)
    if zero is not None:
        x_int += zero
    # In place only on request: torch.func.vmap has no rule for that.
    if activation is None:
        x_int = torch.clamp(x_int, qmin, qmax, out=out)
    else:
        # The integers of its bounds are bounds of the integers: division and rounding keep the order, too.
        # (A number divided by a tensor is multiplied by its reciprocal, which rounds twice.)
        low, high = (rounding(torch.full_like(s, bound, dtype=x.dtype).to(dtype) / s) for bound in activation)
        low, high = ((at if zero is None else at + zero).clamp(qmin, qmax) for at in (low, high))
        if torch.compiler.is_compiling() and low.is_cpu and low.numel() == 1:
            # Told to take the smaller and the larger of two, torch's compiler finds them once on a CPU, where it would
            # divide and round them for each value. (On a GPU that is free, and these would be two more kernels.)
            both = torch.stack([low, high])
            low, high = both.amin(0), both.amax(0)
        # On a CPU a clamp to tensors takes four times as long as these two.
        x_int = torch.minimum(torch.maximum(x_int, low, out=out), high, out=out)
    return x_int if frozen_int is None else _replace_frozen(x_int, frozen_int)[0]


def _replace_frozen(x_int: Tensor, frozen_int: Tensor) -> tuple[Tensor, Tensor]:
    """Put frozen integers in their places; also return 1 where a weight is live and 0 where it is frozen.

    Masks in here and in `quantize_backward` are numbers, because on a CPU torch is several times slower with booleans.
    """
    live = frozen_int.clone().eq_(live_sentinel(frozen_int.dtype)).to(x_int.dtype)
    # Exact at both ends, also where an estimator adds noise and a live value is no whole number.
    return torch.lerp(frozen_int.to(x_int.dtype), x_int, live), live


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    *,
    axis: int = 0,
    frozen_int: Tensor | None = None,
    gradient_scale: float = 1.0,
    gradient_estimator: str | GradientEstimator = STRAIGHT_THROUGH,
    activation: Activation | None = None,
) -> Tensor:
    """Round `x` to a grid and back to real values; differentiable in `x`, `scale` and `zero_point`.

    With `w_int = to_int(x)`, `u = x / s` and `zero_point` z, forward is `s * (w_int - z)`. For an upstream gradient g
    and the estimator's slope k of rounding (1 for the straight-through one):

    ===================  ===========  =======================  ==============
    value                d/dx         d/dscale                 d/dzero_point
    ===================  ===========  =======================  ==============
    inside the grid      g * k        g * (round(u) - k * u)   0
    clamped              0            g * (w_int - z)          -g * s
    frozen               0            g * (w_int - z)          -g * s
    ===================  ===========  =======================  ==============

    A random estimator has its own `round(u)`, drawn anew in each call from torch's generator.

    Args:
        x: values, any shape and floating dtype; rounding happens in float32 or wider.
        scale: step of the grid, positive; `(1,)` or `(channels,)`.
        zero_point: None for a symmetric grid, else shaped like `scale`; a learned float, rounded straight-through.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        axis: channel dimension of `x`, used where `scale` has one value per channel.
        frozen_int: integers of frozen weights, with `live_sentinel` elsewhere; None if nothing is frozen.
        gradient_scale: factor on the gradients of `scale` and `zero_point`; `lsq_gradient_scale` gives LSQ's.
        gradient_estimator: one of `GRADIENT_ESTIMATORS`, by name or as an object with settings of its own.
        activation: first clamp `x` to these bounds, as the activation before the layer would, in the same pass; `x`
            then gets a gradient strictly between them only.

    Returns:
        Tensor shaped and typed like `x`.

    Raises:
        ValueError: if `gradient_estimator` is unknown, or `activation` has its bounds in the wrong order.

    Source: Esser et al. (ICLR 2020), eq. 2 to 4; freezing from Nagel et al. (ICML 2022), sec. 4.2.
    """
    if activation is not None and not activation[0] <= activation[1]:
        raise ValueError(f"got activation={activation!r}, expected its smallest value and then its largest")
    if isinstance(gradient_estimator, str):
        gradient_estimator = make_gradient_estimator(gradient_estimator)
    noise = gradient_estimator.noise(x, _compute_dtype(x, scale)) if gradient_estimator.is_random else None
    args = (x, scale, zero_point, frozen_int, noise, qmin, qmax, axis, gradient_scale, gradient_estimator, activation)
    if not torch.is_grad_enabled():
        return _quantized(*args)
    return (_TransformableFakeQuantize if in_transform() else _FakeQuantize).apply(*args)


def lsq_gradient_scale(x: Tensor, scale: Tensor, qmax: int) -> float:
    """LSQ's factor on the scale's gradient, `1 / sqrt(values per scale * qmax)` (Esser et al., sec. 2.2)."""
    return (max(1, x.numel() // scale.numel()) * qmax) ** -0.5


def quantize(
    tensors: Any,
    parameters: Any,
    bounds: Any,
    axis: int,
    estimator: GradientEstimator,
    activation: Activation | None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The forward pass of `fake_quantize`, as a function for `one_pass`.

    Args:
        tensors: `x`, frozen integers or None, noise or None.
        parameters: scale, zero-point or None.
        bounds: qmin and qmax.
        axis: channel dimension.
        estimator: how noise, if there is any, rounds.
        activation: clamp `x` to its bounds first.
        out: write there, in the dtype that is computed in.

    Returns:
        The values on the grid, typed like `x`.
    """
    x, frozen_int, noise = tensors
    scale, zero_point = parameters
    qmin, qmax = bounds
    rounding = torch.round_ if noise is None else partial(estimator.round, noise=noise)
    x_int = _round_to_grid(x, scale, zero_point, qmin, qmax, axis, frozen_int, rounding, activation, out)
    if zero_point is not None:
        x_int -= grid_zero(broadcast_to_axis(zero_point.to(x_int.dtype), x.ndim, axis), qmin, qmax)
    # Dynamo of torch 2.11 loses all gradients where an autograd function returns what was written in place or what a
    # cast without effect gave.
    y = torch.mul(x_int, positive_scale(scale, x_int.dtype, x.ndim, axis), out=out)
    return (y if y.dtype == x.dtype else y.to(x.dtype),)


def quantize_backward(
    tensors: Any,
    parameters: Any,
    bounds: Any,
    axis: int,
    estimator: GradientEstimator,
    activation: Activation | None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The backward pass of `fake_quantize`, as a function for `one_pass`; see the table there.

    Args:
        tensors: `x`, upstream gradient, frozen integers or None, noise or None.
        parameters: see `quantize`.
        bounds: qmin, qmax and the factor on the gradients of scale and zero-point.
        axis: see `quantize`.
        estimator: its slope stands in for that of rounding.
        activation: see `quantize`.
        out: write the gradient of `x` there, in the dtype that is computed in.

    Returns:
        Gradients of `x`, scale and, where there is one, zero-point.
    """
    x, grad_output, frozen_int, noise = tensors
    scale, zero_point = parameters
    qmin, qmax, factor = bounds
    dtype = _compute_dtype(x, scale)
    s = positive_scale(scale, dtype, x.ndim, axis)
    z = None if zero_point is None else broadcast_to_axis(zero_point.to(dtype), x.ndim, axis)
    grad = grad_output.to(dtype)

    clamped = x if activation is None else torch.clamp(x, *activation, out=out)
    u = clamped.to(dtype) / s
    rounded = estimator.round(u, noise)
    slope = estimator.slope(u - rounded, grad, qmax - qmin) if estimator.has_slope else None
    zero = None if z is None else grid_zero(z, qmin, qmax)
    position = rounded if zero is None else rounded.add_(zero)
    w_int = position.clamp(qmin, qmax)
    passes = position.eq_(w_int)
    if frozen_int is not None:
        w_int, live = _replace_frozen(w_int, frozen_int)
        passes *= live
    if zero is not None:
        w_int -= zero

    # Before the sums: torch's compiler makes one loop of the two in this order only.
    grad_x = torch.mul(grad, passes, out=out)
    if slope is not None:
        grad_x = torch.mul(grad_x, slope, out=out)
    if activation is not None:
        backward, within = torch.ops.aten.hardtanh_backward, (x.to(dtype), *activation)
        grad_x = backward(grad_x, *within) if out is None else backward.grad_input(grad_x, *within, grad_input=out)

    grad_zero_point: tuple[Tensor, ...] = ()
    if z is not None:
        on_grid = (z.round() >= qmin) & (z.round() <= qmax)
        of_zero = _sum_like(grad * (passes - 1) * s, s, zero_point, factor)
        grad_zero_point = (of_zero * on_grid.reshape(zero_point.shape),)
    # The difference is small and exact; that of the products would not be.
    own = None if out is None else w_int
    of_scale = torch.addcmul(w_int, passes if slope is None else passes * slope, u, value=-1, out=own)
    grad_scale = _sum_like(of_scale.mul_(grad), s, scale, factor)
    return (grad_x.to(x.dtype), grad_scale, *grad_zero_point)


def _sum_like(per_value: Tensor, broadcast: Tensor, parameter: Tensor, factor: Any) -> Tensor:
    """Sum over everything that one value of `parameter` was used for, times the factor."""
    return (per_value.sum_to_size(broadcast.shape) * factor).reshape(parameter.shape).to(parameter.dtype)


def _quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    frozen_int: Tensor | None,
    noise: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    gradient_scale: float,
    estimator: GradientEstimator,
    activation: Activation | None,
) -> Tensor:
    tensors, parameters, static = (x, frozen_int, noise), (scale, zero_point), (estimator, activation)
    return one_pass(quantize, tensors, parameters, (qmin, qmax), axis=axis, static=static)[0]


def taker_of_memory(rounded: Tensor) -> "weakref.ref[Any] | None":
    """Who can take memory from `leave_memory`: the quantizer's backward, if it is one of ours on a CPU.

    Args:
        rounded: what a quantizer returned.
    """
    node: Any = rounded.grad_fn
    is_ours = rounded.is_cpu and getattr(node, "_forward_cls", None) is _FakeQuantize
    # Weakly: a layer that detaches what it gets would otherwise keep everything that came before.
    return weakref.ref(node) if is_ours else None


def leave_memory(taker: "weakref.ref[Any] | None", rounded: Tensor) -> None:
    """Let a quantizer's backward write its gradient over what it rounded, once nobody else can see that.

    On a CPU new memory costs more than the arithmetic does.

    Args:
        taker: from `taker_of_memory`.
        rounded: what the quantizer returned, made once more for the layer's backward.
    """
    node = None if taker is None else taker()
    if node is not None and not is_traced(rounded):
        # A tensor of its own, so that whoever holds another one of this memory is counted.
        node._memory = rounded.data


def _is_seen(x: Tensor) -> bool:
    """Whether anybody else can see the memory of `x`: more is referred to than that of a new tensor."""
    return _references(x) > _references(torch.empty(1, device="cpu"))


def _references(x: Tensor) -> float:
    """How often the memory of `x` is referred to, by tensors and by names of its storage in Python."""
    storage = x.untyped_storage()
    # That of another library, or of another process besides, may be seen by those.
    if not storage.resizable() or storage.is_shared():
        return math.inf
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


class _FakeQuantize(torch.autograd.Function):
    """Keeps `x`, and noise if any, for backward; the rest is recomputed, which is cheaper than reading it back."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _FakeQuantize.keep(ctx, args)
        return _quantized(*args)

    @staticmethod
    def keep(ctx: Any, args: tuple[Any, ...]) -> None:
        *tensors, ctx.qmin, ctx.qmax, ctx.axis, ctx.gradient_scale, ctx.estimator, ctx.activation = args
        ctx._memory = None  # see `leave_memory`
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, frozen_int, noise = ctx.saved_tensors
        memory, ctx._memory = ctx._memory, None
        if memory is not None and (memory.stride() != x.stride() or _is_seen(memory)):
            memory = None
        grads = one_pass(
            quantize_backward,
            (x, grad_output, frozen_int, noise),
            (scale, zero_point),
            (ctx.qmin, ctx.qmax, ctx.gradient_scale),
            axis=ctx.axis,
            static=(ctx.estimator, ctx.activation),
            memory=memory,
        )
        return (*grads, *[None] * (11 - len(grads)))


class _TransformableFakeQuantize(_FakeQuantize):
    """The same in the form that torch.func asks for, with which torch inspects signatures in each call (40 us)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _quantized(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _FakeQuantize.keep(ctx, inputs)
