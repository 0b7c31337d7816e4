"""The recipes of the published experiments: complete, sourced, and with the numbers that were published."""

import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torchvision.transforms as T
import yaml

from hf_oscqat import OscQATConfig, OscQATTrainingArguments
from hf_oscqat.integration.data import DataArguments, build_transforms, resolve_data_config
from hf_oscqat.remedies.dampening import DampeningSettings
from hf_oscqat.remedies.freezing import FreezingSettings
from run_qat import ModelArguments, RunArguments, load_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
MODELS = {
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "efficientnet_lite0": "efficientnet_lite0",
    "resnet18": "resnet18.tv_in1k",
}
BITS = {"w4a4": (4, 4), "w3a3": (3, 3), "w4": (4, None), "w3": (3, None)}
METHODS = ("lsq", "dampen", "freeze")
LEAVES = list(product(MODELS, BITS, METHODS))
BEYOND_THE_PAPER = ("deit_tiny_w4a4_freeze", "deit_tiny_w3a3_freeze")

# As published for these, and taken over from here for MobileNetV3 and ResNet-18 and for weights alone.
LEARNING_RATE = {4: 0.0033, 3: 0.01}
EPOCHS = {"mobilenetv2": 90, "mobilenetv3_small": 90, "efficientnet_lite0": 50, "resnet18": 90}
EPOCHS_FOR_WEIGHTS_ALONE = 20
WEIGHT_DECAY = {
    ("mobilenetv2", 4): {"lsq": 2.5e-5, "dampen": 2.5e-5, "freeze": 5e-5},
    ("mobilenetv2", 3): {"lsq": 2.5e-5, "dampen": 2.5e-5, "freeze": 2.5e-5},
    ("efficientnet_lite0", 4): {"lsq": 1e-4, "dampen": 1e-4, "freeze": 1e-4},
    ("efficientnet_lite0", 3): {"lsq": 5e-5, "dampen": 5e-5, "freeze": 5e-5},
}
FINAL_THRESHOLD = {
    ("mobilenetv2", 4): 0.01,
    ("mobilenetv2", 3): 0.011,
    ("efficientnet_lite0", 4): 0.015,
    ("efficientnet_lite0", 3): 0.005,
}

SOURCES = ("published code", "authors' README", "secondary notes of the paper", "not published, taken from ", "ours")
LINE = re.compile(r"^(?P<indent> *)(?P<key>[a-z_0-9]+):(?: +(?P<value>[^#\s][^#]*?))?(?:  # (?P<comment>.+))?$")


def name_of(model: str, width: str, method: str) -> str:
    return f"{model}_{width}_{method}"


def recipe_of(model: str, width: str, method: str) -> dict[str, Any]:
    return load_recipe(RECIPES / f"{name_of(model, width, method)}.yaml")


