"""What from_pretrained makes of packed checkpoints, training checkpoints and float ones, whole and spoiled."""

import copy
import json
import logging
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
)

from hf_oscqat import (
    CheckpointError,
    OscillationTracker,
    OscQATConfig,
    OscQATTimmConfig,
    OscQATTimmForImageClassification,
    OscQATTimmModel,
    calibrate,
    pack,
)
from hf_oscqat.checkpoint import digest, packed_layers
from hf_oscqat.integration.modeling import check_all_loaded
from hf_oscqat.integration.register import register
from hf_oscqat.quantization.layers import quantized_layers, quantizers

STEM = "timm_model.conv_stem"
FAST = {"range_estimator": "minmax"}
SETTINGS = {"weight_bits": 3, "weight_granularity": "per_channel", "activation_scheme": "asymmetric"} | FAST


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


def load(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def packed(make_prepared_wrapper):
    return pack(make_prepared_wrapper(**SETTINGS))


@pytest.fixture(scope="module")
def packed_dir(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    packed.save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled_dir(packed_dir, tmp_path):
    """A copy to be spoiled."""
    folder = tmp_path / "spoiled"
    shutil.copytree(packed_dir, folder)
    return folder


def assert_same_repository(first, second):
    """Compare what is in the files: safetensors writes the entries of the metadata in any order."""
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    tensors, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    with (
        safe_open(first / "model.safetensors", "pt") as one,
        safe_open(second / "model.safetensors", "pt") as other,
    ):
        assert one.metadata() == other.metadata()


def rewrite(folder, spoil):
    """Let `spoil` change the tensors and the header of a checkpoint."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["oscqat"])
    tensors = load_file(path)
    spoil(tensors, content)
    save_file(tensors, path, metadata={"format": "pt", "oscqat": json.dumps(content)})


def rewrite_config(folder, spoil):
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    spoil(data)
    path.write_text(json.dumps(data), encoding="utf-8")


class TestPacked:
    def test_classifier_has_equal_logits(self, packed, packed_dir, pixel_values):
        model = load(packed_dir)
        assert type(model) is OscQATTimmForImageClassification
        assert torch.equal(logits(model, pixel_values), logits(packed, pixel_values))

    @pytest.mark.parametrize("loader", [AutoModelForImageClassification, AutoModel])
    def test_kept_packed_it_holds_no_weight_and_computes_the_same(self, packed_dir, pixel_values, loader):
        model, kept = (loader.from_pretrained(packed_dir).eval() for _ in range(2))
        assert kept.keep_packed() is kept
        with torch.no_grad():
            assert torch.equal(kept(pixel_values)[0], model(pixel_values)[0])
        assert all(layer._unpacked is None for layer in packed_layers(kept).values())
        assert all(layer._unpacked is not None for layer in packed_layers(model).values())

    def test_model_that_is_made_and_not_loaded_has_the_random_weights_of_timm(self, packed_dir):
        model, expected = [], []
        for cls, found in ((OscQATTimmForImageClassification, model), (TimmWrapperForImageClassification, expected)):
            torch.manual_seed(0)
            found.extend(cls(AutoConfig.from_pretrained(packed_dir)).parameters())
        assert all(torch.equal(one, other) for one, other in zip(model, expected, strict=True))

    def test_model_without_head_has_equal_features(self, packed, packed_dir, pixel_values):
        model = AutoModel.from_pretrained(packed_dir).eval()
        assert type(model) is OscQATTimmModel
        with torch.no_grad():
            features = packed.timm_model.forward_features(pixel_values)
            assert torch.equal(model(pixel_values).last_hidden_state, features)

    def test_every_tensor_is_that_of_the_file(self, packed_dir):
        state = load(packed_dir).state_dict()
        stored = load_file(packed_dir / "model.safetensors")
        assert state.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype

    @pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
    def test_logits_are_equal_for_every_scheme(
        self, make_prepared_wrapper, pixel_values, tmp_path, scheme, granularity
    ):
        trained = make_prepared_wrapper(
            weight_scheme=scheme, activation_scheme=scheme, weight_granularity=granularity, weight_bits=5, **FAST
        )
        pack(trained).save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path), pixel_values), logits(trained, pixel_values))

    @pytest.mark.parametrize(
        "settings",
        [
            {"weight_bits": None},
            {"activation_bits": None},
            {"first_last_bits": None},
            {"modules_to_not_convert": ["classifier", "*.se.*"]},
        ],
        ids=str,
    )
    def test_layers_may_be_float_in_part(self, make_prepared_wrapper, pixel_values, tmp_path, settings):
        trained = make_prepared_wrapper(**settings, **FAST)
        pack(trained).save_pretrained(tmp_path)
        # A copy, because torch adds up in another order where a weight lies in a file that is mapped into memory.
        model = copy.deepcopy(load(tmp_path))
        assert torch.equal(logits(model, pixel_values), logits(trained, pixel_values))

    def test_headless_model_packs_and_loads(self, make_prepared_wrapper, pixel_values, tmp_path):
        trained = make_prepared_wrapper(headless=True, **FAST)
        pack(trained).save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(model(pixel_values).last_hidden_state, trained(pixel_values).last_hidden_state)

    def test_config_says_what_it_is(self, packed_dir):
        config = AutoConfig.from_pretrained(packed_dir)
        assert type(config) is OscQATTimmConfig
        assert config.architecture == "test_efficientnet"
        assert config.num_labels == 5
        assert load(packed_dir).config.quantization_config.layers[STEM]["weight"]["bits"] == 8
        assert repr(config) == "OscQATTimmConfig(architecture='test_efficientnet')"

    def test_image_processor_is_found(self, packed_dir):
        pixels = AutoImageProcessor.from_pretrained(packed_dir)(
            torch.zeros(3, 200, 200, dtype=torch.uint8).numpy(), return_tensors="pt"
        )["pixel_values"]
        assert pixels.shape == (1, 3, 160, 160)

    def test_saved_again_it_is_the_same_repository(self, packed_dir, tmp_path):
        load(packed_dir).save_pretrained(tmp_path)
        assert_same_repository(tmp_path, packed_dir)

    def test_file_may_be_sharded(self, packed, pixel_values, tmp_path):
        packed.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert torch.equal(logits(load(tmp_path), pixel_values), logits(packed, pixel_values))

    def test_nothing_is_to_be_trained(self, packed_dir):
        model = load(packed_dir)
        assert not model.hf_quantizer.is_trainable
        assert not model.hf_quantizer.is_qat_trainable

    def test_bfloat16_keeps_integers_and_scales(self, packed, packed_dir, pixel_values):
        model = load(packed_dir, dtype=torch.bfloat16)
        assert model.timm_model.conv_stem.weight.dtype == torch.bfloat16
        assert model.timm_model.conv_stem.weight_scale.dtype == torch.float32
        assert torch.equal(model.timm_model.conv_stem.weight_scale, packed.timm_model.conv_stem.weight_scale)
        expected = logits(copy.deepcopy(packed).bfloat16(), pixel_values.bfloat16())
        assert torch.equal(logits(model, pixel_values.bfloat16()), expected)

    def test_package_is_used_where_it_is_imported_even_if_remote_code_is_trusted(self, packed_dir):
        assert type(load(packed_dir, trust_remote_code=True)) is OscQATTimmForImageClassification

    def test_only_the_main_process_writes_the_code(self, packed, tmp_path):
        packed.save_pretrained(tmp_path, is_main_process=False)
        assert not (tmp_path / "modeling_oscqat.py").exists()

    def test_registering_again_changes_nothing(self, packed_dir):
        register()
        assert type(load(packed_dir)) is OscQATTimmForImageClassification


def test_importing_the_package_is_enough_for_the_auto_classes(packed, packed_dir, pixel_values, tmp_path):
    save_file({"pixel_values": pixel_values}, tmp_path / "pixels.safetensors")
    program = """
import sys
import hf_oscqat
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

assert "hf_oscqat.integration.trainer" not in sys.modules, "Trainer is imported when it is asked for"
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert isinstance(model, hf_oscqat.OscQATTimmForImageClassification)
save_file({"logits": model(load_file(sys.argv[2])["pixel_values"]).logits}, sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", program, packed_dir, tmp_path / "pixels.safetensors"], check=True)
    torch.testing.assert_close(load_file(tmp_path / "pixels.safetensors")["logits"], logits(packed, pixel_values))


class TestSize:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_file_is_within_the_bound_of_the_contract(self, make_prepared_wrapper, tmp_path, bits):
        model = make_prepared_wrapper(
            weight_bits=bits,
            weight_granularity="per_channel",
            weight_scheme="asymmetric",
            activation_bits=bits,
            **FAST,
        )
        pack(model).save_pretrained(tmp_path)
        bound = 0
        of_quantized = set()
        for name, layer in quantized_layers(model):
            shape, quantizer = layer.latent_weight.shape, layer.weight_quantizer
            bound += shape[0] * math.ceil(math.prod(shape[1:]) * quantizer.num_bits / 8)
            bound += sum(4 * q.scale.numel() for q in (quantizer, layer.input_quantizer) if q is not None)
            bound += quantizer.zero_point.numel()
            of_quantized.add(f"{name}.weight")
        bound += sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in model.state_dict().items()
            if name not in of_quantized and "_quantizer." not in name
        )
        assert (tmp_path / "model.safetensors").stat().st_size <= bound + max(0.02 * bound, 64 * 1024)

    def test_metadata_is_readable_without_loading_a_tensor(self, packed_dir):
        with safe_open(packed_dir / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        content = json.loads(metadata["oscqat"])
        assert content["format_version"] == 1
        config = json.loads((packed_dir / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert content["layers"] == config["layers"]
        assert (config["checkpoint_format"], config["format_version"]) == ("packed", 1)
        stem = content["layers"][STEM]["weight"]
        assert (stem["bits"], stem["qmin"], stem["qmax"], stem["shape"]) == (8, -128, 127, [24, 3, 3, 3])


def test_tensors_that_no_file_has_filled_are_named():
    layer = nn.Linear(2, 2)
    layer.bias._is_hf_initialized = True
    with pytest.raises(CheckpointError, match="does not fill 1 tensors of the model: weight"):
        check_all_loaded(layer)
    layer.weight._is_hf_initialized = True
    check_all_loaded(layer)


def set_first(name, value):
    def spoil(tensors, content):
        tensors[name].view(-1)[0] = value
        layer, _, part = name.rpartition(".")
        index = {"weight_scale": 1}[part]
        content["sha256"][layer][index] = digest(tensors[name])

    return spoil


def swap(first, second):
    def spoil(tensors, content):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return spoil


BLOCK = "timm_model.blocks.1.0"
SPOILED = {
    "missing scale": (lambda t, c: t.pop(f"{STEM}.weight_scale"), f"'{STEM}.weight_scale'"),
    "missing integers": (lambda t, c: t.pop(f"{STEM}.weight_packed"), f"'{STEM}.weight_packed'"),
    "missing statistics": (lambda t, c: t.pop("timm_model.bn1.running_var"), "'timm_model.bn1.running_var'"),
    "missing head": (lambda t, c: t.pop("timm_model.classifier.bias"), "'timm_model.classifier.bias'"),
    "extra": (lambda t, c: t.update({f"{STEM}.input_scale": torch.ones(1)}), f"'{STEM}.input_scale'"),
    "misshapen": (lambda t, c: t.update({f"{STEM}.weight_scale": torch.ones(1)}), rf"'{STEM}.weight_scale'.*\[24\]"),
    "retyped": (
        lambda t, c: t.update({f"{STEM}.weight_scale": t[f"{STEM}.weight_scale"].half()}),
        f"'{STEM}.weight_scale' of type F16",
    ),
    "altered": (lambda t, c: t[f"{STEM}.weight_packed"].view(-1)[5:6].bitwise_xor_(16), f"'{STEM}.weight_packed'"),
    "swapped": (
        swap(f"{BLOCK}.conv_exp.input_scale", f"{BLOCK}.conv_pwl.input_scale"),
        rf"'{BLOCK}.conv_(exp|pwl).input_scale'",
    ),
    "NaN scale": (set_first(f"{STEM}.weight_scale", torch.nan), f"not finite and positive in '{STEM}.weight_scale'"),
    "zero scale": (set_first(f"{STEM}.weight_scale", 0), f"not finite and positive in '{STEM}.weight_scale'"),
    "negative scale": (set_first(f"{STEM}.weight_scale", -1), f"not finite and positive in '{STEM}.weight_scale'"),
    "zero-point off grid": (
        lambda t, c: t[f"{BLOCK}.conv_exp.input_zero_point"].fill_(200),
        f"zero-point outside 0 to 15 in '{BLOCK}.conv_exp.input_zero_point'",
    ),
    "format version": (lambda t, c: c.update(format_version=2), "format_version 2"),
    "header's bits": (lambda t, c: c["layers"][STEM]["weight"].update(bits=4), f"layer '{STEM}'"),
    "header's layers": (lambda t, c: c["layers"].pop(STEM), f"layer '{STEM}' in config.json only"),
}
SPOILED_CONFIG = {
    "bits": (lambda d: d["layers"][STEM]["weight"].update(bits=4, qmin=-8, qmax=7), STEM),
    "impossible bits": (lambda d: d["layers"][STEM]["weight"].update(bits=17), STEM),
    "granularity": (lambda d: d["layers"][STEM]["weight"].update(granularity="per_tensor"), STEM),
    "shape": (lambda d: d["layers"][STEM]["weight"].update(shape=[24, 3, 9]), STEM),
    "no grid": (lambda d: d["layers"][STEM].update(weight=None), STEM),
    "one layer less": (lambda d: d["layers"].pop(STEM), STEM),
    "one layer more": (lambda d: d["layers"].update({f"{STEM}.more": d["layers"][STEM]}), f"{STEM}.more"),
    "layer that is none": (
        lambda d: d["layers"].update({"timm_model.blocks": d["layers"][STEM]}),
        "timm_model.blocks",
    ),
    "no layers": (lambda d: d.pop("layers"), "layers"),
    "training format": (lambda d: d.update(checkpoint_format="qat"), "timm_model"),
    "format version": (lambda d: d.update(format_version=2), "format_version"),
}


class TestSpoiled:
    @pytest.mark.parametrize("name", SPOILED)
    def test_file_with_this_wrong_is_refused_by_name(self, spoiled_dir, name):
        spoil, message = SPOILED[name]
        rewrite(spoiled_dir, spoil)
        with pytest.raises(CheckpointError, match=message):
            load(spoiled_dir)

    @pytest.mark.parametrize("name", [n for n in SPOILED if "head" not in n or n.startswith("header")])
    def test_file_with_this_wrong_is_refused_without_head_too(self, spoiled_dir, name):
        spoil, message = SPOILED[name]
        rewrite(spoiled_dir, spoil)
        with pytest.raises(CheckpointError, match=message):
            AutoModel.from_pretrained(spoiled_dir)

    @pytest.mark.parametrize("name", SPOILED_CONFIG)
    def test_config_with_this_wrong_is_refused_by_name(self, spoiled_dir, name):
        spoil, message = SPOILED_CONFIG[name]
        rewrite_config(spoiled_dir, lambda data: spoil(data["quantization_config"]))
        with pytest.raises(CheckpointError, match=message):
            load(spoiled_dir)

    def test_config_without_quantization_is_refused(self, spoiled_dir):
        # transformers would go on with random weights and a table in the log.
        rewrite_config(spoiled_dir, lambda data: data.pop("quantization_config"))
        with pytest.raises(CheckpointError, match="quantization_config"):
            load(spoiled_dir)

    def test_file_without_metadata_is_refused(self, spoiled_dir):
        path = spoiled_dir / "model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="without readable 'oscqat' metadata"):
            load(spoiled_dir)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_file_is_refused(self, spoiled_dir, share):
        path = spoiled_dir / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(CheckpointError, match=r"model\.safetensors, which is no whole safetensors file"):
            load(spoiled_dir)

    def test_pickle_in_place_of_safetensors_is_refused(self, spoiled_dir):
        path = spoiled_dir / "model.safetensors"
        torch.save(load_file(path), spoiled_dir / "pytorch_model.bin")
        path.unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load(spoiled_dir)

    def test_missing_shard_is_an_error(self, packed, tmp_path):
        packed.save_pretrained(tmp_path, max_shard_size="20KB")
        shards = sorted(tmp_path.glob("*.safetensors"))
        index = tmp_path / "model.safetensors.index.json"
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = {n: f for n, f in data["weight_map"].items() if f != shards[-1].name}
        index.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(CheckpointError, match="got a checkpoint without 'timm_model"):
            load(tmp_path)

    @pytest.mark.parametrize("ignore", [False, True])
    def test_another_number_of_labels_is_an_error_even_if_sizes_may_mismatch(self, packed_dir, ignore):
        with pytest.raises(CheckpointError, match=r"timm_model\.classifier.*\[5, 256\].*\[3, 256\]"):
            load(packed_dir, num_labels=3, ignore_mismatched_sizes=ignore)

    def test_another_number_of_labels_is_an_error_where_the_head_is_float(self, make_prepared_wrapper, tmp_path):
        pack(make_prepared_wrapper(modules_to_not_convert=["classifier"], **FAST)).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"timm_model\.classifier"):
            load(tmp_path, num_labels=3, ignore_mismatched_sizes=True)

    def test_repository_without_head_is_no_classifier(self, make_prepared_wrapper, tmp_path):
        pack(make_prepared_wrapper(headless=True, **FAST)).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"timm_model\.classifier"):
            load(tmp_path)


def run_steps(tracker, count):
    for _ in range(count):
        for layer in tracker.layers.values():
            layer.latent_weight.data[0].neg_()
        tracker.tick(0.4)


@pytest.fixture(scope="module")
def source(make_prepared_wrapper, tmp_path_factory):
    """A model in the middle of training, some of its weights frozen, and where it was saved."""
    model = make_prepared_wrapper(weight_bits=3, weight_granularity="per_channel", **FAST)
    tracker = OscillationTracker(model, momentum=0.5, count_total=True)
    run_steps(tracker, 4)
    assert 0 < tracker.frozen_fraction < 1
    folder = tmp_path_factory.mktemp("training")
    model.save_pretrained(folder)
    return model, folder


class TestTrainingForm:
    def test_logits_and_every_tensor_are_equal(self, source, pixel_values):
        model, folder = source
        again = load(folder)
        assert type(again) is type(model)
        assert torch.equal(logits(again, pixel_values), logits(model, pixel_values))
        state = model.state_dict()
        assert again.state_dict().keys() == state.keys()
        for name, tensor in again.state_dict().items():
            assert tensor.dtype == state[name].dtype
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)

    def test_model_without_head_has_equal_features(self, source, pixel_values):
        model, folder = source
        again = AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            features = model.timm_model.forward_features(pixel_values)
            assert torch.equal(again(pixel_values).last_hidden_state, features)

    def test_model_without_head_needs_no_layer_for_the_patterns_of_the_head(
        self, make_prepared_wrapper, pixel_values, tmp_path
    ):
        model = make_prepared_wrapper(overrides={"classifier": {"weight_bits": 6}}, **FAST)
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            features = AutoModel.from_pretrained(tmp_path).eval()(pixel_values).last_hidden_state
            assert torch.equal(features, model.timm_model.forward_features(pixel_values))

    def test_frozen_weights_stay_frozen_while_their_latents_move(self, source):
        model, folder = source
        again = load(folder)
        quantizer, latent = (
            again.timm_model.conv_head.weight_quantizer,
            again.timm_model.conv_head.latent_weight.detach(),
        )
        frozen = quantizer.frozen_int != torch.iinfo(torch.int8).min
        assert frozen.any()
        before = quantizer.to_int(latent)
        assert torch.equal(quantizer.to_int(-3 * latent)[frozen], before[frozen])
        assert torch.equal(before, model.timm_model.conv_head.weight_quantizer.to_int(latent))

    def test_tracker_goes_on_where_it_stopped(self, source):
        model, folder = source
        uninterrupted = OscillationTracker(copy.deepcopy(model), momentum=0.5)
        resumed = OscillationTracker(load(folder), momentum=0.5)
        for tracker in (uninterrupted, resumed):
            run_steps(tracker, 3)
        expected = uninterrupted.state_dict()
        assert resumed.state_dict().keys() == expected.keys()
        for name, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_it_is_trainable(self, source, pixel_values):
        model = load(source[1]).train()
        assert model.hf_quantizer.is_trainable
        assert model.hf_quantizer.is_qat_trainable
        model(pixel_values).logits.sum().backward()
        assert all(q.scale.grad is not None for _, q in quantizers(model))
        assert model.timm_model.conv_stem.latent_weight.grad is not None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_refused_with_a_warning_and_stays_float32(self, source, pixel_values, caplog, dtype):
        model, folder = source
        with caplog.at_level(logging.WARNING, logger="hf_oscqat"):
            again = load(folder, dtype=dtype)
        assert "it stays float32" in caplog.text
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        assert torch.equal(logits(again, pixel_values), logits(model, pixel_values))

    def test_config_is_the_one_that_was_trained_with(self, source):
        model, folder = source
        assert load(folder).config.quantization_config == model.config.quantization_config

    def test_it_packs_to_the_same_repository(self, source, tmp_path):
        model, folder = source
        pack(model).save_pretrained(tmp_path / "a")
        pack(load(folder)).save_pretrained(tmp_path / "b")
        assert_same_repository(tmp_path / "a", tmp_path / "b")

    def test_without_tracker_state_none_is_made(self, make_prepared_wrapper, tmp_path):
        make_prepared_wrapper(**FAST).save_pretrained(tmp_path)
        assert not any("oscillation" in n or "frozen_int" in n for n in load(tmp_path).state_dict())

    @pytest.mark.parametrize(
        "name",
        [
            f"{STEM}.weight",
            f"{STEM}.weight_quantizer.scale",
            "timm_model.conv_head.input_quantizer.scale",
            "timm_model.conv_head.input_quantizer.signed",
            "timm_model.conv_head.oscillation.direction",
            "timm_model.classifier.bias",
        ],
    )
    def test_missing_tensor_is_refused_by_name(self, source, tmp_path, name):
        shutil.copytree(source[1], tmp_path / "spoiled")
        path = tmp_path / "spoiled" / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / "spoiled")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0])
    def test_scale_that_is_none_is_refused_by_name(self, source, tmp_path, value):
        shutil.copytree(source[1], tmp_path / "spoiled")
        path = tmp_path / "spoiled" / "model.safetensors"
        tensors = load_file(path)
        tensors[f"{STEM}.weight_quantizer.scale"][3] = value
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"'{STEM}.weight_quantizer.scale'"):
            load(tmp_path / "spoiled")

    def test_another_number_of_labels_is_an_error_even_if_sizes_may_mismatch(self, source):
        with pytest.raises(CheckpointError, match=r"timm_model\.classifier\.weight"):
            load(source[1], num_labels=3, ignore_mismatched_sizes=True)


