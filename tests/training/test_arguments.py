"""Recipes and command line: what is merged, what wins, what is refused."""

import json
import re

import pytest
import yaml

from arguments import RecipeError, load_recipe, parse

DIGITS = ["--dataset_name", "digits", "--use_cpu", "true", "--output_dir", "unused"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_options_win_over_recipes_and_later_recipes_over_earlier(tmp_path):
    first = write(tmp_path / "a.yaml", "learning_rate: 0.1\nimg_size: 32\nweight_decay: 0.5\n")
    second = write(tmp_path / "b.yaml", "learning_rate: 0.2\nimg_size: 48\n")
    settings = parse([first, second, *DIGITS, "--learning_rate", "0.3"])
    assert settings.training.learning_rate == 0.3
    assert settings.data.img_size == 48
    assert settings.training.weight_decay == 0.5


def test_quantization_is_merged_key_by_key(tmp_path):
    recipe = write(tmp_path / "a.yaml", "quantization: {weight_bits: 3, freezing: {threshold: 0.2, momentum: 0.01}}\n")
    config = parse([recipe, *DIGITS, "--quantization.freezing.threshold", "0.3"]).quantization
    assert (config.weight_bits, config.freezing.threshold, config.freezing.momentum) == (3, 0.3, 0.01)


def test_null_switches_a_remedy_off(tmp_path):
    recipe = write(tmp_path / "a.yaml", "quantization: {freezing: {threshold: 0.2}}\n")
    assert parse([recipe, *DIGITS, "--quantization.freezing", "null"]).quantization.freezing is None


def test_include_is_relative_to_the_file_and_loses_to_it(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "model.yaml", "seed: 1\nimg_size: 32\n")
    recipe = write(tmp_path / "leaf.yaml", "include: [base/model.yaml]\nseed: 2\n")
    assert load_recipe(recipe) == {"seed": 2, "img_size": 32}


def test_a_recipe_that_includes_itself_is_refused(tmp_path):
    recipe = write(tmp_path / "a.yaml", "include: [a.yaml]\n")
    with pytest.raises(RecipeError, match="includes itself"):
        load_recipe(recipe)


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    recipe = write(tmp_path / "a.yaml", "learning_rate: 1e-3\n")
    assert load_recipe(recipe)["learning_rate"] == 1e-3
    threshold = parse([*DIGITS, "--quantization.freezing.threshold", "5e-2"]).quantization.freezing.threshold
    assert threshold == 0.05


def test_a_flag_alone_is_true_and_dashes_are_underscores():
    settings = parse([*DIGITS, "--skip-bad-images", "--img-size=64"])
    assert settings.data.skip_bad_images
    assert settings.data.img_size == 64


def test_model_args_are_json():
    assert parse([*DIGITS, "--model_args", '{"drop_rate": 0.1}']).model.model_args == {"drop_rate": 0.1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learn_rate", "0.1"], "got unknown key 'learn_rate'.*Did you mean 'learning_rate'"),
        (["--quantization.weight_bit", "3"], "got unknown key 'weight_bit'.*Did you mean 'weight_bits'"),
        (["--quantization.weight_bits", "9"], "got weight_bits=9, expected a whole number from 2 to 8"),
        (["--quantization", "4"], "got quantization=4, expected a mapping"),
        (["--learning_rate", "fast"], "learning_rate.*invalid float value: 'fast'"),
        (["--model_args", "[1]"], "got model_args=.*expected a mapping"),
        (["--fsdp", "full_shard"], "got FSDP"),
        (["--img_size", "32", "stray"], "stray"),
        (["--optim", "adafactor"], "got optim='adafactor', which this script does not read; use weight_optimizer"),
        (["--resume_from_checkpoint", "x"], "continues by itself"),
        (["--img_size", "@3"], "got value '@3', which is no YAML"),
        (["--output_dir", ""], "got output_dir='', expected a folder"),
    ],
)
def test_what_cannot_be_used_is_named(argv, message):
    with pytest.raises(ValueError, match=message):
        parse([*DIGITS, *argv])


