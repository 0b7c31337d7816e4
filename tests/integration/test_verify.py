"""Measuring again what a card claims: on disk, from the Hub, on part of the data, and where it cannot be done."""

import io
import json
import math
import shutil

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_oscqat.hub.card import CARD, eval_results_file, write_card
from hf_oscqat.hub.client import HubError
from hf_oscqat.hub.push import push_folder
from hf_oscqat.integration.data import DataArguments, load_image_data
from hf_oscqat.integration.verify import (
    TITLE,
    CannotRerunError,
    _is_folder_of_classes,
    claim_arguments,
    propose_results,
    read_claim,
    tolerance,
    verify,
)

REPO = "org/mbv2-w4a4-osc"
QUIET = {"device": "cpu", "show_progress": False}


def claim_otherwise(folder, **changes):
    """Let the folder claim something else: of what was measured, or keys of its `data`, or of data's `evaluation`."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    measured = results["accuracy"]["packed"]
    measured |= {key: changes.pop(key) for key in changes.keys() & measured.keys()}
    results["data"] |= {key: value for key, value in changes.items() if key in results["data"]}
    results["data"]["evaluation"] |= {key: value for key, value in changes.items() if key not in results["data"]}
    path.write_text(json.dumps(results))
    write_card(folder)


class TestTolerance:
    def test_on_all_images_it_is_rounding(self):
        assert tolerance(0.7, 50_000, True) == pytest.approx(1e-3)

    def test_on_few_images_it_is_one_of_them(self):
        assert tolerance(0.7, 100, True) == pytest.approx(0.01)
        assert tolerance(0.7, 100, True) > 0.71 - 0.70

    def test_on_a_subset_it_is_three_standard_errors(self):
        assert tolerance(0.7, 1000, False) == pytest.approx(3 * math.sqrt(0.21 / 1000))
        assert tolerance(1.0, 1000, False) == 1e-3


@pytest.mark.parametrize("held_out", [True, False])
def test_share_of_held_out_images_belongs_to_a_claim_only_if_it_was_used(held_out):
    preparation = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}
    preparation |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    args = DataArguments(train_dir="train", validation_dir="val", train_val_split=0.1)
    claimed = claim_arguments(args, 3, preparation, held_out=held_out)
    assert [claimed.get(key) for key in ("train_val_split", "seed")] == ([0.1, 3] if held_out else [None, None])


class TestFolder:
    def test_claim_is_reproduced_exactly(self, folder):
        result = verify(str(folder), **QUIET)
        assert result.reproduced
        assert result.differences == {"accuracy": 0.0, "top_5_accuracy": 0.0}
        assert (result.measured.num_images, result.claim.num_images) == (60, 60)

    def test_other_claim_is_not(self, folder):
        claimed = json.loads((folder / "results.json").read_text())["accuracy"]["packed"]["accuracy"]
        claim_otherwise(folder, accuracy=claimed + 0.04)
        result = verify(str(folder), **QUIET)
        assert not result.reproduced
        assert result.differences["accuracy"] == pytest.approx(-0.04)

    def test_other_preparation_is_another_measurement(self, folder):
        other = {"input_size": [3, 8, 8], "interpolation": "nearest"}
        claim_otherwise(folder, **other)
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"] |= other
        (folder / "config.json").write_text(json.dumps(config))
        assert verify(str(folder), **QUIET).differences != {"accuracy": 0.0, "top_5_accuracy": 0.0}

    def test_subset_is_drawn_and_allows_for_chance(self, folder):
        result = verify(str(folder), max_samples=20, **QUIET)
        assert result.measured.num_images == 20
        assert result.tolerance["accuracy"] > 0.1

    @pytest.mark.parametrize("max_samples", [None, 5, 10, 15])
    def test_a_subset_of_other_data_is_other_data(self, folder, max_samples):
        claim_otherwise(folder, num_images=10)
        with pytest.raises(CannotRerunError, match=r"speaks of 10 images .* there are \d+: these are other data"):
            verify(str(folder), max_samples=max_samples, **QUIET)

    def test_a_subset_of_all_is_the_whole(self, folder):
        result = verify(str(folder), max_samples=1000, **QUIET)
        assert result.measured.num_images == result.claim.num_images
        assert result.tolerance["accuracy"] < 0.1

    def test_record_has_the_keys_of_timm(self, folder):
        record = verify(str(folder), **QUIET).to_dict()
        keys = [
            "model",
            "top1",
            "top1_err",
            "top5",
            "top5_err",
            "param_count",
            "img_size",
            "crop_pct",
            "interpolation",
        ]
        assert list(record)[: len(keys)] == keys
        assert record["top1"] + record["top1_err"] == pytest.approx(100)
        assert (record["img_size"], record["reproduced"]) == (32, True)
        assert json.loads(json.dumps(record)) == record

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "without README.md"),
            ("# Words\n", "states no accuracy together with how it was measured"),
            ("---\nmodel-index:\n- name: a\n  results: []\n---\n", "states no accuracy"),
        ],
    )
    def test_card_that_claims_nothing(self, folder, text, message):
        (folder / CARD).unlink()
        if text is not None:
            (folder / CARD).write_text(text)
        with pytest.raises(CannotRerunError, match=message):
            verify(str(folder), **QUIET)

    def test_card_that_does_not_say_how(self, folder):
        text = (folder / CARD).read_text().replace("        crop_mode: center\n", "")
        (folder / CARD).write_text(text)
        with pytest.raises(CannotRerunError, match="how images were prepared: crop_mode are missing"):
            verify(str(folder), **QUIET)

    def test_other_number_of_images(self, folder):
        claim_otherwise(folder, max_eval_samples=50)
        with pytest.raises(
            CannotRerunError, match="speaks of 60 images of digits, split validation, and there are 50"
        ):
            verify(str(folder), **QUIET)

    def test_name_that_is_neither(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # `make demo` makes one of these folders in the project
        for name in ("nothing", "runs/quickstart/packed", "./packed", "/packed"):
            with pytest.raises(HubError, match="expected a folder that exists, or a Hub id such as org/name"):
                verify(name)

    def test_folder_of_the_run_is_told_where_it_is(self, folder):
        with pytest.raises(CannotRerunError, match=f"you may mean {folder}"):
            verify(str(folder.parent))


class TestUntrustedCards:
    """Anyone may have written them."""

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("- 32\n        - 32", "- 60000\n        - 60000", "input_size"),
            ("- 32\n        - 32", "- x\n        - 32", "input_size"),
            ("crop_pct: 1.0", "crop_pct: a", "crop_pct"),
            ("interpolation: bicubic", "interpolation: zzz", "interpolation 'zzz', expected nearest"),
            ("crop_mode: center", "crop_mode: 3", "crop_mode"),
            ("num_images: 60", "num_images: many", "num_images 'many', expected a number of images"),
            ("source: digits", "source: disk", "source 'disk', expected hub, digits, folder"),
            ("      split: validation\n", "      split: 3\n", "split"),
            ("value: 0.", "value: 50.", "a share from 0 to 1"),
        ],
    )
    def test_what_cannot_be_is_not_run(self, folder, old, new, message):
        text = (folder / CARD).read_text()
        assert old in text
        (folder / CARD).write_text(text.replace(old, new))
        with pytest.raises(CannotRerunError, match=message):
            verify(str(folder), **QUIET)

    @pytest.mark.parametrize("index", ["[foo]", "[{results: [3]}]", "[{results: [{dataset: 3}]}]"])
    def test_results_of_another_form(self, folder, index):
        (folder / CARD).write_text(f"---\nmodel-index: {index}\n---\n")
        with pytest.raises(ValueError, match="cannot be read"):
            verify(str(folder), **QUIET)

    @pytest.mark.parametrize("other", [{"crop_pct": 0.3}, {"input_size": [3, 64, 64]}, {"interpolation": "nearest"}])
    def test_other_preparation_than_that_of_the_model(self, folder, other):
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"] |= other
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CannotRerunError, match=f"was measured with {next(iter(other))} .*one of the two was"):
            verify(str(folder), **QUIET)

    def test_other_normalisation_than_that_of_the_model(self, folder):
        claim_otherwise(folder, mean=[0.0, 0.0, 0.0])
        with pytest.raises(CannotRerunError, match="one of the two was changed"):
            verify(str(folder), **QUIET)

    def test_dataset_of_the_hub_that_is_a_local_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "pets").mkdir(parents=True)
        claim_otherwise(folder, source="hub", dataset_id="org/pets", name="org/pets")
        with pytest.raises(CannotRerunError, match="here is a file or folder of that name"):
            verify(str(folder), **QUIET)

    def test_model_of_another_kind_runs_no_code(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "another"
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_oscqat.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
        with pytest.raises(ValueError, match=r"trust_remote_code|expected a packed one"):
            verify(str(folder), **QUIET)
        assert not (tmp_path / "trace").exists()

    def test_float_model_is_refused_before_its_weights_are_read(self, folder, make_wrapper):
        make_wrapper().save_pretrained(folder)
        with pytest.raises(CannotRerunError, match="a timm_wrapper model, expected a packed one of hf_oscqat"):
            verify(str(folder), **QUIET)

    def test_checkpoint_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CannotRerunError, match="cannot be loaded"):
            verify(str(folder), **QUIET)


def test_device_that_is_not_there(folder):
    with pytest.raises(CannotRerunError, match="expected one that it has"):
        verify(str(folder), device="xpu", show_progress=False)


def test_revision_of_a_folder(folder):
    with pytest.raises(CannotRerunError, match="a folder, which has none"):
        verify(str(folder), revision="main", **QUIET)


def write_digits(folder, classes=10):
    """The claim's images as a folder per class."""
    data = load_image_data(DataArguments(dataset_name="digits", max_eval_samples=60), seed=3, need_train=False)
    for i in range(60):
        target = folder / str(data.validation.labels[i] % classes)
        target.mkdir(parents=True, exist_ok=True)
        data.validation.open(i).save(target / f"{i:02}.png")