@pytest.fixture(scope="module")
def float_dir(make_wrapper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    make_wrapper().save_pretrained(folder)
    return folder


class TestFloat:
    def test_config_prepares_the_model_on_the_way(self, float_dir, make_prepared_wrapper, pixel_values):
        model = load(float_dir, quantization_config=OscQATConfig(weight_bits=3, **FAST))
        assert model.config.quantization_config == OscQATConfig(weight_bits=3, **FAST)
        with pytest.raises(RuntimeError, match="no range yet"):
            model(pixel_values)
        calibrate(model, [{"pixel_values": pixel_values}])
        expected = dict(quantizers(make_prepared_wrapper(weight_bits=3, **FAST)))
        found = dict(quantizers(model))
        assert found.keys() == expected.keys()
        for name, quantizer in found.items():
            assert (quantizer.qmin, quantizer.qmax) == (expected[name].qmin, expected[name].qmax)
            torch.testing.assert_close(quantizer.scale, expected[name].scale)

    def test_what_was_prepared_so_is_saved_and_loaded(self, float_dir, pixel_values, tmp_path):
        model = load(float_dir, quantization_config=OscQATConfig(**FAST))
        calibrate(model, [pixel_values])
        model.save_pretrained(tmp_path / "training")
        pack(model).save_pretrained(tmp_path / "packed")
        for name in ("training", "packed"):
            assert torch.equal(logits(load(tmp_path / name), pixel_values), logits(model, pixel_values))

    def test_new_head_is_initialised_and_has_a_range(self, float_dir, pixel_values):
        model = load(float_dir, quantization_config=OscQATConfig(**FAST), num_labels=3, ignore_mismatched_sizes=True)
        head = model.timm_model.classifier
        assert head.latent_weight.shape == (3, 256)
        assert 0 < head.latent_weight.std() < 1
        calibrate(model, [pixel_values])
        assert logits(model, pixel_values).shape == (2, 3)
        spread = head.latent_weight.abs().max() / head.weight_quantizer.scale
        assert 60 < spread.item() < 260

    def test_pattern_that_matches_nothing_is_an_error(self, float_dir):
        with pytest.raises(ValueError, match="got pattern 'haed' in overrides"):
            load(float_dir, quantization_config=OscQATConfig(overrides={"haed": {"weight_bits": 8}}))

    def test_half_precision_is_refused_with_a_warning_and_stays_float32(self, float_dir, caplog):
        with caplog.at_level(logging.WARNING, logger="hf_oscqat"):
            model = load(float_dir, quantization_config=OscQATConfig(**FAST), dtype=torch.bfloat16)
        assert "it stays float32" in caplog.text
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_packed_config_does_not_make_it_packed(self, float_dir):
        with pytest.raises(CheckpointError, match="without readable 'oscqat' metadata"):
            load(float_dir, quantization_config=OscQATConfig(checkpoint_format="packed", layers={}))
