"""Image-classification data: where images come from, what is checked, how they become tensors.

Every source is reduced to the same small thing: labels in memory, images decoded on demand. Splitting, subsampling and
dropping unreadable images then only change an array of indices, and a mistake in the data is reported before training
starts, in the words of the command line.
"""

import copy
import hashlib
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import timm.data
import torch
from huggingface_hub import HfApi
from PIL import Image
from torchvision.datasets import ImageFolder
from tqdm import tqdm

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
VALIDATION_SPLITS = ("validation", "val", "test")

Transform = Callable[[Image.Image], torch.Tensor]


class DataError(ValueError):
    """The data, or the arguments that describe it, cannot be used; the message says what to change."""


class BadImageError(DataError):
    """An image cannot be decoded; the message names it."""


# Argument: (what it must satisfy where it is given, the same in words).
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train_val_split": (lambda value: 0 < value < 1, "a fraction above 0 and below 1"),
    "max_train_samples": (lambda value: value >= 1, "1 or more"),
    "max_eval_samples": (lambda value: value >= 1, "1 or more"),
    "img_size": (lambda value: value >= 1, "1 pixel or more"),
    "crop_pct": (lambda value: 0 < value <= 1, "a fraction above 0 and at most 1"),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "train_scale": (
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
        "two fractions above 0 and at most 1, the smaller one first",
    ),
    "hflip": (lambda value: 0 <= value <= 1, "a probability from 0 to 1"),
    "color_jitter": (lambda value: value >= 0, "0 or more"),
}


