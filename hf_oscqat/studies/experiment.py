"""What the studies on a network share: images, a float model, and its training on the grid with any method.

Models are kept in `output_dir/models`, under a name made from everything that decides what they are, so that a study
that was stopped, or another one, need not train them again.
"""

import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers import Trainer as FloatTrainer

from hf_oscqat.config import OscQATConfig
from hf_oscqat.integration.data import (
    DataArguments,
    ImageData,
    build_transforms,
    collate,
    load_image_data,
    randomness_of,
    resolve_data_config,
)
from hf_oscqat.integration.evaluate import evaluate_accuracy
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.integration.trainer import OscQATTrainer, OscQATTrainingArguments
from hf_oscqat.prepare import calibrate, prepare_qat

logger = logging.getLogger(__name__)

TRACKER_MOMENTUM = 0.02
"""Memory of 50 steps: the default training has a few hundred."""

OSCILLATING_ABOVE = 0.03
"""Frequency from which a weight counts as oscillating: more than one oscillation within that memory."""

METHODS: dict[str, dict[str, Any]] = {
    "lsq": {},
    "dampening": {"dampening": {"weight": 0.0, "weight_final": 1.0, "anneal_start": 0.25}},
    "freezing": {
        "freezing": {"threshold": 0.1, "threshold_final": 0.02, "anneal_start": 0.25, "momentum": TRACKER_MOMENTUM}
    },
    "bin_regularization": {"bin_regularization": {"weight": 0.1, "anneal_start": 0.25}},
}
"""Plain learned step sizes and the remedies, each an `OscQATConfig`; strengths for short runs."""

ON_GRID = ("epochs", "learning_rate", "lr_scheduler_type", "scale_learning_rate", "weight_bits", "activation_bits")
"""Settings that the float model does not depend on."""


