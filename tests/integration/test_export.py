"""pack: the same outputs from integers, and an argument that stays as it was."""

import copy

import pytest
import torch
from safetensors.torch import save
from torch import nn
from transformers import TimmWrapperForImageClassification

from hf_oscqat import (
    CheckpointError,
    OscillationTracker,
    OscQATConfig,
    OscQATTimmForImageClassification,
    OscQATTimmModel,
    calibrate,
    describe,
    model_parameters,
    pack,
    prepare_qat,
    quantizer_parameters,
)
from hf_oscqat.checkpoint import header_metadata
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers
from hf_oscqat.quantization.packed import PackedLayer
from hf_oscqat.quantization.packing import unpack_bits


def oscillate(model, threshold=0.4):
    """Freeze a part of the weights of a model of low width."""
    tracker = OscillationTracker(model, momentum=0.5)
    for _ in range(4):
        for layer in tracker.layers.values():
            layer.latent_weight.data[0].neg_()
        tracker.tick(threshold)
    assert 0 < tracker.frozen_fraction < 1
    return tracker


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel])
def test_what_is_around_a_model_is_left_behind(make_prepared_wrapper, pixel_values, tmp_path, wrap):
    model = make_prepared_wrapper()
    packed = pack(wrap(model))
    packed.save_pretrained(tmp_path)
    loaded = type(packed).from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_packed_model_whose_layer_was_replaced_is_not_saved(make_prepared_wrapper, tmp_path):
    packed = pack(make_prepared_wrapper())
    packed.timm_model.reset_classifier(7)
    with pytest.raises(CheckpointError, match=r"layers timm_model.classifier are no longer those that were packed"):
        packed.save_pretrained(tmp_path)


def test_variant_is_saved_beside_the_weights(make_prepared_wrapper, tmp_path):
    packed = pack(make_prepared_wrapper())
    packed.save_pretrained(tmp_path)
    packed.save_pretrained(tmp_path, variant="ema")
    assert {"model.safetensors", "model.ema.safetensors"} <= {path.name for path in tmp_path.iterdir()}