@pytest.mark.parametrize(
    ("files", "is_one"),
    [
        (["cat/1.png", "dog/2.png"], True),
        (["bus/1.png", "train/2.png"], True),
        (["cat/1.png", "dog/2.png", "LICENSE"], True),
        (["cat/near/1.png", "dog/2.png"], True),
        (["train/cat/1.png", "validation/cat/2.png"], False),
        (["train/1.png", "train/metadata.csv"], False),
        (["data/train-00000.parquet", "README.md"], False),
        (["train.parquet"], False),
        (["1.png"], False),
        (["README.md", "validation/cat/1.png", "test/dog/1.png"], False),
        (["README.md", "data/train/cat/1.png"], False),
        (["README.md", "data/train.tar.gz"], False),
        (["cat/1.png", "cat/notes.json", "dog/2.png"], True),
    ],
)
def test_folder_of_classes_is_told_from_one_that_datasets_reads(tmp_path, files, is_one):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert _is_folder_of_classes(tmp_path) == is_one


class TestDataFromElsewhere:
    def test_images_that_are_not_published_must_be_given(self, folder, tmp_path):
        claim_otherwise(folder, source="folder", max_eval_samples=None)
        with pytest.raises(CannotRerunError, match="a folder that is not published: pass the images as --dataset"):
            verify(str(folder), **QUIET)
        write_digits(tmp_path / "images")
        assert verify(str(folder), dataset=str(tmp_path / "images"), **QUIET).differences["accuracy"] == 0.0

    def test_a_claim_about_a_share_of_the_training_images(self, folder, tmp_path):
        write_digits(tmp_path / "images")
        data = load_image_data(DataArguments(train_dir=str(tmp_path / "images"), train_val_split=0.2), seed=3)
        claim_otherwise(folder, source="folder", max_eval_samples=None, train_val_split=0.2, split="train")
        text = (folder / CARD).read_text().replace("num_images: 60", f"num_images: {len(data.validation)}")
        (folder / CARD).write_text(text)
        measured = verify(str(folder), dataset=str(tmp_path / "images"), **QUIET).measured
        assert measured.num_images == len(data.validation) < 60

    def test_other_classes(self, folder, tmp_path):
        write_digits(tmp_path / "images", classes=5)
        with pytest.raises(CannotRerunError, match="with 10 classes and data with 5"):
            verify(str(folder), dataset=str(tmp_path / "images"), **QUIET)

    def test_same_classes_in_another_order(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        config["label_names"] = config["label_names"][::-1]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CannotRerunError, match="the same classes in another order"):
            verify(str(folder), **QUIET)

    def test_folder_that_is_not_there(self, folder):
        with pytest.raises(CannotRerunError, match="are not to be had"):
            verify(str(folder), dataset="no/where", **QUIET)


