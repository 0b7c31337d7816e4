"""Batch-norm re-estimation: replace running statistics that oscillating weights have spoiled.

The running statistics average over many past steps in which oscillating weights had other integers than now, so they
describe no network that ever existed (Nagel et al., ICML 2022, sec. 3.1). Fresh averages over some training batches
put that right, with or without any other remedy.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = Tensor | Mapping[str, Any]
"""A batch of images `[N, 3, H, W]`, or a dict of what the model's forward takes."""

_Statistics = tuple[Tensor | None, Tensor | None]
"""Running mean and variance of a layer."""


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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each module is in the mode that it was in.

    What was cached in between is dropped: timm's attentions cache their biases, and what was made in inference mode
    could not be trained with.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()  # on which timm's attentions clear their caches
        for module, training in modes:
            module.training = training


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch], *, total_variance: bool = False) -> None:
    """Set the running statistics of every batch-norm layer to the average over `batches`, in place.

    It takes one forward for each batch, in inference mode. Dropout and everything else stay in evaluation mode, the
    oscillation tracker sees nothing, and each module is left in the mode it was in. A layer that the forward does not
    reach keeps its statistics. Under `torch.distributed` the average is over the batches of all processes, and every
    process must call it. A model without batch-norm is left alone and no batch is read.

    Args:
        model: any model.
        batches: training batches; each a tensor, or a dict of what the model's forward takes.
        total_variance: take the variance over all images at once. It has the variance of the batches' means in it,
            which the average of the batches' variances, the published choice, leaves out.

    Raises:
        ValueError: if `batches` is empty, in all processes.
    """
    layers = batchnorm_layers(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    counts = [None if n.num_batches_tracked is None else n.num_batches_tracked.clone() for n in layers]
    saved = [(_clone(layer.running_mean), _clone(layer.running_var)) for layer in layers]
    results = saved
    sums = [_StatisticSums(layer, total_variance) for layer in layers]
    handles = [layer.register_forward_hook(its_sums) for layer, its_sums in zip(layers, sums, strict=True)]
    seen = 0
    try:
        with evaluation_mode(model):
            for layer in layers:
                layer.training = True
                layer.reset_running_stats()
                layer.momentum = 1.0  # the running statistics are those of the batch, for the hook to add up
            for batch in batches:
                # Not around the loop: what a dataset makes and keeps in there may be trained on later.
                with torch.inference_mode():
                    forward_batch(model, batch)
                seen += 1
        # A process without batches gives nothing to the sums, and must not leave the others waiting for it.
        of_all = sums[0].mean.new_tensor([seen])
        _sum_over_processes([of_all])
        if of_all.item() == 0:
            raise ValueError("got no batches for batch-norm re-estimation, expected at least one")
        results = _averages(sums, saved)
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum, count, (mean, var) in zip(layers, momenta, counts, results, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None and count is not None:
                layer.num_batches_tracked.copy_(count)
            _fill(layer.running_mean, mean)
            _fill(layer.running_var, var)


class _StatisticSums:
    """Adds up one layer's batch statistics, in float64 where the device has it; a forward hook.

    Args:
        layer: with momentum 1, so that its running statistics are those of the last batch.
        total_variance: see `reestimate_batchnorm`.
    """

    def __init__(self, layer: _BatchNorm, total_variance: bool) -> None:
        assert layer.running_mean is not None
        self.total_variance = total_variance
        dtype = torch.float32 if layer.running_mean.device.type == "mps" else torch.float64
        self.mean, self.square = (torch.zeros_like(layer.running_mean, dtype=dtype) for _ in range(2))
        self.weight = 0

    def __call__(self, layer: _BatchNorm, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        if self.total_variance:
            count = args[0].numel() // self.mean.numel()
            mean = layer.running_mean.to(self.mean.dtype)
            self.square.addcmul_(mean, mean, value=count)
            factor = count - 1
        else:
            count = factor = 1
        self.weight += count
        self.mean.add_(layer.running_mean, alpha=count)
        self.square.add_(layer.running_var, alpha=factor)

    def parts(self) -> list[Tensor]:
        """What is to be summed over the processes: weight, mean and square."""
        return [self.mean.new_tensor([self.weight]), self.mean, self.square]

    def averages(self, weight: float) -> tuple[Tensor, Tensor]:
        """Mean and variance, given the weight of all processes."""
        mean = self.mean / weight
        if self.total_variance:
            return mean, (self.square - weight * mean.square()) / (weight - 1)
        return mean, self.square / weight


def _averages(sums: list[_StatisticSums], saved: list[_Statistics]) -> list[_Statistics]:
    """Statistics over all processes; the saved ones where no forward came by, as at an auxiliary head."""
    parts = [its_sums.parts() for its_sums in sums]
    _sum_over_processes([part for of_layer in parts for part in of_layer])
    weights = torch.cat([weight for weight, _, _ in parts]).tolist()
    return [
        its_sums.averages(weight) if weight else old
        for its_sums, weight, old in zip(sums, weights, saved, strict=True)
    ]


def kl_divergence(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """KL divergence of a normal distribution from another, per channel, in nats.

    Formula: `KL(N(mean, var) || N(running_mean, running_var))
    = (log(running_var / var) + (var + (mean - running_mean)^2) / running_var - 1) / 2`.

    Args:
        mean: of the population, `[channels]`.
        var: of the population.
        running_mean: of the batch-norm layer.
        running_var: of the batch-norm layer.

    Returns:
        `[channels]`, at least 0 but for rounding.
    """
    return ((running_var / var).log() + (var + (mean - running_mean).square()) / running_var - 1) / 2


def average_over_processes(layers: list[_BatchNorm]) -> None:
    """Replace running statistics by their average over all processes; does nothing in a single process."""
    if _num_processes() == 1:
        return
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    _sum_over_processes(statistics)
    for statistic in statistics:
        statistic /= _num_processes()


def _num_processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over all processes, in one message."""
    if _num_processes() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _clone(statistic: Tensor | None) -> Tensor | None:
    return None if statistic is None else statistic.clone()


def _fill(statistic: Tensor | None, value: Tensor | None) -> None:
    if statistic is not None and value is not None:
        statistic.copy_(value)
