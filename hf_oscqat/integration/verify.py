"""Measure again what a card claims, and say whether it comes out the same.

`claim_arguments` writes down, beside a measured accuracy, everything that decides about it; `read_claim` reads that
from a card, and `verify` runs it again: the same images prepared in the same way, by the weights of one commit.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import timm.data
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_oscqat.hub.card import (
    CARD,
    METRICS,
    OURS,
    TASK,
    eval_results_entry,
    merge_eval_results,
    read_card,
    read_metadata,
    with_results,
)
from hf_oscqat.hub.client import check_repo_id, explained, is_passing, patiently
from hf_oscqat.hub.push import Pushed, commit, differences, digests_there, open_pull_requests, read_file
from hf_oscqat.integration.data import (
    INTERPOLATIONS,
    DataArguments,
    DataError,
    ImageData,
    build_transforms,
    collate,
    load_image_data,
)
from hf_oscqat.integration.evaluate import Evaluation, evaluate_accuracy
from hf_oscqat.integration.modeling import OscQATTimmConfig
from hf_oscqat.integration.models import check_classes
from hf_oscqat.quantization.packed import PackedLayer

logger = logging.getLogger(__name__)

DATA_FILES = {".parquet", ".arrow", ".csv", ".json", ".jsonl", ".zip", ".tar", ".tgz"}
"""In a folder, or in one of a split, they make it one that `datasets` reads."""
SPLIT_FOLDERS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "data")

PREPARATION = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""Keys of timm that say how an image is prepared."""
CROP_MODES = ("center", "squash", "border")
SOURCES = ("hub", "digits", "folder")
MAX_SIDE = 2048
"""Pixels; a card may claim any size, and memory is allocated by it."""
RESOLUTION = 1e-3
"""Differences of accuracy up to this are rounding: another device sums in another order."""
TITLE = "Results measured by oscqat evaluate"


class CannotRerunError(ValueError):
    """A claim cannot be measured again; the message says why, and what would help."""


@dataclass(frozen=True)
class Claim:
    """What a card says was measured.

    Attributes:
        accuracy: claimed values by metric, as in `METRICS`, in [0, 1].
        num_images: how many images that was measured on.
        dataset: id on the Hub, "digits", or the name of a folder that is not published.
        config: configuration of the dataset; None is the default.
        split: of the dataset.
        revision: commit of the dataset; None if it is not versioned.
        arguments: how images were chosen and prepared, see `claim_arguments`.
    """

    accuracy: Mapping[str, float]
    num_images: int
    dataset: str
    config: str | None
    split: str
    revision: str | None
    arguments: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """What images are drawn with."""
        return int(self.arguments.get("seed", 0))


@dataclass(frozen=True)
class Verification:
    """What came out.

    Attributes:
        name: folder or Hub id.
        commit: of the model; None for a folder.
        claim: what was claimed.
        measured: what was measured.
        tolerance: by metric, the largest difference that is taken for the same.
        parameters: numbers in the model.
        other_data: whether the images came from somewhere else than the claim says.
    """

    name: str
    commit: str | None
    claim: Claim
    measured: Evaluation
    tolerance: Mapping[str, float]
    parameters: int
    other_data: bool

    @property
    def differences(self) -> dict[str, float]:
        """Measured minus claimed, by metric."""
        return {
            metric: getattr(self.measured, METRICS[metric][0]) - claimed
            for metric, claimed in self.claim.accuracy.items()
        }

    @property
    def reproduced(self) -> bool:
        """Whether every claimed value was met."""
        return all(abs(difference) <= self.tolerance[metric] for metric, difference in self.differences.items())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; the keys of timm's validate.py come first, accuracies in percent."""
        top1, top5 = 100 * self.measured.accuracy, 100 * self.measured.top5_accuracy
        prepared = self.claim.arguments
        return {
            "model": self.name,
            "top1": round(top1, 4),
            "top1_err": round(100 - top1, 4),
            "top5": round(top5, 4),
            "top5_err": round(100 - top5, 4),
            "param_count": round(self.parameters / 1e6, 2),
            "img_size": prepared["input_size"][-1],
            "crop_pct": prepared["crop_pct"],
            "interpolation": prepared["interpolation"],
            "commit": self.commit,
            "dataset": self.claim.dataset,
            "dataset_revision": self.claim.revision,
            "split": self.claim.split,
            "num_images": self.measured.num_images,
            "claimed_num_images": self.claim.num_images,
            "images_per_second": round(self.measured.images_per_second, 1),
            "claimed": {metric: 100 * value for metric, value in self.claim.accuracy.items()},
            "tolerance": {metric: 100 * value for metric, value in self.tolerance.items()},
            "reproduced": self.reproduced,
        }


