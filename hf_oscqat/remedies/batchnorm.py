"""Batch-norm re-estimation: replace running statistics that oscillating weights have spoiled.

The running statistics average over many past steps in which oscillating weights had other integers than now, so they
describe no network that ever existed (Nagel et al., ICML 2022, sec. 3.1). Fresh averages over some training batches
put that right, with or without any other remedy.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = Tensor | Mapping[str, Any]
"""A batch of images `[N, 3, H, W]`, or a dict of what the model's forward takes."""


def forward_batch(model: nn.Module, batch: Batch) -> None:
    """Run the model on one batch, on the model's device; the output is dropped.

    Raises:
        TypeError: if the batch is neither a tensor nor a mapping.
    """
    parameter = next(model.parameters())
    if isinstance(batch, Tensor):
        model(batch.to(parameter.device))
    elif isinstance(batch, Mapping):
        model(**{k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    else:
        raise TypeError(
            f"got a batch of type {type(batch).__name__}, expected a tensor or a dict of what the model takes"
        )


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers that keep running statistics, timm's and synchronized ones included."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set the running statistics of every batch-norm layer to the average over `batches`, in place.

    Dropout and everything else stay in evaluation mode, the oscillation tracker sees nothing, and each module is
    left in the mode it was in. Under `torch.distributed` the averages of all processes are averaged; every process
    must call it, with as many batches. A model without batch-norm is left alone and no batch is read.

    Args:
        model: any model.
        batches: training batches; each a tensor, or a dict of what the model's forward takes.

    Raises:
        ValueError: if `batches` is empty.
    """
    layers = batchnorm_layers(model)
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    counts = [None if n.num_batches_tracked is None else n.num_batches_tracked.clone() for n in layers]
    saved = [(_clone(layer.running_mean), _clone(layer.running_var)) for layer in layers]
    seen = 0
    finished = False
    try:
        model.eval()
        for layer in layers:
            layer.training = True
            layer.reset_running_stats()
            layer.momentum = None  # torch's own cumulative average
        for batch in batches:
            forward_batch(model, batch)
            seen += 1
        if seen == 0:
            raise ValueError("got no batches for batch-norm re-estimation, expected at least one")
        average_over_processes(layers)
        finished = True
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum, count, (mean, var) in zip(layers, momenta, counts, saved, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None and count is not None:
                layer.num_batches_tracked.copy_(count)
            if not finished:
                _fill(layer.running_mean, mean)
                _fill(layer.running_var, var)


def average_over_processes(layers: list[_BatchNorm]) -> None:
    """Replace running statistics by their average over all processes; does nothing in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if not layers:
        return
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    flat = torch.cat([s.flatten() for s in statistics])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for statistic, average in zip(statistics, flat.split([s.numel() for s in statistics]), strict=True):
        statistic.copy_(average.view_as(statistic))


def _clone(statistic: Tensor | None) -> Tensor | None:
    return None if statistic is None else statistic.clone()


def _fill(statistic: Tensor | None, value: Tensor | None) -> None:
    if statistic is not None and value is not None:
        statistic.copy_(value)
