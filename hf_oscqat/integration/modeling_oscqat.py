"""Loads a packed low-bit timm model; made from the source of the hf_oscqat package, not to be edited.

It needs torch, timm, transformers and safetensors, and nothing else. With `import hf_oscqat` it is not used.
"""

# ruff: noqa
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin
from types import FrameType, FunctionType
from typing import Any, ClassVar, NamedTuple, Self, cast
import base64
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import re
import sys
import tempfile
import threading
import torch
import torch.nn.functional as F
import weakref

# --- hf_oscqat.quantization.gradient_estimators
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


# --- hf_oscqat.quantization.kernels
logger = logging.getLogger(__name__)

SMALL = 2**10
"""Values below which, on a CPU, a call of a compiled kernel costs as much as a dozen operations do."""
CHUNK = 2**17
"""Values of a chunk for each thread: temporaries fit into the cache, and starting an operation counts for little."""
MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
"""What is at work where `make_fx` traces with values."""
MAX_CALLS = 2**12
"""Kinds of calls that are remembered."""
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., tuple[Tensor, ...]]
"""`function(tensors, parameters, bounds, axis, *static)`: tensors of one shape (or None), parameters with one value or
one per channel along `axis` (or None), numbers. Returns first what is shaped like the tensors, then sums over
whatever one value of a parameter was used for. It may also write into the tensors. One that returns something shaped
like the tensors also takes `out`, for the first of its results; see `_in_chunks`."""


def one_pass(
    function: Function,
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    *,
    axis: int = 0,
    static: tuple[Any, ...] = (),
    shaped: int = 1,
    in_place: bool = False,
    memory: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a `Function`. There is no gradient: call it without gradients, as in the methods of an autograd function.

    Args:
        function: defined at the top level of a module.
        tensors: of one shape and device; the first decides how it is run.
        parameters: `(1,)`, or `(channels,)` along `axis`.
        bounds: numbers that the function takes; other numbers need no other kernel.
        axis: channel dimension.
        static: further arguments, hashable; other ones need another kernel.
        shaped: how many outputs are shaped like the tensors; the others are sums.
        in_place: whether the function writes into the tensors.
        memory: a tensor that nobody needs any more, for a compiled kernel to write an output to; see `_lent`.

    Returns:
        What the function returns.
    """
    first = tensors[0]
    assert first is not None
    if is_traced(first):  # asked first: a question about the size would tie a traced graph to it
        return function(tensors, parameters, bounds, axis, *static)
    is_small = first.is_cpu and first.numel() < SMALL
    kind = None
    if _enabled and not is_small and first.dtype in FUSED_DTYPES:
        kind = _kind_of_call((function, static, axis, shaped), tensors, parameters)
        call = _calls.get(kind)
        if call is not None:
            return call(tensors, parameters, bounds, memory)
    layout = None if is_small else _layout(first)
    # What is written to must not be a copy in another layout.
    copies = (
        in_place
        and layout is not None
        and not all(t is None or t.is_contiguous(memory_format=layout) for t in tensors)
    )
    if layout is None or copies:
        return function(tensors, parameters, bounds, axis, *static)
    per_channel = any(p is not None and p.numel() > 1 for p in parameters)
    if not _fit(first, tensors, parameters, axis if per_channel else None):
        return function(tensors, parameters, bounds, axis, *static)  # which says what is wrong
    views = [None if t is None else _view(t, layout, axis if per_channel else None) for t in tensors]
    outputs = None
    if is_compiled(first):
        outputs, launch = _compiled(function, static, views, parameters, bounds, per_channel)
        if launch is not None and all(t is None or t.is_contiguous(memory_format=layout) for t in tensors):
            seen = views[0]
            assert seen is not None
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            # Strides as the other ways give them, because torch chooses a convolution's layout by them.
            stride = _unview(seen, first.shape, layout).stride()
            seen_stride = None if all(map(_is_own, static)) else seen.stride()
            _calls[kind] = _Call(launch, seen.shape, seen_stride, first.shape, stride, first.device, shaped)
    if outputs is None and first.is_cpu and not per_channel and first.numel() > chunk_size():
        outputs = _in_chunks(function, static, views, parameters, bounds, shaped)
    if outputs is None:
        return function(tensors, parameters, bounds, axis, *static)
    return (*(_unview(output, first.shape, layout) for output in outputs[:shaped]), *outputs[shaped:])


def is_compiled(x: Tensor) -> bool:
    """Whether functions over large tensors like `x` are run by compiled kernels, as far as is known yet."""
    return _enabled and x.device.type not in _without_compiler and x.dtype in FUSED_DTYPES


def is_traced(x: Tensor) -> bool:
    """Whether `x` is a stand-in that somebody traces with, and not values in memory."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or in_transform()
        or torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(MAKE_FX) is not None
    )


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


# --- One shape for all: values in a row, or in rows per channel ---


def _fit(
    first: Tensor, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor | None], axis: int | None
) -> bool:
    """Whether all have the sizes, the device and the values that kernels, which see addresses, take for granted."""
    sizes = (1,) if axis is None else (1, first.shape[axis])
    return all(
        t is None or (t.shape == first.shape and t.device == first.device and not _is_lazy(t)) for t in tensors
    ) and all(p is None or (p.numel() in sizes and p.device == first.device and not _is_lazy(p)) for p in parameters)


def _is_lazy(x: Tensor) -> bool:
    """Whether memory does not hold the values of `x`, which torch negates, or makes of nothing, when they are read."""
    return x.is_neg() or x._is_zerotensor()


def _layout(x: Tensor) -> torch.memory_format | None:
    if x.dtype not in FUSED_DTYPES or x.device.type not in ("cpu", "cuda") or x.numel() == 0:
        return None
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _view(x: Tensor, layout: torch.memory_format, axis: int | None) -> Tensor:
    """See a dense tensor as `[values]` in the order of memory; with an axis, as `[outer, channels, inner]`."""
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    if layout is torch.channels_last:
        x = x.permute(0, 2, 3, 1)
        axis = None if axis is None else (0, 3, 1, 2)[axis]
    return x.view(-1) if axis is None else x.view(x.shape[:axis].numel(), x.shape[axis], -1)


def _unview(x: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    if layout is torch.contiguous_format:
        return x.view(shape)
    n, c, h, w = shape
    return x.view(n, h, w, c).permute(0, 3, 1, 2)


# --- Compiled ---

_kernels: dict[Any, "_Kernel"] = {}
_calls: dict[Any, "_Call"] = {}
_without_compiler: set[str] = set()
_enabled = os.environ.get("OSCQAT_FUSED_KERNELS", "1") != "0"


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Let torch's compiler in, or keep it out, for a while; the environment variable decides otherwise."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def _compiled(
    function: Function,
    static: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    per_channel: bool,
) -> tuple[tuple[Tensor, ...] | None, "_Launch | None"]:
    """Run the compiled function; None if it cannot be compiled, which is said once. Also return how to launch it."""
    first = tensors[0]
    assert first is not None
    device = first.device
    rows = [None if p is None else _row(p) for p in parameters]
    arguments = [*tensors, *rows, _on_device(bounds, device)]
    kinds = (
        *[None if a is None else a.dtype for a in arguments],
        *[None if p is None else p.numel() > 1 for p in rows],
    )
    key = (function, static, kinds, per_channel, device, torch.is_inference_mode_enabled())
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = _Kernel(function, static, len(tensors), int(per_channel))
    shape_class = _shape_class(first.shape)
    launch = kernel.launches.get(shape_class)
    if launch is not None:
        return launch(arguments, first.shape), launch
    from torch._dynamo import exc  # most of a second at first, which those who never train need not spend

    try:
        if shape_class is not None:
            # Compiled for sizes of ours: the compiler orders sums by the first size that it sees, and the bits of a
            # result must not depend on what a process has computed before.
            kernel(_examples(arguments, shape_class, len(tensors)))
            launch = kernel.launches.get(shape_class)
        if launch is None:
            return kernel(arguments), kernel.launches.get(shape_class)
        return launch(arguments, first.shape), launch
    except exc.FailOnRecompileLimitHit:
        return None, None  # too many kinds of shapes for one kernel; the others go on
    except exc.TorchDynamoException as error:
        _without_compiler.add(device.type)
        _calls.clear()
        logger.warning(
            "quantization goes on without compiled kernels, which makes training slower: install %s, or set "
            "OSCQAT_FUSED_KERNELS=0 to be told no more. torch.compile said: %s",
            "a C++ compiler" if device.type == "cpu" else "Triton",
            " ".join(str(error).split("\n\n")[0].split()),  # what failed, and why; then come hints
        )
        return None, None


