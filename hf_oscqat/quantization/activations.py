"""Fold activations into the quantizer behind them.

ReLU and ReLU6 clamp, and so does a quantizer right afterwards. Done in one pass, forward and backward, the clamp is
free: a quantized network then reads and writes little more memory than the float one.

An activation may be folded only where its output goes to one quantized layer and nowhere else. For the blocks below
that is known from timm's source; anything else stays as it is, and so does what somebody watches with a hook. What the
network computes does not change by a bit. (A hook that is registered later, on a norm with such an activation in it,
sees values before the activation, and the packed model goes on writing into them.)

In a packed model the batch-norm before such an activation is computed by the layer behind it too; see `norms.py`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from hf_oscqat.quantization.functional import Activation
from hf_oscqat.quantization.norms import defer_norm
from hf_oscqat.quantization.packed import PackedLayer


class Site(NamedTuple):
    """Where in a block one layer feeds the next, through norm and activation and to nothing else; names of modules.

    Args:
        before: the first layer.
        norm: behind it.
        activation: behind or in the norm.
        layer: the next layer.
        between: what may stand between norm and layer besides, and must be nothing.
    """

    before: str
    norm: str
    activation: str
    layer: str
    between: tuple[str, ...] = ()


FOLDABLE = {
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": (
        Site("conv_dw", "bn1", "bn1.act", "conv_pw", ("aa", "se")),
    ),
    "timm.models._efficientnet_blocks.InvertedResidual": (
        Site("conv_pw", "bn1", "bn1.act", "conv_dw"),
        Site("conv_dw", "bn2", "bn2.act", "conv_pwl", ("aa", "se")),
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": (Site("conv_exp", "bn1", "bn1.act", "conv_pwl", ("aa", "se")),),
    "timm.models.resnet.BasicBlock": (Site("conv1", "bn1", "act1", "conv2", ("drop_block", "aa")),),
    "timm.models.resnet.Bottleneck": (
        Site("conv1", "bn1", "act1", "conv2"),
        Site("conv2", "bn2", "act2", "conv3", ("drop_block", "aa")),
    ),
}
"""The sites in blocks of timm, by class."""


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
    for block, site in list(_foldable(model)):
        activation, layer = block.get_submodule(site.activation), block.get_submodule(site.layer)
        bounds = _bounds(activation)
        if bounds is not None and _quantizes_input(layer) and not _is_watched(block, site.activation, layer):
            layer.input_activation = bounds  # type: ignore[assignment]
            _replace(block, site.activation, FoldedActivation(activation))


def defer_norms(model: nn.Module) -> None:
    """Let packed layers compute the batch-norms before activations that are folded into them, in place."""
    for block, site in _foldable(model):
        layer = block.get_submodule(site.layer)
        if isinstance(layer, PackedLayer) and isinstance(block.get_submodule(site.activation), FoldedActivation):
            defer_norm(block.get_submodule(site.before), block.get_submodule(site.norm), layer)


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


def _foldable(model: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    for block in model.modules():
        for site in FOLDABLE.get(f"{type(block).__module__}.{type(block).__name__}", ()):
            modules = dict(block.named_modules())
            nothing_between = all(type(modules.get(part, nn.Identity())) is nn.Identity for part in site.between)
            # Some norms that timm puts in place of batch-norm are their own activation.
            if nothing_between and all(name in modules for name in site[:4]):
                yield block, site


def _bounds(activation: nn.Module) -> Activation | None:
    if type(activation) is nn.ReLU:
        return 0.0, math.inf
    return (0.0, 6.0) if type(activation) is nn.ReLU6 else None


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