class TestEqualOutputs:
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
    @pytest.mark.parametrize("weight_scheme", ["symmetric", "asymmetric"])
    @pytest.mark.parametrize("activation_scheme", ["symmetric", "asymmetric"])
    def test_for_every_scheme_and_granularity(
        self, make_prepared, images, granularity, weight_scheme, activation_scheme
    ):
        model = make_prepared(
            weight_bits=3,
            weight_granularity=granularity,
            weight_scheme=weight_scheme,
            activation_scheme=activation_scheme,
        ).eval()
        assert torch.equal(pack(model)(images), model(images))

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
    def test_for_every_width(self, make_prepared, images, bits, scheme):
        model = make_prepared(
            weight_bits=bits,
            activation_bits=bits,
            first_last_bits=bits,
            weight_scheme=scheme,
            activation_scheme=scheme,
        ).eval()
        assert torch.equal(pack(model)(images), model(images))

    @pytest.mark.parametrize("parts", [{"activation_bits": None}, {"weight_bits": None}, {"first_last_bits": None}])
    def test_for_weights_alone_inputs_alone_and_float_ends(self, make_prepared, images, parts):
        model = make_prepared(**parts).eval()
        assert torch.equal(pack(model)(images), model(images))

    def test_after_training_steps_have_moved_everything(self, make_prepared, images):
        model = make_prepared(weight_scheme="asymmetric", activation_scheme="asymmetric").train()
        groups = [{"params": model_parameters(model), "lr": 0.02}, {"params": quantizer_parameters(model)}]
        optimizer = torch.optim.Adam(groups, lr=1e-4)
        for _ in range(5):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        model.eval()
        assert torch.equal(pack(model)(images), model(images))

    def test_with_zero_points_that_have_left_the_grid(self, make_prepared, images):
        model = make_prepared(weight_scheme="asymmetric", activation_scheme="asymmetric").eval()
        with torch.no_grad():
            model.pw.weight_quantizer.zero_point.fill_(17.3)
            model.pw.input_quantizer.zero_point.fill_(-3.0)
        packed = pack(model)
        assert packed.pw.weight_zero_point.item() == 15
        assert packed.pw.input_zero_point.item() == 0
        assert torch.equal(packed(images), model(images))

    def test_with_frozen_weights_whose_latents_moved_on(self, make_prepared, images):
        model = make_prepared(weight_bits=3).eval()
        oscillate(model)
        with torch.no_grad():
            for _, layer in quantized_layers(model):
                layer.latent_weight.mul_(-3)
        packed = pack(model)
        quantizer = model.pw.weight_quantizer
        frozen = quantizer.frozen_int != torch.iinfo(torch.int8).min
        stored = unpack_bits(packed.pw.weight_packed, 3, 8).view(6, 8, 1, 1) + quantizer.qmin
        assert torch.equal(stored[frozen], quantizer.frozen_int[frozen].short())
        assert torch.equal(stored.float(), quantizer.to_int(model.pw.latent_weight))
        assert torch.equal(packed(images), model(images))

    def test_of_a_module_that_has_two_names(self):
        shared = nn.Linear(4, 4)
        model = prepare_qat(nn.Sequential(nn.Linear(4, 4), shared, shared), OscQATConfig())
        x = torch.randn(5, 4)
        calibrate(model, [x])
        packed = pack(model.eval())
        assert packed[1] is packed[2]
        assert torch.equal(packed(x), model(x))

    def test_of_a_parameter_that_two_layers_share(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        prepare_qat(model, OscQATConfig())
        x = torch.randn(5, 4)
        calibrate(model, [x])
        assert torch.equal(pack(model.eval())(x), model(x))

    def test_of_a_layer_that_is_the_whole_model(self):
        model = prepare_qat(nn.Linear(4, 3), OscQATConfig())
        x = torch.randn(5, 4)
        packed = pack(model)
        assert torch.equal(packed(x), model(x))
        assert sorted(packed.state_dict()) == ["bias", "weight_packed", "weight_scale"]

    def test_twice_gives_the_same_bytes(self, make_prepared):
        model = make_prepared()
        first, second = pack(model), pack(model)
        assert save(first.state_dict()) == save(second.state_dict())
        assert header_metadata(first) == header_metadata(second)


class TestArgument:
    @pytest.mark.parametrize("training", [True, False])
    def test_is_left_as_it_was(self, make_prepared, training):
        model = make_prepared(weight_bits=3).train(training)
        oscillate(model)
        before = copy.deepcopy(model)
        pack(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
        assert all(p.requires_grad for p in model.parameters())
        state = before.state_dict()
        assert model.state_dict().keys() == state.keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)

    def test_goes_on_training(self, make_prepared, images):
        model = make_prepared()
        packed = pack(model)
        before = packed(images)
        model.train()(images).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert torch.equal(packed(images), before)

    def test_keeps_its_config_and_class_if_it_is_of_transformers(self, make_prepared_wrapper):
        model = make_prepared_wrapper()
        config = model.config.to_dict()
        pack(model)
        assert type(model) is TimmWrapperForImageClassification
        assert model.config.to_dict() == config
        assert model.config.quantization_config.checkpoint_format == "qat"
        assert model.config.quantization_config.layers is None


class TestResult:
    def test_has_nothing_to_train_and_is_in_evaluation_mode(self, make_prepared):
        packed = pack(make_prepared().train())
        assert not any(p.requires_grad for p in packed.parameters())
        assert not any(m.training for m in packed.modules())

    def test_has_neither_latents_nor_statistics(self, make_prepared):
        model = make_prepared(weight_bits=3)
        oscillate(model)
        packed = pack(model)
        assert not any(isinstance(m, QuantizedLayer) for m in packed.modules())
        assert sum(isinstance(m, PackedLayer) for m in packed.modules()) == 4
        parts = {name.removeprefix("pw.") for name in packed.state_dict() if name.startswith("pw.")}
        assert parts == {"bias", "weight_packed", "weight_scale", "input_scale"}

    def test_of_a_bare_model_is_a_bare_module(self, make_prepared_wrapper, pixel_values):
        model = make_prepared_wrapper().timm_model
        packed = pack(model)
        assert type(packed) is type(model)
        assert torch.equal(packed(pixel_values), model(pixel_values))

    @pytest.mark.parametrize(
        ("headless", "expected"), [(False, OscQATTimmForImageClassification), (True, OscQATTimmModel)]
    )
    def test_of_a_wrapper_is_the_published_class_and_says_so(self, make_prepared_wrapper, headless, expected):
        packed = pack(make_prepared_wrapper(headless, weight_bits=3))
        assert type(packed) is expected
        assert packed.config.model_type == "oscqat_timm"
        quantization = packed.config.quantization_config
        assert quantization.checkpoint_format == "packed"
        assert quantization.format_version == 1
        assert quantization.layers["timm_model.conv_stem"]["weight"]["bits"] == 8
        assert quantization.layers["timm_model.conv_head"]["weight"]["bits"] == 3
        assert ("timm_model.classifier" in quantization.layers) is not headless
        assert quantization.weight_bits == 3

    def test_of_a_wrapper_computes_the_same_logits(self, make_prepared_wrapper, pixel_values):
        model = make_prepared_wrapper(activation_scheme="asymmetric", range_estimator="minmax")
        assert torch.equal(pack(model)(pixel_values).logits, model(pixel_values).logits)


def test_description_of_a_packed_model_is_that_of_its_training_form(make_prepared):
    model = make_prepared(overrides={"dw": {"activation_bits": None}})
    assert describe(pack(model)) == describe(model)


class TestErrors:
    def test_model_that_is_not_prepared(self, make_net):
        with pytest.raises(ValueError, match="expected a prepared one: run prepare_qat first"):
            pack(make_net())

    def test_model_that_is_packed_already(self, make_prepared):
        with pytest.raises(ValueError, match="got a model"):
            pack(pack(make_prepared()))

    def test_model_that_was_never_calibrated(self, make_net):
        with pytest.raises(ValueError, match=r"scale of dw\.input_quantizer .*calibrate the model"):
            pack(prepare_qat(make_net(), OscQATConfig()))

    @pytest.mark.parametrize("part", ["weight", "input"])
    @pytest.mark.parametrize("value", [0.0, -0.1, torch.nan, torch.inf])
    def test_scale_that_training_has_ruined_is_named(self, make_prepared, part, value):
        model = make_prepared(weight_granularity="per_channel")
        with torch.no_grad():
            getattr(model.pw, f"{part}_quantizer").scale[-1] = value
        with pytest.raises(ValueError, match=f"scale of pw.{part}_quantizer that is not finite and positive"):
            pack(model)

    def test_weight_that_training_has_ruined_is_named(self, make_prepared):
        model = make_prepared()
        with torch.no_grad():
            model.pw.latent_weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="pw"):
            pack(model)

    def test_name_of_the_layer_is_that_of_patterns(self, make_wrapper):
        model = prepare_qat(make_wrapper(), OscQATConfig())
        with pytest.raises(ValueError, match="scale of blocks"):
            pack(model)

    def test_transformers_model_of_another_class(self, make_prepared_wrapper):
        class Other(TimmWrapperForImageClassification):
            pass

        model = make_prepared_wrapper()
        model.__class__ = Other
        with pytest.raises(ValueError, match="got a Other, expected TimmWrapperForImageClassification, TimmWrapperM"):
            pack(model)
