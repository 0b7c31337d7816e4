"""Let a packed layer compute the batch-norm in front of it, together with the rounding of its input.

A batch-norm gives out new memory. For the largest tensors of a network, beyond what C libraries keep for later use,
the system has to clear it page by page, which takes several times as long as the arithmetic of both. So a part at a
time is normalised, into memory that is small and soon used again, rounded, and written over the norm's input. What is
computed does not change by a bit, because each part goes through the same operation.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from hf_oscqat.quantization.kernels import is_traced

PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a batch-norm, in the order in which torch takes them."""
LARGE = 2**22
"""Values from which on this pays. glibc hands memory of up to 32 MiB out again, as it is, and parts cost some time."""


class DeferredNorm(nn.Module):
    """Mixin of a batch-norm between two layers that leaves its work to the second one, where nobody can tell.

    That is for large tensors on a CPU, without gradients, and with no hook to look at what passes. Otherwise it does
    what it always did.

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
        if self.training or torch.is_grad_enabled() or is_traced(x) or not _is_large(x):
            return False
        before, behind = self.around
        watched = before._forward_hooks or self._forward_pre_hooks or self._forward_hooks or behind._forward_pre_hooks
        # The activation may have been taken out of the layer again, into this norm.
        return not watched and behind.input_activation is not None

    def parts(self, x: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of `x`, of about `count` values, each a view, and what it is when normalised, in new memory.

        Args:
            x: `[N, C, H, W]`, dense in one of torch's two layouts.
            count: how many values.
        """
        eps = cast(nn.BatchNorm2d, self).eps
        vectors = [cast(Tensor, getattr(self, name)) for name in PER_CHANNEL]
        channels, size = x.shape[1], x.shape[2] * x.shape[3]
        parts: Iterable[Tensor]
        own: Iterable[Sequence[Tensor]] = itertools.repeat(vectors)
        if not x.is_contiguous():
            rows = x.permute(0, 2, 3, 1).view(-1, channels)
            parts = (part.t()[None, :, :, None] for part in rows.split(max(1, count // channels)))
        elif channels * size <= count:
            parts = x.split(count // (channels * size))
        else:
            width = max(1, count // size)
            parts = (part for image in x.split(1) for part in image.split(width, 1))
            own = itertools.cycle(list(zip(*(vector.split(width) for vector in vectors), strict=True)))
        for part, (weight, bias, mean, var) in zip(parts, own, strict=False):
            yield part, torch.batch_norm(part, weight, bias, mean, var, False, 0.0, eps, False)


def _is_large(x: Tensor) -> bool:
    if x.numel() < LARGE or x.ndim != 4 or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


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
    tensors = [getattr(norm, name, None) for name in PER_CHANNEL]
    simple = all(t is not None and t.dtype == torch.float32 for t in tensors)
    if kind is None or not simple or type(getattr(norm, "drop", nn.Identity())) is not nn.Identity:
        return
    deferred: Any = norm
    deferred.__class__ = kind
    deferred.around = (before, behind)
