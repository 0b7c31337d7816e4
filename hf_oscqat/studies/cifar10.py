"""Accuracy at low width with and without the remedies, on CIFAR-10, from one float model and with equal budgets.

The unit is one training, a cell: network, width, method and seed. Each writes a file of its own when it is done, and
the table is made of the files that there are. So a table that was stopped goes on where it was, several processes may
fill one together, and parts may be trained on other machines. The float model, which takes longest, goes on after the
last twentieth of its training that was completed. A cell measures accuracy before and after batch-norm re-estimation:
plain LSQ and LSQ with re-estimation are one training. Of several draws of batches to re-estimate from, the table
has the mean.

Each method gets as many trials, on images held out of the training split; the best learning rate and strength, by
accuracy after re-estimation, are what its cells train with.
"""

import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_oscqat.config import OscQATConfig, check_keys
from hf_oscqat.integration.data import DataArguments
from hf_oscqat.integration.export import pack
from hf_oscqat.integration.optimizer import SCALE_SCHEDULES
from hf_oscqat.prepare import calibrate, prepare_qat
from hf_oscqat.remedies.batchnorm import reestimate_batchnorm
from hf_oscqat.report.pictures import AFTER, BEFORE, FROZEN, OSCILLATING, tidy
from hf_oscqat.report.recording import FILE, append_row
from hf_oscqat.studies.base import Study, StudyResult
from hf_oscqat.studies.small_images import (
    Batches,
    Images,
    SmallImages,
    accuracy,
    load_small_images,
    read_about,
    train_float,
    train_on_grid,
    training_batches,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What is tuned: a learning rate and, for a remedy, its strength at the end of training."""

    learning_rate: float
    strength: float | None = None


Grid = dict[str, tuple[Trial, ...]]
"""Trials of each method, as many for each."""


@dataclass(frozen=True)
class Network:
    """What is trained of a timm network, and how it is adapted to small images.

    Args:
        widths: to train at, such as W4A4, or W3 for weights only.
        stem_stride: of the first convolution, which has 2 as published: too coarse for most small images.
        model_args: further arguments of `timm.create_model`.
        activation_scheme: of the grid of activations; "asymmetric" behind h-swish, which goes a little below 0.
    """

    widths: tuple[str, ...]
    stem_stride: int
    model_args: dict[str, Any] = field(default_factory=dict)
    activation_scheme: str = "symmetric"


@dataclass(frozen=True)
class Budget:
    """How much is trained; all that decides what a cell measures.

    Args:
        networks: by timm name.
        train_images: at most so many images of the training split are used, None for all.
        held_out: how many of these are for the trials.
        float_epochs: passes in float.
        float_learning_rate: of SGD in float.
        float_weight_decay: of SGD in float.
        float_batch_size: images in a batch in float.
        float_init: where float training starts: at timm's initialisation, or at torch's smaller weights, with which it
            is stable at a higher rate and a short one gets further; "timm" or "torch".
        epochs: passes on the grid.
        tuning_epochs: the same for a trial.
        batch_size: images in a batch on the grid.
        weight_decay: of SGD on the grid.
        scale_learning_rate: of Adam for scales.
        scale_lr_scheduler_type: its schedule, "constant" as published or "as_weights".
        momentum: of the oscillation tracker.
        reestimation_batches: batches that batch-norm is re-estimated from.
        seeds: trainings of each kind.
        trials: what is tried for each method.
        size: pixels.
        mirror: whether training images are mirrored.
    """

    networks: dict[str, Network]
    train_images: int | None
    held_out: int
    float_epochs: float
    float_learning_rate: float
    float_weight_decay: float
    float_batch_size: int
    float_init: str
    epochs: float
    tuning_epochs: float
    batch_size: int
    weight_decay: float
    scale_learning_rate: float
    momentum: float
    reestimation_batches: int
    seeds: int
    trials: Grid
    size: int = 32
    mirror: bool = True
    scale_lr_scheduler_type: str = "constant"


METHODS: dict[str, Callable[[float, float], dict[str, Any]]] = {
    "lsq": lambda strength, momentum: {},
    "dampening": lambda strength, momentum: {"dampening": {"weight": 0.0, "weight_final": strength}},
    "freezing": lambda strength, momentum: {
        "freezing": {"threshold": 0.1, "threshold_final": strength, "momentum": momentum}
    },
}
"""Method -> its part of the `OscQATConfig`, given its strength and the tracker's momentum; schedules as published."""

BUDGETS: dict[str, Budget] = {
    # The whole protocol. 20 epochs, 3 seeds and batches of 128 are the paper's, for its ablations.
    "gpu": Budget(
        networks={
            "mobilenetv2_100": Network(("W4A4", "W3A3", "W3"), stem_stride=1, model_args={"output_stride": 16}),
            "efficientnet_lite0": Network(("W3A3",), stem_stride=1, model_args={"output_stride": 16}),
        },
        train_images=None,
        held_out=5000,
        float_epochs=150,
        float_learning_rate=0.1,
        float_weight_decay=5e-4,
        float_batch_size=128,
        float_init="torch",
        epochs=20,
        tuning_epochs=20,
        batch_size=128,
        weight_decay=2.5e-5,
        scale_learning_rate=1e-5,
        momentum=0.002,
        reestimation_batches=50,
        seeds=3,
        trials={
            "lsq": tuple(Trial(rate) for rate in (0.0033, 0.01, 0.02, 0.033, 0.066, 0.1)),
            "dampening": tuple(Trial(rate, s) for rate in (0.01, 0.033, 0.066) for s in (0.1, 1.0)),
            "freezing": tuple(Trial(rate, s) for rate in (0.01, 0.033, 0.066) for s in (0.008, 0.015)),
        },
    ),
    # What two cores finish in some six hours.
    "cpu": Budget(
        networks={
            "mobilenetv2_035": Network(("W3", "W3A3", "W4A4"), stem_stride=2, model_args={"output_stride": 16}),
            # timm's MobileNetV3 takes no output_stride.
            "mobilenetv3_small_050": Network(("W3A3",), stem_stride=1, activation_scheme="asymmetric"),
        },
        train_images=None,
        held_out=5000,
        float_epochs=30,
        float_learning_rate=0.05,
        float_weight_decay=3e-4,
        float_batch_size=64,
        float_init="torch",
        epochs=10,
        tuning_epochs=1.5,
        batch_size=64,
        weight_decay=2.5e-5,
        scale_learning_rate=1e-5,
        momentum=0.005,
        reestimation_batches=50,
        seeds=3,
        trials={
            "lsq": tuple(Trial(rate) for rate in (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)),
            "dampening": (
                Trial(0.005, 0.1),
                *(Trial(rate, strength) for rate in (0.01, 0.02) for strength in (0.1, 1.0)),
                Trial(0.04, 1.0),
            ),
            "freezing": (
                Trial(0.005, 0.02),
                *(Trial(rate, threshold) for rate in (0.01, 0.02) for threshold in (0.01, 0.02)),
                Trial(0.04, 0.01),
            ),
        },
    ),
    # Seconds, to see that it works; on any small images.
    "smoke": Budget(
        networks={"test_efficientnet": Network(("W3A3",), stem_stride=1)},
        train_images=96,
        held_out=32,
        float_epochs=2,
        float_learning_rate=0.05,
        float_weight_decay=1e-4,
        float_batch_size=16,
        float_init="timm",
        epochs=2,
        tuning_epochs=1,
        batch_size=16,
        weight_decay=2.5e-5,
        scale_learning_rate=1e-5,
        momentum=0.05,
        reestimation_batches=2,
        seeds=2,
        trials={
            "lsq": (Trial(0.05), Trial(0.1)),
            "dampening": (Trial(0.05, 1.0), Trial(0.1, 1.0)),
            "freezing": (Trial(0.05, 0.06), Trial(0.1, 0.06)),
        },
        mirror=False,
    ),
}

BUDGETS["cpu_large"] = replace(
    # As "cpu", with a wider network on a finer grid of pixels: a better float model. Some seven hours of one core.
    BUDGETS["cpu"],
    networks={"mobilenetv2_050": Network(("W3A3",), stem_stride=1)},
)


@dataclass
class Cifar10Settings(DataArguments):
    """Options of the study: where images and results are, and which part of the table to fill."""

    budget: str = field(default="gpu", metadata={"help": f"How much to train: {', '.join(BUDGETS)}."})
    device: str | None = field(default=None, metadata={"help": "Such as cuda or cpu. Default: the fastest there is."})
    output_dir: str = field(default="runs/cifar10", metadata={"help": "Folder for cells, table and picture."})
    networks: list[str] = field(default_factory=list, metadata={"help": "Fill these rows only. Default: all."})
    widths: list[str] = field(default_factory=list, metadata={"help": "Fill these rows only. Default: all."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Fill these rows only. Default: all."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Fill with these seeds only. Default: all."})
    again: bool = field(default=False, metadata={"help": "Train the chosen cells anew where they are done already."})
    table_only: bool = field(default=False, metadata={"help": "Train nothing; make the table of what there is."})
    compile: bool = field(default=False, metadata={"help": "Train with torch.compile; a CPU needs a C++ compiler."})
    threads: int | None = field(default=None, metadata={"help": "Threads of a CPU. Default: torch's."})
    record: bool = field(
        default=False, metadata={"help": "Record each cell that is trained, for `oscqat report`, in recordings/."}
    )
    scale_lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Rate of the scales: constant as published, or as_weights; a table of its own in a folder."},
    )

    def __post_init__(self) -> None:
        if not self.table_only:
            super().__post_init__()
        check_keys([self.budget], BUDGETS, "--budget")
        budget = BUDGETS[self.budget]
        check_keys(self.networks, budget.networks, f"--networks of budget {self.budget}")
        widths = {width for network in budget.networks.values() for width in network.widths}
        check_keys(self.widths, widths, f"--widths of budget {self.budget}")
        check_keys(self.methods, METHODS, "--methods")
        check_keys([self.scale_lr_scheduler_type], SCALE_SCHEDULES, "--scale_lr_scheduler_type")
        if wrong := [seed for seed in self.seeds if seed not in range(budget.seeds)]:
            raise ValueError(f"got --seeds {wrong}, expected some of 0 to {budget.seeds - 1} in budget {self.budget}")
        if not any(self.has(cell) for cell in cells(budget)):
            rows = "; ".join(f"{name}: {', '.join(network.widths)}" for name, network in budget.networks.items())
            raise ValueError(
                f"got --networks {' '.join(self.networks)} --widths {' '.join(self.widths)}, which have no row in "
                f"common, expected some of {rows}"
            )

    def has(self, cell: "Cell") -> bool:
        """Whether a cell is among those to fill."""
        return (
            (not self.networks or cell.network in self.networks)
            and (not self.widths or cell.width in self.widths)
            and (not self.methods or cell.method in self.methods)
            and (not self.seeds or cell.seed in self.seeds)
        )

    @property
    def torch_device(self) -> torch.device:
        """Where to train."""
        if self.device is not None:
            return torch.device(self.device)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @property
    def use_cpu(self) -> bool:
        """Whether no accelerator is used, for the record of the study."""
        return self.torch_device.type == "cpu"


