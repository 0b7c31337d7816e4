"""Put quantizers into a layer of any class without replacing its forward.

A mixin goes in front of the layer's own class and changes two things only: what `self.weight` returns, and what
arrives as input. The layer keeps its padding rules, grouping and state-dict names, so `<layer>.weight` is the float
latent weight and float checkpoints load as they are. An `isinstance` swap to a plain Conv2d would lose, for example,
the SAME padding of timm's `Conv2dSame` without a word.

Writing into `layer.weight` in place after this changes a computed tensor and is lost; write into `latent_weight`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_oscqat.quantization.functional import TRANSPOSED, Activation, leave_memory, taker_of_memory
from hf_oscqat.quantization.kernels import is_compiled, is_traced
from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.quantization.timm_layers import convolve, is_standardised, standardise

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)


class QuantizedLayer(nn.Module):
    """Mixin of a layer in training form.

    Attributes:
        weight_quantizer: quantizer of the weight, or None where the weight stays float.
        input_quantizer: quantizer of the input, or None where the input stays float.
        input_activation: bounds of the activation before the layer, where `fold_activations` has moved it in here.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    input_activation: Activation | None = None

    @property
    def latent_weight(self) -> nn.Parameter:
        """The float weight that is trained."""
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def float_weight(self) -> Tensor:
        """The float weight that is quantized: the latent one, or what the layer makes of it; differentiable."""
        return self.latent_weight

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with: on the grid, differentiable in latent weight and scale."""
        # An AttributeError in here would send nn.Module looking for `weight` elsewhere: it would find the float one.
        try:
            quantizer = self.weight_quantizer
            # A meta tensor has no values to quantize; who asks for one (a loader, say) wants the shape.
            return (
                self.float_weight if quantizer is None or self.latent_weight.is_meta else quantizer(self.float_weight)
            )
        except AttributeError as error:
            raise RuntimeError(f"the weight of {type(self).__name__} cannot be quantized: {error}") from error

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input, then do what the layer always did."""
        quantized = self._quantized(input)
        with self._keeping(input, quantized):
            return super().forward(quantized, *args, **kwargs)

    def _quantized(self, input: Tensor) -> Tensor:
        quantizer, activation = self.input_quantizer, self.input_activation
        if isinstance(quantizer, Quantizer):
            return quantizer(input, activation)
        if activation is not None:
            input = input.clamp(*activation)
        return input if quantizer is None else quantizer(input)

    def _keeping(self, input: Tensor, quantized: Tensor) -> AbstractContextManager[Any]:
        """Let autograd keep the input, which the quantizer needs anyway, and compute the quantized one from it again.

        The layer's gradient needs its quantized input. To keep both would be half as much memory again as the float
        model takes, and compiled kernels round once more at little cost. Under torch.compile its partitioner decides.
        """
        quantizer = self.input_quantizer
        if not (isinstance(quantizer, Quantizer) and quantized.requires_grad) or is_traced(quantized):
            return nullcontext()
        if quantizer.rounds_at_random or not is_compiled(quantized) or _is_checkpointed():
            return nullcontext()
        input, activation, taker = input.detach(), self.input_activation, taker_of_memory(quantized)
        storage = quantized.untyped_storage().data_ptr()

        def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
            if saved.untyped_storage().data_ptr() != storage or saved.dtype != input.dtype:
                return saved
            size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()  # it may be a view

            def again() -> Tensor:
                with torch.no_grad():
                    rounded = quantizer(input, activation)
                    leave_memory(taker, rounded)
                    return rounded.as_strided(size, stride, offset)

            return again

        return saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, Tensor) else packed())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as "the class made for that base", because a class made at run time has no import path."""
        return _new_quantized_layer, (type(self).__bases__[1],), self.__dict__.copy()


class StandardisedQuantizedLayer(QuantizedLayer):
    """Mixin of a weight-standardised convolution in training form: quantizes the standardised weight."""

    @property
    def float_weight(self) -> Tensor:
        """The standardised latent weight."""
        return standardise(self, self.latent_weight)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input and convolve; the weight is standardised already."""
        quantized = self._quantized(input)
        with self._keeping(input, quantized):
            return convolve(self, quantized)


def _is_checkpointed() -> bool:
    """Whether gradient checkpointing is at work, which is to keep nothing here; `_keeping` would keep the input."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


_QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {}


def _quantized_class(base: type[nn.Module]) -> type[QuantizedLayer]:
    """One class per base class, so that repeated blocks share one compiled graph."""
    if base not in _QUANTIZED_CLASSES:
        mixin = StandardisedQuantizedLayer if is_standardised(base) else QuantizedLayer
        _QUANTIZED_CLASSES[base] = type(f"Quantized{base.__name__}", (mixin, base), {})
    return _QUANTIZED_CLASSES[base]


def _new_quantized_layer(base: type[nn.Module]) -> QuantizedLayer:
    cls = _quantized_class(base)
    return cls.__new__(cls)


def quantize_layer(
    layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
) -> QuantizedLayer:
    """Turn a layer into its training form, in place.

    Args:
        layer: an instance of one of `QUANTIZABLE` or a subclass that hands `self.weight` to the usual operation.
        weight_quantizer: for its weight, or None.
        input_quantizer: for its input, or None.

    Returns:
        The same object.
    """
    layer.__class__ = _quantized_class(type(layer))
    quantized = cast(QuantizedLayer, layer)
    quantized.weight_quantizer = weight_quantizer
    quantized.input_quantizer = input_quantizer
    return quantized


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield `(name, layer)` for each layer in training form, each module once, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def quantized_weights(model: nn.Module) -> Iterator[tuple[Tensor, Quantizer]]:
    """Yield `(float_weight, quantizer)` for each weight that is quantized.

    Raises:
        ValueError: if none is.
    """
    found = False
    for _, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            found = True
            yield layer.float_weight, layer.weight_quantizer
    if not found:
        raise ValueError("got a model without quantized weights, expected a prepared one: run prepare_qat first")


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield `(name, quantizer)` for each quantizer of the model, named like its module."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
