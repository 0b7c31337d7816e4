"""What can go wrong with the numbers of a prepared model, by the names of its layers."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import MIN_SCALE
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers, quantizers
from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.remedies.batchnorm import Batch, evaluation_mode, forward_batch

PREFIX = "timm_model."


@torch.inference_mode()
def dead_quantizers(model: nn.Module, batch: Batch) -> list[str]:
    """Return the quantizers that give every value the same integer: what passes through them says nothing.

    Args:
        model: a prepared and calibrated model.
        batch: images, or a dict of what the model's forward takes; one forward is made.

    Returns:
        Names such as `blocks.0.conv.input_quantizer`: of weights in the order of definition, then of inputs in that of
        use.
    """
    is_dead: dict[str, bool] = {}  # of a layer that is used twice, if both times

    def look(name: str, quantizer: Quantizer, x: Tensor) -> None:
        integers = quantizer.to_int(x)
        constant = integers.numel() > 1 and bool(integers.amin() == integers.amax())
        is_dead[name] = constant and is_dead.get(name, True)

    def watch(name: str, layer: QuantizedLayer) -> torch.utils.hooks.RemovableHandle:
        def before_forward(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            quantizer, activation = layer.input_quantizer, layer.input_activation
            if isinstance(quantizer, Quantizer):
                look(f"{name}.input_quantizer", quantizer, args[0].clamp(*activation) if activation else args[0])

        return layer.register_forward_pre_hook(before_forward)

    layers = {name.removeprefix(PREFIX): layer for name, layer in quantized_layers(model)}
    for name, layer in layers.items():
        if layer.weight_quantizer is not None:
            look(f"{name}.weight_quantizer", layer.weight_quantizer, layer.float_weight)
    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        with evaluation_mode(model):
            forward_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, dead in is_dead.items() if dead]


def scales_at_minimum(model: nn.Module) -> list[str]:
    """Return the quantizers with a scale at its lower bound, to which training tried to make it zero or negative."""
    found = [(name, (quantizer.scale <= MIN_SCALE).any()) for name, quantizer in quantizers(model)]
    flags = torch.stack([flag for _, flag in found]).tolist() if found else []
    return [name.removeprefix(PREFIX) for (name, _), flag in zip(found, flags, strict=True) if flag]


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; the device is waited for once.

    Args:
        named: names and tensors of any shape; integers and None are passed over.
    """
    tensors = [
        (name.removeprefix(PREFIX), tensor)
        for name, tensor in named
        if tensor is not None and tensor.is_floating_point()
    ]
    if not tensors:
        return []
    largest = torch._foreach_norm([tensor for _, tensor in tensors], ord=torch.inf)
    finite = torch.stack([norm.double() for norm in largest]).isfinite()
    if bool(finite.all()):
        return []
    return [name for (name, _), is_finite in zip(tensors, finite.tolist(), strict=True) if not is_finite]


@torch.no_grad()
def compare_ranks(model: nn.Module, step: int) -> None:
    """Find out whether all processes hold the same parameters, grids, oscillation statistics and frozen integers.

    Batch-norm statistics are left out, for each process has its own until they are averaged or re-estimated. Every
    process must call it. Each sends 8 bytes a layer.

    Args:
        model: a prepared model, the same on each process if all is well.
        step: for the message.

    Raises:
        RuntimeError: on every process, with the names of the layers that differ.
    """
    layers = {name: {**layer.state_dict(), "grids": _grids(layer)} for name, layer in quantized_layers(model)}
    inside = tuple(f"{name}." for name in layers)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and name not in layers and not name.startswith(inside):
            layers[name] = own
    sums = torch.stack([_checksum(tensors) for tensors in layers.values()])
    lowest, highest = sums.clone(), sums.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    differ = [name for name, same in zip(layers, (lowest == highest).tolist(), strict=True) if not same]
    if differ:
        names = ", ".join(name.removeprefix(PREFIX) for name in differ[:5])
        raise RuntimeError(
            f"got other weights, scales or statistics on some processes at step {step}, expected the same on all, in "
            f"{names}" + (f" and {len(differ) - 5} more" if len(differ) > 5 else "") + ". They no longer train one "
            "model: continue from the last checkpoint, and look for what one process does alone"
        )


def _grids(layer: QuantizedLayer) -> Tensor:
    """What the quantizers of a layer remember of their tensors: signs, and whether they have looked at frozen ones."""
    flags = [flag for _, quantizer in quantizers(layer) for flag in (quantizer.is_signed, quantizer.has_frozen)]
    return torch.tensor(flags, dtype=torch.int8, device=layer.latent_weight.device)


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """A number, int64 0-d, that depends on every bit of the tensors and on their order."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = None
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().flatten().view(integers[tensor.element_size()]).long()
        place = torch.arange(1, bits.numel() + 1, device=bits.device)
        part = (bits * place).sum()
        total = part if total is None else total * 31 + part
    assert total is not None
    return total