@pytest.fixture
def dataset_on_the_hub(hub, request):
    """The claim's images as a dataset repository of its own name, with their labels; returns name and first commit."""
    data = load_image_data(DataArguments(dataset_name="digits", max_eval_samples=60), seed=3, need_train=False)
    names = [str(i) for i in range(10)]

    def png(i):
        stream = io.BytesIO()
        data.validation.open(i).save(stream, "png")
        return {"bytes": stream.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [png(i) for i in range(60)], "label": data.validation.labels.tolist()}
    table = datasets.Dataset.from_dict(columns, features=features)
    stream = io.BytesIO()
    table.to_parquet(stream)
    name = f"org/digits-{abs(hash(request.node.name))}"
    hub.create(name, {"data/validation-00000-of-00001.parquet": stream.getvalue()}, kind="dataset", private=True)
    return name, hub.head(name, kind="dataset")


class TestHub:
    def test_commit_of_model_is_pinned(self, hub, folder):
        commit = push_folder(folder, REPO).commit
        result = verify(REPO, **QUIET)
        assert (result.reproduced, result.commit) == (True, commit)

    def test_older_revision_is_measured_as_it_was(self, hub, folder):
        old = push_folder(folder, REPO).commit
        claim_otherwise(folder, accuracy=1.0)
        push_folder(folder, REPO)
        assert not verify(REPO, **QUIET).reproduced
        assert verify(REPO, revision=old, **QUIET).reproduced

    def test_dataset_of_the_hub_is_read_at_the_commit_of_the_claim(self, hub, folder, dataset_on_the_hub):
        name, commit = dataset_on_the_hub
        changes = {"source": "hub", "name": name, "dataset_id": name, "revision": commit, "max_eval_samples": None}
        claim_otherwise(folder, **changes)
        push_folder(folder, REPO)
        hub.add_commit(name, {"data/validation-00000-of-00001.parquet": None, "a.txt": b"x"}, kind="dataset")
        result = verify(REPO, **QUIET)
        assert result.reproduced
        assert result.claim.revision == commit

    def test_token_is_for_the_dataset_too(self, hub, folder, dataset_on_the_hub, monkeypatch):
        name, commit = dataset_on_the_hub
        changes = {"source": "hub", "name": name, "dataset_id": name, "revision": commit, "max_eval_samples": None}
        claim_otherwise(folder, **changes)
        push_folder(folder, REPO)
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(CannotRerunError, match="are not to be had"):
            verify(REPO, **QUIET)
        assert verify(REPO, token="hf_write", **QUIET).reproduced

    def test_missing_repository(self, hub):
        with pytest.raises(HubError, match="there is no such repository, or it is private"):
            verify("org/nothing")

    def test_gated_repository_names_the_page(self, hub, folder):
        hub.create(REPO, {p.name: p.read_bytes() for p in folder.iterdir()}, gated=True)
        with pytest.raises(HubError, match=f"it is gated; ask for access on {hub.url}/{REPO}"):
            verify(REPO, token="hf_other", **QUIET)

    def test_repository_without_a_card(self, hub):
        hub.create(REPO, {"config.json": b"{}"})
        with pytest.raises(CannotRerunError, match=r"without README\.md"):
            verify(REPO, **QUIET)


