"""Let a packed layer compute the batch-norm in front of it, together with the rounding of its input.

On its own a batch-norm reads and writes all values of an activation, the largest tensors of a network, and so does
rounding. Done together, part by part, each part is still in the cache from the one to the other: rounding costs
arithmetic only. What is computed does not change by a bit, because each part goes through the same operation.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from hf_oscqat.quantization.kernels import is_traced


class DeferredNorm(nn.Module):
    """Mixin of a batch-norm between two layers that leaves its work to the second one, where nobody can tell.

    That is on a CPU, without gradients, and with no hook to look at what passes. Otherwise it does what it always did.

    Attributes:
        around: the layer before it, whose output is written over, and the one behind it.
    """

    around: tuple[nn.Module, nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, or hand on what came with a note of who is to normalise it."""
        if not self._is_deferred(x):
            return super().forward(x)
        x.deferred_norm = self  # type: ignore[attr-defined]
        return x

    def _is_deferred(self, x: Tensor) -> bool:
        before, behind = self.around
        watched = before._forward_hooks or self._forward_pre_hooks or self._forward_hooks or behind._forward_pre_hooks
        # The activation may have been taken out of the layer again, into this norm.
        if self.training or watched or behind.input_activation is None:
            return False
        return not torch.is_grad_enabled() and not is_traced(x) and _is_plain(x)

    def parts(self, x: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of `x`, of about `count` values, each a view, and what it is when normalised, in new memory.

        Args:
            x: `[N, C, H, W]`, dense in one of torch's two layouts.
            count: how many values.
        """
        norm = cast(nn.BatchNorm2d, self)
        per_channel = cast(tuple[Tensor, ...], (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        channels, size = x.shape[1], x.shape[2] * x.shape[3]
        if not x.is_contiguous():
            for rows in x.permute(0, 2, 3, 1).view(-1, channels).split(max(1, count // channels)):
                part = rows.t()[None, :, :, None]
                yield part, self._normalised(part, *per_channel)
            return
        for images in x.split(max(1, count // (channels * size))):
            # Some channels of several images would not be dense.
            width = channels if len(images) > 1 else max(1, count // size)
            for part, *own in zip(images.split(width, 1), *(p.split(width) for p in per_channel), strict=True):
                yield part, self._normalised(part, *own)

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        eps = cast(nn.BatchNorm2d, self).eps
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def _is_plain(x: Tensor) -> bool:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4 and x.numel() > 0 and dense


class DeferredBatchNorm2d(DeferredNorm, nn.BatchNorm2d):
    """Torch's batch-norm; see `DeferredNorm`."""


class DeferredBatchNormAct2d(DeferredNorm, BatchNormAct2d):
    """timm's batch-norm with an activation, which must be folded into the layer behind; see `DeferredNorm`."""


_DEFERRED: dict[type[nn.Module], type[DeferredNorm]] = {
    nn.BatchNorm2d: DeferredBatchNorm2d,
    BatchNormAct2d: DeferredBatchNormAct2d,
}


def defer_norm(before: nn.Module, norm: nn.Module, behind: nn.Module) -> None:
    """Let the packed layer behind a norm compute it, in place; a norm of another kind stays as it is.

    Args:
        before: the layer whose output goes to the norm, and nowhere else.
        norm: its output goes to `behind`, and nowhere else.
        behind: a packed layer.
    """
    kind = _DEFERRED.get(type(norm))
    tensors = [getattr(norm, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
    simple = all(t is not None and t.dtype == torch.float32 for t in tensors)
    if kind is None or not simple or type(getattr(norm, "drop", nn.Identity())) is not nn.Identity:
        return
    deferred: Any = norm
    deferred.__class__ = kind
    deferred.around = (before, behind)