def claim_arguments(
    args: DataArguments, seed: int, preparation: Mapping[str, Any], *, held_out: bool
) -> dict[str, Any]:
    """Return what decides about an accuracy besides model, dataset, configuration, revision and split.

    Args:
        args: the data of the run.
        seed: that images are held out and drawn with.
        preparation: how images are prepared, with the keys of timm.
        held_out: whether `train_val_split` was used, and not a split of its own.
    """
    source = "hub"
    if args.dataset_name == "digits":
        source = "digits"
    elif args.dataset_name is None or Path(args.dataset_name).exists():
        source = "folder"
    chosen = {
        name: getattr(args, name)
        for name in ("train_split", "train_val_split", "image_column_name", "label_column_name", "max_eval_samples")
        if getattr(args, name) != getattr(DataArguments, name, None)
    }
    if not held_out:
        chosen.pop("train_val_split", None)
    if args.skip_bad_images:
        chosen["skip_bad_images"] = True
    if chosen.keys() & {"train_val_split", "max_eval_samples"}:
        chosen["seed"] = seed
    prepared = {key: list(v) if isinstance(v := preparation[key], tuple) else v for key in PREPARATION}
    return {"source": source, **prepared, **chosen}


def read_claim(metadata: Mapping[str, Any], place: str) -> Claim:
    """Find in a card's metadata what was measured, and how.

    Args:
        metadata: of the card.
        place: where the card is, for messages.

    Raises:
        CannotRerunError: if it claims nothing, or not how it was measured, or what cannot be.
    """
    found: dict[tuple[Any, ...], Claim] = {}
    try:
        for model in metadata.get("model-index") or []:
            for result in model.get("results") or []:
                dataset = result.get("dataset") or {}
                arguments = dataset.get("args") or {}
                values = {
                    metric["type"]: metric["value"]
                    for metric in result.get("metrics") or []
                    if metric.get("type") in METRICS
                }
                if (result.get("task") or {}).get("type") != TASK or not values or "num_images" not in arguments:
                    continue
                key = (dataset.get("type"), dataset.get("config"), dataset.get("split"), dataset.get("revision"))
                before = found[key].accuracy if key in found else {}
                claimed: tuple[Any, ...] = ({**before, **values}, arguments["num_images"], *key, arguments)
                found[key] = Claim(*claimed)
    except (AttributeError, TypeError, KeyError) as error:
        raise CannotRerunError(f"the results of {place} cannot be read: {error}") from error
    if not found:
        raise CannotRerunError(
            f"{place} states no accuracy together with how it was measured, so nothing can be run again; expected "
            "model-index results with dataset args, as oscqat writes them"
        )
    claim = next(iter(found.values()))
    missing = [key for key in PREPARATION if key not in claim.arguments]
    if missing:
        raise CannotRerunError(f"{place} does not say how images were prepared: {', '.join(missing)} are missing")
    for name, value, good, expected in _checks(claim):
        if not good:
            raise CannotRerunError(f"{place} claims something with {name} {value!r}, expected {expected}")
    if len(found) > 1:
        logger.warning("%s has results on %d datasets; the first is run again: %s", place, len(found), claim.dataset)
    return claim


def _checks(claim: Claim) -> Iterator[tuple[str, Any, bool, str]]:
    """What of a claim to believe: name, value, whether it can be, and what can be. Anyone may have written it."""

    def numbers(value: Any, count: int, low: float, high: float, kind: Any = (int, float)) -> bool:
        values = value if isinstance(value, list) else [value]
        right = all(isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high for v in values)
        return right and len(values) == count

    for metric, value in claim.accuracy.items():
        yield metric, value, numbers(value, 1, 0, 1), "a share from 0 to 1"
    yield "num_images", claim.num_images, numbers(claim.num_images, 1, 1, 1e9, int), "a number of images"
    for name in ("dataset", "split", "config", "revision"):
        named = getattr(claim, name)
        optional = name in ("config", "revision") and named is None
        yield name, named, optional or (isinstance(named, str) and bool(named)), "a name"
    args = claim.arguments
    size = args["input_size"]
    yield (
        "input_size",
        size,
        numbers(size, 3, 1, MAX_SIDE, int) and size[0] == 3,
        f"[3, height, width] up to {MAX_SIDE}",
    )
    yield "crop_pct", args["crop_pct"], numbers(args["crop_pct"], 1, 0.01, 1), "a share of the image"
    for name in ("mean", "std"):
        yield name, args[name], numbers(args[name], 3, -10, 10), "three numbers"
    yield "interpolation", args["interpolation"], args["interpolation"] in INTERPOLATIONS, ", ".join(INTERPOLATIONS)
    yield "crop_mode", args["crop_mode"], args["crop_mode"] in CROP_MODES, ", ".join(CROP_MODES)
    yield "source", args.get("source"), args.get("source") in SOURCES, ", ".join(SOURCES)


