"""Let batch-norms of a packed model write over what they read.

On a CPU new memory costs more than the arithmetic of a norm does. What a convolution has just made and nobody but its
norm reads need not be kept, and what the network computes does not change by a bit.

Which convolutions feed a norm and nothing else is known from timm's source. Whether what reaches the norm is what such
a convolution made is seen in each forward, by a mark that the convolution leaves on its output and the norm takes off:
whatever comes between the two, a hook or another module, leaves no mark.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.modules.module as torch_modules
from torch import Tensor, nn

from hf_oscqat.quantization.kernels import is_traced
from hf_oscqat.quantization.packed import UNSHARED, PackedLayer

FEEDS_NORM: dict[str, tuple[tuple[str, str], ...]] = {
    # block: (layer, the norm that alone gets its output)
    "timm.layers.conv_bn_act.ConvNormAct": (("conv", "bn"),),
    "timm.models._efficientnet_blocks.ConvBnAct": (("conv", "bn1"),),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "timm.models._efficientnet_blocks.InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    "timm.models._efficientnet_blocks.EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "timm.models.efficientnet.EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "timm.models.efficientnet.EfficientNetFeatures": (("conv_stem", "bn1"),),
    "timm.models.mobilenetv3.MobileNetV3": (("conv_stem", "bn1"),),
    "timm.models.mobilenetv3.MobileNetV3Features": (("conv_stem", "bn1"),),
    "timm.models.resnet.BasicBlock": (("conv1", "bn1"), ("conv2", "bn2")),
    "timm.models.resnet.Bottleneck": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    "timm.models.resnet.ResNet": (("conv1", "bn1"),),
}
OVERWRITING = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")
"""Norms of which it is known what they do behind the normalisation: apply their `drop` and `act`, if they have any."""


class OverwritingNorm(nn.Module):
    """Mixin of a batch-norm that writes over its input wherever nobody else can see it."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, in place where that is safe, and do what the norm always did behind that."""
        norm = cast(nn.BatchNorm2d, self)
        # A mark for another norm would have come here by a way that the table does not know.
        if is_traced(input) or vars(input).pop(UNSHARED, None) is not norm or not _may_overwrite(norm):
            return super().forward(input)
        parameters, buffers = norm._parameters, norm._buffers  # not by attribute: nn.Module takes its time to find one
        nothing = cast(Tensor, buffers["running_mean"]).new_empty(0)
        torch.native_batch_norm(
            input,
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            False,
            0.0,
            norm.eps,
            out=(input, nothing, nothing),
        )
        for behind in (norm._modules.get("drop"), norm._modules.get("act")):
            input = input if behind is None else behind(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as "the class made for that base", because a class made at run time has no import path."""
        return _new_overwriting_norm, (type(self).__bases__[1],), self.__dict__.copy()


def _may_overwrite(norm: nn.BatchNorm2d) -> bool:
    """Whether it uses its statistics, nobody wants gradients, and no hook gets to see the input and might keep it."""
    hooks = (norm._forward_pre_hooks, norm._forward_hooks)
    everybodys = (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks)
    wants_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in norm.parameters(recurse=False))
    return not (norm.training or norm.running_mean is None or wants_gradients or any(hooks) or any(everybodys))


_OVERWRITING_CLASSES: dict[type[nn.Module], type[OverwritingNorm]] = {}


def _overwriting_class(base: type[nn.Module]) -> type[OverwritingNorm]:
    if base not in _OVERWRITING_CLASSES:
        _OVERWRITING_CLASSES[base] = type(f"Overwriting{base.__name__}", (OverwritingNorm, base), {})
    return _OVERWRITING_CLASSES[base]


def _new_overwriting_norm(base: type[nn.Module]) -> OverwritingNorm:
    cls = _overwriting_class(base)
    return cls.__new__(cls)


def let_norms_overwrite(model: nn.Module) -> None:
    """Make norms behind packed convolutions write over their input, in place, where that is known to be safe.

    Args:
        model: a packed model; its state dict stays as it is.
    """
    for layer, norm in list(_pairs(model)):
        if f"{type(norm).__module__}.{type(norm).__qualname__}" in OVERWRITING:
            norm.__class__ = _overwriting_class(type(norm))
        if isinstance(norm, OverwritingNorm):
            layer.feeds = (norm,)


def _pairs(model: nn.Module) -> Iterator[tuple[PackedLayer, nn.Module]]:
    for block in model.modules():
        for names in FEEDS_NORM.get(f"{type(block).__module__}.{type(block).__qualname__}", ()):
            layer, norm = (block._modules.get(name) for name in names)
            if isinstance(layer, PackedLayer) and isinstance(layer, nn.Conv2d) and norm is not None:
                yield layer, norm
