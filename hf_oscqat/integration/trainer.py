"""`OscQATTrainer`: transformers' Trainer for a prepared model.

It knows the places where a remedy may act and none of the remedies; everything it does can be done in a plain PyTorch
loop with the same functions.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Sized
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import CONFIG_NAME

from hf_oscqat.config import OscQATConfig, check_keys
from hf_oscqat.diagnosis import compare_ranks, dead_quantizers, not_finite, scales_at_minimum
from hf_oscqat.hub.push import check_push, push_folder
from hf_oscqat.integration.checkpoints import whole_folder
from hf_oscqat.integration.data import randomness_of
from hf_oscqat.integration.evaluate import accuracy_metrics, keep_top5
from hf_oscqat.integration.export import pack
from hf_oscqat.integration.image_trainer import ImageTrainer
from hf_oscqat.integration.optimizer import SCALE_SCHEDULES, OscQATOptimizer, create_optimizer
from hf_oscqat.integration.publish import (
    command_line,
    oscillation_facts,
    plain_results,
    provenance,
    published_step,
    run_facts,
    write_companions,
)
from hf_oscqat.integration.recording import RecordOscillations
from hf_oscqat.prepare import model_parameters, quantizer_parameters
from hf_oscqat.quantization.layers import quantized_layers, quantizers
from hf_oscqat.remedies.base import take_tick
from hf_oscqat.remedies.batchnorm import (
    average_over_processes,
    batchnorm_layers,
    evaluation_mode,
    reestimate_batchnorm,
)
from hf_oscqat.remedies.tracker import OscillationTracker
from hf_oscqat.report.recorder import running_statistics, set_running_statistics

logger = logging.getLogger(__name__)

GRID = (
    "weight_bits", "activation_bits", "weight_granularity", "weight_scheme", "activation_scheme", "first_last_bits",
    "overrides", "modules_to_not_convert", "scale_domain",
)  # fmt: skip
"""Settings that say which values weights and inputs can have."""
RECORDED_BATCHES = 4
"""Batches that show, on images of their own, how good re-estimated statistics are; for the report only."""


@dataclass
class OscQATTrainingArguments(TrainingArguments):
    """Training arguments of transformers, with what low-bit training adds and defaults that suit it.

    Different from transformers by default: SGD with a cosine schedule, no gradient clipping, no removal of dataset
    columns, and no broadcast of buffers before every forward of DDP (all ranks compute the same ones).

    Args:
        weight_optimizer: "sgd" or "adamw" for everything but scales; scales always take Adam.
        momentum: of SGD.
        scale_learning_rate: of Adam for scales and zero-points.
        scale_lr_scheduler_type: "constant", as published, or "as_weights": the schedule of the weights' rate. Scales
            that move on while the weights have come to rest keep pushing weights over thresholds to the end.
        decay_norm_and_bias: whether weight decay also acts on biases and normalisation, as in the published code.
        channels_last: use the memory format that GPUs with tensor cores prefer for convolutions.
        track_oscillations: keep oscillation statistics also when no remedy needs them, for the log and the report.
        record_oscillations: write what is tracked to `oscillation.jsonl` in `output_dir`, for `oscqat report`.
        record_steps: steps between recordings; 0 takes a 200th of training, and 10 at least.
        max_skipped_steps: a step whose gradient is not finite is not made; more than this many in a row end training
            (three times as many in fp16, whose scaler finds its scale by skipping).
        compare_ranks_steps: every so many steps the processes compare weights, scales and statistics; 0 never does.

    Raises:
        ValueError: if FSDP, DeepSpeed, another hub_strategy than "end", `optim` or evaluation in 16 bits is asked for,
            `weight_optimizer` or `scale_lr_scheduler_type` is unknown, or `record_steps` negative.
    """

    weight_optimizer: str = field(default="sgd", metadata={"help": "sgd or adamw, for everything but scales."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    scale_learning_rate: float = field(default=1e-5, metadata={"help": "Adam's rate for scales."})
    scale_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Schedule of the scales' rate: constant, as published, or as_weights."}
    )
    decay_norm_and_bias: bool = field(default=True, metadata={"help": "Weight decay on biases and normalisation."})
    channels_last: bool = field(default=False, metadata={"help": "Use the channels_last memory format."})
    track_oscillations: bool = field(default=True, metadata={"help": "Keep oscillation statistics."})
    record_oscillations: bool = field(default=True, metadata={"help": "Record oscillations for `oscqat report`."})
    record_steps: int = field(
        default=0, metadata={"help": "Steps between recordings; 0 takes a 200th of training, and 10 at least."}
    )
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row without a finite gradient, at most."})
    compare_ranks_steps: int = field(default=100, metadata={"help": "Steps between comparisons of the processes."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the weights' learning rate."})
    learning_rate: float = field(default=0.01, metadata={"help": "Learning rate of the weights."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step, whatever logging_steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the weights' gradient norm; 0 does not."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not take."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "As in DistributedDataParallel."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Ask before training whether a push will be possible; run_qat.py pushes the packed checkpoint "
            "with its card in the end, a script of your own by trainer.push_to_hub()."
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to: org/name; by default the name of output_dir."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub: only at the end."})

    def __post_init__(self) -> None:
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if self.push_to_hub and strategy != "end":
            raise ValueError(
                f"got hub_strategy={strategy!r}, expected 'end': what is pushed is the packed checkpoint at the "
                "end. Training checkpoints hold pickles, and stay where they are"
            )
        if self.weight_optimizer not in ("sgd", "adamw"):
            raise ValueError(f"got weight_optimizer={self.weight_optimizer!r}, expected 'sgd' or 'adamw'")
        check_keys([self.scale_lr_scheduler_type], SCALE_SCHEDULES, "scale_lr_scheduler_type")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "got bf16_full_eval or fp16_full_eval, expected neither: transformers would round the trained weights "
                "in place. With bf16=True or fp16=True evaluation has the precision of training"
            )
        if self.optim != _default("optim") or self.optim_args:
            raise ValueError(
                f"got optim={str(self.optim)!r}, optim_args={self.optim_args!r}, expected the defaults: use "
                "weight_optimizer ('sgd' or 'adamw') and momentum, or pass optimizers=(optimizer, scheduler)"
            )
        if self.record_steps < 0:
            raise ValueError(f"got record_steps={self.record_steps!r}, expected a number of steps, or 0")
        sharded = "DeepSpeed" if self.deepspeed else "FSDP" if self.fsdp else None
        sharded = sharded or ("FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None)
        sharded = sharded or ("DeepSpeed" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None)
        if sharded:
            raise ValueError(
                f"got {sharded}, expected plain data parallelism: oscillation statistics and frozen integers belong "
                "to whole weights. The models that this trains fit on one device; use DistributedDataParallel"
            )
        super().__post_init__()
        if self.torch_compile:
            from torch._inductor import config as inductor

            # Triton's division is approximate by default, and what is near a threshold would train at one integer and
            # be packed with another.
            inductor.eager_numerics.division_rounding = True
        if self.n_gpu > 1:
            raise ValueError(
                f"got one process for {self.n_gpu} GPUs, expected one process each: transformers would choose "
                "DataParallel, which cannot copy these layers. Use accelerate launch --multi_gpu, or set "
                "CUDA_VISIBLE_DEVICES to one GPU"
            )


def _default(name: str) -> Any:
    return TrainingArguments.__dataclass_fields__[name].default


class OscQATTrainer(ImageTrainer):
    """Trains a prepared and calibrated model, with the remedies of its config.

    Args:
        model: a transformers model after `prepare_qat` and `calibrate`, or one loaded in training form.
        args: `OscQATTrainingArguments`.
        **kwargs: as in transformers, without `model_init`. `compute_metrics` defaults to top-1 and top-5 accuracy.

    Attributes:
        tracker: the oscillation tracker.
        remedies: what acts against oscillation.
        skipped_steps: steps of this process that were not made, because their gradient was not finite.

    Raises:
        ValueError: if the model is not prepared or not calibrated, batch-norm is to be re-estimated from a dataset
            that cannot be indexed, or an argument of transformers does not fit.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, args: OscQATTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "got model_init, expected a model: tracker and remedies belong to one. For a search of "
                "hyper-parameters make a model and a trainer for each trial"
            )
        if args is not None and not isinstance(args, OscQATTrainingArguments):
            raise ValueError(f"got args of {type(args).__name__}, expected OscQATTrainingArguments")
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        if model is None or not isinstance(config, OscQATConfig) or not any(True for _ in quantized_layers(model)):
            if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
                raise ValueError(
                    f"got a bare {type(model).__name__}, expected transformers' wrapper of a timm model, after "
                    'hf_oscqat.prepare_qat: AutoModelForImageClassification.from_pretrained("timm/..") makes one'
                )
            raise ValueError("got a model that is not prepared, expected one after hf_oscqat.prepare_qat")
        uncalibrated = [name for name, quantizer in quantizers(model) if not quantizer.calibrated]
        if uncalibrated:
            raise ValueError(
                f"got {len(uncalibrated)} quantizers without a range ({uncalibrated[0]}, ..), expected none: run "
                "hf_oscqat.calibrate(model, batches)"
            )
        if kwargs.get("optimizer_cls_and_kwargs") is not None:
            raise ValueError(
                "got optimizer_cls_and_kwargs, expected none: scales and weights take an optimizer each. Use "
                "weight_optimizer, or pass optimizers=(optimizer, scheduler)"
            )
        args = OscQATTrainingArguments() if args is None else args
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if "compute_metrics" not in kwargs:
            kwargs["compute_metrics"] = accuracy_metrics
            kwargs.setdefault("preprocess_logits_for_metrics", keep_top5)
        self.oscqat_config = config
        self.remedies = config.remedies()
        # Before the model is wrapped or loaded into: the statistics are buffers of its layers.
        self.tracker = None
        if args.track_oscillations:
            self.tracker = OscillationTracker(model, config.momentum, use_ema=config.use_ema)
        if self.tracker is None and self.remedies:
            raise ValueError("got track_oscillations=False with remedies in the config, which need the tracker")
        if config.freezing is not None and self.tracker is not None and not self.tracker.layers:
            raise ValueError(
                "got freezing and no weights of at most 4 bits, expected some: wider ones are not tracked, because "
                "their oscillations have no effect. Remove freezing from the config"
            )
        if self.remedies and all(layer.weight_quantizer is None for _, layer in quantized_layers(model)):
            names = " and ".join(remedy.name for remedy in self.remedies)
            raise ValueError(
                f"got {names} and no quantized weights, expected some: remedies act on weights. Set weight_bits, or "
                "remove them from the config"
            )
        self._remedy_losses: dict[str, Any] = {}
        self._loss_count = 0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._gradient_dropped = False
        self._grad_norm: float | None = None  # of the step being made; not known while fp16's scaler has it scaled
        self._hooked: torch.optim.Optimizer | None = None
        self._ticked = False
        self._num_evaluated = 0
        self._begins_step = True
        self._batchnorm = batchnorm_layers(model)
        self._statistics: list[torch.Tensor] = []
        self._dead: list[str] | None = None
        self._statistics_are_current = False
        self._warned: set[str] = set()
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(_LogLastStep)
        self.add_callback(_NoteSteps(self))
        self._recording: RecordOscillations | None = None
        if args.record_oscillations and self._tracks:
            scheme = f"W{config.weight_bits or 32}A{config.activation_bits or 32}"
            names = " and ".join(remedy.name.replace("_", " ") for remedy in self.remedies)
            about = {"model": str(getattr(model.config, "architecture", "")), "scheme": scheme, "remedies": names}
            self._recording = RecordOscillations(self, about)
            self.add_callback(self._recording)
        in_order = not isinstance(self.train_dataset, Sized) or isinstance(self.train_dataset, IterableDataset)
        if self._reestimates and self.train_dataset is not None and in_order:
            raise ValueError(
                "got a training dataset without a length, expected one that can be indexed: batch-norm re-estimation "
                "draws from it. Or set batchnorm_reestimation_batches=0"
            )

    @property
    def step(self) -> int:
        """The optimizer step being made, counted from 1."""
        return self.state.global_step + 1

    def _check_origin(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another number of processes, or of a model on another grid.

        Raises:
            ValueError: if it is one.
        """
        super()._check_origin(checkpoint)
        found = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8")).get("quantization_config") or {}
        wanted = self.oscqat_config.to_dict()
        if isinstance(found.get("overrides"), dict):  # whose order a file does not keep, so earlier versions lost it
            wanted["overrides"] = self.oscqat_config.overrides
        # What acts in training may be changed on the way; what values the weights can have may not.
        changed = sorted(key for key in GRID if found.get(key) != wanted[key])
        if changed:
            raise ValueError(
                f"got checkpoint {checkpoint} of a model with other settings of {', '.join(changed)}, expected the "
                "same to continue: prepare the model as it was, or begin anew in another output_dir"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and config; transformers would push as well, at each call, and on one process only."""
        super().save_model(output_dir, _internal_call=True)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Find out before training whether a push will be possible; transformers would make the repository only.

        Raises:
            ValueError: if the token may not write there.
        """
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            self.hub_model_id = self.args.hub_model_id = check_push(
                name, token=token or self.args.hub_token, private=self.args.hub_private_repo or None
            )

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *,
        license: str | None = None,
        base_model: str | None = None,
        dataset_name: str | None = None,
        **push_arguments: Any,
    ) -> str | None:
        """Evaluate, pack into `<output_dir>/packed`, and push that with its card and pictures in one commit.

        Args:
            commit_message: title of the commit.
            blocking: True; a push in the background could be cut off by the end of the program.
            token: None takes `hub_token`, the stored one, or HF_TOKEN.
            revision: the branch; None takes `hub_revision`, or main.
            license: of the result; None inherits that of the base model.
            base_model: Hub id of the float model; None for one trained from scratch, which needs a `license`.
            dataset_name: Hub id of the evaluation data, for the card.
            **push_arguments: as in `push_folder`: private, create_pr.

        Returns:
            Address of the repository or of the pull request; None on processes other than the first.

        Raises:
            ValueError: if the licence is not known, or the Hub refuses; see `push_folder`.
        """
        if not blocking:
            raise ValueError("got blocking=False, expected True: nobody would hear of a push that fails")
        if license is None and base_model is None:
            raise ValueError("got neither license nor base_model, expected one: a model trained from scratch has none")
        metrics = {} if self.eval_dataset is None else self.evaluate()
        if not self.is_world_process_zero():
            return None
        token, inherited = token or self.args.hub_token, license is None
        if base_model is not None:
            base_model, license = provenance(base_model, license=license, token=token)
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        with whole_folder(Path(str(self.args.output_dir), "packed")) as folder:
            packed: PreTrainedModel = pack(model)
            packed.save_pretrained(folder)
            results = self._results(name, metrics, license, base_model, dataset_name, token)
            results["model"]["license_inherited"] = inherited
            results["bytes"]["packed"] = (folder / "model.safetensors").stat().st_size
            write_companions(folder, results, log_history=self.state.log_history)
        pushed = push_folder(
            Path(str(self.args.output_dir), "packed"),
            name,
            token=token,
            message=commit_message,
            revision=revision or self.args.hub_revision,
            **{"private": self.args.hub_private_repo or None, **push_arguments},
        )
        return pushed.url

    def _results(
        self,
        name: str,
        metrics: dict[str, float],
        license: str | None,
        base_model: str | None,
        dataset_name: str | None,
        token: str | None,
    ) -> dict[str, Any]:
        """Return for the card what Trainer knows; how its data were prepared it does not."""
        measured = None
        if "eval_accuracy" in metrics and "eval_top5_accuracy" in metrics:
            measured = {
                "accuracy": metrics["eval_accuracy"],
                "top5_accuracy": metrics["eval_top5_accuracy"],
                "num_images": self._num_evaluated,
                "images_per_second": metrics.get("eval_samples_per_second", 0.0),
            }
        command = command_line([Path(sys.argv[0]).name, *sys.argv[1:]], self.args.hub_token, token)
        oscillation = oscillation_facts(self.state.log_history, published_step(self))
        results = plain_results(self.model, name, license)
        results["model"] |= {"base_model": base_model, "origin": base_model or results["model"]["architecture"]}
        if dataset_name is not None:
            results["data"] = {
                "name": dataset_name,
                "dataset_id": dataset_name,
                "config": None,
                "revision": None,
                "split": "the eval_dataset that Trainer was given",
                "num_train": len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0,
                "skipped_images": 0,
                "preprocessing": "that of the training script",
                "evaluation": None,
            }
        results["accuracy"]["packed"] = measured
        results["oscillation"] = None if oscillation is None else {**oscillation, "distances": False}
        runtime = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        seconds = runtime[-1] if runtime and not self._was_resumed else None
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(self.args.mixed_precision, "float32")
        results["run"] = run_facts(self, command=command, seconds=seconds, recipe=False) | {"precision": precision}
        return results

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make one optimizer of two: weights by SGD or AdamW, scales by Adam."""
        if self.optimizer is None:  # type: ignore[has-type]
            args: OscQATTrainingArguments = self.args
            optimizer = create_optimizer(
                self._weight_groups(),
                quantizer_parameters(self.model),
                [q.scale for _, q in quantizers(self.model) if isinstance(q.scale, nn.Parameter)],
                weight_optimizer=args.weight_optimizer,
                learning_rate=args.learning_rate,
                momentum=args.momentum,
                adam_betas=(args.adam_beta1, args.adam_beta2),
                adam_epsilon=args.adam_epsilon,
                scale_learning_rate=args.scale_learning_rate,
            )
            self.optimizer = optimizer
        # Also of an optimizer that Trainer was given, and accelerate may have wrapped it.
        hooked = getattr(self.optimizer, "optimizer", self.optimizer)
        if hooked is not self._hooked:
            # Fires between backward and the step, once per step that is really taken: not for the micro-batches of
            # gradient accumulation, nor for a step that fp16's scaler skips.
            hooked.register_step_pre_hook(self._tick)
            self._hooked = hooked
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Schedule the weights' learning rate, and that of the scales if it is not to stay constant.

        Raises:
            ValueError: if the scales' rate is to stay constant and the schedule is not one of time alone.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        args: OscQATTrainingArguments = self.args
        ours = getattr(scheduler.optimizer, "optimizer", scheduler.optimizer)
        # Which groups of an optimizer that Trainer was given hold scales is not known; all have its schedule.
        if args.scale_lr_scheduler_type == "constant" and isinstance(ours, OscQATOptimizer):
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"got lr_scheduler_type={str(args.lr_scheduler_type)!r} with a constant rate of the scales, "
                    "which it would change too: set scale_lr_scheduler_type='as_weights', or take another schedule"
                )
            for i in range(len(ours.weights.param_groups), len(scheduler.lr_lambdas)):
                scheduler.lr_lambdas[i] = _constant
                group = scheduler.optimizer.param_groups[i]
                group["lr"] = scheduler.base_lrs[i]
        return scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see `ImageTrainer.train`; in the end the model has re-estimated batch-norm statistics.

        Whoever packs it then, with or without an evaluation, packs statistics of the weights that it has.

        Raises:
            ValueError: if there is no dataset to re-estimate them from.
        """
        if self._reestimates and self.train_dataset is None:
            raise ValueError(
                "got train_dataset=None, expected the training data also where get_train_dataloader is your own: "
                "batch-norm re-estimation draws from it. Or set batchnorm_reestimation_batches=0"
            )
        output = super().train(*args, **kwargs)
        self._finish_statistics()
        return output

    def _finish_statistics(self) -> None:
        if not self._reestimates:
            average_over_processes(batchnorm_layers(self.model))
        elif not self._statistics_are_current:
            self.reestimate_batchnorm()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; a gradient that is not finite is dropped, and with it the step.

        Gradients are summed over the processes by then, so all of them drop the same ones. In fp16 the scaler does it.

        Raises:
            RuntimeError: after `max_skipped_steps` in a row, with the names of the parameters.
        """
        self._statistics_are_current = False
        if self._begins_step:
            self._statistics = [statistic.clone() for statistic in self._running_statistics()]
        self._begins_step = self.accelerator.sync_gradients
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._grad_norm = self._norm_of_gradients()
            bad = []
            if not math.isfinite(self._grad_norm):  # it may also have overflowed
                bad = not_finite((name, parameter.grad) for name, parameter in self.model.named_parameters())
            if bad:
                for parameter in self.model.parameters():
                    parameter.grad = None
                self._restore_statistics()
            self._gradient_dropped = bool(bad)
            self._note_skipped(bad, self.args.max_skipped_steps)
        return loss

    def _running_statistics(self) -> list[torch.Tensor]:
        return [s for n in self._batchnorm for s in (n.running_mean, n.running_var) if s is not None]

    def _restore_statistics(self) -> None:
        """Take back what the forwards of a step that is not made did to batch-norm."""
        if self._statistics:
            torch._foreach_copy_(self._running_statistics(), self._statistics)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the task loss and, in training, what the remedies add to it."""
        # Before the forward, so that autograd goes through it last: by then the activations are gone, and gradients of
        # the remedies, one for each weight, do not add to what a step holds at most.
        extra = self._remedy_loss() if model.training else None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if extra is not None:
            if self._is_scaled_for_accumulation(num_items_in_batch):
                extra = extra / self.current_gradient_accumulation_steps
            loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    def _is_scaled_for_accumulation(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether a micro-batch's loss is its share of the whole batch's, and transformers does not divide it."""
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # newer than some transformers
        if told is not None:
            return told
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _remedy_loss(self) -> torch.Tensor | None:
        total = None
        for remedy in self.remedies:
            extra = remedy.loss(self.model, self.step, self.state.max_steps)
            if extra is not None:
                total = extra if total is None else total + extra
                name = f"{remedy.name}_loss"
                self._remedy_losses[name] = self._remedy_losses.get(name, 0) + extra.detach()
        self._loss_count += 1
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to `report_to`, adding oscillation to what comes with a training loss."""
        if "loss" in logs:
            logs |= self._oscillation_scalars()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate after re-estimating batch-norm statistics, which then stay in the model."""
        if self._reestimates and self.train_dataset is not None:
            self.reestimate_batchnorm()
        else:
            average_over_processes(batchnorm_layers(self.model))
        metrics = super().evaluate(*args, **kwargs)
        self._warn_once(self._dead or [], "every value has the same integer: what passes through says nothing")
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as transformers does; `predictions` are logits, of which evaluation keeps the best classes only."""
        kept: Any = self.preprocess_logits_for_metrics  # type: ignore[has-type]
        if kept is keep_top5:
            self.preprocess_logits_for_metrics = None
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics = kept

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and keep nothing that was cached meanwhile; the model stays in evaluation mode."""
        with evaluation_mode(self.model):
            output = super().evaluation_loop(*args, **kwargs)
        self.model.eval()
        self._num_evaluated = output.num_samples
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch in inference mode; accelerate sees to the precision of training."""
        with torch.inference_mode():
            return super().prediction_step(*args, **kwargs)

    def reestimate_batchnorm(self) -> None:
        """Re-estimate batch-norm statistics on training batches, the same ones each time, shared among processes."""
        images = self.args.train_batch_size * self.args.world_size
        wanted = self.oscqat_config.batchnorm_reestimation_batches * images
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(self.train_dataset), generator=generator).tolist()
        # Where they are current already, there is no difference to record.
        changed, self._statistics_are_current = not self._statistics_are_current, True
        if self._recording is None or self.state.global_step == 0 or not changed:
            self._dead = self._reestimate(order[:wanted])
            return
        before = running_statistics(self.model)
        self._dead = self._reestimate(order[:wanted])
        # What the new statistics are off by shows on images that they do not come from, where there are some.
        others = order[wanted : wanted + RECORDED_BATCHES * images]
        if len(others) < images:
            self._recording.batchnorm(before, running_statistics(self.model), None)
            return
        after = running_statistics(self.model)
        self._reestimate(others)
        self._recording.batchnorm(before, after, running_statistics(self.model))
        set_running_statistics(self.model, after)

    def _reestimate(self, indices: list[int]) -> list[str]:
        """Re-estimate on these training images; returns the dead quantizers."""
        world_size, rank = self.args.world_size, self.args.process_index
        # A view of its own: workers of training read the epoch of theirs while this goes on.
        at_epoch = getattr(self.train_dataset, "at_epoch", None)
        dataset = self.train_dataset if at_epoch is None else at_epoch(0)
        without_unused = self._get_collator_with_removed_columns(self.data_collator, description="re-estimation")
        indices = indices[: len(indices) - len(indices) % world_size] or indices * world_size
        loader = DataLoader(
            Subset(dataset, indices[rank::world_size]),
            batch_size=min(self.args.train_batch_size, max(2, len(indices) // world_size)),
            collate_fn=without_unused,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            # A last batch of one image would give batch-norm no variance.
            drop_last=True,
        )
        model = self.accelerator.unwrap_model(self.model)
        shown = not self.args.disable_tqdm and self.is_local_process_zero()
        # Evaluation before training meets a model that accelerate has not wrapped yet.
        with randomness_of(self.args.seed), self.accelerator.autocast():
            progress = tqdm(loader, desc="Re-estimating batch-norm", leave=False, disable=not shown)
            batches = map(self._images, progress)
            first = list(islice(batches, 1))
            reestimate_batchnorm(
                model, chain(first, batches), total_variance=self.oscqat_config.batchnorm_total_variance
            )
            return dead_quantizers(model, first[0])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self._finish_statistics()
        super()._save_checkpoint(model, trial)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last and isinstance(inputs.get("pixel_values"), torch.Tensor):
            inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
        return inputs

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Scales have gradients of another order of magnitude; clipped together, only they would be heard.
        return self.accelerator.clip_grad_norm_(model_parameters(self.model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # transformers measures it by clipping at infinity, which turns gradients to NaN where their norm overflows.
        if grad_norm is None and self._grad_norm is not None:
            grad_norm = self._grad_norm
        elif grad_norm is None:
            scaler = self.accelerator.scaler
            grad_norm = self._norm_of_gradients() / (1.0 if scaler is None else scaler.get_scale())
        return float(grad_norm)

    def _norm_of_gradients(self) -> float:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _tick(self, *_: Any) -> None:
        self._ticked = True
        if self.tracker is not None and not self._gradient_dropped:
            take_tick(self.tracker, self.remedies, self.step, self.state.max_steps)
        if self._recording is not None:  # which watches weights in steps that follow each other
            self._recording.tick(self.step)
        if self._gradient_dropped:  # without a gradient the optimizer does nothing either
            return
        every = self.args.compare_ranks_steps
        if self.args.world_size > 1 and every > 0 and self.step % every == 0:
            compare_ranks(self.model, self.step)

    def _note_step(self) -> None:
        """Make sure that a step was noticed, and count it if fp16's scaler has skipped it, as it does at first.

        Raises:
            RuntimeError: if the optimizer does not call what is registered with `register_step_pre_hook`.
        """
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        if not (skipped or self._ticked):
            raise RuntimeError(
                f"got the optimizer {type(self._hooked).__name__}, whose step calls no hooks, expected one that does, "
                "as torch.optim's own: oscillations would be neither tracked nor acted upon"
            )
        self._ticked = False
        if self.accelerator.scaler is not None:
            if skipped:
                self._restore_statistics()
                if self._recording is not None:  # no hook of the optimizer was called
                    self._recording.tick(self.step)
            self._note_skipped(["the scaled loss"] if skipped else [], 3 * self.args.max_skipped_steps)

    def _note_skipped(self, bad: list[str], limit: int) -> None:
        if not bad:
            self._skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        where = f"{', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        if self._skipped_in_a_row > limit:
            values = not_finite(self.model.named_parameters())
            raise RuntimeError(
                f"got {self._skipped_in_a_row} steps in a row without a finite gradient, the last one in {where}, "
                f"expected at most {limit}. Not finite themselves: "
                f"{', '.join(values[:3]) or 'no weights'}. Look at the data, continue from a checkpoint before "
                "this began (the newest one is taken: delete later ones), or begin anew with a lower learning rate"
            )
        logger.warning("step %d is not made: its gradient is not finite in %s", self.step, where)

    def _warn_once(self, names: list[str], message: str) -> None:
        for name in names:
            if f"{name}: {message}" not in self._warned:
                self._warned.add(f"{name}: {message}")
                logger.warning("%s: %s", name, message)

    @property
    def _reestimates(self) -> bool:
        return self.oscqat_config.batchnorm_reestimation_batches > 0 and bool(batchnorm_layers(self.model))

    @property
    def _tracks(self) -> bool:
        """Whether there are weights whose oscillations are looked at; of wide ones they have no effect."""
        return self.tracker is not None and bool(self.tracker.layers)

    def _images(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in self._prepare_inputs(batch).items() if k not in self.label_names}

    def _weight_groups(self) -> list[dict[str, Any]]:
        parameters = model_parameters(self.model)
        if self.args.decay_norm_and_bias:
            return [{"params": parameters, "weight_decay": self.args.weight_decay}]
        return [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _oscillation_scalars(self) -> dict[str, float]:
        scalars: dict[str, float] = {}
        if self._tracks:
            assert self.tracker is not None
            scalars["oscillating_percent"] = 100 * self.tracker.oscillating_fraction
            scalars["scale_caused_percent"] = 100 * self.tracker.scale_caused_fraction
            scalars["frozen_percent"] = 100 * self.tracker.frozen_fraction
        at_minimum = scales_at_minimum(self.model)
        scalars["skipped_steps"] = self.skipped_steps
        scalars["scales_at_minimum"] = len(at_minimum)
        if self._dead is not None:  # looked for in re-estimation
            scalars["dead_quantizers"] = len(self._dead)
        self._warn_once(at_minimum, "training tried to make this scale zero or negative; it is kept at its minimum")
        step = max(1, self.state.global_step)
        for remedy in self.remedies:
            scalars |= remedy.scalars(step, self.state.max_steps)
        scalars |= {name: float(total) / self._loss_count for name, total in self._remedy_losses.items()}
        self._remedy_losses, self._loss_count = {}, 0
        return scalars


class _LogLastStep(TrainerCallback):
    """However rarely a run logs, it says how it ended."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or state.global_step >= state.max_steps
        return control


class _NoteSteps(TrainerCallback):
    """Fires when the model has been wrapped, and after each step, made or skipped by the scaler."""

    def __init__(self, trainer: OscQATTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # DistributedDataParallel has given every process the buffers of the first, behind the quantizers' backs.
        for _, quantizer in quantizers(self.trainer.model):
            quantizer.refresh()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._note_step()


def _constant(step: int) -> float:
    return 1.0
