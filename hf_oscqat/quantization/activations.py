"""Fold activations into the quantizer behind them.

ReLU and ReLU6 clamp, and so does a quantizer right afterwards. Done in one pass, forward and backward, the clamp is
free: a quantized network then reads and writes little more memory than the float one.

An activation may be folded only where its output goes to one quantized layer and nowhere else. For the blocks below
that is known from timm's source; anything else stays as it is, and so does what somebody watches with a hook. What the
network computes does not change by a bit. (A hook that is registered later, on a norm with such an activation in it,
sees values before the activation, and the packed model goes on writing into them.)
"""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from hf_oscqat.quantization.functional import Activation
from hf_oscqat.quantization.packed import PackedLayer

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