@dataclass
class DataArguments:
    """What to train and evaluate on, and how images are prepared.

    Raises:
        DataError: unless exactly one source of images is given and every value is in range.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset id on the Hub, a local folder that `datasets.load_dataset` reads, a folder written by "
            "`save_to_disk`, or 'digits' for the 1,797 handwritten digits of scikit-learn."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images, in one folder per class."})
    validation_dir: str | None = field(
        default=None, metadata={"help": "Validation images, in one folder per class. Alone: for evaluation only."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": f"Split to evaluate on. Default: the first there is of {', '.join(VALIDATION_SPLITS)}."},
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the training split to hold out for evaluation, of every class alike and drawn with "
            "the seed. Used only when there is no validation split."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random subset of this size."})
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Decode every image once at the start and leave out those that fail."}
    )
    cache_images: bool = field(
        default=False,
        metadata={
            "help": "Decode every image once at the start and keep all in memory, 3 bytes a pixel. For small images, "
            "of which decoding is a large part of the work."
        },
    )
    img_size: int | None = field(default=None, metadata={"help": "Input size in pixels. Default: the model's."})
    crop_pct: float | None = field(
        default=None, metadata={"help": "In evaluation, crop size over resized image size. Default: the model's."}
    )
    interpolation: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(INTERPOLATIONS)} (in training only). Default: the model's."},
    )
    train_scale: list[float] | None = field(
        default=None,
        metadata={"help": "Smallest and largest area of a random training crop. Default: timm's, 0.08 1.0."},
    )
    hflip: float | None = field(default=None, metadata={"help": "Probability of mirroring. Default: timm's, 0.5."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Strength of color jitter, 0 is off. Default: timm's, 0.4."}
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "A policy of timm, such as 'rand-m9-mstd0.5', instead of color jitter."}
    )
    no_aug: bool = field(default=False, metadata={"help": "Prepare training images as for evaluation."})

    def __post_init__(self) -> None:
        """Check the arguments by themselves, before anything is loaded."""
        if bool(self.dataset_name) == bool(self.train_dir or self.validation_dir):
            raise DataError(
                f"Got dataset_name={self.dataset_name!r}, train_dir={self.train_dir!r} and "
                f"validation_dir={self.validation_dir!r}; expected one source of images. Pass --dataset_name, or "
                "--train_dir with --validation_dir or --train_val_split, or --validation_dir alone to evaluate only."
            )
        for name, (is_valid, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise DataError(f"Got --{name} {value}; expected {expected}.")


class ImageSource(Protocol):
    """Labelled images: int64 labels of shape [images], one class name per label, and access by index."""

    labels: np.ndarray
    class_names: list[str]

    def open(self, index: int) -> Image.Image:
        """Decode an image to RGB; whatever the decoder raises passes through."""

    def describe(self, index: int) -> str:
        """Say where an image is stored, for messages."""

    def key(self, index: int) -> str:
        """Name an image within the source, wherever that is."""


def _decode(file: str | io.BytesIO) -> Image.Image:
    # Orientation tags are not applied, as in timm and torchvision, whose published accuracies rest on that.
    with Image.open(file) as image:
        return image.convert("RGB")


class _FolderSource:
    """Image files in one folder per class; the classes are the sorted folder names."""

    def __init__(self, directory: str, class_names: list[str] | None = None) -> None:
        try:
            listing = ImageFolder(directory)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"Cannot list '{directory}': {error} Expected one folder per class in it, each with images. Correct "
                "--train_dir or --validation_dir, or remove class folders that are empty."
            ) from error
        for name in listing.classes:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"Got the class folder {name!r} in '{directory}', whose name is not in UTF-8 and cannot stand "
                    "in a config or a card. Rename it."
                ) from error
        _check_same_classes(class_names, listing.classes)
        self.class_names = listing.classes
        self.labels = np.asarray(listing.targets, dtype=np.int64)
        self.paths = [path for path, _ in listing.samples]
        self.directory = str(listing.root)  # with ~ expanded

    def open(self, index: int) -> Image.Image:
        return _decode(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]

    def key(self, index: int) -> str:
        return self.paths[index].removeprefix(self.directory).lstrip(os.sep)


class _DigitsSource:
    """The 8x8 digits of scikit-learn, a fifth of them held out: always the same, so that accuracies compare."""

    def __init__(self, split: str, class_names: list[str] | None = None) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        train, validation = _stratified_split(digits.target, 0.2, seed=0)
        rows = train if split == "train" else validation
        self.class_names = [str(name) for name in digits.target_names]
        self.labels = digits.target[rows].astype(np.int64)
        self.pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self.split = split

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def describe(self, index: int) -> str:
        return f"digit {index} of split '{self.split}'"

    def key(self, index: int) -> str:
        return str(index)


class _TableSource:
    """A split of a dataset of the `datasets` library."""

    def __init__(
        self, args: DataArguments, table: "datasets.Dataset", split: str, class_names: list[str] | None = None
    ) -> None:
        import datasets

        if len(table) == 0:
            raise DataError(f"Split '{split}' is empty; expected at least one image. Choose another split.")
        for option in ("image_column_name", "label_column_name"):
            if getattr(args, option) not in table.column_names:
                raise DataError(
                    f"Split '{split}' has no column '{getattr(args, option)}', only {_join(table.column_names)}. "
                    f"Pass one of them as --{option}."
                )
        self.split, self.column = split, args.image_column_name
        try:
            # Images stay encoded, so that one that cannot be decoded is met in `open` and can be named.
            self.rows = table.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise DataError(
                f"Column '{self.column}' of split '{split}' has type {table.features[self.column]}; expected images, "
                "their bytes or their paths. Pass another --image_column_name."
            ) from error
        self.labels, self.class_names = _read_labels(table, split, args.label_column_name, class_names)
        _check_same_classes(class_names, self.class_names)

    def open(self, index: int) -> Image.Image:
        image = self.rows[index][self.column]
        if image is None:
            raise ValueError("the row holds no image")
        return _decode(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))

    def describe(self, index: int) -> str:
        path = (self.rows[index][self.column] or {}).get("path")
        return f"row {index} of split '{self.split}'" + (f" ({path})" if path else "")

    def key(self, index: int) -> str:
        return str(index)


def _read_labels(
    table: "datasets.Dataset", split: str, column: str, class_names: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return int64 labels and the classes: declared, or else given, or else found in the labels themselves."""
    feature = table.features[column]
    dtype = str(getattr(feature, "dtype", feature))
    values = table.select_columns(column).with_format("arrow")[:][column]
    # Missing and unknown labels become -1, which is outside the classes.
    if dtype.endswith("string"):
        strings = values.to_pylist()
        class_names = class_names or sorted(set(strings) - {None})
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = np.array([numbers.get(string, -1) for string in strings], dtype=np.int64)
    elif dtype.startswith(("int", "uint")):
        labels = values.cast("int64").fill_null(-1).to_numpy()
        class_names = getattr(feature, "names", class_names) or [str(number) for number in range(labels.max() + 1)]
    else:
        raise DataError(
            f"Column '{column}' of split '{split}' has type {feature}; expected class labels, integers or strings. "
            "Pass another --label_column_name."
        )
    outside = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(outside):
        raise DataError(
            f"{len(outside)} of {len(labels)} labels of split '{split}' are outside its {len(class_names)} classes "
            f"({_join(class_names)}); the first is {values[int(outside[0])].as_py()!r} in row {outside[0]}. "
            "Correct the labels, or choose a split that has labels."
        )
    return labels, class_names


