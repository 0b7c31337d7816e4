"""The packed form of a layer: integers in a dense bit stream, scale and zero-point, and nothing to train.

Like the training form it is a mixin in front of the layer's own class, so the same forward runs. Input rounding calls
the function that training called, and the weight is rebuilt by the same two operations: outputs agree to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import broadcast_to_axis, fake_quantize, output_axis
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


class PackedLayer(nn.Module):
    """Mixin of a layer in packed form.

    Attributes (buffers):
        weight_packed: uint8 `[out, ceil(n * bits / 8)]`, n weights per output channel; stored value = integer - qmin.
        weight_scale: float32 `(1,)` or `(out,)`.
        weight_zero_point: uint8 or int8, like the scale; None when symmetric.
        input_scale: float32 `(1,)`; None where inputs stay float.
        input_zero_point: uint8 or int8 `(1,)`; None when symmetric.
        format: the grids.
    """

    format: LayerFormat
    compute_dtype: torch.dtype
    weight_packed: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight as the layer computes with it, unpacked, in the dtype of the model."""
        # An AttributeError in here would be taken for a missing `weight` by nn.Module and hide its cause.
        try:
            grid = self.format.weight
            if grid is None:
                weight = cast(Tensor, self._parameters["weight"])
                return standardise(self, weight) if is_standardised(type(self)) else weight
            return self._unpack(grid).to(self.compute_dtype)
        except AttributeError as error:
            raise RuntimeError(f"the weight of {type(self).__name__} cannot be unpacked: {error}") from error

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input as in training, then do what the layer always did."""
        return super().forward(self._quantized(input), *args, **kwargs)

    def reset_parameters(self) -> None:
        """There is nothing to initialise: everything comes from the checkpoint."""

    def _quantized(self, input: Tensor) -> Tensor:
        grid = self.format.input
        if grid is None or self.input_scale is None:
            return input
        return fake_quantize(input, self.input_scale, self.input_zero_point, grid.qmin, grid.qmax)

    def _unpack(self, grid: GridFormat) -> Tensor:
        rows = list(grid.shape)
        rows.insert(0, rows.pop(output_axis(self)))
        values = unpack_bits(self.weight_packed, grid.bits, prod(rows[1:])).view(rows)
        w_int = values.movedim(0, output_axis(self)) + grid.qmin
        if self.weight_zero_point is not None:
            w_int = w_int - broadcast_to_axis(self.weight_zero_point, w_int.ndim, output_axis(self))
        assert self.weight_scale is not None
        scale = broadcast_to_axis(self.weight_scale, w_int.ndim, output_axis(self))
        return w_int.to(scale.dtype) * scale

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as "the class made for that base", because a class made at run time has no import path."""
        return _new_packed_layer, (type(self).__bases__[1],), self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        # A cast of the model decides the dtype of the unpacked weight; the scales keep all their digits.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        scales = {id(scale) for scale in (self.weight_scale, self.input_scale)}

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in scales else moved

        super()._apply(keep_precision, recurse)
        return self


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
