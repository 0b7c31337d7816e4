"""Time the range search against the published one, on MobileNetV2's weights and one batch of its activations.

    python training/benchmarks/range_search.py [--model mobilenetv2_100] [--batch-size 32] [--img-size 96] [--bits 4]

The published search quantizes all values with each candidate; `published_search` does that, as a loop of torch
operations. Both times and both errors are printed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_oscqat.quantization.functional import fake_quantize
from hf_oscqat.quantization.layers import QUANTIZABLE
from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.quantization.range_estimators import MAX_SAMPLES, MSE, GridParameters

CANDIDATES, MARGIN = 100, 0.5


def published_search(
    batches: Sequence[Tensor], bits: int, *, symmetric: bool, signed: bool, per_channel: bool = False
) -> GridParameters:
    """Search as published: quantize everything with each candidate and add up the squared error.

    Args:
        batches: values; channels come first where `per_channel`.
        bits: width of the grid.
        symmetric: whether 0.0 is the integer 0; otherwise the candidates are also shifted.
        signed: whether the values go below 0.
        per_channel: search each channel by itself, among the candidates of the whole tensor.

    Returns:
        What `RangeEstimator.finish` returns.
    """
    lowest, highest = float(batches[0].min()), float(batches[0].max())
    step = (max(-lowest, highest) + MARGIN) / CANDIDATES
    levels = 2**bits - 1
    shifts = [0] if symmetric or not signed else range(-(2**bits // 4) + 1, 2**bits // 4)
    qmin = -(2 ** (bits - 1)) if symmetric and signed else 0
    best_error: Tensor | None = None
    best_scale = best_zero = torch.zeros(0)
    for candidate in range(1, CANDIDATES + 1):
        for shift in shifts:
            limit = candidate * step
            if symmetric or not signed:
                steps_to_limit = levels // 2 if signed else levels
                scale, zero_point = torch.tensor([limit / steps_to_limit]), torch.zeros(1)
            else:
                skew = shift * 2 * limit / levels
                low, high = max(-limit + skew, lowest - MARGIN), min(limit + skew, highest + MARGIN)
                low_end, high_end = torch.tensor([low]), torch.tensor([high])
                scale = (high_end - low_end) / levels
                zero_point = (-low_end / scale).round()
            error = torch.zeros(len(batches[0]) if per_channel else 1)
            for x in batches:
                y = fake_quantize(x, scale, None if symmetric else zero_point, qmin, qmin + levels)
                square = (y - x).square()
                error += square.flatten(1).sum(1) if per_channel else square.sum()
            if best_error is None:
                best_error = torch.full_like(error, torch.inf)
                best_scale, best_zero = scale.expand_as(error), zero_point.expand_as(error)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
    return GridParameters(best_scale, None if symmetric else best_zero, signed)


def _values(model: nn.Module, images: Tensor) -> list[tuple[Tensor, bool]]:
    """Weights and inputs of every layer that is quantized, and which of them are weights."""
    values: list[tuple[Tensor, bool]] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        values.append((args[0], False))

    layers = [module for module in model.modules() if isinstance(module, QUANTIZABLE)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers[1:]]
    model(images)
    for hook in hooks:
        hook.remove()
    return [(layer.weight.detach(), True) for layer in layers] + values


def _timed(search: Callable[[Tensor, bool], GridParameters], values: list[tuple[Tensor, bool]], bits: int) -> Any:
    start = time.perf_counter()
    grids = [search(x, is_weight) for x, is_weight in values]
    seconds = time.perf_counter() - start
    error = 0.0
    for (x, _), grid in zip(values, grids, strict=True):
        qmin = -(2 ** (bits - 1)) if grid.signed else 0
        error += float((fake_quantize(x, grid.scale, None, qmin, qmin + 2**bits - 1) - x).double().square().sum())
    return seconds, error


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure and print.

    Returns:
        Seconds and squared errors by name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.pretrained)
    for module in model.modules():  # with fresh statistics the activations would vanish on their way
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    values = _values(model, torch.randn(args.batch_size, 3, args.img_size, args.img_size))

    def ours(x: Tensor, is_weight: bool) -> GridParameters:
        estimator = MSE(Quantizer(args.bits, signed=True if is_weight else None), keep_all=is_weight)
        estimator.update(x)
        return estimator.finish()

    def published(x: Tensor, is_weight: bool) -> GridParameters:
        return published_search([x], args.bits, symmetric=True, signed=is_weight or bool((x < 0).any()))

    seconds, error = _timed(ours, values, args.bits)
    their_seconds, their_error = _timed(published, values, args.bits)
    count = sum(x.numel() for x, _ in values)
    table = Table(
        title=f"{args.model}: {len(values)} tensors, {count:,} values, {args.bits} bits", title_justify="left"
    )
    for column in ("search", "seconds", "squared error"):
        table.add_column(column, justify="left" if column == "search" else "right")
    table.add_row("published: quantizes with each of 100 candidates", f"{their_seconds:.2f}", f"{their_error:.6g}")
    table.add_row(f"this package: sorts at most {MAX_SAMPLES:,} values a tensor", f"{seconds:.2f}", f"{error:.6g}")
    console = Console(width=110)
    console.print(table)
    console.print(f"{their_seconds / seconds:.1f} times faster, on {torch.get_num_threads()} CPU threads")
    return {"ours": seconds, "published": their_seconds, "our_error": error, "published_error": their_error}


if __name__ == "__main__":
    main()
