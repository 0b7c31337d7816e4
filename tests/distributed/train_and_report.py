"""Train a few steps and write what this process ended with; started by test_two_processes.py through accelerate."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from accelerate import PartialState
from hf_oscqat import (
    OscQATConfig,
    OscQATTrainer,
    OscQATTrainingArguments,
    calibrate,
    prepare_qat,
    reestimate_batchnorm,
)
from hf_oscqat.checkpoint import digest
from hf_oscqat.integration.image_trainer import ImageTrainer, leave_process_group
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.quantization.layers import quantizers

FREEZING = {"momentum": 0.1, "threshold": 0.1, "threshold_final": 0.1, "anneal_start": 0.0}


class RandomImages(Dataset):
    """Images of five classes, each a colour under noise that depends on the index alone."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, object]:
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + index % 5, "labels": index % 5}


def main(folder: Path) -> None:
    images = RandomImages()
    torch.manual_seed(0)
    model = timm_wrapper("test_efficientnet", list("abcde"))
    prepare_qat(model, OscQATConfig(freezing=FREEZING, batchnorm_reestimation_batches=2))
    calibrate(model, [torch.stack([images[i]["pixel_values"] for i in range(8)])])
    if PartialState().process_index == 1:  # DistributedDataParallel is to make this one's grids those of the first
        for _, quantizer in quantizers(model):
            quantizer.set_range(2 * quantizer.scale, signed=not quantizer.is_signed)
    args = OscQATTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=0.05,
        scale_learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = OscQATTrainer(model=model, args=args, train_dataset=images, eval_dataset=images)
    trainer.train()
    trainer.reestimate_batchnorm()
    # Unequal shares: six batches here, four there, compared with all images at once.
    every = torch.randn(10, 4, 5, 3, 3, generator=torch.Generator().manual_seed(7))
    layer = torch.nn.BatchNorm2d(5)
    share = every[:6] if args.process_index == 0 else every[6:]
    reestimate_batchnorm(torch.nn.Sequential(layer), list(share), total_variance=True)
    nothing = torch.nn.BatchNorm2d(5)
    reestimate_batchnorm(nothing, list(every) if args.process_index == 0 else [])
    together = every.flatten(0, 1)
    difference = max(
        float((layer.running_mean - together.mean((0, 2, 3))).abs().max()),
        float((layer.running_var - together.var((0, 2, 3))).abs().max()),
        float((nothing.running_mean - together.mean((0, 2, 3))).abs().max()),
    )
    state = {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()}
    # In float, on other images each, to a checkpoint.
    float_args = TrainingArguments(
        output_dir=str(folder / "float"),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    float_trainer = ImageTrainer(
        model=timm_wrapper("test_efficientnet", list("abcde")), args=float_args, train_dataset=images
    )
    float_trainer.train()
    float_state = {name: digest(tensor) for name, tensor in float_trainer.model.state_dict().items()}
    report = {
        "float_state": float_state,
        "signed": [quantizer.is_signed for _, quantizer in quantizers(trainer.model)],
        "processes": args.world_size,
        "frozen": trainer.tracker.frozen_fraction,
        "state": state,
        "batchnorm_difference": difference,
    }
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
