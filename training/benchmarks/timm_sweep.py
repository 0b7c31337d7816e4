"""Try every architecture of timm: which are quantized whole, which partly, which are refused, and why.

    python training/benchmarks/timm_sweep.py --json runs/coverage.json [--families] [--names NAME ..] [--markdown FILE]

All names are prepared on the meta device, without weights. With `--families`, the smallest architecture of each family
goes the whole way with random weights: quantizers that let everything pass give the float model's output exactly; then
calibration, a training step with a gradient at every latent weight and scale, two ticks, packing, saving,
loading with `AutoModelForImageClassification`, and the same logits. What is in the JSON file already is not tried
again.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from tqdm import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_oscqat import (
    OscillationTracker,
    OscQATConfig,
    calibrate,
    dampening_loss,
    describe,
    pack,
    prepare_qat,
    quantizer_parameters,
    reestimate_batchnorm,
)
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.prepare import insert_quantizers
from hf_oscqat.quantization.layers import QUANTIZABLE, quantized_layers

CONFIG: dict[str, Any] = {"activation_scheme": "asymmetric", "range_estimator": "minmax"}
"""Widths as by default; ranges by the quickest estimator, since ranges are not what is tried."""


def prepare_on_meta(name: str) -> dict[str, Any]:
    """Prepare one architecture without weights.

    Returns:
        `family`, `parameters`, and `quantized` layers, or `refused` with the reason; `float` lists layers that could
        have been quantized and are not.
    """
    with torch.device("meta"):
        model = timm.create_model(name)
    row: dict[str, Any] = {
        "family": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    try:
        insert_quantizers(model, OscQATConfig(**CONFIG))
    except ValueError as error:
        return row | {"refused": str(error)}
    layers = dict(quantized_layers(model))
    left = [n for n, m in model.named_modules() if isinstance(m, QUANTIZABLE) and n not in layers]
    return row | {"quantized": len(layers), "float": left}


def whole_path(name: str) -> dict[str, Any]:
    """Take one architecture from random weights to a packed checkpoint and back.

    Returns:
        `ok`, or the `step` that failed and the `error`; what is refused by prepare_qat is `refused`.
    """
    torch.manual_seed(0)
    step = "create"
    try:
        model = timm_wrapper(name, list("abcde"))
        images = _smallest_images(model)
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # a branch that is dropped gets no gradient
        unused = _without_gradient(model, images)
        reestimate_batchnorm(model, [images])
        with torch.no_grad():
            expected = model(images).logits
        step = "prepare"
        try:
            prepare_qat(model, OscQATConfig(**CONFIG))
        except ValueError as error:
            return {"refused": str(error)}
        step = "identity"
        difference = _identity_difference(model, images, expected)
        if difference != 0:
            raise AssertionError(f"quantizers that let everything pass change the output by {difference:.3g}")
        step = "calibrate"
        calibrate(model, [images])
        step = "gradients"
        missing = set(_without_gradient(model, images, dampen=True)) - set(unused)
        if missing:
            raise AssertionError(f"no gradient at {', '.join(sorted(missing)[:3])} and {len(missing)} in all")
        step = "tick"
        tracker = OscillationTracker(model)
        tracker.tick(0.01)
        torch.optim.Adam(quantizer_parameters(model), lr=1e-10).step()
        tracker.tick(0.01)
        step = "pack"
        model.eval()
        packed = pack(model)
        with torch.no_grad():
            logits = model(images).logits
            if not torch.equal(packed(images).logits, logits):
                raise AssertionError("the packed model computes something else")
            step = "save and load"
            with tempfile.TemporaryDirectory() as folder:
                packed.save_pretrained(folder)  # type: ignore[operator]
                loaded = AutoModelForImageClassification.from_pretrained(folder)
                if not torch.equal(loaded(images).logits, logits):
                    raise AssertionError("the loaded model computes something else")
    except Exception as error:  # whatever one architecture does, the others are tried
        return {"step": step, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"ok": True, "layers": sum(1 for row in describe(packed) if row.weight_bits)}


def _smallest_images(model: PreTrainedModel) -> torch.Tensor:
    """Two images of the smallest of some sizes that the architecture takes, or of its own size."""
    channels, *own = model.timm_model.pretrained_cfg["input_size"]
    for pixels in (96, 112, 128, 192, 224):
        images = torch.randn(2, channels, *(min(size, pixels) for size in own))
        try:
            with torch.no_grad():
                model(images)
        except Exception:  # patches, windows and position tables that do not fit raise errors of many kinds
            continue
        return images
    return torch.randn(2, channels, *own)


def _identity_difference(model: torch.nn.Module, images: torch.Tensor, expected: torch.Tensor) -> float:
    kept = [(layer, layer.weight_quantizer, layer.input_quantizer) for _, layer in quantized_layers(model)]
    for layer, _, _ in kept:
        layer.weight_quantizer = layer.input_quantizer = None
    with torch.no_grad():
        difference = float((model(images).logits - expected).abs().max())
    for layer, weight_quantizer, input_quantizer in kept:
        layer.weight_quantizer, layer.input_quantizer = weight_quantizer, input_quantizer
    return difference


def _without_gradient(model: torch.nn.Module, images: torch.Tensor, *, dampen: bool = False) -> list[str]:
    model.train()
    loss = (model(images).logits - torch.randn(len(images), 5)).square().sum()
    if dampen:
        loss = loss + dampening_loss(model)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    model.eval()
    return missing


def to_markdown(results: dict[str, Any]) -> str:
    """Write what was found as a page."""
    names, families = results["names"], results["families"]
    refused = {n: row["refused"] for n, row in names.items() if "refused" in row}
    partly = {n: row["float"] for n, row in names.items() if row.get("float")}
    done = {n: row for n, row in families.items() if row.get("ok")}
    failed = {n: row for n, row in families.items() if not row.get("ok")}
    lines = [
        "# Coverage of timm",
        "",
        "Made by `python training/benchmarks/timm_sweep.py --families --json runs/coverage.json --markdown "
        f"docs/coverage.md`, with {results['versions']}.",
        "",
        f"Of {len(names)} architectures, {len(names) - len(refused)} are prepared, {len(partly)} of them with a layer "
        f"that stays float, and {len(refused)} are refused with the reason. Of {len(families)} families, the smallest "
        f"architecture of {len(done)} goes the whole way: float passthrough equal to the original (difference 0), "
        "calibration, a training step with a gradient at every latent weight and scale, two ticks of the tracker, "
        "packing, saving, loading with `AutoModelForImageClassification`, equal logits.",
        "",
        "Quantized are weights and inputs of layers. What two activations compute together stays float: queries with "
        "keys and softmax with values in attention, fused or not, sums and gates. So do activation functions, "
        "normalisation, and parameters outside of layers, such as tokens and position tables, which "
        "`oscqat inspect NAME` lists.",
        "",
        "## Refused, or partly float",
        "",
        "| architecture | why |",
        "|---|---|",
        *(f"| {name} | {_cell(why)} |" for name, why in refused.items()),
        *(f"| {name} | float: {', '.join(layers)} |" for name, layers in partly.items()),
        "",
        "## Families",
        "",
        "| family | smallest architecture | parameters | quantized layers | |",
        "|---|---|---|---|---|",
    ]
    for name, row in {**failed, **done}.items():
        said = "whole path" if row.get("ok") else row.get("refused") or f"{row['step']}: {row['error']}"
        count = names[name]
        lines.append(
            f"| {count['family']} | {name} | {count['parameters']:,} | {count.get('quantized', '')} | {_cell(said)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = text.replace("\n", " ").replace("|", "/")
    return text if len(text) < 250 else f"{text[:250]} .."


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Try what is asked for and not yet in the file.

    Returns:
        `names`, `families` and `versions`, as written to the JSON file.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help="only these; with --families they go the whole way")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--json", type=Path, help="results so far, read and written")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    results: dict[str, Any] = {"names": {}, "families": {}}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text(encoding="utf-8"))
    results["versions"] = ", ".join(f"{n} {version(n)}" for n in ("hf_oscqat", "timm", "torch", "transformers"))

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    wanted = args.names or timm.list_models()
    for count, name in enumerate(tqdm([n for n in wanted if n not in results["names"]], desc="On the meta device")):
        results["names"][name] = prepare_on_meta(name)
        if count % 50 == 49:
            save()
    save()
    if args.families:
        smallest: dict[str, str] = {}
        for name, row in sorted(results["names"].items(), key=lambda item: item[1]["parameters"]):
            smallest.setdefault(row["family"], name)
        chosen = args.names or list(smallest.values())  # small ones first
        for name in tqdm([n for n in chosen if n not in results["families"]], desc="The whole way"):
            results["families"][name] = whole_path(name)
            save()
    if args.markdown:
        args.markdown.write_text(to_markdown(results), encoding="utf-8")
    logging.disable(logging.NOTSET)
    outcomes = Counter(
        "ok" if r.get("ok") else "refused" if "refused" in r else r["step"] for r in results["families"].values()
    )
    tqdm.write(
        f"{len(results['names'])} names, {sum('refused' in r for r in results['names'].values())} refused; "
        f"whole way: {dict(outcomes)}"
    )
    return results


if __name__ == "__main__":
    main()
