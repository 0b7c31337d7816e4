"""What some of timm's own classes need before their weights can be quantized. timm itself is not imported here.

Weight-standardised convolutions (NFNet, BiT) normalise the weight inside forward. What the convolution computes with,
and what integer hardware would hold, is the normalised weight, so that is what gets quantized.

Some attentions (BEiT, EVA, Swin v2) hand `qkv.weight` to a linear function without calling the layer, so its input
would never be quantized. timm has a switch that makes them call it, with the bias added afterwards.

Some networks (RepViT, MobileOne, FastViT) train with branches that are merged for inference. Merging makes new layers
from the float weights of old ones, and the quantizers would be gone without a word.
"""

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

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
