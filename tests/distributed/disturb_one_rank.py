"""Let one of two processes change a weight, then send it SIGTERM; started by test_two_processes.py."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from train_and_report import RandomImages
from transformers import TrainerCallback

from hf_oscqat import OscQATConfig, OscQATTrainer, OscQATTrainingArguments, calibrate, prepare_qat
from hf_oscqat.integration.checkpoints import checkpoints
from hf_oscqat.integration.image_trainer import leave_process_group
from hf_oscqat.integration.models import timm_wrapper


class OnOneRank(TrainerCallback):
    """Does something on rank 1 when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            self.action(model)


def make_trainer(folder: Path) -> OscQATTrainer:
    """A trainer of 30 steps that compares the processes after every second."""
    images = RandomImages()
    torch.manual_seed(0)
    model = timm_wrapper("test_efficientnet", list("abcde"))
    prepare_qat(model, OscQATConfig(batchnorm_reestimation_batches=0))
    calibrate(model, [torch.stack([images[i]["pixel_values"] for i in range(8)])])
    args = OscQATTrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=4, max_steps=30, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", compare_ranks_steps=2,
    )  # fmt: skip
    return OscQATTrainer(model=model, args=args, train_dataset=images)


def change(model):
    """The smallest change that there is."""
    with torch.no_grad():
        weight = model.timm_model.blocks[1][0].conv_exp.latent_weight.view(-1)
        weight[7] = torch.nextafter(weight[7], torch.tensor(1e9))


def forget_what_is_frozen(model):
    """What is not in the tensors: whether a quantizer looks at its frozen integers."""
    model.timm_model.conv_stem.weight_quantizer.has_frozen = True


def gloo_threads() -> list[str]:
    """Names of the threads of this process that serve its connections to others."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def main(folder: Path) -> dict[str, Any]:
    """What this rank met."""
    report: dict[str, Any] = {}
    trainer = make_trainer(folder)
    trainer.add_callback(OnOneRank(2, change))
    try:
        trainer.train()
    except RuntimeError as error:
        report["error"] = str(error)
    trainer = make_trainer(folder)
    trainer.add_callback(OnOneRank(0, forget_what_is_frozen))
    try:
        trainer.train()
    except RuntimeError as error:
        report["grid_error"] = str(error)
    trainer = make_trainer(folder)
    trainer.add_callback(OnOneRank(3, lambda model: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        trainer.train()
    except SystemExit as stopped:
        report |= {"code": stopped.code, "step": trainer.state.global_step}
    report |= {"checkpoints": [path.name for path in checkpoints(folder / "run")], "rank": trainer.args.process_index}
    return report


if __name__ == "__main__":
    met = main(Path(sys.argv[1]))
    met["gloo_threads"] = [bool(gloo_threads())]
    leave_process_group()
    met["gloo_threads"].append(bool(gloo_threads()))
    Path(sys.argv[1], f"rank{met['rank']}.json").write_text(json.dumps(met))
