"""OscQATTrainer: when it ticks, what it logs, what it saves, and that a resumed run is the same run."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_oscqat import (
    CheckpointError,
    OscQATConfig,
    OscQATTrainer,
    OscQATTrainingArguments,
    pack,
    prepare_qat,
    reestimate_batchnorm,
)
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