@dataclass(frozen=True)
class Cell:
    """One training."""

    network: str
    width: str
    method: str
    seed: int

    @property
    def bits(self) -> tuple[int, int | None]:
        """Width of weights, and of activations or None for float."""
        match = re.fullmatch(r"W(\d)(?:A(\d))?", self.width)
        if match is None:
            raise ValueError(f"got width {self.width!r}, expected one such as W4A4, or W3 for weights only")
        return int(match[1]), None if match[2] is None else int(match[2])


def cells(budget: Budget) -> list[Cell]:
    """Every cell of the table, one seed after the other, so that a table that is stopped has rows of equal length."""
    return [
        Cell(network, width, method, seed)
        for network, adapted in budget.networks.items()
        for width in adapted.widths
        for seed in range(budget.seeds)
        for method in METHODS
    ]


DRAWS = 5
"""How often a cell is re-estimated from other training batches, to see what of its accuracy that decides."""


class Table:
    """A table in a folder, and what fills it.

    Args:
        settings: see `Cifar10Settings`.

    Attributes:
        budget: what is trained.
        folder: with `float/`, `trials/` and `cells/`.
    """

    def __init__(self, settings: Cifar10Settings) -> None:
        self.settings = settings
        self.budget = replace(BUDGETS[settings.budget], scale_lr_scheduler_type=settings.scale_lr_scheduler_type)
        self.folder = Path(settings.output_dir)
        self._images: SmallImages | None = None
        self._float_models: dict[str, nn.Module] = {}

    def fill(self) -> None:
        """Train what is chosen and missing: float models, trials, cells."""
        chosen = [cell for cell in cells(self.budget) if self.settings.has(cell)]
        # All are read before any is removed: reading refuses what was made with another protocol.
        missing = [cell for cell in chosen if self.results(cell) is None or self.settings.again]
        for cell in missing:
            self.trials(cell)
        if self.settings.again:  # otherwise another process may have trained one of them by now
            for cell in missing:
                self._file("cells", cell).unlink(missing_ok=True)
        for network in dict.fromkeys(cell.network for cell in missing):
            self._float_model(network)
        kinds = dict.fromkeys((cell.network, cell.width, cell.method) for cell in missing)
        self._finish(
            {
                self._trial_file(kind, trial): partial(self._try, kind, trial)
                for kind in kinds
                for trial in self.budget.trials[kind[2]]
            }
        )
        self._finish({self._file("cells", cell): partial(self._train, cell) for cell in missing})

    def results(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell measured; None if it is missing."""
        return self._read(self._file("cells", cell))

    def trials(self, cell: Cell) -> list[dict[str, Any]]:
        """What was tried for cells of that kind."""
        kind = (cell.network, cell.width, cell.method)
        found = (self._read(self._trial_file(kind, trial)) for trial in self.budget.trials[cell.method])
        return [trial for trial in found if trial is not None]

    def best(self, cell: Cell) -> Trial:
        """The trial that a cell trains with."""
        best = max(self.trials(cell), key=lambda trial: trial["after"])
        return Trial(best["learning_rate"], best["strength"])

    def measure(
        self, cell: Cell, trial: Trial, epochs: float, images: Images, draws: int = 1, record: bool = False
    ) -> dict[str, Any]:
        """Train a cell, of the table or not, from the float model, and measure it; writes nothing but a recording.

        Args:
            cell: what to train.
            trial: with which learning rate and strength.
            epochs: how long.
            images: to measure accuracy on.
            draws: how often to re-estimate from other batches; `after` is of the first of them, the others are listed.
            record: see `train`.

        Returns:
            What its file is to say.
        """
        model, trained = self.train(cell, trial, epochs, record)
        before = accuracy(model, images, self.images.normalise)
        after = []
        for draw in range(draws):
            reestimate_batchnorm(model, self.some_batches(self.budget.reestimation_batches, seed=draw))
            after.append(accuracy(model, images, self.images.normalise))
        if record:
            scalars = {"eval_accuracy": fmean(after) / 100}
            append_row(self.recording(cell) / FILE, {"row": "log", "step": trained["steps"], "scalars": scalars})
        return {
            **asdict(cell),
            **asdict(trial),
            "before": before,
            "after": after[0],
            **({"after_other_draws": after[1:]} if draws > 1 else {}),
            "images": len(images),
            **trained,
        }

    def train(self, cell: Cell, trial: Trial, epochs: float, record: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        """Train a cell, of the table or not, from the float model.

        Args:
            cell: see `measure`.
            trial: see `measure`.
            epochs: see `measure`.
            record: whether to record it for `oscqat report`.

        Returns:
            The model, with batch-norm statistics as trained, and how it was trained.
        """
        b = self.budget
        weight_bits, activation_bits = cell.bits
        config = OscQATConfig(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            activation_scheme=b.networks[cell.network].activation_scheme,
            tracker_momentum=b.momentum,
            **METHODS[cell.method](trial.strength or 0.0, b.momentum),
        )
        model = copy.deepcopy(self._float_model(cell.network))
        prepare_qat(model, config)
        # The published code calibrates with one batch; of small ones it takes some more to see as many values.
        calibrate(model, self.some_batches(4, seed=0))
        size = sum(tensor.numel() * tensor.element_size() for tensor in pack(model).state_dict().values())
        model.to(memory_format=torch.channels_last)
        steps = self._steps(epochs, b.batch_size)
        torch.manual_seed(cell.seed)
        training = train_on_grid(
            model,
            config,
            self._batches(b.batch_size, seed=1 + cell.seed),
            steps,
            learning_rate=trial.learning_rate,
            weight_decay=b.weight_decay,
            scale_learning_rate=b.scale_learning_rate,
            scales_as_weights=b.scale_lr_scheduler_type == "as_weights",
            compiled=self.settings.compile,
            recording=self.recording(cell) if record else None,
            about={
                "model": cell.network,
                "scheme": cell.width,
                "remedies": "" if cell.method == "lsq" else f"{cell.method}, {trial.strength or 0.0:g} at the end",
            },
        )
        return model, {
            "steps": steps,
            "packed_bytes": size,
            "scale_lr_scheduler_type": b.scale_lr_scheduler_type,
            **asdict(training),
            **self._conditions(),
        }

    def _finish(self, jobs: dict[Path, Callable[[], dict[str, Any]]]) -> None:
        """Do what no file is there of. What another process is at is waited for at the end only.

        Raises:
            ValueError: when everything else is done, if a training has diverged.
        """
        diverged: dict[Path, FloatingPointError] = {}
        for timeout in (0, -1):
            for file, job in jobs.items():
                try:
                    with self._lock(file, timeout):
                        if self._read(file) is None and file not in diverged:
                            logger.info("%s", file.stem)
                            self._write(file, job())
                except Timeout:
                    logger.info("%s is being done by another process", file.stem)
                except FloatingPointError as error:
                    logger.warning("%s: %s", file.stem, error)
                    diverged[file] = error
        if diverged:
            names = ", ".join(file.stem for file in diverged)
            raise ValueError(f"the training of {names} diverged: {next(iter(diverged.values()))}; the others are done")

    def _try(self, kind: tuple[str, str, str], trial: Trial) -> dict[str, Any]:
        cell = Cell(*kind, seed=0)
        try:
            return self.measure(cell, trial, self.budget.tuning_epochs, self.images.held_out)
        except FloatingPointError as error:
            logger.warning("%s", error)
            return {**asdict(cell), **asdict(trial), "before": 0.0, "after": 0.0, "diverged": True}

    def _train(self, cell: Cell) -> dict[str, Any]:
        return self.measure(cell, self.best(cell), self.budget.epochs, self.images.test, DRAWS, self.settings.record)

    def _float_model(self, network: str) -> nn.Module:
        if network not in self._float_models:
            file = self.folder / "float" / f"{network}.json"
            weights, stopped = file.with_suffix(".safetensors"), file.with_suffix(".stopped")
            torch.manual_seed(0)
            adapted = self.budget.networks[network]
            model = timm.create_model(network, num_classes=self.images.classes, **adapted.model_args)
            model.conv_stem.stride = (adapted.stem_stride, adapted.stem_stride)
            if self.budget.float_init == "torch":
                for layer in model.modules():
                    if isinstance(layer, (nn.Conv2d, nn.Linear)):
                        layer.reset_parameters()
            model = model.to(self.settings.torch_device, memory_format=torch.channels_last)
            with self._lock(file, -1):
                if self._read(file) is None:
                    self._write(file, self._train_float(model, network, weights, stopped))
                stopped.unlink(missing_ok=True)
            model.load_state_dict(load_file(weights))
            self._float_models[network] = model.eval()
        return self._float_models[network]

    def _train_float(self, model: nn.Module, network: str, weights: Path, stopped: Path) -> dict[str, Any]:
        b = self.budget
        steps = self._steps(b.float_epochs, b.float_batch_size)
        logger.info("float training of %s, %d steps", network, steps)
        labels = hashlib.sha256(self.images.train.labels.cpu().numpy().tobytes()).hexdigest()
        about = {"steps": str(steps), "labels": labels}
        if stopped.is_file():
            written = read_about(stopped)
            self._check_protocol(stopped, json.loads(written["protocol"]), network)
            if differing := [key for key, value in about.items() if written[key] != value]:
                raise ValueError(
                    f"got {stopped}, a training with other {' and '.join(differing)} that was stopped, expected one "
                    "with the same images: choose another --output_dir, or delete it to begin anew"
                )
        seconds = train_float(
            model,
            self._batches(b.float_batch_size, seed=0),
            steps,
            learning_rate=b.float_learning_rate,
            weight_decay=b.float_weight_decay,
            compiled=self.settings.compile,
            progress=stopped,
            about={"protocol": json.dumps(self._protocol("float", network)), **about},
        )
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
        return {
            "network": network,
            "test": accuracy(model, self.images.test, self.images.normalise),
            "held_out": accuracy(model, self.images.held_out, self.images.normalise),
            "steps": steps,
            "seconds": seconds,
            **self._conditions(),
        }

    def _conditions(self) -> dict[str, Any]:
        """What decides the time that a training takes, and the last digits of what it measures."""
        device = self.settings.torch_device
        return {
            "compile": self.settings.compile,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()}",
            "versions": {name: version(name) for name in ("hf_oscqat", "torch", "timm")},
            "date": date.today().isoformat(),
        }

    @property
    def images(self) -> SmallImages:
        """All images, decoded when they are first needed."""
        if self._images is None:
            b = self.budget
            images = load_small_images(self.settings, b.size, b.held_out, self.settings.torch_device)
            if b.train_images is not None:
                images = images._replace(train=images.train[: b.train_images - b.held_out])
            self._images = images
        return self._images

    def _batches(self, batch_size: int, seed: int) -> Batches:
        train = self.images.train
        return training_batches(train, self.images.normalise, batch_size, seed, self.budget.mirror)

    def some_batches(self, count: int, seed: int) -> Iterator[Tensor]:
        """Draw training images, `[batch, channels, height, width]`, the same ones for the same seed."""
        batches = self._batches(self.budget.batch_size, seed)
        return (next(batches)[0] for _ in range(count))

    def _steps(self, epochs: float, batch_size: int) -> int:
        return max(1, round(epochs * (len(self.images.train) // batch_size)))

    def recording(self, cell: Cell) -> Path:
        """Folder of what is recorded of a cell."""
        return self.folder / "recordings" / self._file("cells", cell).stem

    def _file(self, part: str, cell: Cell) -> Path:
        return self.folder / part / f"{cell.network}-{cell.width}-{cell.method}-{cell.seed}.json"

    def _trial_file(self, kind: tuple[str, str, str], trial: Trial) -> Path:
        tuned = [f"{value:g}" for value in (trial.learning_rate, trial.strength) if value is not None]
        return self.folder / "trials" / f"{'-'.join([*kind, *tuned])}.json"

    def _lock(self, file: Path, timeout: float) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{file.parent.name}-{file.stem}.lock", timeout=timeout)

    def _read(self, file: Path) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self._check_protocol(file, content["protocol"], content["network"])
        return content

    def _check_protocol(self, file: Path, written: dict[str, Any], network: str) -> None:
        own = self._protocol(file.parent.name, network)
        # What the protocol did not name when a file was written was as it is by default now.
        its = {key: written.get(key, _DEFAULTS.get(key)) for key in own}
        if differing := [f"{key}={its[key]!r} and not {own[key]!r}" for key in sorted(own) if its[key] != own[key]]:
            raise ValueError(
                f"got {file}, made with {', '.join(differing)}, expected results of one protocol in a folder: choose "
                "another --output_dir, --budget or --scale_lr_scheduler_type"
            )

    def _write(self, file: Path, content: dict[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.new")
        text = json.dumps({**content, "protocol": self._protocol(file.parent.name, content["network"])}, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.rename(file)

    def _protocol(self, part: str, network: str) -> dict[str, Any]:
        """What decides results of a network in `float/`, `trials/` or `cells/`; not how many of them there are."""
        everything = asdict(self.budget)
        adapted = everything.pop("networks").get(network, {})
        kept = {key: adapted.get(key) for key in ("model_args", "stem_stride")}
        if part == "float":
            data = ("train_images", "held_out", "size", "mirror")
            kept |= {k: v for k, v in everything.items() if k in data or "float" in k}
        else:
            # More trials leave those that were made valid, but not what was trained with the best of them.
            left_out = {"seeds"} | ({"trials", "epochs"} if part == "trials" else set())
            kept |= {"activation_scheme": adapted.get("activation_scheme")}
            kept |= {k: v for k, v in everything.items() if k not in left_out}
        return json.loads(json.dumps(kept))


_DEFAULTS = {f.name: f.default for of in (Budget, Network) for f in fields(of) if f.default is not MISSING}


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def run(settings: Cifar10Settings) -> StudyResult:
    """Fill the table as far as is asked for, and make it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    table = Table(settings)
    if not settings.table_only:
        table.fill()
    kinds = dict.fromkeys((cell.network, cell.width, cell.method) for cell in cells(table.budget))
    found = {kind: [table.results(Cell(*kind, seed)) for seed in range(table.budget.seeds)] for kind in kinds}
    rows = [_row(kind, results, table.trials(Cell(*kind, seed=0))) for kind, results in found.items()]
    missing = sum(result is None for results in found.values() for result in results)
    total = len(cells(table.budget))
    if missing == total:
        raise ValueError(f"got no finished cell in {table.folder}, expected at least one: train some first")
    finding = f"{total - missing} of {total} cells are there" + (f", {missing} are missing." if missing else ".")
    floats = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(table.folder.glob("float/*.json"))]
    finding += "".join(f" {f['network']} in float: {f['test']:.2f}%." for f in floats)
    return StudyResult(rows, _draw(found), finding, _conditions(r for results in found.values() for r in results if r))


