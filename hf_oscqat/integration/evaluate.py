"""Top-1 and top-5 accuracy, inside Trainer and without it."""

import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import EvalPrediction

from accelerate import PartialState
from hf_oscqat.integration.pixels import normalize_pixels
from hf_oscqat.remedies.batchnorm import evaluation_mode


def keep_top5(logits: Any, labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: the classes of the five largest logits, best first.

    Trainer then collects five numbers an image and not a thousand.

    Args:
        logits: `[N, classes]`, or a tuple that begins with them.
        labels: `[N]`, not looked at.

    Returns:
        int64 `[N, min(5, classes)]`.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return torch.topk(logits, min(5, logits.shape[-1]), dim=-1).indices


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`.

    Args:
        prediction: with `predictions` as `keep_top5` makes them, or logits `[N, classes]`, and `label_ids` `[N]`.

    Returns:
        `accuracy` and `top5_accuracy`, in [0, 1].

    Raises:
        ValueError: if predictions or labels are something else.
    """
    predictions: Any = prediction.predictions
    top5 = np.asarray(predictions[0] if isinstance(predictions, tuple | list) else predictions)
    labels = np.asarray(prediction.label_ids)
    if top5.ndim != 2 or labels.shape != top5.shape[:1]:
        raise ValueError(
            f"got predictions of shape {list(top5.shape)} and labels of shape {list(labels.shape)}, expected logits "
            "[N, classes] or the best classes [N, 5], and classes [N]: pass compute_metrics for others"
        )
    if top5.dtype.kind == "f":
        top5 = keep_top5(torch.from_numpy(top5), torch.from_numpy(labels)).numpy()
    hits = top5 == labels[:, None]
    return {"accuracy": float(hits[:, 0].mean()), "top5_accuracy": float(hits.any(1).mean())}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_accuracy` measured.

    Attributes:
        accuracy: share of images whose class got the largest logit, in [0, 1].
        top5_accuracy: share of images whose class is among the five largest.
        num_images: how many were looked at.
        images_per_second: of the whole pass, decoding included.
    """

    accuracy: float
    top5_accuracy: float
    num_images: int
    images_per_second: float


def evaluate_accuracy(
    model: nn.Module,
    dataset: Dataset[dict[str, Any]],
    *,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    num_workers: int = 0,
    cpu: bool = False,
    autocast: torch.dtype | None = None,
    show_progress: bool = True,
) -> Evaluation:
    """Measure the accuracy of a classifier in any form, float, training or packed; on all processes together.

    Each module is left in the mode it was in.

    Args:
        model: takes `pixel_values` and returns an object with `logits` `[N, classes]`.
        dataset: with a length; its examples become `pixel_values`, as floats or uint8, and `labels` by `collate`.
        batch_size: images per process.
        collate: makes a batch of a list of examples.
        num_workers: processes that load images.
        cpu: stay on the CPU.
        autocast: compute in this precision where mixed-precision training does; None computes in the model's own.
        show_progress: show a progress bar on the main process.

    Returns:
        The same numbers on each process.

    Raises:
        ValueError: if the dataset is empty.
    """
    if len(cast(Sized, dataset)) == 0:
        raise ValueError("got an empty dataset, expected images to evaluate on")
    # PartialState and not Accelerator: that would settle the precision of a Trainer that is made later.
    state = PartialState(cpu=cpu)
    count = len(cast(Sized, dataset))
    own = Subset(dataset, range(state.process_index, count, state.num_processes))
    loader = DataLoader(
        own,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=state.device.type == "cuda",
    )
    model.to(state.device)
    hits = torch.zeros(2, dtype=torch.int64, device=state.device)
    start = time.perf_counter()
    with evaluation_mode(model):
        shown = show_progress and state.is_main_process
        for batch in tqdm(loader, desc="Evaluating", leave=False, disable=not shown):
            # Not around the loop: what a dataset makes and keeps in there may be trained on later.
            with torch.inference_mode(), torch.autocast(state.device.type, autocast, enabled=autocast is not None):
                labels = batch["labels"].to(state.device, non_blocking=True)
                images = batch["pixel_values"].to(state.device, non_blocking=True)
                logits = model(pixel_values=normalize_pixels(images, getattr(model, "config", None))).logits
                hit = keep_top5(logits, labels) == labels[:, None]
                hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
    if state.num_processes > 1:
        torch.distributed.all_reduce(hits)
    return Evaluation(
        accuracy=hits[0].item() / count,
        top5_accuracy=hits[1].item() / count,
        num_images=count,
        images_per_second=count / (time.perf_counter() - start),
    )
