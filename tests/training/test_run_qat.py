"""The script from end to end on few digits and a tiny network: what it writes, how it continues, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_oscqat.integration.data import DataArguments, load_image_data
from hf_oscqat.integration.evaluate import evaluate_accuracy
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.integration.publish import provenance
from hf_oscqat.integration.verify import verify
from run_qat import _dataset_commit, float_model, main, open_output_dir, parse, show

SETTINGS = [
    "--dataset_name", "digits", "--model_name_or_path", "test_efficientnet", "--img_size", "32",
    "--model_license", "mit", "--hflip", "0",
    "--max_train_samples", "64", "--max_eval_samples", "40", "--per_device_train_batch_size", "16",
    "--num_train_epochs", "2", "--save_strategy", "epoch", "--logging_steps", "1", "--report_to", "none",
    "--use_cpu", "true", "--disable_tqdm", "true", "--calibration_batches", "2", "--learning_rate", "0.01",
    "--quantization.batchnorm_reestimation_batches", "2", "--quantization.weight_bits", "3",
    "--quantization.freezing.momentum", "0.1", "--quantization.freezing.threshold", "0.2",
    "--quantization.freezing.threshold_final", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with float training before it: (folder, results)."""
    output_dir = tmp_path_factory.mktemp("runs") / "demo"
    return output_dir, main([*SETTINGS, "--float_epochs", "1", "--output_dir", str(output_dir)])


def test_results_hold_what_was_measured(finished):
    output_dir, results = finished
    assert json.loads((output_dir / "results.json").read_text()) == results
    assert all(0 <= results["accuracy"][key]["accuracy"] <= 1 for key in ("float", "rounded", "packed"))
    assert results["accuracy"]["packed"]["num_images"] == 40
    assert results["bytes"]["packed"] == (output_dir / "packed" / "model.safetensors").stat().st_size
    assert results["bytes"]["packed"] < results["bytes"]["float"]
    assert results["packed_difference"] <= 1e-5
    assert results["run"]["steps"] == 8
    assert results["oscillation"].keys() == {"start", "peak", "end", "frozen", "distances"}
    assert results["run"]["data_images_per_second"] > 0


def test_token_is_written_nowhere(tmp_path, monkeypatch, capfd, caplog):
    token, other = "hf_" + "plantedinthecommand", "hf_" + "plantedintheenvironment"
    monkeypatch.setenv("HF_TOKEN", other)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"hub_token: {token}\n")
    output_dir = tmp_path / "run"
    options = [*SETTINGS, "--report_to", "tensorboard", "--output_dir", str(output_dir)]
    with caplog.at_level("DEBUG"):
        main([str(recipe), *options, "--hub_token", token])
        main([*options, f"--hub_token={token}"])  # another token, or none, is no other run
    written = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "results.json", "README.md", "model.safetensors"} <= {path.name for path in written}
    out, err = capfd.readouterr()
    for text in (*(path.read_bytes() for path in written), out.encode(), err.encode(), caplog.text.encode()):
        assert token.encode() not in text
        assert other.encode() not in text
    command = json.loads((output_dir / "results.json").read_text())["run"]["command"]
    assert "--hub_" not in command


@pytest.mark.parametrize("place", ["/proc/nothing", "file", "file/below"])
def test_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="pass another --output_dir"):
        main([*SETTINGS, "--output_dir", str(tmp_path / place)])