def verify(
    source: str,
    *,
    revision: str | None = None,
    dataset: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
    token: str | None = None,
    show_progress: bool = True,
) -> Verification:
    """Measure again what the card of a packed model claims.

    Args:
        source: a folder or a Hub id.
        revision: for a Hub id, a branch, tag or commit.
        dataset: the images, where they are not on the Hub or to be read from somewhere else: a folder with one folder
            per class, a folder that `datasets` reads, or a Hub id.
        max_samples: measure on a random subset of this size.
        batch_size: images at once.
        num_workers: processes that load images.
        device: "cpu" to stay there; None takes the accelerator if there is one.
        token: None takes the stored one, or HF_TOKEN.
        show_progress: show a progress bar.

    Raises:
        CannotRerunError: if the claim cannot be run again: it says too little, or the images are not to be had.
        ValueError: if the checkpoint is damaged, or the Hub refuses.
    """
    _check_device(device)
    sha, card = _pinned_card(source, revision, token)
    claim = read_claim(read_metadata(card, f"the card of {source}"), f"the card of {source}")
    data = _load_data(claim, dataset, token)
    if data.num_images != claim.num_images:
        raise CannotRerunError(
            f"the card of {source} speaks of {claim.num_images} images of {claim.dataset}, split {claim.split}, and "
            f"there are {data.num_images}: these are other data"
        )
    images = data.validation if max_samples is None else data.validation.sample(max_samples, claim.seed)
    whole = len(images) == claim.num_images
    model = _load_model(source, sha, token)
    try:
        check_classes(model.config, data.class_names, source)
    except ValueError as error:
        raise CannotRerunError(str(error)) from error
    _check_preparation(model, claim, source)
    images.transform = _transform(claim)
    measured = evaluate_accuracy(
        model,
        images,
        batch_size=batch_size,
        collate=collate,
        num_workers=num_workers,
        cpu=device == "cpu",
        show_progress=show_progress,
    )
    return Verification(
        name=source,
        commit=sha,
        claim=claim,
        measured=measured,
        tolerance={metric: tolerance(value, measured.num_images, whole) for metric, value in claim.accuracy.items()},
        parameters=_count_parameters(model),
        other_data=dataset is not None and dataset != claim.dataset,
    )


def tolerance(claimed: float, num_images: int, whole: bool) -> float:
    """Return the largest difference from a claimed accuracy that is taken for the same.

    On the images of the claim that is 0.001, or one image where there are fewer than a thousand. A subset is drawn by
    chance: three standard errors of a binomial share of that size.

    Args:
        claimed: accuracy, in [0, 1].
        num_images: how many were measured on.
        whole: whether those are all of the claim's.
    """
    if whole:
        return max(RESOLUTION, 1 / num_images) + 1e-9
    return max(RESOLUTION, 3 * math.sqrt(claimed * (1 - claimed) / num_images))