def test_a_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"got recipe nowhere.yaml, which cannot be read: No such file"):
        parse(["nowhere.yaml", *DIGITS])


def test_an_empty_list_is_refused_by_name(tmp_path):
    with pytest.raises(RecipeError, match="got an empty list for report_to, expected something in it"):
        parse([write(tmp_path / "a.yaml", "report_to: []"), *DIGITS])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "which is no YAML"),
        ("- a\n", "holding a list"),
        ("? [a]\n: b", "which is no YAML"),
        ("!!python/name:os.x ''", "no YAML"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "a.yaml", text))


def test_more_processes_than_training_sees_are_an_error(monkeypatch):
    monkeypatch.setattr("arguments._launched_processes", lambda: 2)
    with pytest.raises(RecipeError, match="got 2 processes from the launcher but 1 in training"):
        parse(DIGITS)


def test_help_names_keys_of_all_kinds(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for key in ("--dataset_name", "--float_epochs", "--learning_rate", "--model_name_or_path", "--quantization.KEY"):
        assert key in shown
    # What the docstrings say of an argument, of the config and of a remedy.
    text = " ".join(shown.split())
    assert "--quantization.first_last_bits width of the first layer's weight and of the last layer's weight" in text
    assert "--quantization.freezing.momentum " in text
    assert not re.search(r"--quantization\.\S+ \(default", text)


@pytest.mark.parametrize("text", ["1.10", "12e4567", "no", "012", "2024_11", "2024-11-28", "-foo"])
@pytest.mark.parametrize("key", ["dataset_revision", "run_name"])
def test_text_in_a_recipe_stays_as_it_is_written(tmp_path, key, text):
    settings = parse([write(tmp_path / "r.yaml", f"{key}: {text}"), *DIGITS])
    assert getattr(settings.data if key == "dataset_revision" else settings.training, key) == text
    again = write(tmp_path / "again.yaml", yaml.safe_dump(json.loads(json.dumps(settings.recipe))))
    assert parse([again]).recipe == settings.recipe


@pytest.mark.parametrize("given", [".", "..", "below/.."])
def test_the_folder_of_a_run_has_a_name(tmp_path, monkeypatch, given):
    (tmp_path / "mine" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    output_dir = parse([*DIGITS, "--output_dir", given]).training.output_dir
    assert output_dir == str((tmp_path / "mine" / given).resolve())


def test_null_is_no_text(tmp_path):
    assert parse([write(tmp_path / "r.yaml", "dataset_revision: null"), *DIGITS]).data.dataset_revision is None


def test_text_and_a_number_may_be_one_by_an_alias(tmp_path):
    settings = parse([write(tmp_path / "a.yaml", "learning_rate: &x 0.1\nrun_name: *x\n"), *DIGITS])
    assert (settings.training.learning_rate, settings.training.run_name) == (0.1, "0.1")
    assert settings.recipe["learning_rate"] == 0.1


@pytest.mark.parametrize("pattern", ["*.se.*", "head", "1", "no"])
def test_one_pattern_is_a_list_of_one(pattern):
    quantization = parse(["--quantization.modules_to_not_convert", pattern, *DIGITS]).quantization
    assert quantization.modules_to_not_convert == [pattern]
    several = parse(["--quantization.modules_to_not_convert", pattern, "a", *DIGITS]).quantization
    assert several.modules_to_not_convert == [pattern, "a"]


def test_text_stays_as_typed_and_none_means_none():
    settings = parse([*DIGITS, "--dataset_revision", "12e4567", "--quantization.activation_bits", "None"])
    assert settings.data.dataset_revision == "12e4567"
    assert settings.quantization.activation_bits is None
    assert parse([*DIGITS, "--model_license", "None"]).run.model_license is None
