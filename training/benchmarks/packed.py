"""Time the packed model against the float one: loading, inference, and the memory that it holds.

    python training/benchmarks/packed.py [--model mobilenetv2_100] [--weight-bits 4] [--activation-bits 4]
        [--batch-sizes 1 8] [--img-size 224] [--repeats 20] [--device cpu] [--threads 2] [--compile] [--channels-last]

Float and packed checkpoints are written to a temporary folder and loaded in one process, from a warm file cache. They
take turns, so that a busy machine slows down all of them; a ratio is the median over the rounds. Rows without rounded
inputs show what the weights cost, the others add what rounding the inputs costs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run by its path

from benchmarks.measure import ratio, spread, take_turns
from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.integration.models import timm_wrapper

COMPILED = ", torch.compile"
"""What is added to the name of a model that is compiled."""


def write_checkpoints(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Write the float model and its packed forms; with random weights, which take as long as trained ones."""
    torch.manual_seed(0)
    images = {"pixel_values": torch.randn(2, 3, args.img_size, args.img_size)}
    model = timm_wrapper(args.model, None)
    reestimate_batchnorm(model, [images])  # with fresh statistics the activations would vanish on their way
    model.save_pretrained(folder / "float")
    paths = {"float": folder / "float"}
    for bits in dict.fromkeys((None, args.activation_bits)):
        name = f"W{args.weight_bits}" + (f"A{bits}" if bits else ", inputs in float")
        prepared = prepare_qat(
            AutoModelForImageClassification.from_pretrained(folder / "float"),
            OscQATConfig(weight_bits=args.weight_bits, activation_bits=bits, range_estimator="minmax"),
        )
        calibrate(prepared, [images])
        paths[name] = folder / name
        packed: Any = pack(prepared)
        packed.save_pretrained(paths[name])
    return paths


def resident_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model holds: parameters, buffers, and unpacked weights that it keeps."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    tensors |= {id(layer._unpacked): layer.weight for layer in packed_layers(model).values() if layer._unpacked}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def compare(title: str, tasks: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, float]:
    """Time the tasks in turns, from the second call on, and print a table.

    Returns:
        Times float, by task: the median over the rounds. Those of compiled tasks are times compiled float.
    """
    for task in tasks.values():
        task()
    seconds = take_turns(tasks, args.repeats, args.device)
    ratios = {name: ratio(times, seconds[_baseline(name)]).median for name, times in seconds.items()}
    table = Table(title=title, title_justify="left")
    for column in ("", "ms", "times", "of"):
        table.add_column(column, justify="right" if column in ("ms", "times") else "left")
    for name, times in seconds.items():
        table.add_row(name, f"{1000 * spread(times).median:.1f}", f"{ratios[name]:.2f}", _baseline(name))
    Console(width=110).print(table)
    return ratios


def _baseline(name: str) -> str:
    return f"float{COMPILED}" if name.endswith(COMPILED) else "float"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print.

    Returns:
        `load` and `batch N`: times float, by model, or times compiled float of compiled ones; `bytes`: by model.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20, help="rounds that each median is of")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="also time what torch.compile makes of the models")
    parser.add_argument("--channels-last", action="store_true", help="models and images in this memory format")
    args = parser.parse_args(argv)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        paths = write_checkpoints(Path(folder), args)
        load = AutoModelForImageClassification.from_pretrained
        found["load"] = compare(f"Loading {args.model}", {n: partial(load, path) for n, path in paths.items()}, args)
        models: dict[str, Any] = {
            name: load(path).to(args.device, memory_format=memory_format) for name, path in paths.items()
        }
        for name in list(paths)[1:]:
            kept: Any = load(paths[name])
            models[f"{name}, kept packed"] = kept.keep_packed().to(args.device, memory_format=memory_format)
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, 3, args.img_size, args.img_size, device=args.device)
        images = images.contiguous(memory_format=memory_format)
        title = f"Inference, batch of {batch_size}, {args.img_size} pixels, {_describe(args.device)}"
        title += ", channels last" if args.channels_last else ""
        forwards = {name: partial(model, images) for name, model in models.items()}
        if args.compile:
            forwards |= {f"{name}{COMPILED}": partial(torch.compile(models[name]), images) for name in paths}
        found[f"batch {batch_size}"] = compare(title, forwards, args)
    found["bytes"] = {name: resident_bytes(model) for name, model in models.items()}
    table = Table(title="Resident after inference", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    for name, count in found["bytes"].items():
        table.add_row(name, f"{count:,}")
    Console(width=110).print(table)
    return found


def _describe(device: torch.device) -> str:
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