class _DecodedSource:
    """Some images of another source, decoded and kept; worker processes that are forked share them."""

    def __init__(self, source: ImageSource, images: dict[int, Image.Image]) -> None:
        self.source, self.images = source, images
        self.labels, self.class_names = source.labels, source.class_names

    def open(self, index: int) -> Image.Image:
        return self.images[index]

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def key(self, index: int) -> str:
        return self.source.key(index)


class ImageDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Some of the images of a source, as {"pixel_values": [3, height, width], "labels": int}.

    With a seed, the random numbers that the transform draws depend on seed, epoch and image alone, whichever process
    or worker prepares it and whatever it has prepared before.

    Attributes:
        source: where the images are.
        indices: int64, which of them, in order.
        transform: turns an RGB image into `pixel_values`; None until it is set.
        seed: None to draw from the generators as they are.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray | None = None) -> None:
        """Select images of a source, by default all."""
        self.source = source
        self.indices = np.arange(len(source.labels)) if indices is None else indices
        self.transform: Transform | None = None
        self.seed: int | None = None
        # Shared, because persistent workers keep their own copy of everything else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other random numbers than in other epochs, in worker processes too."""
        self._epoch.fill_(epoch)

    def at_epoch(self, epoch: int) -> "ImageDataset":
        """Return the same images as in that epoch, whatever this dataset is told; its workers go on undisturbed."""
        other = copy.copy(self)
        other._epoch = torch.tensor([epoch]).share_memory_()
        return other

    @property
    def epoch(self) -> int:
        """What `set_epoch` was last told; 0 at first."""
        return int(self._epoch)

    @property
    def labels(self) -> np.ndarray:
        """The labels of the selected images, int64 of shape [len(self)]."""
        return self.source.labels[self.indices]

    @property
    def sha256(self) -> str:
        """Digest of names and labels of the selected images, in order; of their pixels nothing."""
        digest = hashlib.sha256("\0".join(self.source.class_names).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update("\0".join(map(self.source.key, self.indices.tolist())).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of selected images."""
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Decode and transform one image.

        Raises:
            BadImageError: if the image cannot be decoded.
            RuntimeError: if there is no transform.
        """
        if self.transform is None:
            raise RuntimeError("Got a dataset without a transform; set `transform`, see `build_transforms`.")
        image, index = self.open(position), int(self.indices[position])
        with nullcontext() if self.seed is None else randomness_of(self.seed, self.epoch, index):
            pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": int(self.source.labels[index])}

    def open(self, position: int) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            BadImageError: if the image cannot be decoded.
        """
        index = int(self.indices[position])
        try:
            return self.source.open(index)
        except Exception as error:  # decoders meet damaged files with errors of many types, SyntaxError among them
            raise BadImageError(
                f"Cannot decode {self.source.describe(index)}: {type(error).__name__}: {error}. Replace the image, or "
                "pass --skip_bad_images to leave out every such image."
            ) from error

    def subset(self, positions: np.ndarray) -> "ImageDataset":
        """Return the images at these positions as a dataset, without a transform."""
        return ImageDataset(self.source, self.indices[positions])

    def sample(self, count: int, seed: int) -> "ImageDataset":
        """Return a random subset of this size, or all where there are no more, without a transform."""
        drawn = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.subset(np.sort(drawn))

    def decoded(self) -> "ImageDataset":
        """Return the same images as a dataset that has decoded them and keeps them in memory, without a transform.

        Raises:
            BadImageError: if an image cannot be decoded.
        """
        images = _decode_all(self, self.open, "Decoding images")
        decoded = dict(zip(self.indices.tolist(), images, strict=True))
        return ImageDataset(_DecodedSource(self.source, decoded), self.indices)


@contextmanager
def randomness_of(*key: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) by some numbers, and leave them as they were before.

    Args:
        *key: numbers of at least 0, such as seed, epoch and index.
    """
    first, *others = (int(number) for number in np.random.SeedSequence(key).generate_state(3))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(first)
    np.random.seed(others[0])
    torch.default_generator.manual_seed(others[1])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass
class ImageData:
    """Training and validation images, and what is needed to evaluate on the same images again.

    Attributes:
        train: None where only evaluation was asked for.
        validation: the images to evaluate on.
        class_names: one per label.
        name: short name of the dataset, for people.
        dataset_id: id on the Hub; None for the digits and for folders.
        config: configuration of the dataset, as given.
        revision: commit of a dataset of the Hub; None of anything else.
        split: the validation split, or how it was held out of the training split.
        held_out: whether it was.
        skipped: how many images were left out because they cannot be decoded.
    """

    train: ImageDataset | None
    validation: ImageDataset
    class_names: list[str]
    name: str
    dataset_id: str | None
    config: str | None
    revision: str | None
    split: str
    held_out: bool
    skipped: int

    @property
    def num_images(self) -> int:
        """Number of images evaluated on."""
        return len(self.validation)


def load_image_data(args: DataArguments, seed: int, need_train: bool = True, *, token: str | None = None) -> ImageData:
    """Find, check and split the images that the arguments describe.

    Args:
        args: what to load.
        seed: draws held-out images and subsets; to evaluate on held-out images, pass the seed of the training.
        need_train: whether to return training images. If not, a training split that exists still names the classes.
        token: for a private or gated dataset; None takes the stored one, or HF_TOKEN.

    Raises:
        DataError: if the data cannot be found or used.
    """
    on_hub = args.dataset_name not in (None, "digits") and not Path(str(args.dataset_name)).exists()
    if on_hub:
        args = replace(args, dataset_revision=pin_dataset(str(args.dataset_name), args.dataset_revision, token))
    splits = _find_splits(args, token)
    validation_name = _choose_validation_split(args, splits)
    wanted = {"validation_split": validation_name}
    if need_train or validation_name is None:
        wanted["train_split"] = args.train_split
    for option, name in wanted.items():
        if name is not None and name not in splits:
            raise DataError(f"There is no split '{name}', only {_join(splits)}. Pass one of them as --{option}.")

    train = ImageDataset(splits[args.train_split](None)) if args.train_split in splits else None
    if validation_name is not None:
        validation = ImageDataset(splits[validation_name](train.source.class_names if train is not None else None))
        split = validation_name
    else:
        assert train is not None
        assert args.train_val_split is not None
        kept, held_out = _stratified_split(train.labels, args.train_val_split, seed)
        train, validation = train.subset(kept), train.subset(held_out)
        split = f"{args.train_val_split:g} of '{args.train_split}', stratified, seed {seed}"

    validation, skipped = _select(validation, args.max_eval_samples, seed, args.skip_bad_images)
    if not need_train:
        train = None
    if train is not None:
        train, skipped_in_train = _select(train, args.max_train_samples, seed, args.skip_bad_images)
        skipped += skipped_in_train
    if args.cache_images:
        train, validation = None if train is None else train.decoded(), validation.decoded()
    place = args.dataset_name or args.train_dir or args.validation_dir or ""
    path = Path(place).resolve()
    if path.name in ("train", *VALIDATION_SPLITS):
        path = path.parent  # `flowers/train` is about flowers
    return ImageData(
        train=train,
        validation=validation,
        class_names=validation.source.class_names,
        name=place if on_hub else path.name,
        dataset_id=place if on_hub else None,
        config=args.dataset_config_name,
        revision=args.dataset_revision if on_hub else None,
        split=split,
        held_out=validation_name is None,
        skipped=skipped,
    )


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which always means the same."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def pin_dataset(dataset: str, revision: str | None, token: str | None = None) -> str | None:
    """Return the commit that a dataset of the Hub is at, so that what was measured on can be found again.

    Args:
        dataset: id on the Hub.
        revision: branch, tag or commit; None is the default branch.
        token: see `load_image_data`.

    Returns:
        The commit; the revision as it is, with a warning, where the Hub does not say.
    """
    if is_commit(revision):
        return revision
    try:
        return HfApi(token=token).dataset_info(dataset, revision=revision, timeout=30).sha or revision
    except Exception as error:  # `load_dataset` comes next, and says what is wrong if anything is
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        logger.warning("The commit of dataset '%s' is not known (%s); it is not pinned.", dataset, reason)
        return revision


def _find_splits(args: DataArguments, token: str | None) -> dict[str, Callable[[list[str] | None], ImageSource]]:
    """Map each split to a function that opens it, given the classes of the training split where they are known."""
    if args.dataset_name is None:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        return {name: partial(_FolderSource, folder) for name, folder in folders.items() if folder}
    if args.dataset_name == "digits":
        return {name: partial(_DigitsSource, name) for name in ("train", "validation")}
    return {name: partial(_TableSource, args, table, name) for name, table in _load_tables(args, token).items()}


def _load_tables(args: DataArguments, token: str | None) -> dict[str, "datasets.Dataset"]:
    try:
        import datasets  # here, because folders and digits work without it
    except ImportError as error:
        raise ImportError("--dataset_name needs the datasets library: pip install datasets") from error
    name = str(args.dataset_name)
    try:
        if any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, args.dataset_config_name, revision=args.dataset_revision, token=token)
    # IndexError: what the library raises on an empty split that it saved itself.
    except (OSError, ValueError, RuntimeError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Cannot load the dataset '{name}': {type(error).__name__}: {error} Expected a dataset on the Hub, a "
            "local folder or 'digits'; check this name, its configuration "
            f"({args.dataset_config_name or 'default'}) and its revision ({args.dataset_revision or 'newest'})."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or args.train_split): loaded}
    return {str(split): table for split, table in loaded.items()}


