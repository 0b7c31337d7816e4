"""A packed checkpoint as a run leaves it, small: measured on digits, with card, recipe, pictures and results."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.hub.card import CARD
from hf_oscqat.integration.data import DataArguments, build_transforms, collate, load_image_data, resolve_data_config
from hf_oscqat.integration.evaluate import evaluate_accuracy
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.integration.publish import plain_results, write_companions
from hf_oscqat.integration.verify import claim_arguments

LOG = [{"step": step, "oscillating_percent": 3.0 - step, "frozen_percent": float(step)} for step in (1, 2)]


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """The folder; tests copy it before they change anything."""
    args = DataArguments(dataset_name="digits", img_size=32, crop_pct=1.0, max_eval_samples=60)
    data = load_image_data(args, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm_wrapper("test_efficientnet", data.class_names)
        preparation = resolve_data_config(model.timm_model.pretrained_cfg, args)
        model.config.pretrained_cfg = {
            key: value
            for key, value in (model.timm_model.pretrained_cfg | preparation).items()
            if key != "num_classes"
        }
        images = torch.randn(8, 3, 32, 32)
        reestimate_batchnorm(model, [images])
        calibrate(prepare_qat(model, OscQATConfig(weight_bits=3)), [{"pixel_values": images}])
    _, data.validation.transform = build_transforms(preparation, args, normalize=False)
    packed = pack(model)
    measured = asdict(
        evaluate_accuracy(packed, data.validation, batch_size=30, collate=collate, cpu=True, show_progress=False)
    )
    folder = tmp_path_factory.mktemp("published") / "packed"
    packed.save_pretrained(folder)
    results = plain_results(packed, str(folder), "mit")
    results["accuracy"] |= {"float": {**measured, "accuracy": 0.9}, "rounded": {**measured, "accuracy": 0.05}}
    results["accuracy"]["packed"] = measured
    results["bytes"]["packed"] = (folder / "model.safetensors").stat().st_size
    results["oscillation"] = {"start": 2.0, "peak": 2.0, "end": 1.0, "frozen": 2.0, "distances": False}
    results["data"] = {
        "name": "digits", "dataset_id": None, "config": None, "revision": None, "split": data.split,
        "num_train": len(data.train), "skipped_images": 0, "preprocessing": "32 x 32 pixels",
        "evaluation": claim_arguments(args, 3, preparation, held_out=data.held_out),
    }  # fmt: skip
    results["run"] = {
        "command": "training/run_qat.py tiny.yaml", "recipe": True, "epochs": 1.0, "steps": 2, "processes": 1,
        "device": "CPU", "seconds": 1.0, "versions": "torch", "commit": None, "date": "2026-11-25",
    }  # fmt: skip
    results = json.loads(json.dumps(results))
    write_companions(folder, results, recipe={"model_name_or_path": "test_efficientnet"}, log_history=LOG)
    return folder


@pytest.fixture
def folder(digits_folder, tmp_path):
    """A copy to change, under the name that a run gives it."""
    return Path(shutil.copytree(digits_folder, tmp_path / "runs" / "quickstart" / "packed"))


def edit_results(folder, **changes):
    """Change entries of `results.json` of a folder: `section={key: value}`; the card is rendered when it is pushed."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    for section, change in changes.items():
        results[section] = {**(results[section] or {}), **change}
    path.write_text(json.dumps(results))
    (folder / CARD).unlink(missing_ok=True)
