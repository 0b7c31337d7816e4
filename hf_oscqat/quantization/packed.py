"""The packed form of a layer: integers in a dense bit stream, scale and zero-point, and nothing to train.

Like the training form it is a mixin in front of the layer's own class, so the same forward runs. Input rounding calls
the function that training called, and the weight is rebuilt by the same two operations: outputs agree to the bit.

The weight is rebuilt at the first forward and kept beside the integers; `keep_packed` trades that speed for memory.
"""

import functools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import Activation, broadcast_to_axis, fake_quantize, output_axis
from hf_oscqat.quantization.kernels import cache_sized_parts, is_traced
from hf_oscqat.quantization.packing import pack_bits, packed_width, unpack_bits
from hf_oscqat.quantization.timm_layers import convolve, is_standardised, standardise


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