def propose_results(result: Verification, *, token: str | None = None) -> Pushed | None:
    """Open a pull request that puts the measured values into the card, and into `.eval_results` for data of the Hub.

    Args:
        result: measured on all images of the claim, for the newest commit of a model on the Hub.
        token: of any account; None takes the stored one, or HF_TOKEN.

    Returns:
        The pull request; if one of this title is open, that one, without a commit. None if the card has these values
        already.

    Raises:
        ValueError: if the measurement may not be proposed, or the Hub refuses.
    """
    check_proposable(
        folder=result.commit is None,
        subset=result.measured.num_images != result.claim.num_images,
        other_data=result.other_data,
    )
    api = HfApi(token=token)
    name, claim = result.name, result.claim
    with explained(name, "proposing results to", api.endpoint):
        for request in open_pull_requests(api, name, TITLE):
            return Pushed(str(request.url), "", ())
        newest = patiently(lambda: api.repo_info(name), f"reading {name}").sha
        if newest != result.commit:
            raise ValueError(
                f"got a measurement of commit {result.commit} of {name}, whose newest is {newest} now, expected one "
                "of that: the numbers would stand beside other weights. Measure again"
            )

        def changes(head: str) -> dict[str, bytes | Path | None]:
            there = digests_there(api, name, head)
            card = with_results(read_file(api, name, CARD, head), _measured_entries(result), f"the card of {name}")
            wanted: dict[str, bytes | Path | None] = {CARD: card.encode()}
            if claim.arguments["source"] == "hub":
                notes = f"{OURS}top-1 accuracy in percent, split {claim.split}, measured by oscqat evaluate"
                day, accuracy = date.today().isoformat(), result.measured.accuracy
                path, ours = eval_results_entry(claim.dataset, claim.config, claim.revision, accuracy, day, notes)
                theirs = read_file(api, name, path, head) if path in there else ""
                wanted[path] = merge_eval_results(theirs, ours).encode()
            return differences(there, wanted)

        pushed = commit(
            api,
            name,
            changes,
            TITLE,
            create_pr=True,
            description=f"Measured at commit {result.commit} on {result.measured.num_images} images of "
            f"{claim.dataset}, split {claim.split}, by `oscqat evaluate {name}`.",
        )
        return pushed if pushed.changed else None


def check_proposable(*, folder: bool, subset: bool, other_data: bool) -> None:
    """Refuse to propose what is no measurement of the claim.

    Args:
        folder: whether the model is one on disk.
        subset: whether not all images of the claim are measured on.
        other_data: whether the images come from somewhere else than the claim says.

    Raises:
        ValueError: if any of these is so.
    """
    if folder:
        raise ValueError("got a folder to open a pull request in, expected a Hub id such as org/name")
    if subset:
        raise ValueError(
            "got a measurement on a part of the images to propose, expected one on all of them: leave out "
            "--max-samples"
        )
    if other_data:
        raise ValueError(
            "got a measurement on images from elsewhere to propose, expected one on those that the card names: leave "
            "out --dataset"
        )


def _measured_entries(result: Verification) -> dict[tuple[Any, ...], float]:
    """Return the measured value for each result of the card that it is one of."""
    claim = result.claim
    return {
        (TASK, claim.dataset, claim.config, claim.split, metric): getattr(result.measured, METRICS[metric][0])
        for metric in claim.accuracy
    }


def _pinned_card(source: str, revision: str | None, token: str | None) -> tuple[str | None, str]:
    """Return the commit that is evaluated, None for a folder, and its card."""
    if Path(source).is_dir():
        if revision is not None:
            raise CannotRerunError(f"got revision {revision!r} of {source}, a folder, which has none")
        card = Path(source, CARD)
        if not card.is_file():
            inside = Path(source, "packed", CARD)
            hint = f": you may mean {inside.parent}" if inside.is_file() else ""
            raise CannotRerunError(f"got {source} without {CARD}, expected a card that claims something{hint}")
        return None, read_card(card)
    check_repo_id(source)
    api = HfApi(token=token)
    with explained(source, "reading", api.endpoint):
        info = patiently(lambda: api.model_info(source, revision=revision), f"reading {source}")
        if CARD not in {sibling.rfilename for sibling in info.siblings or ()}:
            raise CannotRerunError(f"got {source} without {CARD}, expected a card that claims something")
        path = patiently(lambda: api.hf_hub_download(source, CARD, revision=info.sha), f"reading the card of {source}")
    return info.sha, read_card(Path(path))


