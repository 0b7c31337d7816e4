"""Time the data pipeline step by step and whole, and compute what it feeds.

    python training/benchmarks/data.py [--data FOLDER] [--img-size 224] [--workers 0 1 2] [--cores 16]
        [--step-ms 100 | --needed 2560]

FOLDER is one that `datasets.load_dataset` reads, with images and labels; without it, JPEG photographs are made up, as
large as those of ImageNet are on average. Variants take turns, and the medians are printed. What training uses is
marked with *. Steps are in seconds of a core, which other programs cannot add to; what the machine computed for feeds
is made of these. The whole pipeline is in seconds of a clock, and its workers share the machine with everything else.
"""

import argparse
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from hf_oscqat.integration.data import (
    DataArguments,
    ImageDataset,
    build_transforms,
    collate,
    load_image_data,
    loading_speed,
    resolve_data_config,
)

USED_IN_TRAINING = ("read and decode: Pillow *", "augment, to uint8 *", "collate uint8 *")

MEAN_SIZE, QUALITY = (500, 375), 90
"""Of a photograph of ImageNet, roughly; with QUALITY its file takes about 100 kB."""


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEG files of smooth shapes under noise, in folders of two classes."""
    rng = np.random.default_rng(0)
    for name in ("0", "1"):
        (folder / "validation" / name).mkdir(parents=True)
    width, height = MEAN_SIZE
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            MEAN_SIZE, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(shapes) + rng.normal(0, 18, (height, width, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / "validation" / str(number % 2) / f"{number}.jpg", quality=QUALITY)


def time_on_a_core(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run each task once to warm up, and then once in each round.

    Returns:
        Median seconds by task, of a core and not of a clock: what other programs do meanwhile does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def time_steps(dataset: ImageDataset, data_config: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Time every step on one core.

    Returns:
        Microseconds an image, by step and variant.
    """
    encoded = [_encoded(dataset, position) for position in range(len(dataset))]
    decoded = [dataset.open(position) for position in range(len(dataset))]
    arguments = DataArguments(dataset_name="digits")  # of no account here: the images are there
    floats = build_transforms(data_config, arguments)
    bytes_ = build_transforms(data_config, arguments, normalize=False)
    size = data_config["input_size"][1:]

    def draft(content: bytes) -> Image.Image:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", size)
            return image.convert("RGB")

    def batch_of(pixels: Tensor) -> Callable[[], object]:
        # Anew each time, as the transforms make them.
        return lambda: [
            collate([{"pixel_values": pixels.clone(), "labels": 0} for _ in encoded[start : start + args.batch_size]])
            for start in range(0, len(encoded), args.batch_size)
        ]

    tasks: dict[str, Callable[[], object]] = {
        "read and decode: Pillow *": lambda: [dataset.open(position) for position in range(len(dataset))],
        "decode: Pillow": lambda: [_decode(content) for content in encoded],
        "decode: Pillow, draft at the input size": lambda: [draft(content) for content in encoded],
        "augment, to float": lambda: [floats[0](image) for image in decoded],
        "augment, to uint8 *": lambda: [bytes_[0](image) for image in decoded],
        "prepare for evaluation, to float": lambda: [floats[1](image) for image in decoded],
        "prepare for evaluation, to uint8 *": lambda: [bytes_[1](image) for image in decoded],
        "collate float": batch_of(floats[1](decoded[0])),
        "collate uint8 *": batch_of(bytes_[1](decoded[0])),
    }
    if all(content.startswith(b"\xff\xd8") for content in encoded):
        tasks["decode: torchvision, JPEG to a tensor"] = partial(_decode_with_torchvision, encoded)
    return {name: 1e6 * value / len(decoded) for name, value in time_on_a_core(tasks, args.repeats).items()}


