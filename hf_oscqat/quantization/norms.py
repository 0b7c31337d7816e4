"""Let batch-norms of a packed model write over what they read.

On a CPU new memory costs more than the arithmetic of a norm does. What a convolution has just made and nobody but its
norm reads need not be kept, and what the network computes does not change by a bit.

Which functions of timm hand the output of a convolution to a norm and to nothing else is known from its source. That
such a function runs is seen in each forward: it must have called both, the convolution and the norm, with nothing but
`nn.Module.__call__` between, which calls a forward in another way where there are hooks; and what reaches the norm
must be what the convolution made. Whoever wraps either of them, watches it, traces it or calls it by hand keeps what
he sees.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_oscqat.quantization.kernels import is_traced
from hf_oscqat.quantization.packed import Handover, PackedLayer, is_called_by, offered

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
