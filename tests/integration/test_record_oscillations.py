"""Trainer records what it trains, once, wherever it was stopped; trackers of experiments are told the same numbers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from hf_oscqat import OscQATTrainer, OscQATTrainingArguments
from hf_oscqat.report.page import write_report
from hf_oscqat.report.recording import FILE, read_recording


class Colours(Dataset):
    """Images of five classes, each a colour under noise that depends on the index alone."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + index % 5, "labels": index % 5}


@pytest.fixture
def make_trainer(make_prepared_wrapper, tmp_path):
    def make(folder="run", reestimation=2, **kwargs):
        model = make_prepared_wrapper(weight_bits=3, batchnorm_reestimation_batches=reestimation, tracker_momentum=0.1)
        defaults = {
            "output_dir": str(tmp_path / folder), "per_device_train_batch_size": 4, "max_steps": 10,
            "learning_rate": 0.1, "lr_scheduler_type": "constant", "momentum": 0.0, "logging_steps": 2,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0,
            "record_steps": 4, "eval_strategy": "steps", "eval_steps": 5,
        }  # fmt: skip
        args = OscQATTrainingArguments(**{**defaults, **kwargs})
        return OscQATTrainer(model=model, args=args, train_dataset=Colours(), eval_dataset=Colours())

    return make


def test_training_is_recorded_and_has_a_report(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    recording = read_recording(tmp_path / "run")
    assert recording.steps.tolist() == [1, 4, 8, 10]
    assert recording.total_steps == 10
    assert recording.about == {"model": "test_efficientnet", "scheme": "W3A4", "remedies": ""}
    assert len(recording.layers) == len(trainer.tracker.layers)
    last = 100 * recording.of_all_weights(recording.oscillating)[-1]
    assert last == pytest.approx(recording.log[10]["oscillating_percent"], rel=1e-4)
    for entry in trainer.state.log_history:
        numbers = {k: v for k, v in entry.items() if k not in ("step", "total_flos")}
        assert numbers.items() <= recording.log[entry["step"]].items()
    assert write_report([tmp_path / "run"]).is_file()


def test_batchnorm_is_off_before_reestimation_and_less_so_after_it(make_trainer, tmp_path):
    trainer = make_trainer(reestimation=4)
    trainer.train()
    recording = read_recording(tmp_path / "run")
    assert list(recording.batchnorm) == [5, 10]
    before, after = recording.batchnorm[10]
    assert np.isfinite(before).all()
    assert np.isfinite(after).all()
    assert np.mean(after) < np.mean(before)


def test_evaluation_after_training_leaves_what_was_recorded(make_trainer, tmp_path):
    trainer = make_trainer(reestimation=4, eval_strategy="no")
    trainer.train()
    recorded = read_recording(tmp_path / "run").batchnorm
    trainer.evaluate()
    again = read_recording(tmp_path / "run").batchnorm
    assert list(recorded) == list(again) == [10]
    np.testing.assert_array_equal(recorded[10], again[10])
    assert np.mean(recorded[10][1]) < np.mean(recorded[10][0])


def test_no_other_images_no_measurement_after_reestimation(make_trainer, tmp_path):
    make_trainer(reestimation=6).train()
    before, after = read_recording(tmp_path / "run").batchnorm[10]
    assert np.isfinite(before).all()
    assert np.isnan(after).all()


def test_recording_changes_nothing(make_trainer):
    models = []
    for recorded in (True, False):
        trainer = make_trainer(f"recorded_{recorded}", record_oscillations=recorded)
        trainer.train()
        models.append(trainer.model.state_dict())
    for mine, other in zip(*(model.values() for model in models), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{"record_oscillations": False}, {"track_oscillations": False}])
def test_nothing_is_written_where_nothing_is_wanted(make_trainer, tmp_path, options):
    make_trainer(**options).train()
    assert not (tmp_path / "run" / FILE).exists()


def test_a_run_that_continues_is_recorded_as_if_it_had_not_been_stopped(make_trainer, tmp_path):
    whole = make_trainer("whole")
    whole.train()
    make_trainer(save_strategy="steps", save_steps=4).train()  # dies after step 10; its last checkpoint is of step 8
    with (tmp_path / "run" / FILE).open("a") as file:
        file.write('{"row":"step","st')
    make_trainer().train(str(tmp_path / "run" / "checkpoint-8"))
    mine, other = (read_recording(tmp_path / name) for name in ("run", "whole"))
    assert mine.steps.tolist() == other.steps.tolist()
    for key in ("oscillating", "frozen", "weight_scale", "distances", "sampled_ints"):
        np.testing.assert_array_equal(getattr(mine, key), getattr(other, key))
    assert [scalars.get("loss") for scalars in mine.log.values()] == [s.get("loss") for s in other.log.values()]


def test_evaluation_before_training_loses_nothing(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=8).train()
    trainer = make_trainer()
    trainer.evaluate()
    assert read_recording(tmp_path / "run").steps.tolist() == [1, 4, 8, 10]
    trainer.train(str(tmp_path / "run" / "checkpoint-8"))
    assert read_recording(tmp_path / "run").steps.tolist() == [1, 4, 8, 10]


def test_micro_batches_are_no_steps(make_trainer, tmp_path):
    make_trainer(gradient_accumulation_steps=2, record_steps=1, max_steps=3).train()
    assert read_recording(tmp_path / "run").steps.tolist() == [1, 2, 3]


def test_a_negative_interval_is_refused(make_trainer):
    with pytest.raises(ValueError, match="got record_steps=-1"):
        make_trainer(record_steps=-1)


def test_tensorboard_is_told_the_same(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    told = {tag.removeprefix("train/"): events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {"loss", "oscillating_percent", "frozen_percent", "scale_caused_percent"} <= told.keys()
    entries = [entry for entry in trainer.state.log_history if "oscillating_percent" in entry]
    for key in ("loss", "oscillating_percent", "frozen_percent"):
        assert [event.step for event in told[key]] == [entry["step"] for entry in entries]
        assert [event.value for event in told[key]] == pytest.approx([entry[key] for entry in entries], rel=1e-6)


TRACKIO = """
import json, logging, sys
import timm, torch
from trackio.sqlite_storage import SQLiteStorage
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from hf_oscqat import OscQATConfig, OscQATTrainer, OscQATTrainingArguments, calibrate, prepare_qat

logging.disable()
torch.manual_seed(0)
model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_efficientnet", num_labels=5))
prepare_qat(model, OscQATConfig(weight_bits=3, batchnorm_reestimation_batches=0))
calibrate(model, [{"pixel_values": torch.randn(4, 3, 32, 32)}])
args = OscQATTrainingArguments(
    sys.argv[1], max_steps=3, per_device_train_batch_size=2, logging_steps=1, use_cpu=True, disable_tqdm=True,
    save_strategy="no", report_to="trackio", project="oscillations",
)
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0} for _ in range(6)]
trainer = OscQATTrainer(model=model, args=args, train_dataset=images)
trainer.train()
(run,) = SQLiteStorage.get_runs("oscillations")
told = SQLiteStorage.get_logs("oscillations", run)
print(json.dumps([told, trainer.state.log_history], default=str))
"""


def test_trackio_is_told_the_same(tmp_path):
    """In a process of its own, because it goes on writing until its process ends."""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OSCQAT_FUSED_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, logged = json.loads(done.stdout.splitlines()[-1])
    for key in ("loss", "oscillating_percent", "frozen_percent"):
        its = [row[f"train/{key}"] for row in told if f"train/{key}" in row]
        assert its == pytest.approx([entry[key] for entry in logged if key in entry])
        assert len(its) == 3