def _conditions(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Under which conditions the cells were trained, and how many under each."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        conditions = {key: result.get(key) for key in ("device", "compile", "versions", "date")}
        entry = found.setdefault(json.dumps(conditions, sort_keys=True), {**conditions, "cells": 0})
        entry["cells"] += 1
    return list(found.values())


def _row(
    kind: tuple[str, str, str], results: list[dict[str, Any] | None], trials: list[dict[str, Any]]
) -> dict[str, Any]:
    best = max(trials, key=lambda trial: trial["after"], default=None)
    there = [
        result | {"after": fmean(draws), "re-estimations": len(draws)}
        for result in results
        if result is not None
        for draws in [_reestimated(result)]
    ]
    for key in ("learning_rate", "strength", "images", "steps", "re-estimations"):
        found = dict.fromkeys(result[key] for result in there)
        if len(found) > 1:
            raise ValueError(
                f"got cells of {' '.join(kind)} with {key} of {', '.join(map(str, found))}, expected one for all: "
                "train them with --again"
            )

    def summary(key: str, digits: int = 2) -> str:
        values = [result[key] for result in there]
        if not values:
            return ""
        # One value has no standard deviation.
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}"

    network, width, method = kind
    deviations = [stdev(draws) for result in results if result is not None and len(draws := _reestimated(result)) > 1]
    return {
        "network": network,
        "width": width,
        "method": method,
        "seeds": len(there),
        "before": summary("before"),
        "after": summary("after"),
        "deviation_of_draws": f"{fmean(deviations):.2f}" if deviations else "",
        "oscillating_percent": summary("oscillating_percent", 3),
        "scale_caused_percent": summary("scale_caused_percent", 0),
        "frozen_percent": summary("frozen_percent"),
        "seconds": summary("seconds", 0),
        "trials": "; ".join(_trial(trial, trial is best) for trial in trials),
        "missing_seeds": ", ".join(str(seed) for seed, result in enumerate(results) if result is None),
    }


