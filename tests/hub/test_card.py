"""The model card: metadata, numbers, and nothing left open."""

import copy

import pytest
from jinja2 import UndefinedError

from hf_oscqat.hub.card import render_card

MEASURED = {"accuracy": 0.9611, "top5_accuracy": 1.0, "num_images": 360, "images_per_second": 800.0}
RESULTS = {
    "model": {
        "name": "mbv2-w4a4",
        "path": "org/mbv2-w4a4",
        "architecture": "mobilenetv2_100",
        "origin": "mobilenetv2_100, with pretrained weights",
        "base_model": "timm/mobilenetv2_100.ra_in1k",
        "license": "apache-2.0",
    },
    "scheme": {
        "name": "W4A4",
        "in_words": "4-bit weights and 4-bit inputs of layers",
        "weights": "4 bits, symmetric, per tensor",
        "activations": "4 bits, symmetric, per tensor",
        "first_last": "8 bits; the image stays float",
        "remedies": "freezing (threshold=0.1)",
        "batchnorm": "statistics re-estimated on 50 training batches",
    },
    "data": {
        "name": "digits",
        "dataset_id": None,
        "revision": None,
        "split": "validation",
        "num_train": 1437,
        "preprocessing": "48 x 48 pixels",
    },
    "accuracy": {
        "float": {**MEASURED, "accuracy": 0.9722},
        "rounded": {**MEASURED, "accuracy": 0.3},
        "packed": MEASURED,
    },
    "bytes": {"float": 2_876_552, "packed": 572_972},
    "oscillation": {"start": 0.19, "peak": 10.6, "end": 2.56, "frozen": 1.52},
    "layers": [{"name": "conv_stem", "shape": [16, 3, 3, 3], "weight_bits": 8, "input_bits": None}],
    "run": {
        "command": "training/run_qat.py training/recipes/quickstart.yaml",
        "epochs": 10,
        "steps": 230,
        "processes": 1,
        "device": "CPU, 2 threads",
        "seconds": 120.4,
        "versions": "torch 2.15.0",
        "date": "2026-11-23",
    },
}


def test_metadata_names_base_model_and_relation():
    data = render_card(RESULTS).data
    assert (data.base_model, data.base_model_relation) == ("timm/mobilenetv2_100.ra_in1k", "quantized")
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert "w4a4" in data.tags


def test_a_model_without_base_claims_no_relation():
    results = copy.deepcopy(RESULTS)
    results["model"] |= {"base_model": None, "license": None}
    data = render_card(results).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert "none was stated" in render_card(results).text


def test_numbers_are_those_of_the_results():
    text = render_card(RESULTS).text
    for number in ("97.22%", "30.00%", "**96.11%**", "2,876,552", "572,972", "5.0 times smaller", "10.60%"):
        assert number in text
    assert "| `conv_stem` | 16 x 3 x 3 x 3 | 8 | float |" in text


def test_without_baselines_their_rows_are_left_out():
    results = copy.deepcopy(RESULTS)
    results["accuracy"] |= {"float": None, "rounded": None}
    text = render_card(results).text
    assert "float32 |" not in text
    assert "rounded without training" not in text


def test_without_tracking_there_are_no_pictures():
    assert "oscillation.png" not in render_card({**RESULTS, "oscillation": None}).text


def test_a_missing_number_is_an_error_and_not_a_blank():
    results = copy.deepcopy(RESULTS)
    del results["bytes"]["packed"]
    with pytest.raises(UndefinedError):
        render_card(results)