def test_folder_that_another_run_writes_to_is_refused(tmp_path):
    other = FileLock(tmp_path / ".run.lock")
    with other, pytest.raises(ValueError, match="which another run is writing to"):
        main([*SETTINGS, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_end_is_a_table_and_the_speeds_of_training_and_of_its_data(finished, capsys):
    _, results = finished
    show(results)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{100 * results['accuracy']['packed']['accuracy']:.2f}%" in out
    run = results["run"]
    assert f"Training: {run['images_per_second']:.0f} images/s, evaluation included" in out
    assert f"its data alone: {run['data_images_per_second']:.0f} images/s (dataloader_num_workers 0)" in out


def test_the_checkpoint_is_what_training_ended_with(finished):
    output_dir, _ = finished
    packed = AutoModelForImageClassification.from_pretrained(output_dir / "packed")
    trained = AutoModelForImageClassification.from_pretrained(output_dir / "qat")
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(packed(images).logits, trained(images).logits)
    assert packed.config.id2label == {i: str(i) for i in range(10)}


def test_the_image_processor_prepares_as_the_run_did(finished):
    processor = AutoImageProcessor.from_pretrained(finished[0] / "packed")
    assert tuple(processor.data_config["input_size"]) == (3, 32, 32)


def test_the_folder_holds_card_pictures_and_recipe_and_no_pickle(finished):
    packed = finished[0] / "packed"
    names = {path.name for path in packed.iterdir()}
    assert names == {
        "README.md", "config.json", "distances.png", "model.safetensors", "modeling_oscqat.py", "oscillation.png",
        "recipe.yaml", "results.json",
    }  # fmt: skip
    recipe = yaml.safe_load((packed / "recipe.yaml").read_text())
    assert recipe["quantization"]["weight_bits"] == 3
    assert not list(finished[0].rglob("training_args.bin"))


def test_the_card_says_what_was_measured(finished):
    output_dir, results = finished
    card = ModelCard.load(output_dir / "packed" / "README.md")
    assert card.data.library_name == "transformers"
    for key in ("float", "rounded", "packed"):
        assert f"{100 * results['accuracy'][key]['accuracy']:.2f}%" in card.text
    assert f"{results['bytes']['packed']:,}" in card.text
    assert "more information needed" not in card.text.lower()


def test_the_python_on_the_card_runs(finished, monkeypatch):
    card = (finished[0] / "packed" / "README.md").read_text()
    blocks = [block.split("```")[0] for block in card.split("```python")[1:]]
    assert blocks
    for block in blocks:
        exec(compile(block, "card", "exec"), {})


class TestPush:
    REPO = "org/mbv2-w4a4-osc"

    def test_run_that_ended_is_pushed_and_its_claim_reproduced(self, finished, hub):
        output_dir, results = finished
        main(
            [
                *SETTINGS,
                "--float_epochs",
                "1",
                "--output_dir",
                str(output_dir),
                "--push_to_hub",
                "--hub_model_id",
                self.REPO,
            ]
        )
        files = hub.files(self.REPO)
        assert files.keys() == {path.name for path in (output_dir / "packed").iterdir()}
        assert len(hub.commits(self.REPO)) == 2
        data = ModelCard(files["README.md"].decode()).data
        assert (data.license, data.eval_results[0].metric_value) == ("mit", results["accuracy"]["packed"]["accuracy"])
        assert verify(self.REPO, device="cpu", show_progress=False).reproduced

    def test_new_run_is_pushed_at_its_end_with_a_recipe_for_others(self, hub, tmp_path):
        options = ["--max_steps", "1", "--evaluate_baselines", "false", "--output_dir", str(tmp_path / "run")]
        main([*SETTINGS, *options, "--push_to_hub", "--hub_model_id", self.REPO])
        files = hub.files(self.REPO)
        recipe = yaml.safe_load(files["recipe.yaml"])
        assert recipe["output_dir"] == "runs/run"
        assert not recipe.keys() & {"push_to_hub", "hub_model_id"}
        assert len(hub.commits(self.REPO)) == 2

    def test_token_that_may_only_read_is_found_before_anything_else(self, hub, tmp_path):
        command = [*SETTINGS, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", self.REPO]
        with pytest.raises(ValueError, match="token that may only read"):
            main([*command, "--hub_token", "hf_read"])
        assert not (tmp_path / "run").exists()

    def test_licence_that_a_person_has_written_there_is_found_before_anything_else(self, hub, tmp_path):
        hub.create(self.REPO, {"README.md": b"---\nlicense: gpl-3.0\n---\nText.\n"})
        command = [*SETTINGS, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", self.REPO]
        with pytest.raises(ValueError, match=r"got licence 'mit' for org/mbv2-w4a4-osc, whose card says 'gpl-3.0'"):
            main(command)
        assert not (tmp_path / "run").exists()


class TestLicence:
    def test_model_trained_from_scratch_needs_one(self, tmp_path):
        i = SETTINGS.index("--model_license")
        with pytest.raises(ValueError, match="got test_efficientnet with random weights, expected a licence"):
            main([*SETTINGS[:i], *SETTINGS[i + 2 :], "--output_dir", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()

    def test_that_of_pretrained_weights_is_inherited(self):
        assert provenance("mobilenetv2_100", pretrained=True) == ("timm/mobilenetv2_100.ra_in1k", "apache-2.0")

    def test_that_of_a_folder_is_on_its_card(self, tmp_path):
        with pytest.raises(ValueError, match="with no licence that can be read"):
            provenance(str(tmp_path))
        (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nbase_model: a/b\n---\n")
        assert provenance(str(tmp_path)) == ("a/b", "ours")

    def test_that_of_a_hub_id_is_on_its_card(self, hub):
        hub.create("org/float", {"README.md": b"---\nlicense: mit\n---\n"})
        assert provenance("org/float") == ("org/float", "mit")
        hub.create("org/unlicensed", {"README.md": b"Words\n"})
        with pytest.raises(ValueError, match="with no licence that can be read"):
            provenance("org/unlicensed")

    def test_given_one_is_taken(self):
        assert provenance("mobilenetv2_100", license="mit") == (None, "mit")


def test_the_same_command_again_ends_the_same(finished):
    output_dir, results = finished
    again = main([*SETTINGS, "--float_epochs", "1", "--output_dir", str(output_dir)])
    assert again["accuracy"]["packed"]["accuracy"] == results["accuracy"]["packed"]["accuracy"]
    assert again["run"]["steps"] == results["run"]["steps"]


def test_other_settings_in_the_same_folder_are_refused(finished):
    with pytest.raises(ValueError, match=r"told otherwise about num_train_epochs, seed; expected the same settings"):
        main(
            [
                *SETTINGS,
                "--float_epochs",
                "1",
                "--output_dir",
                str(finished[0]),
                "--num_train_epochs",
                "3",
                "--seed",
                "1",
            ]
        )


@pytest.mark.parametrize("form", ["packed", "qat", "float"])
def test_eval_only_measures_any_form(finished, form):
    output_dir, results = finished
    data = ["--dataset_name", "digits", "--max_eval_samples", "40", "--use_cpu", "true", "--disable_tqdm", "true"]
    model = ["--model_name_or_path", str(output_dir / form), "--output_dir", str(output_dir / "unused")]
    measured = main(["--eval_only", *data, *model])
    expected = results["accuracy"]["float" if form == "float" else "packed"]
    assert measured["accuracy"] == pytest.approx(expected["accuracy"])
    assert not (output_dir / "unused").exists()


def test_training_goes_on_from_a_folder_in_training_form(finished, tmp_path):
    model = ["--model_name_or_path", str(finished[0] / "qat"), "--output_dir", str(tmp_path / "more")]
    results = main([*SETTINGS, *model, "--max_steps", "1", "--evaluate_baselines", "false"])
    assert results["accuracy"]["float"] is None
    assert results["run"]["steps"] == 1


def test_a_model_in_training_form_is_not_trained_as_if_it_were_float(finished, tmp_path):
    model = ["--model_name_or_path", str(finished[0] / "qat"), "--output_dir", str(tmp_path / "more")]
    with pytest.raises(ValueError, match=r"got float_epochs=1 and .*which is in training form already"):
        main([*SETTINGS, *model, "--float_epochs", "1"])


def test_overrides_in_another_order_are_other_settings(tmp_path):
    overrides = {"*": {"weight_bits": 4}, "blocks.*": {"weight_bits": 2}}
    first, other = (json.dumps(dict(pairs)) for pairs in (overrides.items(), reversed(overrides.items())))
    command = [*SETTINGS, "--output_dir", str(tmp_path / "run"), "--quantization.overrides"]
    assert open_output_dir(tmp_path / "run", parse([*command, first])) is None
    open_output_dir(tmp_path / "run", parse([*command, first]))
    open_output_dir(tmp_path / "run", parse([*command, json.dumps(list(overrides.items()))]))
    with pytest.raises(ValueError, match="told otherwise about quantization"):
        open_output_dir(tmp_path / "run", parse([*command, other]))


def test_a_run_of_an_older_version_goes_on_whose_recipe_has_numbers_for_text(tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text("image_column_name: 0\nlabel_column_name: 1\n")
    settings = parse([str(given), *SETTINGS, "--output_dir", str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    as_it_was = settings.recipe | {"image_column_name": 0, "label_column_name": 1}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(as_it_was))
    open_output_dir(tmp_path / "run", settings)


def test_a_run_goes_on_with_the_same_images_in_another_folder_and_with_no_others(tmp_path, monkeypatch):
    digits = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    for split, images, of_each in (("train", digits.train, 6), ("val", digits.validation, 4)):
        for i in np.concatenate([np.flatnonzero(images.labels == label)[:of_each] for label in range(10)]):
            target = tmp_path / "here" / split / str(images.labels[i])
            target.mkdir(parents=True, exist_ok=True)
            images.open(i).save(target / f"{i}.png")
    output = ["--output_dir", str(tmp_path / "run"), "--dataset_name", "None"]

    def command(place):
        return [*SETTINGS, *output, "--train_dir", f"{tmp_path / place}/train", "--validation_dir", f"{place}/val"]

    monkeypatch.chdir(tmp_path)
    assert main([*command("here"), "--max_steps", "1"])["run"]["steps"] == 1
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert main([*command("there/"), "--max_steps", "1"])["run"]["steps"] == 1
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "images.json").rename(tmp_path / "images.json")  # as in a run of an older version
    with pytest.raises(ValueError, match="told otherwise about train_dir, validation_dir"):
        main([*command("there"), "--max_steps", "1"])
    (tmp_path / "images.json").rename(tmp_path / "run" / "images.json")
    image = next((tmp_path / "there" / "val").rglob("*.png"))
    image.rename(image.with_name("other.png"))
    with pytest.raises(ValueError, match=r"got 40 validation images \(40 before\) for the run in .*expected the same"):
        main([*command("there"), "--max_steps", "1"])


def test_only_a_model_without_weights_is_said_to_have_random_ones(tmp_path, caplog):
    data = load_image_data(DataArguments(dataset_name="digits", max_train_samples=8, max_eval_samples=8), seed=0)
    timm_wrapper("test_efficientnet", data.class_names).save_pretrained(tmp_path / "float")
    weights = ["--model_args", json.dumps({"checkpoint_path": str(tmp_path / "mine.safetensors")})]
    save_file(timm.create_model("test_efficientnet", num_classes=10).state_dict(), tmp_path / "mine.safetensors")
    for model in (["--model_name_or_path", str(tmp_path / "float")], weights, []):
        assert "has random weights" not in caplog.text
        float_model(parse([*SETTINGS, *model, "--output_dir", str(tmp_path / "run")]), data)
    assert "test_efficientnet has random weights" in caplog.text


def test_a_model_in_training_form_is_not_put_on_another_grid(finished, tmp_path):
    model = ["--model_name_or_path", str(finished[0] / "qat"), "--output_dir", str(tmp_path / "more")]
    with pytest.raises(ValueError, match="quantized already, with other settings of weight_bits; expected the same"):
        main([*SETTINGS, *model, "--quantization.weight_bits", "4"])


def test_what_continues_from_training_form_claims_no_float_accuracy(finished, tmp_path):
    model = ["--model_name_or_path", str(finished[0] / "qat"), "--output_dir", str(tmp_path / "more")]
    results = main([*SETTINGS, *model, "--max_steps", "1"])
    assert (results["accuracy"]["float"], results["accuracy"]["rounded"]) == (None, None)
    assert results["scheme"]["name"] == "W3A4"
    assert results["bytes"]["float"] == finished[1]["bytes"]["float"]


def test_channels_last_ends_in_a_checkpoint_with_equal_logits(tmp_path):
    options = ["--model_name_or_path", "resnet10t", "--channels_last", "true", "--max_steps", "2"]
    results = main([*SETTINGS, *options, "--output_dir", str(tmp_path / "run")])
    assert results["packed_difference"] <= 1e-5


def test_a_run_that_has_ended_is_shown_and_not_changed(tmp_path):
    command = [*SETTINGS, "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    first = main(command)
    changed = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert main(command) == first
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == changed
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_run_goes_on_with_the_commit_that_its_branch_was_at(tmp_path, monkeypatch, caplog):
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr("run_qat.pin_dataset", lambda name, asked, token: next(commits) if asked == "v1" else asked)
    settings = parse(
        [*SETTINGS, "--dataset_name", "org/pets", "--dataset_revision", "v1", "--output_dir", str(tmp_path)]
    )
    assert _dataset_commit(settings) == "a" * 40
    (tmp_path / "recipe.yaml").write_text(f"dataset_name: org/pets\ndataset_revision: {'a' * 40}\n")
    assert _dataset_commit(settings) == "a" * 40
    assert "goes on with commit aaaa" in caplog.text
    settings.data.dataset_revision = "c" * 40
    assert _dataset_commit(settings) == "c" * 40  # which the check of the recipe then refuses


def test_an_interrupted_run_continues_to_the_same_end(finished, tmp_path, monkeypatch, capsys):
    output_dir, results = finished
    command = [*SETTINGS, "--float_epochs", "1", "--output_dir", str(tmp_path / "broken")]

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("run_qat.OscQATTrainer.save_model", _save_once_then(stop))
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert (tmp_path / "broken" / "checkpoint-4").is_dir()
    assert not (tmp_path / "broken" / "packed").exists()
    measured = []

    def evaluate(*args, **kwargs):
        measured.append(args)
        return evaluate_accuracy(*args, **kwargs)

    monkeypatch.setattr("run_qat.evaluate_accuracy", evaluate)
    continued_results = main(command)
    assert len(measured) == 1, "the baselines are known from before"
    # How long the whole took, nobody knows.
    assert (continued_results["run"]["seconds"], continued_results["run"]["images_per_second"]) == (None, None)
    assert "training time" not in (tmp_path / "broken" / "packed" / "README.md").read_text()
    show(continued_results)
    assert "Training data alone:" in capsys.readouterr().out
    assert continued_results["accuracy"] == {
        key: {**value, "images_per_second": pytest.approx(value["images_per_second"], rel=1e3)}
        for key, value in results["accuracy"].items()
    }
    original = AutoModelForImageClassification.from_pretrained(output_dir / "qat").state_dict()
    continued = AutoModelForImageClassification.from_pretrained(tmp_path / "broken" / "qat").state_dict()
    for name, tensor in original.items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(continued[name])), name


def _save_once_then(stop):
    """Let the first checkpoint be saved and stop the run at the second."""
    from hf_oscqat import OscQATTrainer

    original, calls = OscQATTrainer.save_model, []

    def save(self, *args, **kwargs):
        calls.append(1)
        (original if len(calls) == 1 else stop)(self, *args, **kwargs)

    return save


def test_mixed_precision_ends_in_the_same_kind_of_checkpoint(tmp_path, monkeypatch):
    seen = set()

    def evaluate(*args, autocast=None, **kwargs):
        seen.add(autocast or torch.float32)
        return evaluate_accuracy(*args, autocast=autocast, **kwargs)

    monkeypatch.setattr("run_qat.evaluate_accuracy", evaluate)
    results = main([*SETTINGS, "--bf16", "true", "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    assert results["packed_difference"] <= 1e-5
    assert verify(str(tmp_path / "run" / "packed"), device="cpu", show_progress=False).differences["accuracy"] == 0
    assert seen == {torch.float32}, "the card's accuracies are those of whoever loads the checkpoint"


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run to continue"):
        main([*SETTINGS, "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_packed_model_is_not_trained(finished, tmp_path):
    with pytest.raises(ValueError, match="a packed checkpoint, expected a float model"):
        main([*SETTINGS, "--model_name_or_path", str(finished[0] / "packed"), "--output_dir", str(tmp_path / "run")])


def test_an_unknown_timm_name_gets_suggestions(tmp_path):
    with pytest.raises(ValueError, match=r"expected a timm name.*did you mean test_efficientnet"):
        main([*SETTINGS, "--model_name_or_path", "test_efficientnett", "--output_dir", str(tmp_path / "run")])


def test_a_pattern_that_matches_no_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got pattern 'conv_steem' in modules_to_not_convert"):
        main([*SETTINGS, "--quantization.modules_to_not_convert", "[conv_steem]", "--output_dir", str(tmp_path / "r")])


def test_data_with_other_classes_than_the_model_is_not_evaluated(finished, tmp_path, make_wrapper):
    make_wrapper().save_pretrained(tmp_path)
    options = ["--dataset_name", "digits", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="with 5 classes and data with 10"):
        main(["--eval_only", *options, "--model_name_or_path", str(tmp_path)])


def test_card_template_is_found():
    assert (Path(__file__).parents[2] / "model_cards" / "model_card.md.jinja").is_file()