class TestPropose:
    def test_measured_values_come_as_one_pull_request(self, hub, folder):
        claim_otherwise(folder, accuracy=1.0)
        push_folder(folder, REPO)
        result = verify(REPO, **QUIET)
        pushed = propose_results(result, token="hf_other")
        assert pushed.url.endswith("/discussions/1")
        (pull,) = hub.pulls(REPO)
        assert (pull.title, pull.author) == (TITLE, "carol")
        proposed = hub.files(REPO, "refs/pr/1")
        top1, _ = ModelCard(proposed.pop(CARD).decode()).data.eval_results
        assert top1.metric_value == result.measured.accuracy
        main = hub.files(REPO)
        main.pop(CARD)
        assert proposed == main

    def test_open_one_is_found_and_no_other_opened(self, hub, folder):
        claim_otherwise(folder, accuracy=1.0)
        push_folder(folder, REPO)
        result = verify(REPO, **QUIET)
        assert propose_results(result).url == propose_results(result).url
        assert len(hub.pulls(REPO)) == 1

    def test_card_that_has_them_needs_none(self, hub, folder):
        push_folder(folder, REPO)
        assert propose_results(verify(REPO, **QUIET)) is None
        assert not hub.pulls(REPO)

    def test_data_of_the_hub_get_an_entry_among_its_results(self, hub, folder, dataset_on_the_hub):
        name, commit = dataset_on_the_hub
        changes = {"source": "hub", "name": name, "dataset_id": name, "revision": commit, "max_eval_samples": None}
        claim_otherwise(folder, **changes)
        push_folder(folder, REPO)
        result = verify(REPO, **QUIET)
        propose_results(result)
        path = f".eval_results/{name.replace('/', '--')}.yaml"
        (entry,) = yaml.safe_load(hub.files(REPO, "refs/pr/1")[path])
        assert entry["dataset"] == {"id": name, "task_id": "default", "revision": commit}
        assert entry["value"] == pytest.approx(100 * result.measured.accuracy, abs=1e-4)

    def test_entry_with_the_same_value_needs_none(self, hub, folder, dataset_on_the_hub):
        name, commit = dataset_on_the_hub
        changes = {"source": "hub", "name": name, "dataset_id": name, "revision": commit, "max_eval_samples": None}
        claim_otherwise(folder, **changes)
        results = json.loads((folder / "results.json").read_text())
        path, text = eval_results_file(results)
        (folder / path).parent.mkdir()
        (folder / path).write_text(text)
        push_folder(folder, REPO)
        assert propose_results(verify(REPO, **QUIET)) is None

    def test_numbers_are_not_put_beside_other_weights(self, hub, folder):
        old = push_folder(folder, REPO).commit
        result = verify(REPO, **QUIET)
        hub.add_commit(REPO, {"a.txt": b"x"})
        with pytest.raises(ValueError, match=f"got a measurement of commit {old}"):
            propose_results(result)
        assert not hub.pulls(REPO)

    def test_numbers_of_other_images_are_not_proposed(self, hub, folder, tmp_path):
        push_folder(folder, REPO)
        write_digits(tmp_path / "images")
        result = verify(REPO, dataset=str(tmp_path / "images"), **QUIET)
        with pytest.raises(ValueError, match="expected one on those that the card names"):
            propose_results(result)

    def test_part_of_the_images_is_not_proposed(self, hub, folder):
        push_folder(folder, REPO)
        result = verify(REPO, max_samples=20, **QUIET)
        with pytest.raises(ValueError, match="expected one on all of them"):
            propose_results(result)

    def test_folder_has_no_pull_requests(self, folder):
        with pytest.raises(ValueError, match="got a folder to open a pull request in"):
            propose_results(verify(str(folder), **QUIET))


def test_claims_on_several_datasets_say_which_is_run(folder, caplog):
    metadata = ModelCard.load(folder / CARD).data.to_dict()
    other = json.loads(json.dumps(metadata["model-index"][0]["results"][0]))
    other["dataset"]["type"] = "org/other"
    metadata["model-index"][0]["results"].append(other)
    assert read_claim(metadata, "it").dataset == "digits"
    assert "it has results on 2 datasets; the first is run again: digits" in caplog.text


def test_images_are_the_same_bytes(tmp_path):
    """What `write_digits` relies on: PNG keeps them."""
    write_digits(tmp_path)
    data = load_image_data(DataArguments(dataset_name="digits", max_eval_samples=60), seed=3, need_train=False)
    saved = Image.open(tmp_path / str(data.validation.labels[7]) / "07.png")
    assert np.array_equal(np.asarray(saved), np.asarray(data.validation.open(7)))
    shutil.rmtree(tmp_path)