def names_of(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def part_for(cls: type, recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key in names_of(cls)}


def values_in(recipe: Any) -> list[Any]:
    if isinstance(recipe, dict | list):
        children = recipe.values() if isinstance(recipe, dict) else recipe
        return [value for child in children for value in values_in(child)]
    return [recipe]


each_leaf = pytest.mark.parametrize(("model", "width", "method"), LEAVES, ids=[name_of(*leaf) for leaf in LEAVES])
each_file = pytest.mark.parametrize(
    "path",
    [
        *(RECIPES / f"{name}.yaml" for name in (*(name_of(*leaf) for leaf in LEAVES), *BEYOND_THE_PAPER)),
        *sorted((RECIPES / "_base_").glob("*.yaml")),
    ],
    ids=lambda path: path.stem,
)


def test_there_is_a_recipe_for_each_experiment_and_no_other():
    found = {path.stem for path in RECIPES.glob("*.yaml") if path.stem != "quickstart"}
    assert found == {name_of(*leaf) for leaf in LEAVES} | set(BEYOND_THE_PAPER)


@pytest.mark.parametrize("name", BEYOND_THE_PAPER)
def test_transformer_is_quantized_as_transformers_want_it(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    config = OscQATConfig(**recipe["quantization"])
    bits = 4 if "w4a4" in name else 3
    assert (config.weight_bits, config.activation_bits, config.first_last_bits) == (bits, bits, 8)
    assert (config.weight_granularity, config.activation_scheme) == ("per_channel", "asymmetric")
    assert config.batchnorm_reestimation_batches == 0
    assert config.freezing is not None
    assert (recipe["weight_optimizer"], recipe["weight_decay"]) == ("adamw", 0.05)
    assert recipe["output_dir"] == f"runs/{name}"
    model = timm.create_model(recipe["model_name_or_path"])
    assert recipe["crop_pct"] == model.pretrained_cfg["crop_pct"]
    assert recipe["interpolation"] == model.pretrained_cfg["interpolation"]


@each_leaf
def test_name_agrees_with_quantization(model: str, width: str, method: str):
    config = OscQATConfig(**recipe_of(model, width, method)["quantization"])
    assert (config.weight_bits, config.activation_bits) == BITS[width]
    assert config.first_last_bits == 8
    assert (config.dampening is not None) == (method == "dampen")
    assert (config.freezing is not None) == (method == "freeze")
    assert config.batchnorm_reestimation_batches == 50
    assert config.activation_scheme == ("asymmetric" if model == "mobilenetv3_small" else "symmetric")


@each_leaf
def test_name_agrees_with_model_and_output(model: str, width: str, method: str):
    recipe = recipe_of(model, width, method)
    assert recipe["model_name_or_path"] == MODELS[model]
    assert recipe["pretrained"] is True
    assert recipe["output_dir"] == f"runs/{name_of(model, width, method)}"


@each_leaf
def test_published_values(model: str, width: str, method: str):
    recipe, bits = recipe_of(model, width, method), BITS[width][0]
    like = {"mobilenetv3_small": "mobilenetv2", "resnet18": "mobilenetv2"}.get(model, model)
    decay_like = "efficientnet_lite0" if model == "resnet18" else like
    assert recipe["learning_rate"] == LEARNING_RATE[bits]
    assert recipe["scale_learning_rate"] == 1e-5
    assert recipe["weight_decay"] == WEIGHT_DECAY[decay_like, bits][method]
    assert recipe["num_train_epochs"] == (EPOCHS[model] if "a" in width else EPOCHS_FOR_WEIGHTS_ALONE)
    assert recipe["per_device_train_batch_size"] == 128
    assert (recipe["weight_optimizer"], recipe["momentum"]) == ("sgd", 0.9)
    assert recipe["lr_scheduler_type"] == "cosine"
    config = OscQATConfig(**recipe["quantization"])
    assert config.momentum == 0.001
    if method == "dampen":
        assert config.dampening == DampeningSettings(weight=0.0, weight_final=0.1, anneal_start=0.25)
    if method == "freeze":
        final = FINAL_THRESHOLD[like, bits]
        assert config.freezing == FreezingSettings(
            threshold=0.1, threshold_final=final, anneal_start=0.25, momentum=0.001, use_ema=True
        )
        # Said by the recipe itself, not left to defaults that may change.
        assert set(recipe["quantization"]["freezing"]) == names_of(FreezingSettings)


@each_leaf
def test_keys_are_known_and_make_arguments(model: str, width: str, method: str):
    recipe = recipe_of(model, width, method)
    classes = (ModelArguments, DataArguments, RunArguments, OscQATTrainingArguments)
    assert set(recipe) <= {"quantization"}.union(*(names_of(cls) for cls in classes))
    assert not recipe.keys() & {"dataset_name", "train_dir", "validation_dir"}, "left to the command line"
    ModelArguments(**part_for(ModelArguments, recipe))
    DataArguments(train_dir="train", validation_dir="validation", **part_for(DataArguments, recipe))
    RunArguments(**part_for(RunArguments, recipe))
    OscQATTrainingArguments(use_cpu=True, **part_for(OscQATTrainingArguments, recipe))


@pytest.mark.parametrize("model", MODELS)
def test_images_are_prepared_as_in_the_published_code(model: str):
    recipe = recipe_of(model, "w4a4", "freeze")
    args = DataArguments(train_dir="train", validation_dir="validation", **part_for(DataArguments, recipe))
    pretrained_cfg = timm.get_pretrained_cfg(MODELS[model])
    assert pretrained_cfg is not None
    training, evaluation = build_transforms(resolve_data_config(pretrained_cfg.to_dict(), args), args)

    crop, mirror, jitter = training.transforms[:3]
    assert (crop.size, crop.scale, crop.interpolation) == ((224, 224), (0.08, 1.0), T.InterpolationMode.BILINEAR)
    assert mirror.p == 0.5
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (None, None, None, None)
    resize, centre = evaluation.transforms[:2]
    assert (resize.size, resize.interpolation) == (248, T.InterpolationMode.BILINEAR)
    assert centre.size == (224, 224)
    for transform in (training, evaluation):
        assert transform.transforms[-1].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert transform.transforms[-1].std.tolist() == pytest.approx([0.229, 0.224, 0.225])


@each_file
def test_no_number_is_text(path: Path):
    # By PyYAML itself, which takes 1e-5 for text: people read recipes with it too.
    texts = [value for value in values_in(yaml.safe_load(path.read_text(encoding="utf-8"))) if isinstance(value, str)]
    assert not [text for text in texts if re.fullmatch(r"[-+.\d][-+.\deE]*", text)]


@each_file
def test_every_value_has_its_source_beside_it(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for line in settings:
        match = LINE.match(line)
        assert match, f"{line!r} is not 'key: value  # source'"
        if match["key"] == "include" or match["value"] is None:
            continue
        assert (match["comment"] or "").startswith(SOURCES), f"{line!r} lacks a source, one of {SOURCES}"


@each_leaf
def test_nothing_is_repeated_from_what_is_included(model: str, width: str, method: str):
    own = yaml.safe_load((RECIPES / f"{name_of(model, width, method)}.yaml").read_text(encoding="utf-8"))
    assert own.pop("include") == [f"_base_/{name}.yaml" for name in (model, width, method)]
    assert own.keys() <= {"output_dir", "weight_decay", "quantization"}
    assert own.get("quantization", {}).keys() <= {"freezing"}
    assert own.get("weight_decay") != load_recipe(RECIPES / "_base_" / f"{model}.yaml")["weight_decay"]
