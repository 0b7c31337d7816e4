"""Train a few steps on a global batch that may be split, and write down everything that training left behind.

accelerate launch --config_file ../../training/accelerate/cpu_2proc.yaml same_result.py FOLDER '{"NAME": {..}, ..}'
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import Dataset

from accelerate import PartialState
from hf_oscqat import OscQATConfig, OscQATTrainer, OscQATTrainingArguments, calibrate, prepare_qat
from hf_oscqat.integration.image_trainer import leave_process_group
from hf_oscqat.integration.models import timm_wrapper

GLOBAL_BATCH = 32
METHODS = {
    "lsq": {},
    "dampen": {"dampening": {"weight": 0.1, "weight_final": 1.0, "anneal_start": 0.0}},
    "freeze": {
        "freezing": {"momentum": 0.1, "threshold": 0.11, "threshold_final": 0.11, "anneal_start": 0.0},
    },
}


class Images(Dataset):
    """Float64 images of five classes, each a colour under noise that depends on the index alone."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(3, 32, 32, generator=generator, dtype=torch.float64)
        return {"pixel_values": (noise + index % 5 - 2) / 2, "labels": index % 5}


class SyncedBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm computes, which refuses to run on a CPU."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.act(super().forward(x))
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        count = x.numel() / x.shape[1]
        if torch.distributed.is_initialized():
            sums, count = all_reduce(sums), count * torch.distributed.get_world_size()
        mean, square = sums / count
        normal = (x - mean[:, None, None]) * (square - mean.square() + self.eps).rsqrt()[:, None, None]
        return self.act(normal * self.weight[:, None, None] + self.bias[:, None, None])


def sync_batchnorm(model: nn.Module) -> None:
    """Replace the class of every batch-norm layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm


class ExactTrainer(OscQATTrainer):
    """Keeps the losses in the precision of the model; the log has them in float32."""

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss]
        return loss

    def exact_losses(self, accumulation: int) -> list[float]:
        """One for each step, averaged over the processes."""
        losses = torch.stack(self.losses).view(-1, accumulation).sum(1)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(losses)
        return (losses / self.args.world_size).tolist()


def train(folder: Path, method: str, accumulation: int, batchnorm: str, steps: int) -> None:
    """Train and write `<rank>.safetensors` and `<rank>.json`.

    Rates are small, because low-bit training amplifies what rounding makes different, until a weight next to a tie
    is rounded elsewhere. How soon depends on the processor's order of sums: with rates of 1e-4 some differ by 1e-16
    and others by 1e-5 after 60 steps. With these they differed by 1e-20 where that was seen, and the last step
    alone moves half of the tensors by 8e-6 or more: a wrong step could not hide below the tolerance.
    """
    images = Images()
    torch.manual_seed(0)
    model = timm_wrapper("test_efficientnet", list("abcde")).double()
    first = torch.stack([images[i]["pixel_values"] for i in range(32)])
    config = {"weight_bits": 3, "activation_bits": 3, "batchnorm_reestimation_batches": 0, **METHODS[method]}
    prepare_qat(model, OscQATConfig(**config))
    calibrate(model, [first])
    if batchnorm == "fixed":
        model.timm_model = freeze_batch_norm_2d(model.timm_model)
    elif batchnorm == "synced":
        sync_batchnorm(model)
    world_size = OscQATTrainingArguments(output_dir=str(folder / "run"), report_to="none", use_cpu=True).world_size
    share = GLOBAL_BATCH // world_size // accumulation
    args = OscQATTrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=share, gradient_accumulation_steps=accumulation,
        max_steps=steps, learning_rate=2e-5, momentum=0.5, scale_learning_rate=1e-5, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, compare_ranks_steps=10,
    )  # fmt: skip
    trainer = ExactTrainer(model=model, args=args, train_dataset=images)
    trainer.train()
    rank = args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in trainer.model.state_dict().items() if "num_batches_tracked" not in k}
    save_file(state, str(folder / f"{rank}.safetensors"))
    report = {
        "processes": args.world_size,
        "losses": trainer.exact_losses(accumulation),
        "frozen": trainer.tracker.frozen_fraction,
        "oscillating": trainer.tracker.oscillating_fraction,
    }
    (folder / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    for name, settings in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1], name), **settings)
    PartialState().wait_for_everyone()
    leave_process_group()