@dataclass
class ExperimentSettings(DataArguments):
    """Model, images and training of a study; the defaults are made for scikit-learn's digits and a CPU."""

    dataset_name: str | None = "digits"
    img_size: int | None = 32
    crop_pct: float | None = 1.0
    train_scale: list[float] | None = field(default_factory=lambda: [0.7, 1.0])
    hflip: float | None = 0.0
    color_jitter: float | None = 0.0
    output_dir: str = field(default="runs/studies", metadata={"help": "Folder for table, picture and models."})
    model_name_or_path: str = field(
        default="mobilenetv2_035", metadata={"help": "A timm name, or a folder or Hub id with a float model."}
    )
    pretrained: bool = field(default=False, metadata={"help": "Download the pretrained weights of a timm name."})
    float_epochs: float = field(
        default=20.0, metadata={"help": "Epochs of float training first; 0 takes the model as it is."}
    )
    epochs: float = field(default=20.0, metadata={"help": "Epochs of training on the grid."})
    batch_size: int = field(default=64, metadata={"help": "Images in a batch."})
    float_learning_rate: float = field(default=3e-3, metadata={"help": "Of AdamW."})
    learning_rate: float = field(default=0.01, metadata={"help": "Of SGD on the grid."})
    lr_scheduler_type: str = field(
        default="constant",
        metadata={
            "help": "Schedule of that rate. A constant one shows in minutes what long trainings spend most of their "
            "time in; cosine is the published one."
        },
    )
    scale_learning_rate: float = field(default=1e-5, metadata={"help": "Of Adam for scales."})
    weight_bits: int = field(default=3, metadata={"help": "Width of weights; the first and the last layer have 8."})
    activation_bits: int | None = field(
        default=None, metadata={"help": "Width of inputs; leave it out for float, as in the paper's studies."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, batches and augmentation."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    num_workers: int = field(default=0, metadata={"help": "Processes that load images."})

    def __post_init__(self) -> None:
        if self.dataset_name == "digits" and (self.train_dir or self.validation_dir):
            self.dataset_name = None
        super().__post_init__()


class Experiment:
    """A float model and images, on which methods are compared from the same start.

    Args:
        settings: see `ExperimentSettings`.

    Attributes:
        settings: as given.
        data: training and validation images, with their transforms.
        float_model: trained.
    """

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir, "models")
        self.data: ImageData = load_image_data(settings, seed=settings.seed)
        set_seed(settings.seed)
        model = timm_wrapper(settings.model_name_or_path, self.data.class_names, pretrained=settings.pretrained)
        data_config = resolve_data_config(dict(model.timm_model.pretrained_cfg or {}), settings)
        assert self.data.train is not None
        if len(self.data.train) < settings.batch_size:
            raise ValueError(
                f"got batch_size={settings.batch_size} and {len(self.data.train)} training images, expected at least "
                "one full batch"
            )
        self.data.train.transform, self.data.validation.transform = build_transforms(data_config, settings)
        self.float_model = self._trained("float", {}, settings.seed, lambda: self._train_float(model))

    @property
    def device(self) -> torch.device:
        """Where models are trained and measured."""
        accelerator = None if self.settings.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator

    def train(self, method: str, *, seed: int | None = None, **overrides: Any) -> PreTrainedModel:
        """Train a copy of the float model on the grid.

        Args:
            method: one of `METHODS`.
            seed: of batches and augmentation; None takes that of the settings.
            **overrides: arguments of `OscQATConfig` that win over those of settings and method.

        Returns:
            The model in training form, in evaluation mode, with its oscillation statistics. Without
            `batchnorm_reestimation_batches` its batch-norm statistics are those that training left.
        """
        s = self.settings
        config = OscQATConfig(
            **{
                "weight_bits": s.weight_bits,
                "activation_bits": s.activation_bits,
                "tracker_momentum": TRACKER_MOMENTUM,
                "batchnorm_reestimation_batches": 0,
                **METHODS[method],
                **overrides,
            }
        )
        seed = s.seed if seed is None else seed
        return self._trained(method, config.to_dict(), seed, lambda: self._train_on_grid(config, seed))

    def calibrated(self, **overrides: Any) -> PreTrainedModel:
        """Return a copy of the float model with its quantizers, before any training on the grid."""
        s = self.settings
        config = OscQATConfig(**{"weight_bits": s.weight_bits, "activation_bits": s.activation_bits, **overrides})
        return self._prepared(config)

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 accuracy on the validation images, in percent."""
        measured = evaluate_accuracy(
            model,
            self.data.validation,
            batch_size=256,
            collate=collate,
            num_workers=self.settings.num_workers,
            cpu=self.settings.use_cpu,
            show_progress=False,
        )
        return 100 * measured.accuracy

    def training_batches(self, count: int, *, seed: int = 0, labels: bool = False) -> Iterator[dict[str, Any]]:
        """Yield random training batches, the same for the same seed; as many passes over the images as it takes."""
        passes = chain.from_iterable(self._one_pass(seed + 1000 * i, labels) for i in itertools.count())
        return islice(passes, count)

    @torch.no_grad()
    def training_loss(self, model: nn.Module, count: int = 16) -> float:
        """Mean cross-entropy over `count` training batches, in evaluation mode."""
        model.eval()
        device = next(model.parameters()).device
        total, images = 0.0, 0
        for batch in self.training_batches(count, seed=1, labels=True):
            labels = batch["labels"].to(device)
            logits = model(pixel_values=batch["pixel_values"].to(device)).logits
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            images += len(labels)
        return total / images

    def _one_pass(self, seed: int, labels: bool) -> Iterator[dict[str, Any]]:
        assert self.data.train is not None
        loader = DataLoader(
            self.data.train,
            batch_size=self.settings.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=collate,
            num_workers=self.settings.num_workers,
            drop_last=True,
        )
        batches = iter(loader)
        for i in range(len(loader)):
            with randomness_of(seed + i):  # of the augmentation; the caller's own goes on as if nothing were drawn
                batch = next(batches)
            yield batch if labels else {"pixel_values": batch["pixel_values"]}

    def _prepared(self, config: OscQATConfig) -> PreTrainedModel:
        model = copy.deepcopy(self.float_model)
        prepare_qat(model, config)
        calibrate(model, self.training_batches(4))
        return model

    def _train_on_grid(self, config: OscQATConfig, seed: int) -> PreTrainedModel:
        s = self.settings
        args = OscQATTrainingArguments(
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.lr_scheduler_type,
            scale_learning_rate=s.scale_learning_rate,
            weight_decay=5e-5,
            num_train_epochs=s.epochs,
            **self._common(seed),
        )
        trainer = OscQATTrainer(
            model=self._prepared(config), args=args, train_dataset=self.data.train, data_collator=collate
        )
        trainer.train()
        return trainer.model

    def _train_float(self, model: PreTrainedModel) -> PreTrainedModel:
        s = self.settings
        if s.float_epochs > 0:
            args = TrainingArguments(
                learning_rate=s.float_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.01,
                num_train_epochs=s.float_epochs,
                remove_unused_columns=False,
                **self._common(s.seed),
            )
            FloatTrainer(model=model, args=args, train_dataset=self.data.train, data_collator=collate).train()
        return model

    def _common(self, seed: int) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": self.settings.batch_size,
            "dataloader_num_workers": self.settings.num_workers,
            "dataloader_drop_last": True,
            "use_cpu": self.settings.use_cpu,
            "seed": seed,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": 20,
            "report_to": "none",
        }

    def _trained(self, name: str, config: dict[str, Any], seed: int, train: Any) -> PreTrainedModel:
        """Load a model that was trained before with the same settings, or train and keep it."""
        # Only what this class and the data know of: what a study measures with does not decide what is trained.
        deciding = {f.name for f in fields(ExperimentSettings)} - {"output_dir", "num_workers", "seed"}
        if name == "float":
            deciding -= set(ON_GRID)
        settings = {key: getattr(self.settings, key) for key in sorted(deciding)}
        source = Path(self.settings.model_name_or_path)
        if source.is_dir():
            settings["files"] = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.iterdir())
        decided_by = {
            "version": version("hf_oscqat"),
            "settings": settings,
            "config": config,
            "seed": seed,
            "float_seed": self.settings.seed,
        }
        key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / f"{name}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{folder.name}.lock"):  # another study may be training it
            if (folder / "config.json").is_file():
                logger.info("taking %s from %s", name, folder)
            else:
                logger.info("training %s", name)
                set_seed(seed)
                beside = folder.with_name(f".{folder.name}.new")
                train().save_pretrained(beside)
                beside.rename(folder)
        return timm_wrapper(str(folder), None).eval().to(self.device)