def _load_data(claim: Claim, dataset: str | None, token: str | None) -> ImageData:
    args, source = dict(claim.arguments), claim.arguments.get("source")
    chosen: dict[str, Any] = {
        name: args[name]
        for name in (
            "train_split",
            "train_val_split",
            "image_column_name",
            "label_column_name",
            "skip_bad_images",
            "max_eval_samples",
        )
        if name in args
    }
    if dataset is None and source == "folder":
        raise CannotRerunError(
            f"the card was measured on {claim.dataset}, a folder that is not published: pass the images as --dataset "
            "FOLDER"
        )
    if "train_val_split" not in args:
        chosen["validation_split"] = claim.split
    if dataset is None and source == "hub" and Path(claim.dataset).exists():
        raise CannotRerunError(
            f"the card names the dataset {claim.dataset} of the Hub, and here is a file or folder of that name, which "
            "would be read: do this from another folder, or pass it as --dataset"
        )
    if dataset is None:
        chosen |= {"dataset_name": claim.dataset, "dataset_config_name": claim.config}
        chosen["dataset_revision"] = claim.revision
    elif _is_folder_of_classes(Path(dataset)):
        # A claim about a share of the training images is about a share of this folder.
        chosen["train_dir" if "train_val_split" in args else "validation_dir"] = dataset
        chosen.pop("validation_split", None)
    else:
        chosen["dataset_name"] = dataset
        if dataset == claim.dataset:
            chosen |= {"dataset_config_name": claim.config, "dataset_revision": claim.revision}
    try:
        return load_image_data(DataArguments(**chosen), seed=claim.seed, need_train=False, token=token)
    except (DataError, ImportError, TypeError) as error:
        raise CannotRerunError(f"the images of the claim, {claim.dataset}, are not to be had: {error}") from error


def _is_folder_of_classes(path: Path) -> bool:
    """Whether a folder holds a folder per class, and not what `datasets` reads."""
    if not path.is_dir():
        return False
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    # A class may be called train. As a split it holds the folders of the classes, or data.
    within = [entry for folder in folders if folder.name in SPLIT_FOLDERS for entry in folder.iterdir()]
    has_data = any(DATA_FILES.intersection(entry.suffixes) for entry in (*entries, *within) if entry.is_file())
    return bool(folders) and not has_data and not any(entry.is_dir() for entry in within)


def _load_model(source: str, sha: str | None, token: str | None) -> nn.Module:
    """Load a packed model, and nothing else: other checkpoints may bring code of their own, or pickles.

    Raises:
        CannotRerunError: if it is none.
    """
    api = HfApi(token=token)
    options: dict[str, Any] = {} if sha is None else {"revision": sha, "token": token}

    def load() -> nn.Module:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        if getattr(config, "model_type", None) != OscQATTimmConfig.model_type:
            raise CannotRerunError(
                f"got {source} with a {config.model_type} model, expected a packed one of hf_oscqat"
            )
        return AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, **options
        )

    with explained(source, "loading", api.endpoint):
        try:
            return load() if sha is None else patiently(load, f"loading {source}")
        except OSError as error:
            if is_passing(error):
                raise
            reason = str(error).partition(" and thus")[0]
            raise CannotRerunError(
                f"got {source}, which cannot be loaded ({reason}), expected a packed checkpoint with model.safetensors"
            ) from error


def _check_device(device: str | None) -> None:
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device not in (None, "cpu") and (available is None or available.type != device):
        there = "no accelerator" if available is None else f"an accelerator of type {available.type}"
        raise CannotRerunError(f"got device {device!r} on a machine with {there}, expected one that it has")


def _check_preparation(model: nn.Module, claim: Claim, source: str) -> None:
    """Refuse a card that says otherwise than config.json, which the image processor of the model goes by."""
    config: Any = model.config
    for name in PREPARATION:
        has, claimed = (
            list(value) if isinstance(value, list | tuple) else value
            for value in ((config.pretrained_cfg or {}).get(name), claim.arguments[name])
        )
        if has != claimed:
            raise CannotRerunError(
                f"the card of {source} was measured with {name} {claim.arguments[name]}, and its config.json has "
                f"{has}: one of the two was changed"
            )


def _transform(claim: Claim) -> Any:
    prepared = {key: claim.arguments[key] for key in PREPARATION}
    settings = timm.data.resolve_data_config(
        {key: tuple(value) if isinstance(value, list) else value for key, value in prepared.items()}
    )
    # As bytes, which `evaluate_accuracy` normalises on the device by the model's own config, as the run did.
    _, transform = build_transforms(settings, DataArguments(dataset_name="digits"), normalize=False)
    return transform


def _count_parameters(model: nn.Module) -> int:
    packed = [module.format.weight for module in model.modules() if isinstance(module, PackedLayer)]
    own = sum(parameter.numel() for parameter in model.parameters())
    return own + sum(torch.Size(grid.shape).numel() for grid in packed if grid is not None)
