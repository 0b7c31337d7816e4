"""`ImageTrainer`: transformers' Trainer for images, which can be killed at any moment and continues exactly."""

import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from accelerate import PartialState
from hf_oscqat.integration.checkpoints import (
    PREFIX,
    checkpoints,
    fresh_folder,
    last_good_checkpoint,
    processes_of,
    put_in_place,
    remove,
    rotate,
    what_is_wrong,
    write_manifest,
)
from hf_oscqat.integration.pixels import normalize_pixels
from hf_oscqat.remedies.batchnorm import average_over_processes, batchnorm_layers

EXIT_CODE = 128 + signal.SIGTERM
"""Code that a preempted run exits with: 143, as a shell reports a process that SIGTERM has ended."""
STEPS_BETWEEN_QUESTIONS = 10
"""Several processes ask each other only so often whether one of them was told to stop, because asking takes a wait."""


class Preempted(SystemExit):
    """SIGTERM ended training after a checkpoint was saved; the same command continues. The code is 143."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


def leave_process_group() -> None:
    """End the connections to the other processes, as the last thing of a script in which no trainer is alive any more.

    Gloo's threads end when nothing holds the group, which a trainer's model under DistributedDataParallel does, in
    cycles that only the collector frees. A thread that outlives the interpreter and then drops the tensors of its
    last collective aborts the process (seen once in some ten ends of two processes on a CPU, torch 2.14).
    """
    gc.collect()
    PartialState().destroy_process_group()


class ImageTrainer(Trainer):
    """Trains on images that arrive as uint8, or as floats, and writes only what is whole.

    - A checkpoint is written beside its place, with a list of its files, and renamed; `train(True)` continues from the
      newest one that matches its list.
    - SIGTERM during `train` saves a checkpoint at the end of the step (of several processes: within ten steps) and
      raises `Preempted`. A second one ends the process at once.
    - A dataset with `set_epoch` is told the epoch, so that it can draw the same augmentation again.
    - No pickle of the arguments is written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writing: Path | None = None
        self._was_resumed = False
        self._preemption = _Preemption()
        self.add_callback(self._preemption)
        self.add_callback(_TellEpoch(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest good one in `output_dir`.
            *args: as in transformers.
            **kwargs: as in transformers.

        Raises:
            ValueError: if the checkpoint is damaged, or of another run, or there is no good one.
            Preempted: after SIGTERM.
        """
        self._was_resumed = bool(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_good_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"got no good checkpoint in {self.args.output_dir}, expected one to continue from")
        elif resume_from_checkpoint:
            problem = what_is_wrong(resume_from_checkpoint)
            if problem is not None:
                raise ValueError(
                    f"got checkpoint {resume_from_checkpoint}, expected one to continue from, but {problem}: take an "
                    "earlier one, or begin anew in another output_dir"
                )
        if resume_from_checkpoint:
            self._check_origin(Path(resume_from_checkpoint))
            if (finished := self._finished(resume_from_checkpoint)) is not None:
                return finished
            self._check_is_complete(Path(resume_from_checkpoint))
        with self._preemption.heeded():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._preemption.stopped:
            raise Preempted(self.state.global_step)
        return output

    def _check_origin(self, checkpoint: Path) -> None:
        """Refuse a good checkpoint of a run that this one does not continue.

        Raises:
            ValueError: if another number of processes has trained it.
        """
        if processes_of(checkpoint) != self.args.world_size:
            raise ValueError(
                f"got {self.args.world_size} processes for a checkpoint of {processes_of(checkpoint)}, "
                "expected as many: batch, number of steps and learning rates would be others from here on. Start as "
                "many, or begin anew in another output_dir"
            )

    def _check_is_complete(self, checkpoint: Path) -> None:
        """Refuse to go on without what `save_only_model` leaves out; transformers would begin the schedule anew.

        Raises:
            ValueError: if optimizer or schedule are not in it.
        """
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]
        if missing:
            raise ValueError(
                f"got checkpoint {checkpoint} without {' and '.join(missing)}, expected one that was not saved with "
                "save_only_model: momentum and learning rates would begin anew. Begin another run with its model, in "
                "another output_dir"
            )

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """Load a checkpoint of the last step; None if it is of an earlier one.

        transformers would go on from there with one step more, where `max_steps` ends within an epoch.
        """
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        last = self.args.max_steps
        if last <= 0:  # the same number that transformers takes
            *_, last = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if state.global_step < last:
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        self._find_best(Path(checkpoint).parent)
        # The file is the first process's.
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self._load_rng_state(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            if not Path(state.best_model_checkpoint).is_dir():
                raise ValueError(
                    f"got {checkpoint}, after whose training the best model is to be loaded, but that is not in "
                    f"{state.best_model_checkpoint}: put this checkpoint back, or set load_best_model_at_end=False"
                )
            self._load_best_model()
        return TrainOutput(state.global_step, float("nan"), {})

    def _find_best(self, run_dir: Path) -> None:
        """Take the best checkpoint for where it is now; the run's folder may have been moved."""
        best = self.state.best_global_step
        if best and (run_dir / f"{PREFIX}{best}").is_dir():
            self.state.best_model_checkpoint = str(run_dir / f"{PREFIX}{best}")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if isinstance(inputs.get("pixel_values"), torch.Tensor):
            inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"], self.model.config)
        return inputs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save model and config, and the processing class if there is one; not the arguments, which are a pickle."""
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir) if output_dir is None else output_dir
        os.makedirs(folder, exist_ok=True)
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether to save where only the best is saved; what SIGTERM asked for is."""
        return super()._determine_best_metric(metrics, trial) or self._preemption.stopped

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX}{self.state.global_step}"
        beside = run_dir / ".writing"
        # Each process has seen other images; without this, rank 0's statistics would be saved and the others' lost.
        average_over_processes(batchnorm_layers(self.model))
        if self.args.should_save:
            fresh_folder(beside)
        self.accelerator.wait_for_everyone()
        self._writing = beside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run_dir / name)
        else:
            self._find_best(run_dir)
        if self.args.should_save:
            self.state.save_to_json(str(beside / name / TRAINER_STATE_NAME))
            write_manifest(beside / name, self.args.world_size)
            put_in_place(beside / name, run_dir / name)
            shutil.rmtree(beside, ignore_errors=True)
            self._drop_damaged(run_dir)
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._preemption.stopped:
            # In memory only; transformers would load the best model, and with a limit of one keep no other.
            self.state.best_model_checkpoint = None
        self.accelerator.wait_for_everyone()

    def _drop_damaged(self, run_dir: Path) -> None:
        """Remove damaged checkpoints of later steps, now that there is a good one to continue from."""
        for path in checkpoints(run_dir):
            if int(path.name.removeprefix(PREFIX)) > self.state.global_step and what_is_wrong(path) is not None:
                remove(path)


class _Preemption(TrainerCallback):
    """Ends training with a checkpoint once SIGTERM has reached any of the processes."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take SIGTERM for a question while training; Python hears signals in the main thread only."""
        self.asked = self.stopped = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGTERM, before)

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._anyone_asked(args, state.global_step) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stopped:
            # Time is short and everything is saved, unless this is the end of an epoch, which comes but once: what is
            # evaluated here belongs into the checkpoint.
            is_whole = state.epoch is not None and state.epoch == int(state.epoch)
            control.should_save = control.should_evaluate = control.should_evaluate and is_whole
        return control

    def _anyone_asked(self, args: TrainingArguments, step: int) -> bool:
        if args.world_size == 1:
            return self.asked
        if step % STEPS_BETWEEN_QUESTIONS:
            return False
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


class _TellEpoch(TrainerCallback):
    """Tells the training data the epoch; where there are several processes, accelerate tells its sampler only."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))
