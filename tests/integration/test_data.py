"""Data loading of the training script: every kind of source, every mistake in the data, splits and transforms."""

import copy
import logging
import os
import pickle
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_oscqat.integration import data

PRETRAINED_CFG = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "crop_pct": 0.75,
    "crop_mode": "center",
}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def gray(value):
    return Image.new("RGB", (12, 10), (value, value, value))


def write_folder(root, classes=("cat", "dog"), per_class=4, suffix=".png"):
    """Write gray images, each with a value of its own, into one folder per class."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            gray(40 * label + i).save(root / name / f"{i}{suffix}")
    return str(root)


def make_table(labels, label_feature=None, images=None, image_feature=None):
    label_feature = label_feature or datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": image_feature or datasets.Image(), "label": label_feature})
    images = [gray(i) for i in range(len(labels))] if images is None else images
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def save(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return str(path)


def load(seed=0, need_train=True, **args):
    return data.load_image_data(data.DataArguments(**args), seed, need_train)


def values(dataset):
    """Return the gray value of every image, by which images are told apart."""
    return [dataset.open(i).getpixel((0, 0))[0] for i in range(len(dataset))]


# ---------------------------------------------------------------------------------------------------------- sources


def test_folders(tmp_path):
    train_dir = write_folder(tmp_path / "pets" / "train")
    validation_dir = write_folder(tmp_path / "pets" / "val", per_class=2, suffix=".jpg")
    images = load(train_dir=train_dir, validation_dir=validation_dir)
    assert images.class_names == ["cat", "dog"]
    assert images.train.labels.tolist() == [0] * 4 + [1] * 4
    assert images.train.labels.dtype == np.int64
    assert values(images.train) == [0, 1, 2, 3, 40, 41, 42, 43]
    assert images.validation.labels.tolist() == [0, 0, 1, 1]
    assert images.train.source.describe(5) == str(Path(train_dir, "dog", "1.png"))
    assert (images.name, images.dataset_id, images.split) == ("pets", None, "validation")
    assert (images.num_images, images.skipped) == (4, 0)


def test_validation_folder_alone(tmp_path):
    images = load(validation_dir=write_folder(tmp_path / "pets"), need_train=False)
    assert images.train is None
    assert images.num_images == 8
    assert (images.name, images.class_names) == ("pets", ["cat", "dog"])


def test_train_val_split_is_stratified_disjoint_and_seeded(tmp_path):
    folder = write_folder(tmp_path / "pets", per_class=10)
    images = load(train_dir=folder, train_val_split=0.3)
    train, validation = values(images.train), values(images.validation)
    assert sorted(train + validation) == [*range(10), *range(40, 50)]
    assert np.bincount(images.train.labels).tolist() == [7, 7]
    assert np.bincount(images.validation.labels).tolist() == [3, 3]
    assert images.split == "0.3 of 'train', stratified, seed 0"
    assert values(load(train_dir=folder, train_val_split=0.3).validation) == validation
    assert images.held_out
    assert not load(train_dir=folder, validation_dir=folder, train_val_split=0.3).held_out
    assert values(load(train_dir=folder, train_val_split=0.3, seed=1).validation) != validation
    alone = load(train_dir=folder, train_val_split=0.3, need_train=False)
    assert alone.train is None
    assert values(alone.validation) == validation


def test_digits():
    images = load(dataset_name="digits")
    assert (len(images.train), images.num_images) == (1437, 360)
    assert images.class_names == [str(digit) for digit in range(10)]
    assert set(np.bincount(images.validation.labels)) <= {35, 36, 37}
    assert (images.name, images.dataset_id, images.split) == ("digits", None, "validation")
    image = images.train.open(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert images.train.source.pixels.max() == 255
    assert images.validation.source.describe(3) == "digit 3 of split 'validation'"


def test_digits_split_covers_the_dataset_once_and_ignores_the_seed():
    from sklearn.datasets import load_digits

    first, second = load(dataset_name="digits", seed=0), load(dataset_name="digits", seed=1)
    pixels = [split.source.pixels.reshape(-1, 64) for split in (first.train, first.validation)]
    expected = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, np.concatenate(pixels))) == sorted(map(bytes, expected))
    assert np.array_equal(first.validation.source.pixels, second.validation.source.pixels)


def test_saved_dataset_dict(tmp_path):
    path = save(tmp_path / "pets", train=make_table([0, 1, 1]), val=make_table([1, 0]), test=make_table([1]))
    images = load(dataset_name=path)
    assert images.train.labels.tolist() == [0, 1, 1]
    assert images.validation.labels.tolist() == [1, 0]
    assert values(images.train) == [0, 1, 2]
    assert (images.split, images.name, images.class_names) == ("val", "pets", ["cat", "dog"])
    assert load(dataset_name=path, validation_split="test").split == "test"
    assert load(dataset_name=path, train_split="val", validation_split="train").train.labels.tolist() == [1, 0]
    # A split that is trained on is not taken for evaluation by default.
    assert load(dataset_name=path, train_split="val").split == "test"


def test_saved_single_dataset(tmp_path):
    make_table([0, 1] * 5).save_to_disk(tmp_path / "pets")
    images = load(dataset_name=str(tmp_path / "pets"), train_val_split=0.2)
    assert (len(images.train), images.num_images) == (8, 2)


def test_local_folder_read_by_datasets(tmp_path):
    write_folder(tmp_path / "pets" / "train")
    write_folder(tmp_path / "pets" / "test", per_class=1)
    images = load(dataset_name=str(tmp_path / "pets"))
    assert images.class_names == ["cat", "dog"]
    assert sorted(values(images.train)) == [0, 1, 2, 3, 40, 41, 42, 43]
    assert (images.split, images.num_images, images.dataset_id) == ("test", 2, None)
    assert images.train.source.describe(0).startswith("row 0 of split 'train' (")
    assert images.train.source.describe(0).endswith(".png)")


def test_hub_arguments_reach_datasets_and_the_result(monkeypatch):
    def load_dataset(name, config, revision, token):
        assert (name, config, revision, token) == ("owner/pets", "small", "v2", None)
        return datasets.DatasetDict(train=make_table([0, 1]), validation=make_table([1, 0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = load(dataset_name="owner/pets", dataset_config_name="small", dataset_revision="v2")
    assert (images.name, images.dataset_id) == ("owner/pets", "owner/pets")
    assert (images.config, images.revision, images.split) == ("small", "v2", "validation")


@pytest.mark.parametrize("kind", ["bytes", "path"])
def test_images_as_bytes_or_paths(tmp_path, kind):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        gray(i).save(path)
    images = [path.read_bytes() if kind == "bytes" else str(path) for path in paths]
    table = make_table([0, 1], images=images, image_feature=datasets.Value("binary" if kind == "bytes" else "string"))
    assert values(load(dataset_name=save(tmp_path / "pets", train=table, test=table)).train) == [0, 1]


def test_other_column_names(tmp_path):
    table = make_table([0, 1]).rename_columns({"image": "img", "label": "animal"})
    path = save(tmp_path / "pets", train=table, test=table)
    images = load(dataset_name=path, image_column_name="img", label_column_name="animal")
    assert images.train.labels.tolist() == [0, 1]


def test_string_labels_are_numbered_by_the_training_split(tmp_path):
    train = make_table(["dog", "ant", "cat"], datasets.Value("string"))
    path = save(tmp_path / "pets", train=train, test=make_table(["dog", "cat"], datasets.Value("string")))
    images = load(dataset_name=path)
    assert images.class_names == ["ant", "cat", "dog"]
    assert images.train.labels.tolist() == [2, 0, 1]
    assert images.validation.labels.tolist() == [2, 1]
    assert load(dataset_name=path, need_train=False).validation.labels.tolist() == [2, 1]


def test_integer_labels_are_counted_in_the_training_split(tmp_path):
    train = make_table([0, 3, 1], datasets.Value("uint8"))
    path = save(tmp_path / "pets", train=train, test=make_table([1, 0], datasets.Value("int32")))
    images = load(dataset_name=path)
    assert images.class_names == ["0", "1", "2", "3"]
    assert images.validation.labels.tolist() == [1, 0]
    assert images.validation.labels.dtype == np.int64


def test_datasets_is_not_imported_for_other_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    load(dataset_name="digits")
    load(train_dir=write_folder(tmp_path / "pets"), train_val_split=0.5)
    with pytest.raises(ImportError, match="pip install datasets"):
        load(dataset_name="owner/pets")


# -------------------------------------------------------------------------------------------------- data that is wrong


@pytest.mark.parametrize("folders", [{}, {"train_dir": "pets"}, {"validation_dir": "pets"}])
def test_there_must_be_one_source(folders):
    args = {**folders, "dataset_name": "digits"} if folders else {}
    with pytest.raises(data.DataError, match="expected one source of images") as error:
        data.DataArguments(**args)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_val_split", 0.0),
        ("train_val_split", 1.0),
        ("max_train_samples", 0),
        ("max_eval_samples", -1),
        ("img_size", 0),
        ("crop_pct", 0.0),
        ("crop_pct", 1.5),
        ("interpolation", "cubic"),
        ("train_scale", [0.5]),
        ("train_scale", [0.9, 0.1]),
        ("hflip", 2.0),
        ("color_jitter", -0.1),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(data.DataError, match=f"Got --{name} .*; expected "):
        data.DataArguments(dataset_name="digits", **{name: value})


def test_unknown_dataset_path(tmp_path):
    with pytest.raises(data.DataError, match=r"Cannot load the dataset '.*nowhere'.*check this name"):
        load(dataset_name=str(tmp_path / "nowhere"))


def test_unreachable_hub(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/pets' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(data.DataError, match="ConnectionError: Couldn't reach 'owner/pets'"):
        load(dataset_name="owner/pets")


def test_missing_splits(tmp_path):
    path = save(tmp_path / "pets", fit=make_table([0, 1]), test=make_table([0, 1]))
    with pytest.raises(data.DataError, match=r"no split 'train', only fit, test. Pass one of them as --train_split"):
        load(dataset_name=path)
    with pytest.raises(data.DataError, match=r"no split 'dev', only fit, test. Pass one of .*--validation_split"):
        load(dataset_name=path, validation_split="dev", need_train=False)
    assert load(dataset_name=path, need_train=False).num_images == 2


def test_no_split_to_evaluate_on(tmp_path):
    with pytest.raises(data.DataError, match=r"among train; expected one of validation, val, test.*--train_val_split"):
        load(dataset_name=save(tmp_path / "saved", train=make_table([0, 1])))
    with pytest.raises(data.DataError, match="for folders --validation_dir"):
        load(train_dir=write_folder(tmp_path / "pets"))


def test_training_needs_a_training_folder(tmp_path):
    with pytest.raises(data.DataError, match="no split 'train', only validation"):
        load(validation_dir=write_folder(tmp_path / "pets"))


@pytest.mark.parametrize("column", ["image", "label"])
def test_missing_column(tmp_path, column):
    table = make_table([0, 1]).rename_column(column, "other")
    path = save(tmp_path / "pets", train=table, test=table)
    with pytest.raises(data.DataError, match=f"no column '{column}', only .*other.*--{column}_column_name"):
        load(dataset_name=path)


def test_image_column_of_another_type(tmp_path):
    table = make_table([0, 1], images=[3, 4], image_feature=datasets.Value("int64"))
    with pytest.raises(data.DataError, match=r"Column 'image' of split 'train' has type .*expected images"):
        load(dataset_name=save(tmp_path / "pets", train=table, test=table))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0.0, 1.0], datasets.Value("float32")),
        ([True, False], datasets.Value("bool")),
        ([[0], [1]], datasets.List(datasets.Value("int64"))),
        ([[0], [1]], datasets.List(datasets.ClassLabel(names=["cat", "dog"]))),
    ],
)
def test_label_column_of_another_type(tmp_path, labels, feature):
    table = make_table(labels, feature)
    with pytest.raises(data.DataError, match="expected class labels, integers or strings"):
        load(dataset_name=save(tmp_path / "pets", train=table, test=table))


@pytest.mark.parametrize(
    ("train", "test", "feature", "message"),
    [
        ([0, 1], [0, -1, -1], datasets.ClassLabel(names=["cat", "dog"]), "2 of 3 .*'test'.* 2 classes .*-1 in row 1"),
        ([0, 1], [0, None], datasets.ClassLabel(names=["cat", "dog"]), r"1 of 2 .*\(cat, dog\).*None in row 1"),
        ([0, -5], [0], datasets.Value("int64"), "1 of 2 .*'train'.*-5 in row 1"),
        ([-1, -1], [0], datasets.Value("int64"), "2 of 2 .*'train'.* 0 classes .*-1 in row 0"),
        ([0, 1], [0, 2, 2], datasets.Value("int64"), "2 of 3 .*'test'.*2 in row 1"),
        (["cat", "dog"], ["bird", "cat"], datasets.Value("string"), "1 of 2 .*'test'.*'bird' in row 0"),
        (["cat", None], ["cat"], datasets.Value("string"), "1 of 2 .*'train'.*None in row 1"),
    ],
)
def test_labels_outside_the_classes(tmp_path, train, test, feature, message):
    path = save(tmp_path / "pets", train=make_table(train, feature), test=make_table(test, feature))
    with pytest.raises(data.DataError, match=message):
        load(dataset_name=path)


def test_label_beyond_the_declared_classes(tmp_path):
    # The library checks labels when it encodes them, not when stored integers are declared to be class labels.
    table = make_table([0, 7], datasets.Value("int64"))
    table.info.features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    path = save(tmp_path / "pets", train=table, test=table)
    with pytest.raises(data.DataError, match=r"1 of 2 labels .* outside its 2 classes .*7 in row 1"):
        load(dataset_name=path)


def test_empty_split(tmp_path, monkeypatch):
    splits = datasets.DatasetDict(train=make_table([0, 1]), test=make_table([0]).select([]))
    path = save(tmp_path / "pets", **splits)
    with pytest.raises(data.DataError, match="Cannot load the dataset"):
        load(dataset_name=path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    with pytest.raises(data.DataError, match="Split 'test' is empty; expected at least one image"):
        load(dataset_name="owner/pets")


def test_different_classes_of_saved_splits(tmp_path):
    swapped = make_table([0, 1], datasets.ClassLabel(names=["dog", "cat"]))
    splits = {"train": make_table([0, 1]), "test": swapped}
    for name, split in splits.items():
        split.save_to_disk(tmp_path / "pets" / name)
    (tmp_path / "pets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(data.DataError, match="expected the same in the same order"):
        load(dataset_name=str(tmp_path / "pets"))


def test_different_classes_of_folders(tmp_path):
    train_dir = write_folder(tmp_path / "train", ("ant", "cat", "dog"))
    validation_dir = write_folder(tmp_path / "val", ("bird", "cat", "dog"))
    with pytest.raises(data.DataError, match="Only in training: ant; only in validation: bird"):
        load(train_dir=train_dir, validation_dir=validation_dir)


def test_folders_that_cannot_be_listed(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "eel").mkdir()
    (tmp_path / "none").mkdir()
    with pytest.raises(data.DataError, match=r"no valid file for the classes eel.*remove class folders"):
        load(train_dir=folder, train_val_split=0.5)
    with pytest.raises(data.DataError, match="Couldn't find any class folder"):
        load(train_dir=str(tmp_path / "none"), train_val_split=0.5)
    for wrong in (tmp_path / "nowhere", tmp_path / "pets" / "cat" / "0.png"):
        with pytest.raises(data.DataError, match="Expected one folder per class"):
            load(train_dir=str(wrong), train_val_split=0.5)


def test_too_few_images_to_hold_out(tmp_path):
    with pytest.raises(data.DataError, match=r"Cannot hold out 0.5 of 2 images.*--train_val_split"):
        load(train_dir=write_folder(tmp_path / "pets", per_class=1), train_val_split=0.5)


def test_unused_train_val_split_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        images = load(dataset_name="digits", train_val_split=0.5)
    assert images.num_images == 360
    assert "--train_val_split is not used: there is a split 'validation'" in caplog.text


# ------------------------------------------------------------------------------------------------ subsets, bad images


def test_class_folders_have_names_in_utf_8(tmp_path):
    for name in (b"ant", b"b\xe9e"):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        Image.new("RGB", (4, 4)).save(os.fsdecode(folder + b"/a.png"))
    with pytest.raises(data.DataError, match=r"class folder 'b.*e' in .*, whose name is not in UTF-8 .* Rename it"):
        load(train_dir=str(tmp_path), train_val_split=0.5)


def test_max_samples_draws_a_seeded_subset():
    full = load(dataset_name="digits")
    images = load(dataset_name="digits", max_train_samples=50, max_eval_samples=20)
    assert (len(images.train), images.num_images) == (50, 20)
    assert len(set(images.train.indices)) == 50
    assert len(set(images.train.labels)) == 10
    assert np.array_equal(images.train.labels, full.train.labels[images.train.indices])
    again = load(dataset_name="digits", max_train_samples=50, max_eval_samples=20)
    assert np.array_equal(again.train.indices, images.train.indices)
    assert np.array_equal(again.validation.indices, images.validation.indices)
    other = load(dataset_name="digits", max_train_samples=50, seed=1)
    assert not np.array_equal(other.train.indices, images.train.indices)
    assert len(load(dataset_name="digits", max_train_samples=10_000).train) == 1437


def spoil(folder):
    """Add a truncated JPEG and a text file to the images of a folder."""
    truncated, text = Path(folder, "cat", "cut.jpg"), Path(folder, "dog", "notes.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:1000])
    text.write_text("not an image")
    return truncated, text


def test_bad_image_is_named(tmp_path):
    folder = write_folder(tmp_path / "pets")
    bad = spoil(folder)
    images = load(validation_dir=folder, need_train=False)
    images.validation.transform = np.asarray
    names = [images.validation.source.describe(i) for i in range(images.num_images)]
    for path, cause in zip(bad, ("truncated", "cannot identify"), strict=True):
        with pytest.raises(data.BadImageError, match=f"{path.name}: .*{cause}.*--skip_bad_images"):
            images.validation[names.index(str(path))]


def test_bad_image_error_survives_the_way_back_from_a_worker():
    # A data loader makes the worker's error again from its type and one string.
    assert str(data.BadImageError("cut.jpg")) == "cut.jpg"
    assert str(pickle.loads(pickle.dumps(data.BadImageError("cut.jpg")))) == "cut.jpg"


def test_skip_bad_images_in_folders(tmp_path, caplog):
    train_dir, validation_dir = write_folder(tmp_path / "train"), write_folder(tmp_path / "val")
    bad = spoil(train_dir)
    with caplog.at_level(logging.WARNING):
        images = load(train_dir=train_dir, validation_dir=validation_dir, skip_bad_images=True)
    assert (images.skipped, len(images.train), images.num_images) == (2, 8, 8)
    assert images.train.labels.tolist() == [0] * 4 + [1] * 4
    assert values(images.train) == [0, 1, 2, 3, 40, 41, 42, 43]
    assert "Left out 2 images" in caplog.text
    assert all(str(path) in caplog.text for path in bad)


def test_skip_bad_images_in_rows(tmp_path, caplog):
    good = tmp_path / "good.png"
    gray(9).save(good)
    rows = [{"bytes": good.read_bytes(), "path": "good.png"}, {"bytes": b"rubbish", "path": "bad.png"}, None]
    table = make_table([0, 1, 1], images=rows)
    path = save(tmp_path / "pets", train=make_table([0, 1]), test=table)
    bad = load(dataset_name=path).validation
    with pytest.raises(data.BadImageError, match=r"row 1 of split 'test' \(bad\.png\)"):
        bad.open(1)
    with pytest.raises(data.BadImageError, match=r"row 2 of split 'test': .*the row holds no image"):
        bad.open(2)
    with caplog.at_level(logging.WARNING):
        images = load(dataset_name=path, skip_bad_images=True, need_train=False)
    assert (images.skipped, images.num_images, values(images.validation)) == (2, 1, [9])
    assert "row 1 of split 'test' (bad.png); row 2 of split 'test'" in caplog.text


def test_only_bad_images(tmp_path):
    folder = write_folder(tmp_path / "pets", per_class=1)
    for path in Path(folder).rglob("*.png"):
        path.write_text("not an image")
    with pytest.raises(data.DataError, match="None of 2 images can be decoded"):
        load(validation_dir=folder, need_train=False, skip_bad_images=True)


# --------------------------------------------------------------------------------------------------------- transforms


def transforms(**args):
    arguments = data.DataArguments(dataset_name="digits", **args)
    return data.build_transforms(data.resolve_data_config(PRETRAINED_CFG, arguments), arguments)


def test_data_config_is_the_models_with_overrides():
    def resolve(**args):
        return data.resolve_data_config(PRETRAINED_CFG, data.DataArguments(dataset_name="digits", **args))

    assert resolve() == PRETRAINED_CFG
    assert resolve(img_size=32) == {**PRETRAINED_CFG, "input_size": (3, 32, 32)}
    assert resolve(crop_pct=1.0, interpolation="nearest") == {
        **PRETRAINED_CFG,
        "crop_pct": 1.0,
        "interpolation": "nearest",
    }
    assert resolve(interpolation="random") == PRETRAINED_CFG
    assert data.resolve_data_config({}, data.DataArguments(dataset_name="digits"))["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"img_size": 16},
        {"no_aug": True},
        {"interpolation": "random"},
        {"train_scale": [0.8, 1.0], "hflip": 0.0, "color_jitter": 0.0},
        {"auto_augment": "rand-m9-mstd0.5"},
    ],
)
def test_transforms_give_normalized_tensors(args):
    size = args.get("img_size", 24)
    for transform in transforms(**args):
        for image in (gray(255), Image.new("RGB", (40, 90), (255, 255, 255))):
            pixels = transform(image)
            assert pixels.shape == (3, size, size)
            assert pixels.dtype == torch.float32
    assert pixels.max() == pytest.approx(2.0)  # (1 - 0.5) / 0.25


def test_augmentation_arguments_reach_the_training_transform_only():
    training, evaluation = transforms(train_scale=[0.5, 0.6], hflip=0.0, color_jitter=0.0, interpolation="random")
    assert (training.transforms[0].scale, len(training.transforms[0].interpolation)) == ((0.5, 0.6), 2)
    assert "Flip" not in str(training)
    assert str(evaluation) == str(transforms()[1])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    same, evaluation = transforms(no_aug=True)
    assert torch.equal(same(image), evaluation(image))


def test_unknown_auto_augment_policy():
    with pytest.raises(data.DataError, match="Got --auto_augment rnad-m9; expected a policy of timm"):
        transforms(auto_augment="rnad-m9")


def test_items_and_batches():
    images = load(dataset_name="digits", max_train_samples=6)
    with pytest.raises(RuntimeError, match="set `transform`"):
        images.train[0]
    images.train.transform, _ = transforms()
    item = images.train[-1]
    assert item["labels"] == images.train.labels[-1]
    assert type(item["labels"]) is int
    with pytest.raises(IndexError):
        images.train[6]
    batch = data.collate([images.train[i] for i in range(6)])
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((6, 3, 24, 24), torch.float32)
    assert (batch["labels"].tolist(), batch["labels"].dtype) == (images.train.labels.tolist(), torch.int64)


@pytest.mark.parametrize("kind", ["digits", "folder", "saved"])
def test_datasets_can_be_pickled(tmp_path, kind):
    if kind == "digits":
        images = load(dataset_name="digits", max_eval_samples=5)
    elif kind == "folder":
        images = load(validation_dir=write_folder(tmp_path / "pets"), need_train=False)
    else:
        images = load(dataset_name=save(tmp_path / "pets", test=make_table([0, 1])), need_train=False)
    images.validation.transform = transforms(auto_augment="rand-m9-mstd0.5")[0]
    restored = pickle.loads(pickle.dumps(images.validation))
    assert values(restored) == values(images.validation)
    assert restored[0]["pixel_values"].shape == (3, 24, 24)
    assert np.array_equal(copy.deepcopy(images.validation).labels, images.validation.labels)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # CPython 3.12 and later
class TestRandomness:
    """With a seed, augmentation depends on seed, epoch and image alone."""

    @pytest.fixture
    def dataset(self):
        train = load(dataset_name="digits", max_train_samples=12).train
        config = {"input_size": (3, 24, 24), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
        train.transform, _ = data.build_transforms(
            {**config, "crop_pct": 1.0, "crop_mode": "center"},
            data.DataArguments(dataset_name="digits", hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5"),
        )
        train.seed = 3
        return train

    @staticmethod
    def pixels(dataset, indices=range(12)):
        return torch.stack([dataset[i]["pixel_values"] for i in indices])

    def test_order_and_what_came_before_do_not_matter(self, dataset):
        expected = self.pixels(dataset)
        torch.manual_seed(99)
        random.seed(99)
        assert torch.equal(self.pixels(dataset, range(11, -1, -1)).flip(0), expected)
        dataset.seed = 4
        assert not torch.equal(self.pixels(dataset), expected)

    def test_epochs_differ_and_come_again(self, dataset):
        first = self.pixels(dataset)
        dataset.set_epoch(1)
        assert dataset.epoch == 1
        second = self.pixels(dataset)
        dataset.set_epoch(0)
        assert not torch.equal(first, second)
        assert torch.equal(self.pixels(dataset), first)

    def test_view_of_an_epoch_does_not_touch_the_dataset(self, dataset):
        dataset.set_epoch(2)
        expected = self.pixels(dataset)
        view = dataset.at_epoch(0)
        assert (view.epoch, dataset.epoch) == (0, 2)
        assert not torch.equal(self.pixels(view), expected)
        dataset.set_epoch(0)
        assert torch.equal(self.pixels(view), self.pixels(dataset))

    def test_generators_are_left_as_they_were(self, dataset):
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        self.pixels(dataset)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])

    @pytest.mark.parametrize("workers", [1, 2])
    def test_any_number_of_workers_also_persistent_ones(self, dataset, workers):
        loader = DataLoader(
            dataset, batch_size=4, num_workers=workers, persistent_workers=True, collate_fn=data.collate
        )
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            assert torch.equal(torch.cat([b["pixel_values"] for b in loader]), self.pixels(dataset))

    def test_without_a_seed_it_draws_as_it_goes(self, dataset):
        dataset.seed = None
        assert not torch.equal(self.pixels(dataset), self.pixels(dataset))


def test_workers(tmp_path):
    # Forked, which is quick; spawned workers need no more than what the test of pickling shows.
    images = load(dataset_name=save(tmp_path / "pets", test=make_table([0, 1, 0, 1])), need_train=False)
    _, images.validation.transform = transforms()
    loader = DataLoader(
        images.validation, batch_size=2, num_workers=1, multiprocessing_context="fork", collate_fn=data.collate
    )
    expected = data.collate([images.validation[i] for i in range(4)])
    batches = list(loader)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected["pixel_values"])
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 0, 1]


def test_arguments_parse_from_the_command_line():
    line = "--dataset_name digits --train_scale 0.5 1.0 --no_aug --img_size 32 --train_val_split 0.1"
    (args,) = HfArgumentParser(data.DataArguments).parse_args_into_dataclasses(line.split())
    assert args == data.DataArguments(
        dataset_name="digits", train_scale=[0.5, 1.0], no_aug=True, img_size=32, train_val_split=0.1
    )


# -------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_cached_images_are_decoded_once_and_are_the_same(tmp_path, kind, monkeypatch):
    place = {"validation_dir": write_folder(tmp_path / "pets")}
    if kind == "saved":
        place = {"dataset_name": save(tmp_path / "saved", train=make_table([0, 1]), test=make_table([0, 1, 1, 0]))}
    plain = load(**place, need_train=kind == "saved")
    decoded = []
    original = data._decode
    monkeypatch.setattr(data, "_decode", lambda file: decoded.append(1) or original(file))
    cached = load(**place, need_train=kind == "saved", cache_images=True)
    for before, after in ((plain.validation, cached.validation), (plain.train, cached.train)):
        if before is not None:
            assert values(after) == values(before) == values(after)
            assert np.array_equal(after.labels, before.labels)
    assert len(decoded) == len(cached.validation) + len(cached.train or ()) + len(plain.validation) + len(
        plain.train or ()
    )
    assert cached.validation.source.describe(0) == plain.validation.source.describe(0)
    assert cached.class_names == plain.class_names


def test_cached_subset_holds_its_own_images_only(tmp_path):
    cached = load(
        validation_dir=write_folder(tmp_path / "pets"), need_train=False, cache_images=True, max_eval_samples=3
    )
    assert len(cached.validation.source.images) == len(cached.validation) == 3


def test_image_that_cannot_be_cached_is_named(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(data.BadImageError, match=r"Cannot decode .*cat.0\.png"):
        load(validation_dir=folder, need_train=False, cache_images=True)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # CPython 3.12 and later
@pytest.mark.parametrize(("workers", "batch_size", "timed"), [(0, 5, 10), (1, 8, 8), (2, 3, 12)])
def test_speed_is_that_of_whole_rounds_of_batches_after_a_first_one(monkeypatch, workers, batch_size, timed):
    images = load(dataset_name="digits", max_train_samples=11).train  # fewer than it takes: they come again
    images.transform, _ = transforms()
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))
    speed = data.loading_speed(images, batch_size=batch_size, num_workers=workers, min_images=8)
    assert speed == timed / 4


def test_speed_leaves_torchs_generator_as_it_was():
    images = load(dataset_name="digits", max_train_samples=11).train
    _, images.transform = transforms()
    state = torch.get_rng_state()
    assert data.loading_speed(images, batch_size=4, num_workers=0, min_images=4) > 0
    assert torch.equal(torch.get_rng_state(), state)