def _is_own(value: object) -> bool:
    """Whether the class of something is Python's or this package's.

    A gradient estimator of somebody else may hand tensors to operators that torch's compiler calls as they are, and
    which look at a tensor's shape; what is written here becomes loops over memory.
    """
    return type(value).__module__.partition(".")[0] in ("builtins", __name__.partition(".")[0])


def _kind_of_call(
    what: tuple[Any, ...], tensors: Sequence[Tensor | None], parameters: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Everything that decides how `one_pass` makes a call, but for contents."""
    return (
        *what,
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride(), _is_lazy(t)) for t in tensors],
        *[None if p is None else (p.dtype, p.device, p.shape, _is_lazy(p)) for p in parameters],
    )


def _row(parameter: Tensor) -> Tensor:
    return parameter if parameter.ndim == 1 and parameter.is_contiguous() else parameter.reshape(-1).contiguous()


ShapeClass = tuple[int, ...]
"""What a kernel for any shape still depends on: which sizes are 1, which are equal, and for how many threads."""


def _shape_class(shape: torch.Size) -> ShapeClass | None:
    """The class of a shape; None where its values need 64 bits to count."""
    if shape.numel() >= 2**31:
        return None
    # Of a row only the length is left, and one of a single value is no row.
    if len(shape) == 1:
        return None if shape[0] == 1 else (torch.get_num_threads(),)
    return (torch.get_num_threads(), *[-1 if size == 1 else shape.index(size) for size in shape])


def _examples(arguments: Sequence[Tensor | None], shape_class: ShapeClass, num_tensors: int) -> list[Tensor | None]:
    """Arguments like these, of a size that depends on the class of the shape alone."""
    sizes = (96, 128, 160)
    shape = tuple(1 if place < 0 else sizes[place] for place in shape_class[1:]) or (2**16,)
    examples: list[Tensor | None] = []
    for i, argument in enumerate(arguments):
        if argument is None or i == len(arguments) - 1:
            examples.append(argument)
        elif i < num_tensors:
            examples.append(torch.zeros(shape, dtype=argument.dtype, device=argument.device))
        else:
            count = argument.numel() if argument.numel() == 1 else shape[1]
            examples.append(torch.ones(count, dtype=argument.dtype, device=argument.device))
    return examples


class _Launch:
    """What torch's compiler made for one class of shapes, called directly.

    Before each call torch.compile checks everything that a graph could depend on and passes through layers of its own,
    which takes 20 us, and twice that in a training step, where they have been pushed out of the cache: several times
    as long as a kernel takes for most weights. What a graph of `one_pass` can depend on is in the keys of `_kernels`
    and `_Kernel.launches`, so nothing is left to check.

    Args:
        run: takes a list of tensors and sizes, and returns tensors.
        order: where to find each: an argument's index, or -1 - the dimension for a size.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Tensor]], order: list[int]) -> None:
        self.run = run
        self.order = order

    def __call__(self, arguments: Sequence[Tensor | None], shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Run the kernel.

        Args:
            arguments: dense tensors with their values in the same order, rows of parameters, bounds.
            shape: of the tensors as the kernel sees them.
        """
        return tuple(self.run([arguments[i] if i >= 0 else shape[-1 - i] for i in self.order]))


class _Call(NamedTuple):
    """One kind of call, which `one_pass` makes anew without asking again what there is to know about its arguments.

    Attributes:
        launch: of the kernel.
        seen_shape: of the tensors as the kernel sees them; see `_view`.
        seen_stride: the same; None where the kernel goes through memory from where a tensor begins.
        shape: of the tensors as they are.
        stride: of the outputs that are shaped like them.
        device: where they are.
        shaped: see `one_pass`.
    """

    launch: _Launch
    seen_shape: Sequence[int]
    seen_stride: Sequence[int] | None
    shape: Sequence[int]
    stride: Sequence[int]
    device: torch.device
    shaped: int

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        parameters: Sequence[Tensor | None],
        bounds: tuple[float, ...],
        memory: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.seen_stride is not None:
            tensors = [None if t is None else t.as_strided(self.seen_shape, self.seen_stride) for t in tensors]
        rows = [None if p is None else _row(p) for p in parameters]
        arguments = (*tensors, *rows, _on_device(bounds, self.device))
        if memory is not None and _is_like(memory, self.shape, self.stride):
            outputs = _lend(memory, lambda: self.launch(arguments, self.seen_shape))
        else:
            outputs = self.launch(arguments, self.seen_shape)
        of_tensors = [output.as_strided(self.shape, self.stride) for output in outputs[: self.shaped]]
        return (*of_tensors, *outputs[self.shaped :])


# --- Memory of a compiled kernel's outputs ---


class _Lent(threading.local):
    """Memory that the kernel which this thread runs may take for an output."""

    memory: Tensor | None = None


_lent = _Lent()


def _lend(memory: Tensor, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run a kernel that may write an output to a dense tensor, which is lost."""
    _lent.memory = memory
    try:
        return run()
    finally:
        _lent.memory = None


def _is_like(memory: Tensor, shape: Sequence[int], stride: Sequence[int]) -> bool:
    return memory.shape == shape and memory.stride() == stride and not _is_lazy(memory)


def _allocate(
    new_memory: Callable[..., Tensor], size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Memory for a row of values: what was lent, where it fits, or else new."""
    memory = _lent.memory
    if memory is None or memory.dtype is not dtype or size != (memory.numel(),) or stride != (1,):
        return new_memory(size, stride, dtype)
    _lent.memory = None
    return memory.as_strided(size, stride)


def _let_allocate(run: Any) -> None:
    """Let what the compiler wrote for a CPU take its memory from `_allocate`.

    Told to write into an argument, the compiler makes two loops of one. Where it names things otherwise than we know,
    all memory is new.
    """
    names = getattr(getattr(run, "current_callable", None), "__globals__", {})
    new_memory = names.get("empty_strided_cpu")
    if new_memory is not None and not isinstance(new_memory, functools.partial):
        names["empty_strided_cpu"] = functools.partial(_allocate, new_memory)


class _Kernel:
    """One function compiled for tensors of some kind and any shape."""

    def __init__(self, function: Function, static: tuple[Any, ...], num_tensors: int, axis: int) -> None:
        def kernel(*arguments: Any) -> tuple[Tensor, ...]:
            return function(arguments[:num_tensors], arguments[num_tensors:-1], arguments[-1], axis, *static)

        # Dynamo gives up on a code object that it had to compile too often, so each kernel gets one of its own.
        code = kernel.__code__.replace(co_name=f"{function.__name__}_{len(_kernels)}")
        own = FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
        self.compiled = torch.compile(own, dynamic=True, fullgraph=True, backend=self._compile)
        self.launches: dict[ShapeClass | None, _Launch] = {}
        self._calls: list[tuple[Any, list[Any], Sequence[Tensor]]] = []

    def __call__(self, arguments: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Run it, compiling it if need be, and remember how the next call gets around torch.compile."""
        self._calls = []
        # With `data` nothing is a view to torch, whose compiler would make a kernel for each shape of what it views.
        arguments = [None if a is None else a.detach().data for a in arguments]
        # Numbers in `static` are to be constants of the kernel; made dynamic, they would be arguments of it.
        with torch._dynamo.config.patch(specialize_float=True):
            outputs = self.compiled(*arguments)
        calls, self._calls = self._calls, []
        first = arguments[0]
        assert first is not None
        shape_class = _shape_class(first.shape)
        if shape_class is not None and len(calls) == 1:
            run, inputs, results = calls[0]
            order = _order(inputs, arguments, first.shape)
            if order is not None and len(results) == len(outputs) and all(map(_is_same, results, outputs)):
                self.launches[shape_class] = _Launch(run, order)
        return outputs

    def _compile(self, graph: Any, example_inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        # What comes from this cache is not shown to `inner_compile`; the kernels themselves have one of their own.
        # Division is to round as in eager mode, which Triton's does not by default: packing rounds in eager mode.
        # Sizes are not asserted in each call: they are in the keys, and tensors come in the shape that they have.
        options = {"eager_numerics.division_rounding": True, "size_asserts": False}
        with config.patch(enable_autograd_cache=False), inductor.patch(options):
            return compile_fx(graph, example_inputs, inner_compile=self._record)

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        run = compile_fx_inner(*args, **kwargs)
        _let_allocate(run)

        def recorded(inputs: list[Any]) -> Sequence[Tensor]:
            kept = list(inputs)  # it empties the list that it is given
            outputs = run(inputs)
            self._calls.append((run, kept, outputs))
            return outputs

        recorded._boxed_call = True  # type: ignore[attr-defined]
        return recorded


def _order(inputs: list[Any], arguments: Sequence[Tensor | None], shape: torch.Size) -> list[int] | None:
    """Where each input of a compiled graph is found among the arguments; None if one is not, or in two places."""
    order = []
    for value in inputs:
        if isinstance(value, Tensor):
            found = [i for i, a in enumerate(arguments) if a is not None and _is_same(a, value)]
            if len(found) != 1:
                return None
            order.append(found[0])
        elif value in shape:
            order.append(-1 - shape.index(value))
        else:
            return None
    return order


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


@functools.lru_cache(maxsize=MAX_CALLS)
def _on_device(bounds: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor, because a kernel is compiled anew for other numbers, and not for other contents."""
    with torch.inference_mode(False):
        # Filled there, because a copy from the host would wait for the device, and an annealed threshold is a new one
        # at each step.
        return torch.stack([torch.full((), bound, dtype=torch.float32, device=device) for bound in bounds])


# --- In chunks ---


def chunk_size() -> int:
    """How many values to take at a time, with what is done to them in several operations."""
    return CHUNK * torch.get_num_threads()


def cache_sized_parts(x: Tensor) -> Sequence[Tensor]:
    """Views of all values of a tensor, to be written to in turn; small ones, where a dense tensor is large."""
    layout = _layout(x)
    return (x,) if layout is None or x.numel() <= chunk_size() else _view(x, layout, None).split(chunk_size())


def _in_chunks(
    function: Function,
    static: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    bounds: tuple[float, ...],
    shaped: int,
) -> tuple[Tensor, ...]:
    first = tensors[0]
    assert first is not None
    # New memory costs more than an operation in the cache. So the first result is computed where it is to be, unless
    # it has to be computed in another dtype.
    writes = shaped > 0 and all(t is None or t.dtype == torch.float32 for t in (first, *parameters))
    outputs = [torch.empty_like(first)] if writes else []
    sums: Sequence[Tensor] = ()
    chunk = chunk_size()
    for start in range(0, first.numel(), chunk):
        end = start + chunk
        parts = [None if t is None else t[start:end] for t in tensors]
        out = {"out": outputs[0][start:end]} if writes else {}
        results = function(parts, parameters, bounds, 0, *static, **out)
        outputs += [torch.empty(first.shape, dtype=r.dtype) for r in results[len(outputs) : shaped]]
        for output, result in zip(outputs, results[:shaped], strict=True):
            if result is not out.get("out"):
                output[start:end] = result
        sums = results[shaped:] if start == 0 else [a + b for a, b in zip(sums, results[shaped:], strict=True)]
    return (*outputs, *sums)


# --- hf_oscqat.quantization.functional
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


# --- hf_oscqat.quantization.timm_layers
MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which `timm.models.reparameterize_model` merges."""

STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def is_standardised(cls: type[nn.Module]) -> bool:
    """Whether a class is one of timm's weight-standardised convolutions."""
    return any(base.__name__ in STANDARDISED for base in cls.__mro__)


def standardise(layer: nn.Module, weight: Tensor) -> Tensor:
    """Normalise a weight per output channel, with the layer's gain where it has one, by the operation timm uses.

    Args:
        layer: a standardised convolution.
        weight: its weight, `[out, in / groups, height, width]`.

    Returns:
        Tensor shaped like `weight`, differentiable in it and in the gain.
    """
    conv = cast(Any, layer)
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return weight  # while it is being loaded; who asks wants the shape
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, "gain") else None
    rows = weight.reshape(1, conv.out_channels, -1)
    return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps).reshape_as(weight)


def convolve(layer: nn.Module, input: Tensor) -> Tensor:
    """Convolve with `layer.weight` as it is, padded as the layer's class pads."""
    conv = cast(Any, layer)
    if getattr(conv, "same_pad", False):
        sizes = zip(input.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        height, width = (max((math.ceil(i / s) - 1) * s + (k - 1) * d + 1 - i, 0) for i, k, s, d in sizes)
        input = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
    return F.conv2d(input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def separate_qkv_bias(model: nn.Module) -> None:
    """Make attentions call their qkv layer and add its bias afterwards; what they compute stays the same."""
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]


def forbid_merging(model: nn.Module) -> None:
    """Make the methods that merge branches raise: it must be done before quantizers are there."""
    for module in model.modules():
        for method in MERGING:
            if callable(getattr(type(module), method, None)):  # an instance would search among its tensors
                module.__dict__[method] = _refuse_to_merge


def _refuse_to_merge(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "got a quantized model to merge branches of, expected a float one: run "
        "timm.models.reparameterize_model(model) before prepare_qat. Merged now, its layers would be new and float"
    )


# --- hf_oscqat.quantization.packing
def packed_width(count: int, num_bits: int) -> int:
    """Bytes that a row of `count` integers of `num_bits` bits takes."""
    return -(-count * num_bits // 8)


def pack_bits(values: Tensor, num_bits: int) -> Tensor:
    """Pack rows of unsigned integers into rows of bytes.

    Args:
        values: integers in `[0, 2**num_bits)`, any integer dtype, shape `[rows, count]`.
        num_bits: width of an integer, 1 to 8.

    Returns:
        uint8 tensor `[rows, packed_width(count, num_bits)]`.

    Raises:
        ValueError: if a value does not fit in `num_bits` bits.
    """
    rows, count = values.shape
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**num_bits):
        raise ValueError(
            f"got integers from {int(values.min())} to {int(values.max())}, expected 0 to {2**num_bits - 1} "
            f"for {num_bits} bits: subtract qmin first"
        )
    in_word, dtype = _word(num_bits)
    groups = F.pad(values.to(dtype), (0, -count % in_word)).view(rows, -(-count // in_word), in_word)
    words = (groups << _shifts(groups, in_word, num_bits)).sum(-1, keepdim=True, dtype=dtype)
    if dtype != torch.uint8:
        words = (words >> _shifts(words, num_bits, 8)).to(torch.uint8)
    return words.flatten(1)[:, : packed_width(count, num_bits)].contiguous()


def unpack_bits(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 tensor `[rows, packed_width(count, num_bits)]`.
        num_bits: width of an integer, 1 to 8.
        count: integers in a row.

    Returns:
        int16 tensor `[rows, count]`, values in `[0, 2**num_bits)`.

    Raises:
        ValueError: if a row has another number of bytes than `count` integers take.
    """
    if packed.ndim != 2 or packed.shape[1] != packed_width(count, num_bits):
        raise ValueError(
            f"got packed rows of shape {list(packed.shape)}, expected [rows, {packed_width(count, num_bits)}] "
            f"for {count} integers of {num_bits} bits"
        )
    rows, width = packed.shape
    in_word, dtype = _word(num_bits)
    if dtype == torch.uint8:
        words = packed.unsqueeze(-1)
    else:
        groups = F.pad(packed, (0, -width % num_bits)).view(rows, -(-width // num_bits), num_bits).to(dtype)
        words = (groups << _shifts(groups, num_bits, 8)).sum(-1, keepdim=True, dtype=dtype)
    values = (words >> _shifts(words, in_word, num_bits)).bitwise_and_(2**num_bits - 1)
    return values.to(torch.int16).flatten(1)[:, :count]


def _word(num_bits: int) -> tuple[int, torch.dtype]:
    """How many integers go into a word, and its type."""
    return (8, torch.int64) if 8 % num_bits else (8 // num_bits, torch.uint8)


def _shifts(like: Tensor, count: int, step: int) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


# --- hf_oscqat.quantization.packed
class FormatError(ValueError):
    """A packed checkpoint says something that cannot be so."""


@dataclass(frozen=True)
class GridFormat:
    """The grid of one packed weight or quantized input.

    Attributes:
        bits: width of an integer, 2 to 8.
        qmin: smallest integer.
        qmax: largest integer.
        granularity: "per_tensor" or "per_channel".
        shape: shape of the weight; of an input, that of its scale.
        scheme: "symmetric" or "asymmetric"; only the latter has a zero-point.
    """

    bits: int
    qmin: int
    qmax: int
    granularity: str
    shape: tuple[int, ...]
    scheme: str = "symmetric"

    def __post_init__(self) -> None:
        integers = (self.bits, self.qmin, self.qmax, *self.shape)
        if not all(type(value) is int for value in integers) or not 2 <= self.bits <= 8:
            raise FormatError(f"got {asdict(self)}, expected whole numbers and 2 to 8 bits")
        if self.qmin not in (0, -(2 ** (self.bits - 1))) or self.qmax != self.qmin + 2**self.bits - 1:
            raise FormatError(f"got integers from {self.qmin} to {self.qmax}, which is no grid of {self.bits} bits")
        if self.granularity not in ("per_tensor", "per_channel") or self.scheme not in ("symmetric", "asymmetric"):
            raise FormatError(f"got granularity {self.granularity!r} and scheme {self.scheme!r}")

    @property
    def zero_point_dtype(self) -> torch.dtype:
        """uint8 where the grid starts at 0, else int8."""
        return torch.uint8 if self.qmin == 0 else torch.int8


@dataclass(frozen=True)
class LayerFormat:
    """The grids of one packed layer; None where it is float."""

    weight: GridFormat | None
    input: GridFormat | None

    @classmethod
    def from_dict(cls, name: str, data: Any) -> "LayerFormat":
        """Read what `to_dict` wrote.

        Raises:
            FormatError: naming the layer, if it is anything else.
        """
        try:
            if set(data) != {"weight", "input"}:
                raise FormatError(f"got keys {sorted(data)}, expected weight and input")
            grids = {
                key: None if grid is None else GridFormat(**{**grid, "shape": tuple(grid["shape"])})
                for key, grid in data.items()
            }
            return cls(**grids)
        except (TypeError, KeyError, AttributeError, FormatError) as error:
            raise FormatError(f"the format of layer {name!r} cannot be read: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a symmetric scheme, being the usual one, is left out."""
        return {key: None if grid is None else _grid_to_dict(grid) for key, grid in vars(self).items()}


def _grid_to_dict(grid: GridFormat) -> dict[str, Any]:
    data = {**asdict(grid), "shape": list(grid.shape)}
    if grid.scheme == "symmetric":
        del data["scheme"]
    return data


class _Unpacked(NamedTuple):
    """A weight, what it was made from, and how often any of these tensors had been written to."""

    weight: Tensor
    sources: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]

    def is_of(self, sources: tuple[Tensor | None, ...]) -> bool:
        same = all(map(operator.is_, self.sources, sources))
        return same and self.versions == _versions(self.weight, *sources)


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple([None if tensor is None else tensor._version for tensor in tensors])


Handover = tuple[str, str, int]
"""Module and qualified name of the function that hands the output of a layer to a norm and nothing else, and a number
that this layer and this norm share."""


WORTH_OVERWRITING = 2**18
"""Values from which on new memory for a norm's output is dearer than finding out whether it needs any."""


class _Offered(threading.local):
    """What a layer of this thread made last for a norm to write over."""

    output: tuple[Handover, weakref.ref[Tensor]] | None = None


offered = _Offered()


def is_called_by(frame: FrameType, handover: Handover) -> bool:
    """Whether a frame is that of the function that is known to hand over; with anything between it is another one."""
    return frame.f_code.co_qualname == handover[1] and frame.f_globals.get("__name__") == handover[0]


class PackedLayer(nn.Module):
    """Mixin of a layer in packed form.

    Attributes (buffers):
        weight_packed: uint8 `[out, ceil(n * bits / 8)]`, n weights per output channel; stored value = integer - qmin.
        weight_scale: float32 `(1,)` or `(out,)`.
        weight_zero_point: uint8 or int8, like the scale; None when symmetric.
        input_scale: float32 `(1,)`; None where inputs stay float.
        input_zero_point: uint8 or int8 `(1,)`; None when symmetric.
        format: the grids.
        input_activation: bounds of the activation before the layer, where `fold_activations` has moved it in here.
        handover: set by `let_norms_overwrite` where one norm alone gets the output.
    """

    format: LayerFormat
    compute_dtype: torch.dtype
    input_activation: Activation | None = None
    handover: Handover | None = None
    weight_packed: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    _keeps_packed: bool = False
    _unpacked: _Unpacked | None = None
    _memory_format: torch.memory_format = torch.contiguous_format

    @property
    def weight(self) -> Tensor:
        """The weight as the layer computes with it, unpacked, in the dtype of the model.

        It is unpacked once, and again when a tensor that it is made of was replaced or written to. Writing through
        `.data` or into inference mode's own tensors goes unseen by torch; the latter are therefore unpacked each time.
        """
        # An AttributeError in here would be taken for a missing `weight` by nn.Module and hide its cause.
        try:
            grid = self.format.weight
            if grid is None:
                weight = cast(Tensor, self._parameters["weight"])
                return standardise(self, weight) if is_standardised(type(self)) else weight
            # In a traced graph stands the unpacking itself: a second copy of the weight could go stale there unseen.
            if self._keeps_packed or torch.compiler.is_compiling():
                return self._unpack(grid)
            buffers = self._buffers  # not by attribute: nn.Module takes its time to find one
            sources = (buffers["weight_packed"], buffers["weight_scale"], buffers["weight_zero_point"])
            if self._unpacked is None or not self._unpacked.is_of(sources):
                return self._unpack_and_keep(grid, sources)
            return self._unpacked.weight
        except (AttributeError, KeyError) as error:
            raise RuntimeError(f"the weight of {type(self).__name__} cannot be unpacked: {error}") from error

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input as in training, then do what the layer always did."""
        return self._handed_over(super().forward(self._quantized(input), *args, **kwargs))

    def reset_parameters(self) -> None:
        """There is nothing to initialise: everything comes from the checkpoint."""

    def _quantized(self, input: Tensor) -> Tensor:
        grid = self.format.input
        if grid is None:
            return input
        scale, zero_point = cast(Tensor, self.input_scale), self.input_zero_point
        if input.is_cpu and not input.requires_grad and not is_traced(input):
            return _round(input, scale, zero_point, grid, self.input_activation)
        return fake_quantize(input, scale, zero_point, grid.qmin, grid.qmax, activation=self.input_activation)

    def _handed_over(self, output: Tensor) -> Tensor:
        """Offer the output to the norm behind, where there is one; see `norms.py`."""
        if self.handover is None or output.numel() < WORTH_OVERWRITING:
            return output
        if output.is_cpu and not output.requires_grad and not is_traced(output):
            if is_called_by(sys._getframe(4), self.handover):
                offered.output = self.handover, weakref.ref(output)
        return output

    def _unpack_and_keep(self, grid: GridFormat, sources: tuple[Tensor | None, ...]) -> Tensor:
        if any(tensor is not None and (tensor.is_inference() or tensor.requires_grad) for tensor in sources):
            return self._unpack(grid)
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            weight = self._unpack(grid)
            if weight.ndim == 4:
                weight = weight.contiguous(memory_format=self._memory_format)
        self._unpacked = _Unpacked(weight, sources, _versions(weight, *sources))
        return weight

    def _unpack(self, grid: GridFormat) -> Tensor:
        rows = list(grid.shape)
        rows.insert(0, rows.pop(output_axis(self)))
        values = unpack_bits(self.weight_packed, grid.bits, prod(rows[1:])).view(rows)
        w_int = values.movedim(0, output_axis(self)).contiguous() + grid.qmin
        if self.weight_zero_point is not None:
            w_int = w_int - broadcast_to_axis(self.weight_zero_point, w_int.ndim, output_axis(self))
        assert self.weight_scale is not None
        scale = broadcast_to_axis(self.weight_scale, w_int.ndim, output_axis(self))
        return (w_int.to(scale.dtype) * scale).to(self.compute_dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as "the class made for that base", because a class made at run time has no import path."""
        state = {name: value for name, value in self.__dict__.items() if name != "_unpacked"}
        return _new_packed_layer, (type(self).__bases__[1],), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        self._unpacked = None
        # A cast of the model decides dtype and layout of the unpacked weight; the scales keep all their digits.
        like_weight = torch.empty((2,) * 4, dtype=self.compute_dtype).to(memory_format=self._memory_format)
        cast_weight = fn(like_weight)
        self.compute_dtype = cast_weight.dtype
        channels_last = cast_weight.is_contiguous(memory_format=torch.channels_last)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        scales = {id(scale) for scale in (self.weight_scale, self.input_scale)}

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in scales else moved

        super()._apply(keep_precision, recurse)
        return self


def _round(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: GridFormat, activation: Activation | None
) -> Tensor:
    """What `fake_quantize` computes, on a CPU and for nobody who wants gradients.

    New memory costs more than the arithmetic does. Behind a folded activation nobody else sees `x`, which then takes
    the result; timm's activations write into their input too. A large one is gone through part by part, because what
    is in the cache need not be fetched again for the next operation.
    """
    zero = 0 if zero_point is None else int(zero_point)
    low, high = grid.qmin - zero, grid.qmax - zero
    dtype = torch.promote_types(x.dtype, scale.dtype)
    if activation is not None:
        # Division and rounding keep the order of values, so the bounds of the activation can be rounded instead.
        first, last = (_as_tensor(activation, dtype) / scale).round_().tolist()
        low, high = max(low, first), min(high, last)
    if activation is None or x.dtype != dtype:
        return (x / scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)
    for part in cache_sized_parts(x):
        part.div_(scale).round_().clamp_(low, high).mul_(scale)
    return x


@functools.cache
def _as_tensor(activation: Activation, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(activation, dtype=dtype, device="cpu")


class StandardisedPackedLayer(PackedLayer):
    """Mixin of a weight-standardised convolution in packed form: its integers are those of the standardised weight."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input and convolve, without standardising once more."""
        return convolve(self, self._quantized(input))


_PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {}


def _packed_class(base: type[nn.Module]) -> type[PackedLayer]:
    """One class per base class, so that repeated blocks share one compiled graph."""
    if base not in _PACKED_CLASSES:
        mixin = StandardisedPackedLayer if is_standardised(base) else PackedLayer
        _PACKED_CLASSES[base] = type(f"Packed{base.__name__}", (mixin, base), {})
    return _PACKED_CLASSES[base]


def _new_packed_layer(base: type[nn.Module]) -> PackedLayer:
    cls = _packed_class(base)
    return cls.__new__(cls)


def keep_packed(model: nn.Module, enabled: bool = True) -> None:
    """Choose between memory and speed for the packed layers of a model, as long as it lives.

    Args:
        model: a packed model.
        enabled: whether to hold the integers only and unpack a weight each time it is used. Otherwise, and by default,
            unpacked weights are kept from their first use on, beside the integers, and take as much memory as those of
            the float model.

    Raises:
        ValueError: if the model has no packed layers.
    """
    # Not by class: the remote code of two repositories makes two classes of this name, and one loads for both.
    layers = cast("list[PackedLayer]", [module for module in model.modules() if hasattr(module, "_keeps_packed")])
    if not layers:
        raise ValueError("got a model without packed layers, expected one that hf_oscqat.pack made")
    for layer in layers:
        layer._keeps_packed = enabled
        layer._unpacked = None


def quantizer_tensors(name: str, layer_format: LayerFormat, axis: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Names, dtypes and shapes of the tensors that a packed layer has in a checkpoint.

    Args:
        name: of the layer; empty for the names within it.
        layer_format: its grids.
        axis: dimension of its weight that counts output channels.
    """
    prefix = f"{name}." if name else ""
    expected: dict[str, tuple[torch.dtype, list[int]]] = {}
    if layer_format.weight is not None:
        grid = layer_format.weight
        channels = grid.shape[axis]
        scales = [channels if grid.granularity == "per_channel" else 1]
        width = packed_width(prod(grid.shape) // max(channels, 1), grid.bits)
        expected[f"{prefix}weight_packed"] = (torch.uint8, [channels, width])
        expected[f"{prefix}weight_scale"] = (torch.float32, scales)
        if grid.scheme == "asymmetric":
            expected[f"{prefix}weight_zero_point"] = (grid.zero_point_dtype, scales)
    if layer_format.input is not None:
        expected[f"{prefix}input_scale"] = (torch.float32, [1])
        if layer_format.input.scheme == "asymmetric":
            expected[f"{prefix}input_zero_point"] = (layer_format.input.zero_point_dtype, [1])
    return expected


def make_packed(layer: nn.Module, layer_format: LayerFormat) -> PackedLayer:
    """Turn a float layer into an empty packed one, in place; its tensors are then to be loaded.

    Args:
        layer: a layer whose weight has the shape that `layer_format` says.
        layer_format: its grids.

    Raises:
        FormatError: if the weight has another shape.
    """
    weight = cast(Tensor, layer.weight)
    grid = layer_format.weight
    if grid is not None and tuple(weight.shape) != tuple(grid.shape):
        raise FormatError(f"got a weight of shape {list(grid.shape)}, but the model's is {list(weight.shape)}")
    layer.__class__ = _packed_class(type(layer))
    packed = cast(PackedLayer, layer)
    packed.format = layer_format
    packed.compute_dtype = weight.dtype
    if grid is not None:
        del packed._parameters["weight"]
    tensors = quantizer_tensors("", layer_format, output_axis(packed))
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point"):
        spec = tensors.get(name)
        empty = None if spec is None else torch.empty(spec[1], dtype=spec[0], device=weight.device)
        packed.register_buffer(name, empty)
    return packed


def fill_packed(layer: PackedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Write integers, scales and zero-points into an empty packed layer.

    Args:
        layer: from `make_packed`.
        tensors: `weight_int` shaped like the weight, and what else the layer has of `weight_scale`,
            `weight_zero_point`, `input_scale` and `input_zero_point`.
    """
    for name, value in tensors.items():
        if name == "weight_int":
            assert layer.format.weight is not None
            rows = value.movedim(output_axis(layer), 0).flatten(1) - layer.format.weight.qmin
            layer.weight_packed.copy_(pack_bits(rows, layer.format.weight.bits))
        else:
            getattr(layer, name).copy_(value)


# --- hf_oscqat.quantization.activations
FOLDABLE: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    # block: (activation, the layer that it feeds, what stands between them and must be nothing)
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": (("bn1.act", "conv_pw", ("aa", "se")),),
    "timm.models._efficientnet_blocks.InvertedResidual": (
        ("bn1.act", "conv_dw", ()),
        ("bn2.act", "conv_pwl", ("aa", "se")),
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": (("bn1.act", "conv_pwl", ("aa", "se")),),
    "timm.models.resnet.BasicBlock": (("act1", "conv2", ("aa",)),),
    "timm.models.resnet.Bottleneck": (("act1", "conv2", ()), ("act2", "conv3", ("aa",))),
}
"""Where the output of an activation goes to one layer only."""


class FoldedActivation(nn.Module):
    """Stands where an activation was that the next layer now applies itself.

    Attributes:
        activation: what was there.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Pass on what comes."""
        return x


def fold_activations(model: nn.Module) -> None:
    """Move activations into the quantized layers behind them, in place, where that is known to be safe."""
    for block, path, activation, layer in list(_foldable(model)):
        bounds = _bounds(activation)
        if bounds is not None and _quantizes_input(layer) and not _is_watched(block, path, layer):
            layer.input_activation = bounds  # type: ignore[assignment]
            _replace(block, path, FoldedActivation(activation))


def _quantizes_input(layer: nn.Module) -> bool:
    """Whether a layer, in training form or packed, has a quantizer that can take an activation in."""
    if isinstance(layer, PackedLayer):
        return layer.format.input is not None
    return getattr(layer, "input_quantizer", None) is not None


def _is_watched(block: nn.Module, path: str, layer: nn.Module) -> bool:
    """Whether a hook sees what passes from an activation, or the norm that it is in, to a layer.

    timm's feature extraction is one.
    """
    parts = path.split(".")
    on_the_way = [block.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    return bool(
        layer._forward_pre_hooks
        or on_the_way[-1]._forward_pre_hooks
        or any(module._forward_hooks for module in on_the_way)
    )


def _foldable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, nn.Module]]:
    for block in model.modules():
        for path, layer, between in FOLDABLE.get(f"{type(block).__module__}.{type(block).__name__}", ()):
            modules = dict(block.named_modules())
            nothing_between = all(type(modules.get(part, nn.Identity())) is nn.Identity for part in between)
            # Some norms that timm puts in place of batch-norm are their own activation.
            if path in modules and layer in modules and nothing_between:
                yield block, path, modules[path], modules[layer]


def _bounds(activation: nn.Module) -> Activation | None:
    if type(activation) is nn.ReLU:
        return 0.0, math.inf
    return (0.0, 6.0) if type(activation) is nn.ReLU6 else None


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# --- hf_oscqat.quantization.norms
FEEDS_NORM: dict[str, tuple[tuple[str, str], ...]] = {
    # function: (layer, the norm that alone gets its output)
    "timm.layers.conv_bn_act.ConvNormAct.forward": (("conv", "bn"),),
    "timm.models._efficientnet_blocks.ConvBnAct.forward": (("conv", "bn1"),),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv.forward": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "timm.models._efficientnet_blocks.InvertedResidual.forward": (
        ("conv_pw", "bn1"),
        ("conv_dw", "bn2"),
        ("conv_pwl", "bn3"),
    ),
    "timm.models._efficientnet_blocks.EdgeResidual.forward": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "timm.models.efficientnet.EfficientNet.forward_features": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "timm.models.efficientnet.EfficientNetFeatures.forward": (("conv_stem", "bn1"),),
    "timm.models.mobilenetv3.MobileNetV3.forward_features": (("conv_stem", "bn1"),),
    "timm.models.mobilenetv3.MobileNetV3Features.forward": (("conv_stem", "bn1"),),
    "timm.models.resnet.BasicBlock.forward": (("conv1", "bn1"), ("conv2", "bn2")),
    "timm.models.resnet.Bottleneck.forward": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    "timm.models.resnet.ResNet.forward_features": (("conv1", "bn1"),),
}
OVERWRITING = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")
"""Norms of which it is known what they do behind the normalisation: apply their `drop` and `act`, if they have any."""

_numbers = itertools.count()


class OverwritingNorm(nn.Module):
    """Mixin of a batch-norm that writes over its input wherever nobody else can see it.

    Attributes:
        handover: which function brings it the output of which layer.
    """

    handover: Handover

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, in place where that is safe, and do what the norm always did behind that."""
        if torch.compiler.is_compiling() or offered.output is None or is_traced(input):
            return super().forward(input)
        norm = cast(nn.BatchNorm2d, self)
        is_unshared = self._is_offered(input) and is_called_by(sys._getframe(3), self.handover)
        if not is_unshared or not _can_overwrite(norm, input):
            return super().forward(input)
        nothing = cast(Tensor, norm.running_mean).new_empty(0)
        torch.native_batch_norm(
            input,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            False,
            0.0,
            norm.eps,
            out=(input, nothing, nothing),
        )
        for behind in (norm._modules.get("drop"), norm._modules.get("act")):
            input = input if behind is None else behind(input)
        return input

    def _is_offered(self, input: Tensor) -> bool:
        """Whether this is what the layer in front of the norm has just made."""
        made, offered.output = offered.output, None
        return made is not None and made[0] == self.handover and made[1]() is input

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as "the class made for that base", because a class made at run time has no import path."""
        return _new_overwriting_norm, (type(self).__bases__[1],), self.__dict__.copy()


def _can_overwrite(norm: nn.BatchNorm2d, input: Tensor) -> bool:
    """Whether it uses statistics, of the right size, and nobody wants gradients or sees each operation."""
    parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if norm.training or parts[0] is None or parts[1] is None or input.ndim != 4:
        return False
    tensors = [part for part in parts if part is not None]
    is_watched = torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (is_watched or wants_gradients) and all(tensor.numel() == input.shape[1] for tensor in tensors)


_OVERWRITING_CLASSES: dict[type[nn.Module], type[OverwritingNorm]] = {}


def _overwriting_class(base: type[nn.Module]) -> type[OverwritingNorm]:
    if base not in _OVERWRITING_CLASSES:
        # torch.fx tells by the module of a class that a layer of torch is not to be traced into.
        namespace = {"__module__": base.__module__}
        _OVERWRITING_CLASSES[base] = type(f"Overwriting{base.__name__}", (OverwritingNorm, base), namespace)
    return _OVERWRITING_CLASSES[base]


def _new_overwriting_norm(base: type[nn.Module]) -> OverwritingNorm:
    cls = _overwriting_class(base)
    return cls.__new__(cls)


def let_norms_overwrite(model: nn.Module) -> None:
    """Make norms behind packed convolutions write over their input, in place, where that is known to be safe.

    Args:
        model: a packed model; its state dict stays as it is.
    """
    for block in list(model.modules()):
        for function, layer, norm in _pairs(block):
            if f"{type(norm).__module__}.{type(norm).__qualname__}" in OVERWRITING:
                norm.__class__ = _overwriting_class(type(norm))
                # Both by name and number: what refers to neither of them can be copied and pickled with either.
                handover = (type(block).__module__, f"{type(block).__qualname__}.{function}", next(_numbers))
                cast(OverwritingNorm, norm).handover = layer.handover = handover


def _pairs(block: nn.Module) -> Iterator[tuple[str, PackedLayer, nn.Module]]:
    for function in ("forward", "forward_features"):
        for names in FEEDS_NORM.get(f"{type(block).__module__}.{type(block).__qualname__}.{function}", ()):
            layer, norm = (block._modules.get(name) for name in names)
            # A class of somebody else's might keep what it computes.
            if isinstance(layer, PackedLayer) and isinstance(layer, nn.Conv2d) and norm is not None:
                if type(layer).__bases__[1].__module__.partition(".")[0] in ("torch", "timm"):
                    yield function, layer, norm


# --- hf_oscqat.checkpoint
FORMAT_VERSION = 1
METADATA_KEY = "oscqat"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of the files that hold a checkpoint's weights, or say which ones do."""
DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}


class CheckpointError(ValueError):
    """A packed checkpoint that cannot be trusted; the message names the tensor or layer."""


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def layers_to_dict(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the grids of each packed layer as plain data, for config.json and the header."""
    return {name: layer.format.to_dict() for name, layer in packed_layers(model).items()}


def header_metadata(model: nn.Module) -> dict[str, str]:
    """Return what goes into the header of the file that holds this packed model."""
    digests = {
        name: [digest(layer.get_buffer(part)) for part in quantizer_tensors("", layer.format, output_axis(layer))]
        for name, layer in packed_layers(model).items()
    }
    content = {"format_version": FORMAT_VERSION, "layers": layers_to_dict(model), "sha256": digests}
    return {METADATA_KEY: json.dumps(content, separators=(",", ":"))}


def sort_metadata(path: Path) -> None:
    """Write the metadata of a safetensors file in order, in place, so that equal checkpoints are equal files.

    safetensors itself writes them in an order that differs from time to time. The header keeps its length.

    Args:
        path: a file that safetensors has just written.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
        content["__metadata__"] = dict(sorted(content.get("__metadata__", {}).items()))
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) <= length:
            file.seek(8)
            file.write(header.ljust(length))


def digest(tensor: Tensor) -> str:
    """Sha256 of a tensor's bytes in C order, little-endian, in base64 without padding, for a short header."""
    return _digest(tensor.detach().cpu().contiguous().numpy())


def _digest(content: Any) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def check_checkpoint(
    files: Iterable[str], layers: Mapping[str, Any], model: nn.Module, ignored_prefixes: tuple[str, ...] = ()
) -> None:
    """Compare a packed checkpoint with config.json and with the model that is to hold it.

    Args:
        files: paths of its safetensors files.
        layers: the grids in config.json, as `layers_to_dict` writes them.
        model: a model in packed form, still empty, on any device.
        ignored_prefixes: tensors and layers under these are ignored: the head of a model loaded without one.

    Raises:
        CheckpointError: at the first contradiction, with the name of the tensor or layer.
    """
    layers = {name: data for name, data in layers.items() if not _is_under(name, ignored_prefixes)}
    expected = model.state_dict()
    specs = {
        name: spec
        for layer_name, layer in packed_layers(model).items()
        for name, spec in quantizer_tensors(layer_name, layer.format, output_axis(layer)).items()
    }
    seen: set[str] = set()
    for path in files:
        try:
            # As arrays of numpy, because making torch's tensors would take three times as long as all the checks.
            with safe_open(path, "np") as file:
                content = _read_metadata(path, file.metadata())
                _compare_layers(content["layers"], layers, ignored_prefixes)
                digests = _digests_by_tensor(content["sha256"], specs)
                for name in file.keys():
                    if _is_under(name, ignored_prefixes):
                        continue
                    _check_tensor(name, file.get_slice(name), expected, specs)
                    if name in specs:
                        _check_values(name, file.get_tensor(name), digests.get(name), layers)
                    seen.add(name)
        except SafetensorError as error:
            raise CheckpointError(f"got {path}, which is no whole safetensors file: {error}") from error
    missing = sorted(expected.keys() - seen)
    if missing:
        raise CheckpointError(
            f"got a checkpoint without {_listed(missing)}: it is incomplete, fetch or write it again"
        )


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return f"{name}.".startswith(prefixes)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_metadata(path: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        content = json.loads((metadata or {})[METADATA_KEY])
        version = content["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"got {path} without readable {METADATA_KEY!r} metadata, expected a file that hf_oscqat.pack wrote"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"got format_version {version!r} in {path}, expected {FORMAT_VERSION}: a newer hf_oscqat may read it"
        )
    for key in ("layers", "sha256"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"got {key}={content.get(key)!r} in the header of {path}, expected an object")
    return content


def _digests_by_tensor(sha256: Mapping[str, Any], specs: Iterable[str]) -> dict[str, Any]:
    """Pair the digests, which the header lists by layer, with the names of the tensors in their order."""
    names: dict[str, list[str]] = {}
    for name in specs:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    paired: dict[str, Any] = {}
    for layer, tensors in names.items():
        digests = sha256.get(layer)
        if not isinstance(digests, list) or len(digests) != len(tensors):
            raise CheckpointError(f"got sha256={digests!r} of layer {layer!r} in the header, expected {len(tensors)}")
        paired |= dict(zip(tensors, digests, strict=True))
    return paired


def _compare_layers(header: Mapping[str, Any], config: Mapping[str, Any], ignored_prefixes: tuple[str, ...]) -> None:
    for name in sorted(header.keys() | config.keys()):
        if _is_under(name, ignored_prefixes):
            continue
        if name not in header or name not in config:
            place = "config.json" if name in config else "the header"
            raise CheckpointError(f"got layer {name!r} in {place} only, expected header and config.json to agree")
        if header[name] != config[name]:
            raise CheckpointError(
                f"got layer {name!r} as {header[name]} in the header and as {config[name]} in config.json, "
                "expected them to agree: one of the two was changed"
            )


def _check_tensor(
    name: str, stored: Any, expected: Mapping[str, Tensor], specs: Mapping[str, tuple[torch.dtype, list[int]]]
) -> None:
    if name not in expected:
        raise CheckpointError(f"got tensor {name!r}, which the model has no place for")
    shape, wanted = list(stored.get_shape()), list(expected[name].shape)
    if shape != wanted:
        raise CheckpointError(f"got tensor {name!r} of shape {shape}, expected {wanted}")
    if name in specs and DTYPES.get(stored.get_dtype()) != specs[name][0]:
        raise CheckpointError(f"got tensor {name!r} of type {stored.get_dtype()}, expected {specs[name][0]}")


def _check_values(name: str, values: Any, sha256: Any, layers: Mapping[str, Any]) -> None:
    layer, _, part = name.rpartition(".")
    if part.endswith("_scale") and not ((values > 0) & (values < math.inf)).all():
        raise CheckpointError(f"got a scale that is not finite and positive in {name!r}")
    if part.endswith("_zero_point"):
        grid = layers[layer][part.removesuffix("_zero_point")]
        if not ((values >= grid["qmin"]) & (values <= grid["qmax"])).all():
            raise CheckpointError(f"got a zero-point outside {grid['qmin']} to {grid['qmax']} in {name!r}")
    if sha256 != _digest(values):
        raise CheckpointError(f"got other contents of {name!r} than were written: its sha256 is not the header's")


# --- hf_oscqat.integration.shared_modules
Place = tuple[nn.Module, str, nn.Module]
"""A module that holds another, under what name, and the other."""


def state_dict_without_repeats(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the tensors of a shared module under the name of its first place only."""
    names = {name for name, _ in model.named_modules()}
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in names}


def hide_repeats(model: nn.Module) -> list[Place]:
    """Take shared modules out of all their places but the first; the model cannot run until they are restored."""
    modules = dict(model.named_modules())
    places = [
        (module, child_name, child)
        for name, module in modules.items()
        for child_name, child in module._modules.items()
        if child is not None and f"{name}.{child_name}".removeprefix(".") not in modules
    ]
    for module, child_name, _ in places:
        module._modules[child_name] = None  # and not deleted: the order of the names stays
    return places


def restore_repeats(places: Iterable[Place]) -> None:
    """Put back what `hide_repeats` took out."""
    for module, child_name, child in places:
        module._modules[child_name] = child


# --- hf_oscqat.integration.modeling
REMOTE_CODE = "modeling_oscqat"
PACKED_METHOD = "oscqat"
ALIGNMENT = 64
"""Bytes to which torch aligns the memory it allocates."""


class OscQATTimmConfig(TimmWrapperConfig):
    """Configuration of a packed timm model; the fields are those of `TimmWrapperConfig`."""

    model_type = "oscqat_timm"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; transformers would keep the `label_names` of the file that it was loaded from."""
        return {**super().to_dict(), "label_names": [self.id2label[i] for i in range(self.num_labels)]}

    def __repr__(self) -> str:
        """Name the architecture; transformers asks for this on every load, and the grids of all layers take long."""
        return f"{type(self).__name__}(architecture={self.architecture!r})"


class _NothingToFill(TorchFunctionMode):
    """Leaves out what fills tensors of the meta device, which hold nothing.

    `from_pretrained` makes the model there, and random weights for it would take a fourth of the time of loading.
    """

    FILLS = frozenset(f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _PublishedModel:
    """What the published classes share: what they are made from, and how they are saved."""

    def __init__(self, config: OscQATTimmConfig, *args: Any, **kwargs: Any) -> None:
        """Make the model, to be filled by `from_pretrained`.

        Raises:
            CheckpointError: if the config has no `quantization_config`; transformers would load random weights.
        """
        if getattr(config, "quantization_config", None) is None:
            raise CheckpointError(
                "got a config.json of a packed model without quantization_config, expected what hf_oscqat.pack writes"
            )
        with _NothingToFill():
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def keep_packed(self, enabled: bool = True) -> Self:
        """Choose memory over speed: hold the integers only, and unpack a weight each time it is used.

        Otherwise, and by default, unpacked weights are kept from the first forward on, beside the integers; they take
        as much memory as those of the float model. This holds for the object at hand and is not saved.

        Args:
            enabled: False goes back to the default.

        Returns:
            The model, so that it can follow `from_pretrained` at once.
        """
        keep_packed(cast(PreTrainedModel, self), enabled)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save weights and config, and beside them the code that loading needs.

        Args:
            save_directory: folder, made if missing.
            **kwargs: as in transformers.
        """
        model = cast(PreTrainedModel, self)
        model.config.auto_map = {
            "AutoConfig": f"{REMOTE_CODE}.{OscQATTimmConfig.__name__}",
            "AutoModel": f"{REMOTE_CODE}.{OscQATTimmModel.__name__}",
            "AutoModelForImageClassification": f"{REMOTE_CODE}.{OscQATTimmForImageClassification.__name__}",
        }
        # AutoImageProcessor looks here, and the processor finds timm's pretrained_cfg beside it.
        model.config.image_processor_type = "TimmWrapperImageProcessor"
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(target, **kwargs)  # type: ignore[misc]
            return
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", target.name)
        # Beside its place, so that a full disk leaves the checkpoint that was there as it is.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=target) as beside:
            # Beside this file lies the remote code; where this file is the remote code, that is itself.
            source = Path(__file__).with_name(f"{REMOTE_CODE}.py").read_text(encoding="utf-8")
            Path(beside, f"{REMOTE_CODE}.py").write_text(source, encoding="utf-8")
            super().save_pretrained(beside, **kwargs)  # type: ignore[misc]
            written = {path.name: path for path in Path(beside).iterdir()}
            for path in written.values():
                if path.suffix == ".safetensors":
                    sort_metadata(path)
            for name, path in written.items():
                path.replace(target / name)
            for path in target.iterdir():
                # Weights of a variant stand beside those without one.
                if not kwargs.get("variant") and WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                    path.unlink()
        if push:
            names = ("token", "private", "create_pr", "revision", "license", "commit_message")
            given = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(repo_id, **given)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push to the Hub in one commit: weights, config, code, card and what else lies beside the weights.

        Args:
            repo_id: `org/name`.
            **kwargs: as in `hf_oscqat.hub.push.push_folder`: token, private, create_pr, revision, license; and
                `commit_message`.

        Returns:
            The commit, and what it changed.

        Raises:
            ImportError: without hf_oscqat, which knows how to make the card.
            ValueError: see `push_folder`.
        """
        try:
            from hf_oscqat.integration.publish import push_model
        except ImportError as error:
            raise ImportError("pushing a packed model needs its package: pip install hf_oscqat") from error
        return push_model(cast(PreTrainedModel, self), repo_id, **kwargs)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Whether transformers should copy the file of this class: never, `save_pretrained` above does."""
        return False


class OscQATTimmModel(_PublishedModel, TimmWrapperModel):
    """A packed timm model without head, as `AutoModel` loads it."""

    config_class = OscQATTimmConfig


class OscQATTimmForImageClassification(_PublishedModel, TimmWrapperForImageClassification):
    """A packed timm model with its classifier."""

    config_class = OscQATTimmConfig


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint where the package itself is not imported: kept as it is."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)
        self.quant_method = PACKED_METHOD


class PackedQuantizer(HfQuantizer):
    """What `from_pretrained` does for a packed checkpoint: make the layers and check the file."""

    hidden_repeats: Sequence[Place] = ()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        layers = getattr(self.quantization_config, "layers", None)
        if getattr(self.quantization_config, "checkpoint_format", None) != "packed" or not isinstance(layers, dict):
            raise CheckpointError(
                "got a config.json whose quantization_config has no checkpoint_format 'packed' and layers, "
                "expected what hf_oscqat.pack writes"
            )
        version = getattr(self.quantization_config, "format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"got format_version {version!r} in config.json, expected {FORMAT_VERSION}: "
                "a newer hf_oscqat may read it"
            )
        headless = ignore_head(model)
        separate_qkv_bias(model)
        modules = dict(model.named_modules())
        for name, data in layers.items():
            if not f"{name}.".startswith(headless):
                if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
                    raise CheckpointError(f"got layer {name!r} in config.json, which the model does not have")
                try:
                    make_packed(modules[name], LayerFormat.from_dict(name, data))
                except FormatError as error:
                    raise CheckpointError(f"layer {name!r}: {error}") from error
                # Its weight is computed; transformers must not initialise it.
                modules[name]._is_hf_initialized = True
        fold_activations(model)
        let_norms_overwrite(model)
        forbid_merging(model)
        self.hidden_repeats = hide_repeats(model)
        if checkpoint_files:
            _check_inside(checkpoint_files, str(model.config.name_or_path))
            check_checkpoint(checkpoint_files, layers, model, headless)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_all_loaded(model)
        self.restore_repeats()
        for parameter in model.parameters():
            # Mapped from the file, it may begin anywhere; torch would then sum in another order than in training.
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return model

    def restore_repeats(self) -> None:
        """Put shared modules back into all their places."""
        restore_repeats(self.hidden_repeats)
        self.hidden_repeats = ()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what goes into the file, and into its header.

        Raises:
            CheckpointError: if a layer is no longer what config.json says, and the file could not be loaded.
        """
        layers, now = getattr(self.quantization_config, "layers", None) or {}, packed_layers(model)
        headless = ignore_head(model)
        changed = [
            name
            for name, data in layers.items()
            if not f"{name}.".startswith(headless)
            and (name not in now or now[name].format != LayerFormat.from_dict(name, data))
        ]
        if changed:
            raise CheckpointError(
                f"got a packed model whose layers {', '.join(changed[:3])} are no longer those that were packed, "
                "expected the same: replace layers (as reset_classifier does) before prepare_qat"
            )
        return state_dict_without_repeats(model), header_metadata(model)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed integers cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` accepts the layers."""
        return True


def _check_inside(files: Sequence[str], folder: str) -> None:
    """Refuse files that an index names outside of the folder it stands in; for the Hub its client sees to that."""
    if not os.path.isdir(folder):
        return
    root = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise CheckpointError(f"got {file!r} in the index of {folder}, expected files of that folder only")


def ignore_head(model: PreTrainedModel) -> tuple[str, ...]:
    """Let a model that was built without its classifier pass over the tensors of one.

    Returns:
        What the names of those tensors begin with; empty for a model with a classifier.
    """
    if not isinstance(model, TimmWrapperModel):
        return ()
    timm_model = cast(Any, model.timm_model)
    entry = (getattr(timm_model, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes = tuple(f"timm_model.{name}." for name in ([entry] if isinstance(entry, str) else entry))
    model._keys_to_ignore_on_load_unexpected = {rf"^{prefix}" for prefix in prefixes}
    return prefixes


def check_all_loaded(model: nn.Module) -> None:
    """Refuse a model of which the checkpoint has filled a part only; transformers leaves the rest uninitialised.

    Raises:
        CheckpointError: naming the tensors.
    """
    state = model.state_dict(keep_vars=True)
    empty = [name for name, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if empty:
        some = ", ".join(empty[:5])
        raise CheckpointError(f"got a checkpoint that does not fill {len(empty)} tensors of the model: {some}")


# Without these entries transformers would warn of an unknown method and skip it. The package enters its own.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(PACKED_METHOD, PackedConfig)
AUTO_QUANTIZER_MAPPING.setdefault(PACKED_METHOD, PackedQuantizer)