def _choose_validation_split(args: DataArguments, splits: Iterable[str]) -> str | None:
    """Return the split to evaluate on, or None where images of the training split are to be held out."""
    found = [name for name in VALIDATION_SPLITS if name in splits and name != args.train_split]
    chosen = args.validation_split or (found[0] if found else None)
    if chosen is None and args.train_val_split is None:
        raise DataError(
            f"Found no split to evaluate on among {_join(splits)}; expected one of {_join(VALIDATION_SPLITS)}. Pass "
            "--validation_split (for folders --validation_dir), or --train_val_split to hold images out."
        )
    if chosen is not None and args.train_val_split is not None:
        logger.warning("--train_val_split is not used: there is a split '%s' to evaluate on.", chosen)
    return chosen


def _check_same_classes(train: list[str] | None, validation: list[str]) -> None:
    if train is not None and train != validation:
        raise DataError(
            "The training and validation images have different classes; expected the same in the same order. Only in "
            f"training: {_join(sorted(set(train) - set(validation)))}; only in validation: "
            f"{_join(sorted(set(validation) - set(train)))}. Rename, add or remove classes until they agree."
        )


def _stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted positions that are kept, and those of the fraction that is held out."""
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    try:
        kept, held_out = train_test_split(positions, test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise DataError(
            f"Cannot hold out {fraction:g} of {len(labels)} images with each class on both sides: {error} "
            "Change --train_val_split, add images, or pass a validation split."
        ) from error
    return np.sort(kept), np.sort(held_out)


def _select(
    dataset: ImageDataset, max_samples: int | None, seed: int, skip_bad_images: bool
) -> tuple[ImageDataset, int]:
    """Draw a subset, then drop the images in it that cannot be decoded; return it and how many were dropped."""
    if max_samples is not None:
        dataset = dataset.sample(max_samples, seed)
    if not skip_bad_images:
        return dataset, 0

    def is_readable(position: int) -> bool:
        try:
            dataset.open(position)
        except BadImageError:
            return False
        return True

    readable = np.array(_decode_all(dataset, is_readable, "Checking images"), dtype=bool)
    bad = np.flatnonzero(~readable)
    if len(bad) == len(dataset):
        raise DataError(f"None of {len(bad)} images can be decoded, one is {dataset.source.describe(0)}. Check them.")
    if len(bad):
        names = [dataset.source.describe(int(index)) for index in dataset.indices[bad[:10]]]
        logger.warning("Left out %d images that cannot be decoded, the first are: %s", len(bad), "; ".join(names))
    return dataset.subset(np.flatnonzero(readable)), len(bad)


def _decode_all(dataset: ImageDataset, function: Callable[[int], Any], title: str) -> list[Any]:
    """Call a function that decodes with each position; threads suffice: Pillow gives up the interpreter's lock."""
    with ThreadPool(os.cpu_count()) as pool:
        answers = pool.imap(function, range(len(dataset)), chunksize=16)
        return list(tqdm(answers, total=len(dataset), desc=title))


