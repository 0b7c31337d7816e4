"""The studies on a network, whole but tiny, and that nothing is trained twice."""

import csv
import logging
import random

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from hf_oscqat.studies import STUDIES
from hf_oscqat.studies.base import show, write
from hf_oscqat.studies.experiment import METHODS, Experiment, ExperimentSettings

TINY = {
    "model_name_or_path": "test_efficientnet",
    "max_train_samples": 64,
    "max_eval_samples": 40,
    "batch_size": 16,
    "float_epochs": 2,
    "epochs": 3,
    "use_cpu": True,
    # So that weights of so short a training oscillate.
    "learning_rate": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that studies that run in the same process find each other's models."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("toy", "cifar10")])
def test_study_measures_and_writes(name, folder):
    study = STUDIES[name]
    few = {"reestimation": {"widths": [4]}, "sampling": {"samples": 2, "optimization_steps": 3}}.get(name, {})
    settings = study.settings(output_dir=str(folder), **TINY, **few)
    result = study.run(settings)
    files = write(study, settings, result)
    show(study, result, files)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.rows) > 1
    if name == "distances":
        assert [row["method"] for row in rows] == list(METHODS)
    assert all(path.is_file() for path in files)
    numbers = [value for row in result.rows for value in row.values() if isinstance(value, float)]
    assert torch.isfinite(torch.tensor(numbers)).all()


def test_what_was_trained_is_taken_and_other_settings_train_anew(folder, caplog):
    caplog.set_level(logging.INFO, logger="hf_oscqat.studies.experiment")
    experiment = Experiment(ExperimentSettings(output_dir=str(folder), **TINY))
    first = experiment.train("lsq")
    caplog.clear()
    Experiment(ExperimentSettings(output_dir=str(folder), **TINY)).train("lsq")
    assert not any(message.startswith("training") for message in caplog.messages)
    caplog.clear()
    other = experiment.train("lsq", weight_granularity="per_channel")
    assert "training lsq" in caplog.messages
    assert (
        other.timm_model.conv_stem.weight_quantizer.scale.shape
        != first.timm_model.conv_stem.weight_quantizer.scale.shape
    )


def test_two_studies_do_not_train_the_same_at_once(folder, monkeypatch):
    experiment = Experiment(ExperimentSettings(output_dir=str(folder), **TINY))
    taken = []

    def training(config, seed):
        for lock in experiment.folder.glob(".lsq-*.lock"):
            try:
                with FileLock(lock, timeout=0):
                    pass
            except Timeout:
                taken.append(lock)
        return experiment.calibrated()

    monkeypatch.setattr(experiment, "_train_on_grid", training)
    experiment.train("lsq", weight_bits=5)
    assert len(taken) == 1


def test_training_batches_repeat_with_their_seed_and_leave_the_generator_alone(folder):
    experiment = Experiment(ExperimentSettings(output_dir=str(folder), **TINY))
    state, others = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())
    first, second, other = (next(experiment.training_batches(1, seed=s))["pixel_values"] for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others


def test_as_many_batches_come_as_are_asked_for(folder):
    experiment = Experiment(ExperimentSettings(output_dir=str(folder), **TINY))
    batches = [batch["pixel_values"] for batch in experiment.training_batches(9)]
    assert len(batches) == 9, "there are 64 images, 4 batches"
    assert not torch.equal(batches[0], batches[4])


def test_batch_larger_than_the_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got batch_size=65 and 64 training images"):
        Experiment(ExperimentSettings(output_dir=str(tmp_path), **{**TINY, "batch_size": 65}))


@pytest.mark.parametrize("name", ["batchnorm", "reestimation"])
def test_network_without_batchnorm_is_an_error(name, tmp_path):
    study = STUDIES[name]
    settings = study.settings(
        output_dir=str(tmp_path), **{**TINY, "model_name_or_path": "test_vit", "float_epochs": 0}
    )
    with pytest.raises(ValueError, match="got test_vit, which has no batch-norm"):
        study.run(settings)


def test_folder_of_images_takes_the_place_of_the_digits(tmp_path):
    settings = ExperimentSettings(train_dir=str(tmp_path), train_val_split=0.2)
    assert settings.dataset_name is None
