"""Small images that are kept decoded in memory, and training on them in a plain loop.

Reading, cropping and mirroring 32 x 32 pixels one image at a time costs more than a small network's step. So all
images are one uint8 tensor, on the device where the network is, and a whole batch is cropped and mirrored by one
indexing, whose result has the channels-last layout that convolutions prefer.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_oscqat.config import OscQATConfig
from hf_oscqat.integration.data import DataArguments, ImageDataset, load_image_data
from hf_oscqat.integration.optimizer import create_optimizer
from hf_oscqat.prepare import model_parameters, quantizer_parameters
from hf_oscqat.quantization.layers import quantizers
from hf_oscqat.remedies.base import take_tick
from hf_oscqat.remedies.batchnorm import evaluation_mode
from hf_oscqat.remedies.tracker import OscillationTracker
from hf_oscqat.report.recorder import Recorder

logger = logging.getLogger(__name__)

PADDING = 4
"""Pixels of black around an image before a random crop of its own size."""

POINTS = 20
"""How many times a training on the grid notes its oscillations, and one in float what it goes on from if stopped."""

STEP, SECONDS = "step", "seconds"

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images `[N, 3, size, size]`, normalised, and labels `[N]`."""


@dataclass(frozen=True)
class Images:
    """Decoded images; `len`, slices and indices work as with a tensor.

    Attributes:
        pixels: uint8 `[N, size, size, 3]`.
        labels: int64 `[N]`.
    """

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, which: slice | Tensor) -> "Images":
        return Images(self.pixels[which], self.labels[which])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """Return them on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


class Normaliser(NamedTuple):
    """Mean and standard deviation of each channel, in [0, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Images) -> "Normaliser":
        """Measure those of some images."""
        pixels = images.pixels.reshape(-1, 3)[:: max(1, len(images) // 1000)].double() / 255
        return cls(pixels.mean(0).float(), pixels.std(0).float())

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn uint8 `[N, H, W, 3]` into float `[N, 3, H, W]` in the channels-last layout."""
        return ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class SmallImages(NamedTuple):
    """What is trained, tuned and tested on.

    Attributes:
        train: training images.
        held_out: drawn from the training split for choosing settings; nothing trains on them.
        test: images of the validation split.
        classes: number of classes.
        normalise: with mean and standard deviation of the training images.
    """

    train: Images
    held_out: Images
    test: Images
    classes: int
    normalise: Normaliser


def load_small_images(args: DataArguments, size: int, held_out: int, device: torch.device) -> SmallImages:
    """Decode everything, in a fixed random order.

    Args:
        args: where the images are; the settings of augmentation are not looked at.
        size: pixels; images of another size are resized.
        held_out: how many training images to hold out.
        device: where to keep them.

    Raises:
        ValueError: if not enough training images are left.
    """
    data = load_image_data(args, seed=0)
    assert data.train is not None
    if len(data.train) <= held_out:
        raise ValueError(f"got {len(data.train)} training images, expected more than the {held_out} to hold out")
    train, test = (_decoded(dataset, size).to(device) for dataset in (data.train, data.validation))
    # Training splits may be sorted by class.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(device)
    train = train[order]
    rest = train[held_out:]
    return SmallImages(rest, train[:held_out], test, len(data.class_names), Normaliser.of(rest))


def _decoded(dataset: ImageDataset, size: int) -> Images:
    def array(image: Image.Image) -> np.ndarray:
        image = image.convert("RGB")
        return np.asarray(image if image.size == (size, size) else image.resize((size, size)))

    pixels = np.stack([array(dataset.open(i)) for i in range(len(dataset))])
    return Images(torch.from_numpy(pixels), torch.as_tensor(dataset.labels))


def training_batches(images: Images, normalise: Normaliser, batch_size: int, seed: int, mirror: bool) -> Batches:
    """Yield randomly cropped batches for ever, the same for the same seed.

    Args:
        images: training images.
        normalise: see `Normaliser`.
        batch_size: images in each; what is left over at the end of a pass is dropped.
        seed: of order, crops and mirroring.
        mirror: whether to mirror half of them.

    Raises:
        ValueError: if there are fewer images than one batch.
    """
    if len(images) < batch_size:
        raise ValueError(f"got batch_size={batch_size} and {len(images)} training images, expected one full batch")
    size, device = images.pixels.shape[1], images.pixels.device
    generator = torch.Generator().manual_seed(seed)
    padded = nn.functional.pad(images.pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    line = torch.arange(size, device=device)
    while True:
        order = torch.randperm(len(images), generator=generator).to(device)
        for chosen in order[: len(images) // batch_size * batch_size].split(batch_size):
            offsets = torch.randint(2 * PADDING + 1, (2, batch_size, 1), generator=generator).to(device)
            flipped = (torch.rand(batch_size, 1, generator=generator) < 0.5 * mirror).to(device)
            rows, columns = offsets[0] + line, offsets[1] + torch.where(flipped, size - 1 - line, line)
            pixels = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield normalise(pixels), images.labels[chosen]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, normalise: Normaliser, batch_size: int = 500) -> float:
    """Top-1 accuracy in percent."""
    hits = 0
    with evaluation_mode(model):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            hits += int((model(normalise(batch.pixels)).argmax(1) == batch.labels).sum())
    return 100 * hits / len(images)


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # Dynamo gives up compiling after eight models of one class, unless it is told to forget the ones before.
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model)
    return compiled


def train_float(
    model: nn.Module,
    batches: Batches,
    steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
    compiled: bool = False,
    progress: Path | None = None,
    about: Mapping[str, str] | None = None,
) -> float:
    """Train with SGD, Nesterov's momentum, a tenth of the steps for warm-up and a cosine to 0 after it; in place.

    Args:
        model: to train; one that draws random numbers in a step is not continued exactly.
        batches: the same ones from the beginning, also where an earlier training is continued.
        steps: how many, those of an earlier training included.
        learning_rate: at its peak.
        weight_decay: of all parameters.
        compiled: whether to train with torch.compile.
        progress: file that a training which was stopped is continued from; written now and then.
        about: what to write into that file besides.

    Returns:
        Seconds of all steps, those of an earlier training included.
    """
    forward = _compiled(model) if compiled else model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))

    done, seconds = 0, 0.0
    if progress is not None and progress.is_file():
        done, seconds = _continue(model, optimizer, progress)
        logger.info("going on after float step %d of %d", done, steps)
    model.train()
    remaining = islice(batches, done, steps)
    start = time.perf_counter() - seconds
    for step, (pixels, labels) in enumerate(remaining, start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor(step - 1)
        loss = nn.functional.cross_entropy(forward(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // POINTS) == 0:
            logger.info("float step %d of %d: loss %.3f", step, steps, loss.item())
            if progress is not None:
                _keep(
                    model,
                    optimizer,
                    progress,
                    {**(about or {}), STEP: str(step), SECONDS: str(time.perf_counter() - start)},
                )
    seconds = time.perf_counter() - start
    model.eval()
    return seconds


def _keep(model: nn.Module, optimizer: torch.optim.SGD, file: Path, about: dict[str, str]) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:  # it had a gradient
            tensors[f"momentum.{name}"] = momentum
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, about)
    beside.replace(file)


def _continue(model: nn.Module, optimizer: torch.optim.SGD, file: Path) -> tuple[int, float]:
    """Load what `_keep` wrote, and return the steps that were taken and the seconds that they took."""
    tensors = load_file(file)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if (kept := tensors.get(f"momentum.{name}")) is not None:
            momentum = torch.empty_like(parameter, requires_grad=False).copy_(kept)
            optimizer.state[parameter]["momentum_buffer"] = momentum
    about = read_about(file)
    return int(about[STEP]), float(about[SECONDS])


def read_about(file: Path) -> dict[str, str]:
    """What a file of a training that was stopped says besides its tensors.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"got {file}, which cannot be read: {error}; expected what a float training was at when it was stopped: "
            "delete it to begin anew"
        ) from error


@dataclass(frozen=True)
class GridTraining:
    """What a training on the grid was like, besides the model.

    Attributes:
        history: the three percentages below, and the loss, at some steps.
        oscillating_percent: at the end.
        scale_caused_percent: of the last oscillations, those by a moving scale.
        frozen_percent: at the end.
        seconds: of the steps, and of compiling for them.
    """

    history: list[dict[str, float]]
    oscillating_percent: float
    scale_caused_percent: float
    frozen_percent: float
    seconds: float


def train_on_grid(
    model: nn.Module,
    config: OscQATConfig,
    batches: Batches,
    steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
    scale_learning_rate: float,
    scales_as_weights: bool = False,
    compiled: bool = False,
    recording: Path | None = None,
    about: Mapping[str, str] | None = None,
) -> GridTraining:
    """Train a prepared and calibrated model with the remedies of its config, in place; a cosine to 0, no warm-up.

    The rate of scales is constant, or with `scales_as_weights` follows that cosine. Batch-norm statistics are left as
    they are in the end. With `recording`, a folder, what `oscqat report` shows is recorded there; `about` is what it
    says of the run.

    Raises:
        FloatingPointError: if the loss is not finite: the learning rate was too high.
    """
    optimizer = create_optimizer(
        [{"params": list(model_parameters(model)), "weight_decay": weight_decay}],
        list(quantizer_parameters(model)),
        [q.scale for _, q in quantizers(model) if isinstance(q.scale, nn.Parameter)],
        weight_optimizer="sgd",
        learning_rate=learning_rate,
        momentum=0.9,
        adam_betas=(0.9, 0.999),
        adam_epsilon=1e-8,
        scale_learning_rate=scale_learning_rate,
    )
    scheduled = [(group, group["lr"]) for group in optimizer.param_groups]
    if not scales_as_weights:
        del scheduled[1:]
    forward = _compiled(model) if compiled else model
    tracker = OscillationTracker(model, config.momentum, use_ema=config.use_ema)
    remedies = config.remedies()
    recorder = None if recording is None else Recorder(model, tracker, recording, total_steps=steps, about=about)
    if recorder is not None:
        recorder.begin()
    history: list[dict[str, float]] = []
    model.train()
    start = time.perf_counter()
    for step, (pixels, labels) in enumerate(islice(batches, steps), start=1):
        for group, rate in scheduled:
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        extra = [term for r in remedies if (term := r.loss(model, step, steps)) is not None]
        loss = nn.functional.cross_entropy(forward(pixels), labels)
        sum(extra, start=loss).backward()
        take_tick(tracker, remedies, step, steps)
        if recorder is not None:
            recorder.tick(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // POINTS) == 0 or step == steps:
            history.append({"step": step, "loss": loss.item(), **_percentages(tracker)})
            logger.info("step %d of %d: %s", step, steps, {k: round(v, 3) for k, v in history[-1].items()})
            if recorder is not None:
                recorder.log(step, history[-1])
            if not math.isfinite(history[-1]["loss"]):
                raise FloatingPointError(f"got a loss of {loss.item()} at step {step}, expected a finite one")
    seconds = time.perf_counter() - start
    model.eval()
    return GridTraining(history=history, seconds=seconds, **_percentages(tracker))


def _percentages(tracker: OscillationTracker) -> dict[str, float]:
    return {
        "oscillating_percent": 100 * tracker.oscillating_fraction,
        "scale_caused_percent": 100 * tracker.scale_caused_fraction,
        "frozen_percent": 100 * tracker.frozen_fraction,
    }
