"""Lets Trainer record oscillations; what is recorded, and how, is `report/recorder.py`."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_oscqat.report.recorder import Recorder, Statistics, batchnorm_divergence


class RecordOscillations(TrainerCallback):
    """Tells a recorder what Trainer does; on the first process only, as all of them compute the same.

    Args:
        trainer: an `OscQATTrainer` with a tracker.
        about: what the report shall say of the run.
    """

    def __init__(self, trainer: Any, about: Mapping[str, str]) -> None:
        self.trainer = trainer
        self.about = about
        self.recorder: Recorder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record, or continue after the checkpoint that training continues from."""
        self._begin(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the scalars that go to the log, TensorBoard and the like."""
        if self.recorder is None and state.global_step > 0:  # a finished run that was loaded and not trained
            self._begin(state)
        if self.recorder is not None:
            self.recorder.log(state.global_step, logs or {})

    def tick(self, step: int) -> None:
        """Look at a step, between the tracker's tick and the optimizer's step."""
        if self.recorder is not None:
            self.recorder.tick(step)

    def batchnorm(self, before: Statistics, after: Statistics, others: Statistics | None) -> None:
        """Record what a re-estimation has changed.

        Args:
            before: statistics before it.
            after: statistics after it.
            others: statistics of other images, or None.
        """
        if self.recorder is not None:
            self.recorder.batchnorm(
                self.trainer.state.global_step,
                batchnorm_divergence(before, after),
                [] if others is None else batchnorm_divergence(after, others),
            )

    def _begin(self, state: TrainerState) -> None:
        if state.is_world_process_zero and self.trainer.tracker.layers:
            self.recorder = Recorder(
                self.trainer.accelerator.unwrap_model(self.trainer.model),
                self.trainer.tracker,
                self.trainer.args.output_dir,
                total_steps=state.max_steps,
                every=self.trainer.args.record_steps,
                about=self.about,
            )
            self.recorder.begin(state.global_step)