def _reestimated(result: dict[str, Any]) -> list[float]:
    """Accuracy of a cell re-estimated from each draw of batches that it was measured with."""
    return [result["after"], *result.get("after_other_draws", [])]


def _trial(trial: dict[str, Any], is_best: bool) -> str:
    """Learning rate, strength and accuracy on held-out images; a star where it is what cells are trained with."""
    strength = "" if trial["strength"] is None else f", {trial['strength']:g}"
    return f"{trial['learning_rate']:g}{strength}: {trial['after']:.2f}{'*' if is_best else ''}"


def _draw(found: dict[tuple[str, str, str], list[dict[str, Any] | None]]) -> Figure:
    there = {
        kind: [r | {"after": fmean(_reestimated(r))} for r in results if r is not None]
        for kind, results in found.items()
    }
    panels = [panel for panel in dict.fromkeys(kind[:2] for kind in there) if any(there[(*panel, m)] for m in METHODS)]
    if len(panels) == 1:
        figure = Figure(figsize=(8.6, 3.2), dpi=150, layout="constrained")
        axes: Any = figure.subplots(1, 2, squeeze=False).T
    else:
        figure = Figure(figsize=(0.8 + 2.4 * len(panels), 5.4), dpi=150, layout="constrained")
        axes = figure.subplots(2, len(panels), squeeze=False)
    colours = dict(zip(METHODS, (BEFORE, FROZEN, OSCILLATING), strict=True))
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        labels = {"before": "before", "after": "after"}  # each once
        for place, method in enumerate(METHODS):
            results = there[(*panel, method)]
            for i, result in enumerate(results):
                # One line for a seed, and seeds side by side: two with the same accuracy are two dots.
                ends = [place + offset + 0.04 * (i - (len(results) - 1) / 2) for offset in (-0.2, 0.2)]
                top.plot(ends, [result["before"], result["after"]], color=BEFORE, linewidth=0.8)
                for x, key, colour in zip(ends, ("before", "after"), (BEFORE, AFTER), strict=True):
                    top.scatter(x, result[key], color=colour, s=14, zorder=3, label=labels.pop(key, ""))
            for result in results:
                steps, shares = zip(
                    *((point["step"], point["oscillating_percent"]) for point in result["history"]), strict=True
                )
                # The trials may have chosen other rates, and weights oscillate more at a higher one.
                label = f"{method}, rate {result['learning_rate']:g}" if result is results[0] else ""
                # Plain LSQ on top and dashed, because until a remedy sets in it is the same line.
                style = {"linestyle": "--", "zorder": 3} if method == "lsq" else {}
                bottom.plot(steps, shares, color=colours[method], linewidth=1.2, label=label, **style)
        top.set_xticks(range(len(METHODS)), list(METHODS), fontsize=8)
        top.set_xlim(-0.5, len(METHODS) - 0.5)
        top.set_title(" ".join(panel), loc="left", fontsize=8)
        top.set(ylabel="top-1 accuracy, %")
        bottom.set(xlabel="step", ylabel="oscillating weights, %")
        bottom.set_ylim(0, 1.35 * bottom.get_ylim()[1])  # room for the legend
        tidy(top, legend={"title": "re-estimation", "fontsize": 7, "title_fontsize": 7})
        tidy(bottom, legend={"fontsize": 7, "loc": "upper right"})
    # A point of accuracy is as long in each panel.
    limits = [top.get_ylim() for top in axes[0]]
    span = max((high - low for low, high in limits), default=0.0)
    for top, (low, high) in zip(axes[0], limits, strict=True):
        top.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    return figure


STUDY = Study(
    name="cifar10",
    question="How much accuracy do the remedies save on CIFAR-10, and how much oscillation is left?",
    source="Nagel et al. (ICML 2022), sec. 5, tables 2 and 4 to 8",
    settings=Cifar10Settings,
    run=run,
    example="--dataset_name FOLDER --budget cpu --output_dir runs/cifar10",
)
