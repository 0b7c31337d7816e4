"""A disk that is full while something is written: what was there before stays whole."""

import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForImageClassification

from hf_oscqat.hub.inspect import inspect_packed
from hf_oscqat.integration.checkpoints import what_is_wrong

SAVE_AGAIN = """
import resource, sys
import torch
from transformers import AutoModelForImageClassification
import hf_oscqat

torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_pretrained(sys.argv[2])
except Exception as error:
    raise SystemExit(f"{type(error).__name__}: {error}")
"""


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes to stand for a full disk")
def test_packed_checkpoint_that_was_there_stays_whole(folder):
    before = contents(folder)
    done = run(SAVE_AGAIN, folder, folder)
    assert done.returncode == 1
    assert "File too large" in done.stderr or "SafetensorError" in done.stderr, done.stderr[-500:]
    assert contents(folder) == before
    assert inspect_packed(str(folder)).rows


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 500 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system takes rights that this process does not have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_packed_checkpoint_on_a_full_disk_stays_whole(small_disk, digits_folder):
    model = AutoModelForImageClassification.from_pretrained(digits_folder)
    model.save_pretrained(small_disk / "packed")
    before = contents(small_disk)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    with pytest.raises(Exception, match="No space left on device"):
        model.save_pretrained(small_disk / "packed")
    (small_disk / "ballast").unlink()
    assert contents(small_disk) == before
    assert inspect_packed(str(small_disk / "packed")).rows
    model.save_pretrained(small_disk / "packed")


TRAINING = """
import resource, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from test_trainer import RandomImages
from transformers import AutoModelForImageClassification, TrainerCallback
from hf_oscqat import OscQATTrainer, OscQATTrainingArguments

torch.set_num_threads(1)

class FillTheDisk(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

args = OscQATTrainingArguments(
    output_dir=sys.argv[3], max_steps=2, save_steps=1, save_strategy="steps", per_device_train_batch_size=4,
    report_to="none", use_cpu=True, disable_tqdm=True, record_oscillations=False,
)
model = AutoModelForImageClassification.from_pretrained(sys.argv[2])
trainer = OscQATTrainer(
    model=model, args=args, train_dataset=RandomImages(), eval_dataset=RandomImages(), callbacks=[FillTheDisk]
)
trainer.train()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes to stand for a full disk")
def test_training_checkpoint_that_was_there_stays_whole(make_prepared_wrapper, tmp_path):
    make_prepared_wrapper(batchnorm_reestimation_batches=2).save_pretrained(tmp_path / "qat")
    here = __file__.rpartition("/")[0]
    done = run(TRAINING, here, tmp_path / "qat", tmp_path / "run")
    assert done.returncode != 0
    assert "File too large" in done.stderr or "SafetensorError" in done.stderr, done.stderr[-500:]
    assert what_is_wrong(tmp_path / "run" / "checkpoint-1") is None
    assert not (tmp_path / "run" / "checkpoint-2").exists()
