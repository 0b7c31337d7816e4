"""OscQATTrainer: when it ticks, what it logs, what it saves, and that a resumed run is the same run."""

import copy
import itertools
import json
import logging
import os
import random
import shutil
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

from hf_oscqat import (
    CheckpointError,
    OscQATConfig,
    OscQATTrainer,
    OscQATTrainingArguments,
    pack,
    prepare_qat,
    reestimate_batchnorm,
)
from hf_oscqat.diagnosis import not_finite
from hf_oscqat.integration.checkpoints import checkpoints, what_is_wrong, write_manifest
from hf_oscqat.quantization.gradient_estimators import GRADIENT_ESTIMATORS
from hf_oscqat.quantization.layers import quantizers
from hf_oscqat.remedies.batchnorm import batchnorm_layers

FREEZING = {"momentum": 0.1, "threshold": 0.1, "threshold_final": 0.1, "anneal_start": 0.0}


class RandomImages(Dataset):
    """Images of five classes, each a colour under noise that depends on the index alone."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        label = index % 5
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator) + label, "labels": label}


@pytest.fixture
def make_trainer(make_prepared_wrapper, tmp_path):
    def make(config=None, model=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 10,
            # At a large constant rate without momentum, weights of so small a network oscillate within ten steps.
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "momentum": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        }
        model = model or make_prepared_wrapper(**{"batchnorm_reestimation_batches": 2, **(config or {})})
        args = OscQATTrainingArguments(**{**defaults, **kwargs})
        return OscQATTrainer(model=model, args=args, train_dataset=RandomImages(), eval_dataset=RandomImages())

    return make


def logged(trainer: OscQATTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_step_logs_what_happens_to_oscillation(make_trainer):
    trainer = make_trainer({"freezing": FREEZING, "dampening": {"weight": 0.1, "weight_final": 0.1}})
    trainer.train()
    for entry in logged(trainer):
        assert {"oscillating_percent", "frozen_percent", "freeze_threshold", "dampening_weight"} <= entry.keys()
        assert entry["dampening_loss"] > 0
    assert len(logged(trainer)) == 10


def test_tick_is_taken_once_per_optimizer_step_and_not_by_evaluation(make_trainer, monkeypatch):
    trainer = make_trainer(gradient_accumulation_steps=2, max_steps=2, eval_strategy="steps", eval_steps=1)
    ticks = []
    original = trainer.tracker.tick
    monkeypatch.setattr(trainer.tracker, "tick", lambda threshold: (ticks.append(trainer.step), original(threshold)))
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.tracker.state_dict().items()}
    trainer.evaluate()
    assert ticks == [1, 2]
    for name, tensor in trainer.tracker.state_dict().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(before[name])), name


def test_tick_sees_the_integers_of_the_forward_and_acts_on_the_next(make_trainer):
    trainer = make_trainer({"freezing": FREEZING})
    frozen_before_step = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            frozen_before_step.append(trainer.tracker.frozen_fraction)

    trainer.add_callback(Watch())
    trainer.train()
    assert frozen_before_step[0] == 0
    assert trainer.tracker.frozen_fraction > 0
    assert frozen_before_step == sorted(frozen_before_step)


def test_a_given_optimizer_is_ticked_too_and_all_its_groups_have_its_schedule(make_trainer):
    made = make_trainer({"freezing": FREEZING}, lr_scheduler_type="cosine")
    groups = [{"params": [p]} for p in made.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    data = {"train_dataset": made.train_dataset, "eval_dataset": made.eval_dataset}
    trainer = OscQATTrainer(model=made.model, args=made.args, optimizers=(optimizer, None), **data)
    ticks = []
    original = trainer.tracker.tick
    trainer.tracker.tick = lambda threshold: (ticks.append(trainer.step), original(threshold))
    trainer.train()
    assert ticks == list(range(1, 11))
    assert all(group["lr"] < 0.01 for group in optimizer.param_groups)


def test_given_optimizer_that_calls_no_hooks_is_refused_at_its_first_step(make_trainer):
    from timm.optim import Lookahead

    made = make_trainer({"freezing": FREEZING})
    optimizer = Lookahead(torch.optim.SGD(made.model.parameters(), lr=0.1))
    trainer = OscQATTrainer(
        model=made.model, args=made.args, optimizers=(optimizer, None), train_dataset=made.train_dataset
    )
    with pytest.raises(RuntimeError, match="got the optimizer Lookahead, whose step calls no hooks"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("own_loss", [False, True])
def test_remedies_count_once_however_many_micro_batches_there_are(make_trainer, own_loss):
    moved = []
    for accumulated in (1, 2, 4):
        trainer = make_trainer(
            {"dampening": {"weight": 50.0, "weight_final": 50.0}},
            gradient_accumulation_steps=accumulated, per_device_train_batch_size=8 // accumulated, max_steps=1,
        )  # fmt: skip
        if own_loss:
            trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: 0 * outputs.logits.sum()
        else:
            trainer.model.timm_model.classifier.latent_weight.data.zero_()  # then the task has no gradient behind it
        weight = trainer.model.timm_model.conv_stem.latent_weight
        before = weight.detach().clone()
        trainer.train()
        moved.append(weight.detach() - before)
    assert moved[0].abs().max() > 0
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0])


@pytest.mark.parametrize("remedy", ["freezing", "dampening", "bin_regularization"])
def test_remedies_of_weights_in_float_are_an_error_before_training(make_trainer, remedy):
    with pytest.raises(ValueError, match=f"got {remedy} and no "):
        make_trainer({"weight_bits": None, remedy: {}, "first_last_bits": None})


def test_freezing_of_weights_too_wide_to_be_tracked_is_an_error(make_trainer):
    with pytest.raises(ValueError, match="got freezing and no weights of at most 4 bits"):
        make_trainer({"weight_bits": 8, "freezing": FREEZING})


def test_compiled_training_divides_as_packing_does(make_trainer):
    from torch._inductor import config

    with config.patch({"eager_numerics.division_rounding": False}):
        make_trainer()
        assert not config.eager_numerics.division_rounding
        make_trainer(torch_compile=True)
        assert config.eager_numerics.division_rounding


def test_remedies_change_training(make_trainer):
    plain, damped = make_trainer(), make_trainer({"dampening": {"weight": 5.0, "weight_final": 5.0}})
    plain.train()
    damped.train()
    assert logged(plain)[0]["loss"] < logged(damped)[0]["loss"]


@pytest.mark.parametrize("weight_optimizer", ["sgd", "adamw"])
def test_resumed_run_equals_the_uninterrupted_one(make_trainer, make_prepared_wrapper, tmp_path, weight_optimizer):
    config = {"freezing": FREEZING, "batchnorm_reestimation_batches": 2}
    options = {"save_strategy": "steps", "save_steps": 5, "weight_optimizer": weight_optimizer}
    start = make_prepared_wrapper(**config)
    whole = make_trainer(model=copy.deepcopy(start), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    other = make_trainer(model=copy.deepcopy(start), output_dir=str(tmp_path / "resumed"), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert logged(other)[-1]["loss"] == logged(whole)[-1]["loss"]
    assert whole.tracker.frozen_fraction > 0
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(other.model.state_dict()[name])), name


def test_weights_follow_the_cosine_and_scales_stay(make_trainer):
    trainer = make_trainer(scale_learning_rate=1e-3, decay_norm_and_bias=False, lr_scheduler_type="cosine")
    trainer.train()
    *weights, scales = trainer.optimizer.param_groups
    assert len(weights) == 2
    assert all(group["lr"] < 0.01 for group in weights)
    assert scales["lr"] == 1e-3


def test_scales_can_follow_the_cosine_of_the_weights(make_trainer):
    trainer = make_trainer(
        learning_rate=0.01, scale_learning_rate=1e-3, scale_lr_scheduler_type="as_weights", lr_scheduler_type="cosine"
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    *weights, scales = (group["lr"] for group in trainer.optimizer.param_groups)
    assert weights == pytest.approx([0.005] * len(weights))
    assert scales == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="got unknown key 'linear' in scale_lr_scheduler_type"):
        make_trainer(scale_lr_scheduler_type="linear")


def test_weight_decay_can_spare_normalisation_and_biases(make_trainer):
    trainer = make_trainer(weight_decay=0.1, decay_norm_and_bias=False)
    decayed, spared = trainer._weight_groups()
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim <= 1 for p in spared["params"])


def test_evaluation_uses_reestimated_statistics_and_draws_nothing(make_trainer):
    trainer = make_trainer({"batchnorm_reestimation_batches": 6})
    trainer.train()
    expected = copy.deepcopy(trainer.model)
    images = RandomImages()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [torch.stack([images[i]["pixel_values"] for i in order[k : k + 4]]) for k in range(0, 24, 4)]
    reestimate_batchnorm(expected, batches)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer.reestimate_batchnorm()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    for ours, wanted in zip(batchnorm_layers(trainer.model), batchnorm_layers(expected), strict=True):
        torch.testing.assert_close(ours.running_mean, wanted.running_mean)
        torch.testing.assert_close(ours.running_var, wanted.running_var)


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_training_ends_with_statistics_of_its_last_weights(make_trainer, monkeypatch, eval_strategy):
    trainer = make_trainer(max_steps=4, eval_strategy=eval_strategy, eval_steps=2)
    reestimated = []
    reestimate = trainer.reestimate_batchnorm
    monkeypatch.setattr(trainer, "reestimate_batchnorm", lambda: reestimated.append(trainer.step) or reestimate())
    trainer.train()
    assert len(reestimated) == (1 if eval_strategy == "no" else 2)  # after evaluation there is nothing left to do
    packed = pack(copy.deepcopy(trainer.model))
    trainer.evaluate()
    for layer, evaluated in zip(batchnorm_layers(packed), batchnorm_layers(trainer.model), strict=True):
        assert torch.equal(layer.running_mean, evaluated.running_mean)
        assert torch.equal(layer.running_var, evaluated.running_var)


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_is_in_inference_mode_and_the_precision_of_training_and_training_goes_on(make_trainer, bf16):
    trainer = make_trainer({"freezing": FREEZING}, bf16=bf16, max_steps=2, eval_strategy="steps", eval_steps=1)
    seen = []
    stem = trainer.model.timm_model.conv_stem
    stem.register_forward_hook(lambda layer, args, output: seen.append((output.dtype, output.is_inference())))
    precision = torch.bfloat16 if bf16 else torch.float32
    trainer.evaluate()
    assert set(seen) == {(precision, True)}
    assert not trainer.model.training
    trainer.train()
    assert set(seen) == {(precision, True), (precision, False)}
    assert len(logged(trainer)) == 2
    attributes = [value for module in trainer.model.modules() for value in vars(module).values()]
    tensors = [*trainer.model.state_dict().values(), *(v for v in attributes if isinstance(v, torch.Tensor))]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_images_may_arrive_as_bytes(make_trainer):
    trainer = make_trainer()
    trainer.model.config.pretrained_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    inputs = {"pixel_values": images, "labels": torch.zeros(2, dtype=torch.int64)}
    assert torch.equal(trainer._prepare_inputs(dict(inputs))["pixel_values"], torch.full((2, 3, 32, 32), 2.0))
    as_floats = inputs | {"pixel_values": torch.full((2, 3, 32, 32), 2.0)}
    losses = [trainer.prediction_step(trainer.model, batch, False)[0] for batch in (inputs, as_floats)]
    assert torch.equal(*losses)


def test_reestimation_can_be_turned_off(make_trainer):
    trainer = make_trainer({"batchnorm_reestimation_batches": 0})
    before = [layer.running_mean.clone() for layer in batchnorm_layers(trainer.model)]
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= metrics["eval_top5_accuracy"] <= 1
    for layer, mean in zip(batchnorm_layers(trainer.model), before, strict=True):
        assert torch.equal(layer.running_mean, mean)


def test_clipping_leaves_scales_alone(make_trainer):
    trainer = make_trainer(max_grad_norm=1e-6, max_steps=1)
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(trainer.model)
    scales = [quantizer.scale for _, quantizer in quantizers(trainer.model)]
    assert all(torch.equal(scale.grad, torch.ones_like(scale)) for scale in scales)
    others = [p for n, p in trainer.model.named_parameters() if "quantizer" not in n]
    assert all(p.grad.abs().max() < 1e-5 for p in others)


def test_no_pickle_of_arguments_is_saved_and_a_checkpoint_loads(make_trainer, tmp_path, pixel_values):
    trainer = make_trainer({"freezing": FREEZING}, save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-10")
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, trainer.model(pixel_values).logits)
    names = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors").keys()
    assert any(name.endswith("oscillation.frequency") for name in names)


def test_pickle_of_the_arguments_is_never_written(make_trainer, monkeypatch):
    written = []
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda what, file, *rest: written.append(file) or original(what, file, *rest))
    trainer = make_trainer(save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model()
    assert {os.path.basename(file) for file in written} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


class TestCheckpoints:
    """Written beside and renamed; a damaged one is not continued from."""

    def test_hold_a_list_of_their_files(self, make_trainer, tmp_path):
        make_trainer(save_strategy="steps", save_steps=3, save_total_limit=2).train()
        assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10", "checkpoint-9"]
        assert [what_is_wrong(path) for path in checkpoints(tmp_path / "run")] == [None, None]
        assert not list((tmp_path / "run").glob(".*"))

    def test_of_the_last_step_is_loaded_and_not_trained_on(self, make_trainer, tmp_path):
        trainer = make_trainer({"freezing": FREEZING}, save_strategy="steps", save_steps=5)
        trainer.train()  # ten steps, of which six make an epoch
        again = make_trainer({"freezing": FREEZING})
        assert again.train(True).global_step == 10
        assert again.state.global_step == 10
        assert logged(again) == logged(trainer)
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name]), name

    def test_newest_good_one_is_continued_from(self, make_trainer, tmp_path, caplog):
        make_trainer({"freezing": FREEZING}, save_strategy="steps", save_steps=3).train()
        whole = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
        for step in (10, 9):
            (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"half")
        trainer = make_trainer({"freezing": FREEZING}, save_strategy="steps", save_steps=3)
        with caplog.at_level(logging.WARNING):
            trainer.train(True)
        assert sum("is damaged: optimizer.pt has 4 bytes" in message for message in caplog.messages) == 2
        again = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert what_is_wrong(tmp_path / "run" / "checkpoint-10") is None

    def test_good_ones_of_later_steps_stay(self, make_trainer, tmp_path):
        make_trainer(save_strategy="steps", save_steps=5).train()
        make_trainer(save_strategy="steps", save_steps=4, max_steps=4).train()
        assert [path.name for path in checkpoints(tmp_path / "run")] == [
            "checkpoint-10",
            "checkpoint-5",
            "checkpoint-4",
        ]

    def test_of_another_number_of_processes_is_refused(self, make_trainer, tmp_path):
        make_trainer(save_strategy="steps", save_steps=5).train()
        write_manifest(tmp_path / "run" / "checkpoint-10", processes=2)
        with pytest.raises(ValueError, match="got 1 processes for a checkpoint of 2, expected as many"):
            make_trainer().train(True)

    def test_of_the_last_step_of_part_of_an_epoch(self, make_trainer):
        options = {"max_steps": -1, "num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 3}
        assert make_trainer(**options).train().global_step == 9
        assert make_trainer(**options).train(True).global_step == 9

    @pytest.mark.parametrize("more", [{"num_train_epochs": 2.0}, {"per_device_train_batch_size": 2}])
    def test_of_the_last_step_of_a_shorter_training_is_continued(self, make_trainer, more):
        options = {"max_steps": -1, "num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 3}
        assert make_trainer(**options).train().global_step == 9
        assert make_trainer(**{**options, **more}).train(True).global_step > 9

    def test_without_optimizer_is_refused_unless_it_is_the_last(self, make_trainer):
        options = {"save_strategy": "steps", "save_steps": 5, "save_only_model": True}
        make_trainer(max_steps=5, **options).train()
        with pytest.raises(ValueError, match=r"without optimizer\.pt and scheduler\.pt, expected one that was not"):
            make_trainer(**options).train(True)
        assert make_trainer(max_steps=5, **options).train(True).global_step == 5

    @pytest.mark.parametrize("change", [{"weight_bits": 3}, {"activation_bits": None}, {"overrides": {"*": {}}}])
    def test_of_a_model_on_another_grid_is_refused(self, make_trainer, change):
        make_trainer(save_strategy="steps", save_steps=5, max_steps=5).train()
        with pytest.raises(ValueError, match=f"with other settings of {next(iter(change))}, expected the same"):
            make_trainer(change).train(True)
        make_trainer({"freezing": FREEZING}, max_steps=6).train(True)  # a remedy may begin later

    def test_of_an_older_version_that_lost_the_order_of_overrides_is_continued(self, make_trainer, tmp_path):
        config = {"overrides": {"conv_stem": {"weight_bits": 8}, "*": {"activation_bits": 8}}}
        make_trainer(config, save_strategy="steps", save_steps=5, max_steps=5).train()
        file = tmp_path / "run" / "checkpoint-5" / "config.json"
        written = json.loads(file.read_text())
        pairs = written["quantization_config"]["overrides"]
        assert [pattern for pattern, _ in pairs] == ["conv_stem", "*"]
        written["quantization_config"]["overrides"] = dict(sorted(pairs))
        file.write_text(json.dumps(written))
        write_manifest(file.parent)
        assert make_trainer(config, max_steps=6).train(True).global_step == 6

    def test_damaged_one_that_is_asked_for_is_an_error(self, make_trainer, tmp_path):
        make_trainer(save_strategy="steps", save_steps=5).train()
        (tmp_path / "run" / "checkpoint-5" / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"checkpoint-5, expected .* but model.safetensors has 0 bytes"):
            make_trainer().train(str(tmp_path / "run" / "checkpoint-5"))
        with pytest.raises(ValueError, match="got no good checkpoint"):
            make_trainer(output_dir=str(tmp_path / "other")).train(True)

    def test_best_one_is_found_again(self, make_trainer, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        trainer = make_trainer(
            {"freezing": FREEZING}, **options, load_best_model_at_end=True, metric_for_best_model="accuracy"
        )
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
        state = json.loads((checkpoints(tmp_path / "run")[0] / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best
        stored = load_file(f"{best}/model.safetensors")
        loaded = trainer.model.state_dict()
        assert all(torch.equal(stored[name], loaded[name]) for name in stored)

    def test_best_one_of_a_folder_that_was_moved(self, make_trainer, tmp_path):
        options = {
            "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 6, "learning_rate": 1.0,
        }  # fmt: skip
        trainer = make_trainer(**options)
        trainer.train()
        best = trainer.state.best_global_step
        assert best < 6  # at such a rate the last is not the best
        stored = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
        (tmp_path / "run").rename(tmp_path / "moved")
        again = make_trainer(**options, output_dir=str(tmp_path / "moved"))
        again.train(True)
        loaded = again.model.state_dict()
        # Statistics are re-estimated in the end.
        assert all(torch.equal(stored[name], loaded[name]) for name in stored if name.endswith("weight"))
        shutil.rmtree(tmp_path / "moved" / f"checkpoint-{best}")
        with pytest.raises(ValueError, match="the best model is to be loaded, but that is not in"):
            make_trainer(**options, output_dir=str(tmp_path / "moved")).train(True)

    def test_malicious_pickle_in_a_checkpoint_is_not_executed(self, make_trainer, tmp_path):
        class Malicious:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/executed",)

        make_trainer(save_strategy="steps", save_steps=5).train()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            folder = tmp_path / "run" / "checkpoint-5"
            content = (folder / name).read_bytes()
            torch.save({"state": Malicious(), "param_groups": []}, folder / name)
            write_manifest(folder)
            with pytest.raises(Exception, match=r"[Ww]eights.only"):
                make_trainer().train(str(folder))
            (folder / name).write_bytes(content)
        assert not (tmp_path / "executed").exists()


class TestPreemption:
    @pytest.fixture
    def killing(self):
        def make(step, times=1):
            class Kill(TrainerCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    if state.global_step == step:
                        for _ in range(times):
                            os.kill(os.getpid(), signal.SIGTERM)

            return Kill()

        return make

    def test_saves_and_exits_with_143_and_the_rest_is_the_same(self, make_trainer, tmp_path, killing):
        whole = make_trainer({"freezing": FREEZING}, output_dir=str(tmp_path / "whole"))
        whole.train()
        before = signal.getsignal(signal.SIGTERM)
        trainer = make_trainer({"freezing": FREEZING}, eval_strategy="epoch")
        trainer.add_callback(killing(4))
        with pytest.raises(SystemExit) as stopped:
            trainer.train()
        assert stopped.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-5"]
        continued = make_trainer({"freezing": FREEZING})
        continued.train(True)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(
                tensor,
                continued.model.state_dict()[name],
            ), name

    def test_where_only_the_best_is_saved(self, make_trainer, tmp_path, killing):
        trainer = make_trainer(
            eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="accuracy", max_steps=20
        )
        trainer.add_callback(killing(12))
        with pytest.raises(SystemExit):
            trainer.train()
        assert checkpoints(tmp_path / "run")[0].name == "checkpoint-13"

    @pytest.mark.parametrize("limit", [None, 1])
    def test_in_the_last_step_of_an_epoch_which_is_then_evaluated(self, make_trainer, tmp_path, killing, limit):
        options = {
            "num_train_epochs": 3, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch",
            "save_total_limit": limit, "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
        }  # fmt: skip

        def evaluated(trainer):
            return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]

        whole = make_trainer({"freezing": FREEZING}, output_dir=str(tmp_path / "whole"), **options)
        whole.train()
        assert [step for step, _ in evaluated(whole)] == [6, 12, 18]
        trainer = make_trainer({"freezing": FREEZING}, **options)
        trainer.add_callback(killing(11))
        with pytest.raises(SystemExit):
            trainer.train()
        continued = make_trainer({"freezing": FREEZING}, **options)
        continued.train(True)
        assert evaluated(continued) == evaluated(whole)
        assert continued.state.best_global_step == whole.state.best_global_step
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, continued.model.state_dict()[name]), name

    def test_after_the_last_step_there_is_nothing_to_continue(self, make_trainer, killing):
        trainer = make_trainer()
        trainer.add_callback(killing(9))
        trainer.train()
        assert trainer.state.global_step == 10

    def test_second_signal_is_as_it_was_before(self, make_trainer, killing):
        heard = []
        before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        try:
            trainer = make_trainer()
            trainer.add_callback(killing(4, times=2))
            with pytest.raises(SystemExit):
                trainer.train()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert heard == [1]

    def test_in_another_thread_signals_are_not_touched(self, make_trainer):
        trainer, before = make_trainer(max_steps=1), signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
        assert trainer.state.global_step == 1
        assert signal.getsignal(signal.SIGTERM) is before


def test_run_that_had_made_its_last_step_knows_its_process(make_trainer, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=10).train()
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train(True)
    assert trainer.state.global_step == 10
    assert (trainer.state.is_world_process_zero, trainer.state.is_local_process_zero) == (False, True)


class TestWithoutEffectOrWorse:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bf16_full_eval": True}, "would round the trained weights"),
            ({"fp16_full_eval": True}, "would round the trained weights"),
            ({"optim": "adafactor"}, "got optim='adafactor'.*use weight_optimizer"),
            ({"optim_args": "a=1"}, "use weight_optimizer"),
        ],
    )
    def test_arguments_are_refused(self, make_trainer, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options)

    def test_class_of_one_optimizer_is_refused(self, make_prepared_wrapper, make_trainer):
        with pytest.raises(ValueError, match="got optimizer_cls_and_kwargs"):
            OscQATTrainer(
                model=make_prepared_wrapper(),
                args=make_trainer().args,
                train_dataset=RandomImages(),
                optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1.0}),
            )

    def test_model_init_is_refused(self, make_trainer):
        with pytest.raises(ValueError, match="got model_init, expected a model"):
            OscQATTrainer(args=make_trainer().args, model_init=lambda: None)

    def test_arguments_of_transformers_are_refused(self, make_trainer, tmp_path):
        with pytest.raises(ValueError, match="got args of TrainingArguments, expected OscQATTrainingArguments"):
            OscQATTrainer(model=make_trainer().model, args=TrainingArguments(str(tmp_path), use_cpu=True))

    def test_loader_of_ones_own_without_the_data_is_refused_before_training(self, make_trainer):
        trainer = make_trainer(save_strategy="steps", save_steps=2)
        trainer.train_dataset = None
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(RandomImages(), batch_size=4)
        with pytest.raises(ValueError, match="got train_dataset=None, expected the training data also where"):
            trainer.train()
        assert trainer.state.global_step == 0
        trainer.oscqat_config.batchnorm_reestimation_batches = 0
        assert trainer.train().global_step == 10

    def test_data_that_come_in_an_order_of_their_own_are_refused(self, make_trainer):
        class InOrder(torch.utils.data.IterableDataset):
            def __len__(self):
                return 8

            def __iter__(self):
                return iter(RandomImages())

        made = make_trainer()
        with pytest.raises(ValueError, match="got a training dataset without a length, expected one that can be"):
            OscQATTrainer(model=made.model, args=made.args, train_dataset=InOrder())

    @pytest.mark.parametrize(
        ("name", "settings"), [("polynomial", {"power": 2.0}), ("cosine_with_min_lr", {"min_lr": 0.01})]
    )
    def test_schedules_that_ask_the_optimizer_for_its_rate(self, make_trainer, name, settings):
        trainer = make_trainer(lr_scheduler_type=name, lr_scheduler_kwargs=settings)
        trainer.train()
        weights, scales = (group["lr"] for group in trainer.optimizer.param_groups)
        assert weights == pytest.approx(1e-7 if name == "polynomial" else 0.01)
        assert scales == trainer.args.scale_learning_rate

    def test_schedule_that_would_change_a_constant_rate_is_refused(self, make_trainer):
        options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
        with pytest.raises(ValueError, match="with a constant rate of the scales"):
            make_trainer(**options).train()
        make_trainer(**options, scale_lr_scheduler_type="as_weights", max_steps=2).train()


def test_predictions_are_logits_and_have_the_metrics_of_an_evaluation(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    measured = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    images = torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(24)])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), trainer.model.eval()(images).logits)
    for name in ("accuracy", "top5_accuracy"):
        assert predicted.metrics[f"test_{name}"] == measured[f"eval_{name}"]
    assert trainer.evaluate()["eval_accuracy"] == measured["eval_accuracy"]


def test_of_weights_that_nobody_tracks_no_oscillation_is_told(make_trainer, tmp_path):
    trainer = make_trainer({"weight_bits": 8}, max_steps=2)
    trainer.train()
    assert all("oscillating_percent" not in entry for entry in logged(trainer))
    assert not (tmp_path / "run" / "oscillation.jsonl").exists()


class WithIndex(RandomImages):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "index": index}


def test_columns_that_training_drops_reestimation_drops_too(make_trainer):
    trainer = make_trainer(remove_unused_columns=True, max_steps=2)
    trainer.train_dataset = WithIndex()
    trainer.train()
    assert trainer.state.global_step == 2


class SomeNotFinite(RandomImages):
    """Batches are not shuffled, so that the bad images come in step 2 and later ones as told."""

    def __init__(self, bad):
        self.bad = bad

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if index in self.bad:
            example["pixel_values"] = example["pixel_values"] * torch.nan
        return example


class TestStepsThatAreNotMade:
    def test_gradient_that_is_not_finite_changes_nothing(self, make_trainer, caplog):
        trainer = make_trainer({"freezing": FREEZING}, max_steps=6, train_sampling_strategy="sequential")
        trainer.train_dataset = SomeNotFinite({5})
        states = []

        class Remember(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                states.append({n: t.clone() for n, t in model.state_dict().items() if "bn" not in n})

        trainer.add_callback(Remember())
        with caplog.at_level(logging.WARNING):
            trainer.train()
        same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(states)]
        assert same == [True, False, False, False, False]
        assert trainer.skipped_steps == 1
        assert [entry["skipped_steps"] for entry in logged(trainer)] == [0, 1, 1, 1, 1, 1]
        assert any("step 2 is not made: its gradient is not finite in" in message for message in caplog.messages)
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())

    def test_recording_goes_to_the_end_also_where_the_last_step_is_one(self, make_trainer, tmp_path):
        trainer = make_trainer(max_steps=6, train_sampling_strategy="sequential", record_steps=2)
        trainer.train_dataset = SomeNotFinite({21})  # in the sixth batch
        trainer.train()
        assert trainer.skipped_steps == 1
        rows = map(json.loads, (tmp_path / "run" / "oscillation.jsonl").read_text().splitlines())
        assert max(row["step"] for row in rows if row["row"] == "step") == 6

    def test_large_gradients_of_which_the_norm_overflows_are_no_reason_for_nan(self, make_trainer):
        trainer = make_trainer(max_steps=1)
        trainer.create_optimizer()
        for parameter in trainer.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e25)
        assert trainer._get_grad_norm(trainer.model) == float("inf")
        assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())

    def test_statistics_of_batchnorm_are_those_before_the_step(self, make_trainer):
        trainer = make_trainer(
            {"batchnorm_reestimation_batches": 0}, train_sampling_strategy="sequential", max_steps=3
        )
        trainer.train_dataset = SomeNotFinite({5})
        trainer.train()
        assert trainer.skipped_steps == 1
        assert not_finite(trainer.model.named_buffers()) == not_finite(
            (name, buffer) for name, buffer in trainer.model.named_buffers() if "oscillation" in name
        )
        assert trainer.evaluate()["eval_loss"] < 100

    def test_too_many_in_a_row_stop_training_and_name_layers(self, make_trainer):
        trainer = make_trainer(max_skipped_steps=3, max_steps=20)
        trainer.train_dataset = SomeNotFinite(set(range(24)))
        with pytest.raises(RuntimeError, match=r"got 4 steps in a row .*conv_stem.* expected at most 3"):
            trainer.train()

    def test_step_that_fp16s_scaler_skips_leaves_batchnorm_as_it_was(self, make_trainer, monkeypatch):
        trainer = make_trainer()
        layer = batchnorm_layers(trainer.model)[0]
        before = layer.running_mean.clone()
        monkeypatch.setattr(trainer.accelerator, "scaler", SimpleNamespace(get_scale=lambda: 4.0))
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: True))
        batch = next(iter(trainer.get_train_dataloader()))
        monkeypatch.setattr(trainer.accelerator, "backward", lambda loss, **_: loss.backward())
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, batch)
        assert not torch.equal(layer.running_mean, before)
        # The scaler's factor is not part of the norm that is logged.
        assert trainer._get_grad_norm(trainer.model) == pytest.approx(trainer._norm_of_gradients() / 4)
        trainer._note_step()
        assert torch.equal(layer.running_mean, before)

    def test_steps_that_fp16s_scaler_skips_are_recorded(self, make_trainer, monkeypatch):
        trainer = make_trainer(max_steps=3)
        monkeypatch.setattr(trainer.accelerator, "scaler", object())
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: True))
        recorded = []
        trainer._recording = SimpleNamespace(tick=recorded.append)
        trainer._note_step()
        assert recorded == [1]

    def test_steps_that_fp16s_scaler_skips_are_counted(self, make_trainer, monkeypatch):
        trainer = make_trainer(max_skipped_steps=1)
        skipped = [True, True, False, True, True, True, True]
        monkeypatch.setattr(trainer.accelerator, "scaler", object())
        monkeypatch.setattr(
            type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: skipped.pop(0))
        )
        for _ in range(6):
            trainer._ticked = not skipped[0]
            trainer._note_step()
        assert trainer.skipped_steps == 5
        with pytest.raises(RuntimeError, match=r"got 4 steps in a row .* in the scaled loss, expected at most 3"):
            trainer._note_step()


def test_scale_at_its_minimum_and_dead_quantizers_are_named_and_counted(make_trainer, caplog):
    trainer = make_trainer(max_steps=2, scale_learning_rate=0.0, eval_strategy="steps", eval_steps=1)
    with torch.no_grad():
        dict(quantizers(trainer.model))["timm_model.conv_head.weight_quantizer"].scale.fill_(-1.0)
        dict(quantizers(trainer.model))["timm_model.classifier.input_quantizer"].scale.fill_(1e5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    messages = [message for message in caplog.messages if message.startswith(("conv_head", "classifier"))]
    assert len([m for m in messages if m.startswith("conv_head.weight_quantizer: training tried to make")]) == 1
    assert len([m for m in messages if m.startswith("classifier.input_quantizer: every value has the same")]) == 1
    assert logged(trainer)[-1]["scales_at_minimum"] == 1
    assert logged(trainer)[-1]["dead_quantizers"] >= 1


def test_reestimation_takes_a_view_of_the_data_at_the_first_epoch(make_trainer):
    seen = []

    class AtEpoch(RandomImages):
        def __init__(self, epoch=0):
            self.epoch = epoch

        def at_epoch(self, epoch):
            return AtEpoch(epoch)

        def __getitem__(self, index):
            seen.append(self.epoch)
            return super().__getitem__(index)

    trainer = make_trainer()
    trainer.train_dataset = AtEpoch(3)
    trainer.reestimate_batchnorm()
    assert set(seen) == {0}
    assert trainer.train_dataset.epoch == 3


def test_bare_timm_model_is_refused_by_what_it_lacks(make_net):
    with pytest.raises(ValueError, match="got a bare Sequential, expected transformers' wrapper"):
        OscQATTrainer(model=make_net())


class TestPush:
    REPO = "org/mbv2-w4a4-osc"

    def test_packed_model_with_card_and_picture_in_one_commit(self, make_trainer, hub):
        trainer = make_trainer(push_to_hub=True, hub_model_id=self.REPO, max_steps=3)
        assert not hub._repos, "the repository is made by the push"
        trainer.train()
        assert trainer.push_to_hub(license="mit", dataset_name="org/pets") == f"{hub.url}/{self.REPO}"
        files = hub.files(self.REPO)
        assert files.keys() == {
            "README.md", "config.json", "model.safetensors", "modeling_oscqat.py", "oscillation.png", "results.json",
        }  # fmt: skip
        assert len(hub.commits(self.REPO)) == 2
        metrics = trainer.evaluate()
        data = ModelCard(files["README.md"].decode()).data
        assert (data.license, data.datasets, data.eval_results) == ("mit", ["org/pets"], None)
        assert f"**{100 * metrics['eval_accuracy']:.2f}%**" in files["README.md"].decode()
        images = torch.stack([RandomImages()[i]["pixel_values"] for i in range(4)])
        with torch.no_grad():
            loaded = AutoModelForImageClassification.from_pretrained(self.REPO)
            assert torch.equal(loaded(images).logits, trainer.model.eval()(images).logits)

    def test_card_is_about_the_weights_that_are_pushed(self, make_trainer, hub):
        options = {
            "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1.0,
        }  # fmt: skip
        trainer = make_trainer({"freezing": FREEZING}, hub_model_id=self.REPO, **options)
        trainer.train()
        # At such a rate the last is not the best, and what is best between two checkpoints cannot be loaded.
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert best == 4
        trainer.push_to_hub(license="mit")
        results = json.loads(hub.files(self.REPO)["results.json"])
        of_best = next(e for e in trainer.state.log_history if e["step"] == best and "frozen_percent" in e)
        assert (results["run"]["steps"], results["oscillation"]["frozen"]) == (best, of_best["frozen_percent"])
        assert results["run"]["epochs"] == pytest.approx(best * 4 / len(RandomImages()))
        assert results["run"]["seconds"] > 0
        again = make_trainer({"freezing": FREEZING}, hub_model_id=self.REPO, **options)
        again.train(True)
        again.push_to_hub(license="mit")
        assert json.loads(hub.files(self.REPO)["results.json"])["run"]["seconds"] is None, "part of it is not known"

    @pytest.mark.parametrize(("precision", "said"), [({}, "float32"), ({"bf16": True}, "bfloat16")])
    def test_card_says_in_which_precision_it_was_measured(self, make_trainer, hub, precision, said):
        trainer = make_trainer(hub_model_id=self.REPO, max_steps=1, **precision)
        trainer.train()
        trainer.push_to_hub(license="mit", dataset_name="org/pets")
        card = hub.files(self.REPO)["README.md"].decode()
        assert f"top-1 and top-5 accuracy, in {said} arithmetic on rounded values" in card

    def test_saving_does_not_push(self, make_trainer, hub):
        trainer = make_trainer(push_to_hub=True, hub_model_id=self.REPO, max_steps=1)
        trainer.train()
        trainer.save_model()
        assert not hub._repos

    def test_token_is_written_nowhere(self, make_trainer, hub, monkeypatch, caplog, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", "hf_write"])
        with caplog.at_level("DEBUG"):
            trainer = make_trainer(push_to_hub=True, hub_model_id=self.REPO, hub_token="hf_write", max_steps=1)
            trainer.train()
            trainer.push_to_hub(license="mit")
        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        for content in (*written, *hub.files(self.REPO).values(), caplog.text.encode()):
            assert b"hf_write" not in content

    def test_read_only_token_is_found_before_training(self, make_trainer, hub):
        hub.create(self.REPO)
        with pytest.raises(ValueError, match="the token may not do this; expected one with write permission"):
            make_trainer(push_to_hub=True, hub_model_id=self.REPO, hub_token="hf_read")

    def test_licence_is_needed_before_anything_is_evaluated(self, make_trainer, hub, monkeypatch):
        trainer = make_trainer()
        monkeypatch.setattr(trainer, "evaluate", pytest.fail)
        with pytest.raises(ValueError, match="a model trained from scratch has none"):
            trainer.push_to_hub()

    def test_licence_is_that_of_the_base_model(self, make_trainer, hub):
        hub.create("timm/base", {"README.md": b"---\nlicense: bsd-3-clause\n---\n"})
        trainer = make_trainer(max_steps=1)
        trainer.train()
        trainer.push_to_hub(base_model="timm/base")
        data = ModelCard(hub.files("alice/run")["README.md"].decode()).data
        assert (data.license, data.base_model, data.base_model_relation) == ("bsd-3-clause", "timm/base", "quantized")

    def test_training_checkpoints_are_not_pushed(self, make_trainer):
        with pytest.raises(ValueError, match="got hub_strategy='every_save', expected 'end'"):
            make_trainer(push_to_hub=True, hub_strategy="every_save")

    def test_push_in_the_background_is_refused(self, make_trainer):
        with pytest.raises(ValueError, match="got blocking=False"):
            make_trainer().push_to_hub(blocking=False, license="mit")


def test_training_data_is_told_the_epoch(make_trainer):
    class Told(RandomImages):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    trainer = make_trainer({"batchnorm_reestimation_batches": 0}, max_steps=14)
    trainer.train_dataset = Told()
    trainer.train()
    assert list(dict.fromkeys(Told.epochs)) == [0, 1, 2]


def test_trained_model_packs_to_equal_logits(make_trainer, pixel_values):
    trainer = make_trainer({"freezing": FREEZING})
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(pack(model)(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"channels_last": True},
    ],
    ids=["bf16", "channels_last"],
)
def test_trains_and_freezes_with(make_trainer, options):
    trainer = make_trainer({"freezing": FREEZING}, **options)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in logged(trainer))
    assert trainer.tracker.frozen_fraction > 0
    assert all(quantizer.scale.dtype == torch.float32 for _, quantizer in quantizers(trainer.model))


def test_compiled_training_loses_what_eager_training_loses(make_trainer):
    eager = make_trainer({"freezing": FREEZING})
    compiled = make_trainer({"freezing": FREEZING}, torch_compile=True, torch_compile_backend="aot_eager")
    eager.train()
    compiled.train()
    for one, other in zip(logged(eager), logged(compiled), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert compiled.tracker.frozen_fraction > 0


@pytest.mark.parametrize("use_ema", [True, False])
def test_choice_of_the_frozen_integer_reaches_the_tracker(make_trainer, use_ema):
    assert make_trainer({"freezing": {**FREEZING, "use_ema": use_ema}}).tracker.use_ema is use_ema


def test_first_and_last_step_are_logged_however_rarely_it_logs(make_trainer):
    trainer = make_trainer(logging_steps=500)
    trainer.train()
    assert [entry["step"] for entry in logged(trainer)] == [1, 10]


def test_one_process_on_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(OscQATTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"one process for 2 GPUs, expected one process each.*--multi_gpu"):
        OscQATTrainingArguments(output_dir=str(tmp_path))


def test_checkpoint_with_quantizers_that_the_config_does_not_have_is_refused(make_prepared_wrapper, tmp_path):
    make_prepared_wrapper().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["blocks.1*"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"got tensor 'timm_model.blocks.1.*describes no quantizer"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_float_model_is_refused(make_wrapper):
    with pytest.raises(ValueError, match=r"not prepared.*prepare_qat"):
        OscQATTrainer(model=make_wrapper())


def test_an_uncalibrated_model_is_refused(make_wrapper):
    with pytest.raises(ValueError, match=r"quantizers without a range.*calibrate"):
        OscQATTrainer(model=prepare_qat(make_wrapper(), OscQATConfig()))


def test_remedies_without_tracking_are_refused(make_trainer):
    with pytest.raises(ValueError, match="track_oscillations=False"):
        make_trainer({"freezing": FREEZING}, track_oscillations=False)


def test_training_without_tracking_logs_the_loss_alone(make_trainer):
    trainer = make_trainer(track_oscillations=False)
    trainer.train()
    assert "oscillating_percent" not in logged(trainer)[0]


@pytest.mark.parametrize("options", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_sharded_training_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"(FSDP|DeepSpeed), expected plain data parallelism"):
        OscQATTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_launch_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="expected plain data parallelism"):
        OscQATTrainingArguments(output_dir=str(tmp_path))


def test_unknown_weight_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'sgd' or 'adamw'"):
        OscQATTrainingArguments(output_dir=str(tmp_path), weight_optimizer="lion")


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
@pytest.mark.parametrize("scale_domain", ["linear", "log"])
def test_every_gradient_estimator_trains_packs_and_comes_back(make_trainer, estimator, scale_domain, tmp_path):
    trainer = make_trainer({"gradient_estimator": estimator, "scale_domain": scale_domain}, max_steps=2)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in logged(trainer))
    trainer.save_model(tmp_path / "qat")
    images = torch.stack([RandomImages()[i]["pixel_values"] for i in range(4)])
    with torch.no_grad():
        expected = trainer.model.eval()(images).logits
        assert torch.equal(pack(trainer.model)(images).logits, expected)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "qat").eval()
        assert torch.equal(again(images).logits, expected)
    assert again.config.quantization_config.gradient_estimator == estimator