def _join(names: Iterable[str]) -> str:
    """Join names for a message, ten at most."""
    names = list(names)
    return (", ".join(names[:10]) or "none") + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def resolve_data_config(pretrained_cfg: dict[str, Any], args: DataArguments) -> dict[str, Any]:
    """Return how images are prepared for evaluation: as the model expects, with the arguments on top.

    Args:
        pretrained_cfg: the `pretrained_cfg` of a timm model.
        args: `img_size`, `crop_pct` and `interpolation` replace the model's where given.

    Returns:
        input_size (channels, height, width), interpolation, mean, std, crop_pct and crop_mode.
    """
    overrides = {
        "input_size": None if args.img_size is None else (3, args.img_size, args.img_size),
        "crop_pct": args.crop_pct,
        "interpolation": None if args.interpolation == "random" else args.interpolation,
    }
    return timm.data.resolve_data_config(overrides, pretrained_cfg=pretrained_cfg)


def build_transforms(
    data_config: dict[str, Any], args: DataArguments, *, normalize: bool = True
) -> tuple[Transform, Transform]:
    """Return the training and the evaluation transform, from an RGB image to float32 [3, height, width].

    Args:
        data_config: from `resolve_data_config`.
        args: the augmentation of training images; what is not given is as in timm.
        normalize: False stops before the last step, at uint8, and leaves that to `normalize_pixels` on the device.

    Raises:
        DataError: if timm does not know the `auto_augment` policy.
    """
    evaluation = timm.data.create_transform(**data_config, normalize=normalize)
    if args.no_aug:
        return evaluation, evaluation
    augmentation = {
        "interpolation": args.interpolation,
        "scale": args.train_scale,
        "hflip": args.hflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.auto_augment,
    }
    given = {name: value for name, value in augmentation.items() if value is not None}
    try:
        training = timm.data.create_transform(**{**data_config, **given}, is_training=True, normalize=normalize)
    except AssertionError as error:  # timm's way to reject a policy
        raise DataError(f"Got --auto_augment {args.auto_augment}; expected a policy of timm. {error}") from error
    return training, evaluation


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack examples to "pixel_values", [images, 3, height, width], and "labels", int64 [images]."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.int64),
    }


def loading_speed(
    dataset: ImageDataset, *, batch_size: int, num_workers: int, seed: int = 0, min_images: int = 256
) -> float:
    """Measure how many images a second are read, prepared and collated where no model is waited for.

    Each worker delivers a batch before the clock starts, so that neither its start nor what it has prepared in advance
    counts. Then the same number of batches from each is timed.

    Args:
        dataset: with a transform.
        batch_size: as in training; at most 64, because more images take longer and say the same.
        num_workers: as in training.
        seed: draws the images.
        min_images: how many to time at least.
    """
    batch_size = min(batch_size, 64)
    in_a_round = max(1, num_workers) * batch_size
    count = in_a_round * (1 + -(-min_images // in_a_round))
    indices = np.resize(np.random.default_rng(seed).permutation(len(dataset)), count)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, indices.tolist()),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
    )
    batches = iter(loader)
    for _ in range(max(1, num_workers)):
        next(batches)
    start = time.perf_counter()
    timed = sum(len(batch["labels"]) for batch in batches)
    return timed / (time.perf_counter() - start)