def time_pipeline(
    dataset: ImageDataset, data_config: dict[str, Any], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Time the whole pipeline of training, from the file to the batch, with each number of workers.

    Returns:
        Images per second by variant, one value for each of `args.workers`.
    """
    arguments = DataArguments(dataset_name="digits")
    in_memory = dataset.decoded()
    variants = {
        "float, from the file": (dataset, True),
        "uint8, from the file *": (dataset, False),
        "uint8, from decoded images in memory": (in_memory, False),
    }
    speeds: dict[str, list[list[float]]] = {name: [[] for _ in args.workers] for name in variants}
    for _ in range(args.repeats):
        for position, workers in enumerate(args.workers):
            for name, (images, normalize) in variants.items():
                images.transform, _ = build_transforms(data_config, arguments, normalize=normalize)
                speed = loading_speed(images, batch_size=args.batch_size, num_workers=workers)
                speeds[name][position].append(speed)
    return {name: [median(values) for values in by_workers] for name, by_workers in speeds.items()}


def _decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _decode_with_torchvision(encoded: list[bytes]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 0.29; this is where one sees what it would bring
        return [
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            for content in encoded
        ]


def _encoded(dataset: ImageDataset, position: int) -> bytes:
    source: Any = dataset.source
    image = source.rows[int(dataset.indices[position])][source.column]
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print.

    Returns:
        `steps` in microseconds an image, `pipeline` in images per second by number of workers, `fed` and `needed` in
        images per second.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with images that `datasets.load_dataset` reads")
    parser.add_argument("--split", help="split to read; default: the first of validation, val and test")
    parser.add_argument("--images", type=int, default=256, help="how many images to use")
    parser.add_argument("--model", default="mobilenetv2_100", help="whose preprocessing")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({0, 1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=16, help="of the machine to compute for")
    parser.add_argument(
        "--step-ms", type=float, default=100.0, help="a training step of 256 images on its accelerator"
    )
    parser.add_argument("--needed", type=float, help="images per second to feed, instead of --step-ms")
    args = parser.parse_args(argv)
    args.workers.sort()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            write_photographs(Path(folder), args.images)
        found = DataArguments(
            dataset_name=args.data or folder,
            validation_split=args.split,
            max_eval_samples=args.images,
            img_size=args.img_size,
        )
        dataset = load_image_data(found, seed=0, need_train=False).validation
        data_config = resolve_data_config(timm.get_pretrained_cfg(args.model).to_dict(), found)
        steps = time_steps(dataset, data_config, args)
        pipeline = time_pipeline(dataset, data_config, args)
        mean_bytes = np.mean([len(_encoded(dataset, position)) for position in range(len(dataset))])
    console = Console(width=110)
    table = Table(title=f"{len(dataset)} images of {mean_bytes / 1000:.0f} kB, one core", title_justify="left")
    for column in ("step", "us an image", "images/s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, microseconds in steps.items():
        table.add_row(name, f"{microseconds:,.0f}", f"{1e6 / microseconds:,.0f}")
    console.print(table)
    table = Table(title="All steps of training, images/s", title_justify="left")
    table.add_column("batches of")
    for workers in args.workers:
        table.add_column(f"{workers} workers", justify="right")
    for name, speeds in pipeline.items():
        table.add_row(name, *(f"{speed:,.0f}" for speed in speeds))
    console.print(table)
    per_core = 1e6 / sum(steps[name] for name in USED_IN_TRAINING)
    fed = args.cores * per_core
    needed = args.needed or 256 * 1000 / args.step_ms
    short = "which is enough" if fed >= needed else f"{1 - fed / needed:.0%} short"
    console.print(
        f"The steps of training (*) take a core {1e6 / per_core:,.0f} us an image. {args.cores} such cores that do "
        f"nothing else feed {fed:,.0f} images/s of {needed:,.0f} that are needed: {short}"
    )
    return {"steps": steps, "pipeline": pipeline, "fed": fed, "needed": needed}


if __name__ == "__main__":
    main()
