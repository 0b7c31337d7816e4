"""prepare_qat, calibrate and describe: which layers get which widths, what is refused, and where ranges come from."""

from collections import OrderedDict

import pytest
import timm
import torch
from timm.layers import CondConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_oscqat import (
    OscQATConfig,
    calibrate,
    describe,
    model_parameters,
    pack,
    prepare_qat,
    quantizer_parameters,
    reestimate_batchnorm,
)
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers, quantizers


def widths(model):
    """`{layer: (weight bits, input bits)}` of the quantized layers."""
    return {
        name: tuple(None if q is None else q.num_bits for q in (layer.weight_quantizer, layer.input_quantizer))
        for name, layer in quantized_layers(model)
    }


def classes(model):
    return [type(module) for module in model.modules()]


def snapshot(model):
    return classes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    kinds, state = before
    assert classes(model) == kinds
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)


class Ends(nn.Module):
    """Defines its layers in an order that is not theirs; only timm's config tells."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(4, 3)
        self.stem = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        return self.classifier(self.body(self.stem(x)))


class TestWidths:
    def test_first_and_last_layer_by_order_get_eight_bits_and_the_image_none(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(weight_bits=3, activation_bits=4))
        assert widths(model) == {"stem": (8, None), "dw": (3, 4), "pw": (3, 4), "head": (8, 8)}

    def test_first_and_last_layer_are_those_that_timm_names(self):
        model = Ends()
        model.pretrained_cfg = {"first_conv": "stem", "classifier": "classifier"}
        prepare_qat(model, OscQATConfig())
        assert widths(model) == {"classifier": (8, 8), "body": (4, 4), "stem": (8, None)}

    def test_timm_may_name_several_layers_at_an_end(self):
        model = Ends()
        model.pretrained_cfg = {"first_conv": ["stem", "body"], "classifier": ("classifier",)}
        prepare_qat(model, OscQATConfig())
        assert widths(model) == {"classifier": (8, 8), "body": (8, None), "stem": (8, None)}

    def test_names_that_the_model_does_not_have_fall_back_to_order(self):
        model = Ends()
        model.pretrained_cfg = {"first_conv": "conv_stem", "classifier": None}
        prepare_qat(model, OscQATConfig())
        assert widths(model) == {"classifier": (8, None), "stem": (4, 4), "body": (8, 8)}

    def test_no_other_layer_becomes_last_when_the_classifier_stays_float(self):
        model = Ends()
        model.pretrained_cfg = {"first_conv": "stem", "classifier": "classifier"}
        prepare_qat(model, OscQATConfig(modules_to_not_convert=["classifier"]))
        assert widths(model) == {"body": (4, 4), "stem": (8, None)}

    def test_a_single_layer_is_first_and_last(self):
        model = prepare_qat(nn.Sequential(nn.Linear(3, 2)), OscQATConfig())
        assert widths(model) == {"0": (8, None)}

    def test_first_last_bits_is_taken_for_both_ends(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(first_last_bits=6))
        assert widths(model)["stem"] == (6, None)
        assert widths(model)["head"] == (6, 6)

    def test_first_last_bits_none_leaves_both_ends_float(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(first_last_bits=None))
        assert widths(model) == {"dw": (4, 4), "pw": (4, 4)}

    def test_weight_bits_none_quantizes_inputs_alone(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(weight_bits=None))
        assert widths(model) == {"dw": (None, 4), "pw": (None, 4), "head": (None, 8)}

    def test_activation_bits_none_quantizes_weights_alone(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(activation_bits=None))
        assert widths(model) == {"stem": (8, None), "dw": (4, None), "pw": (4, None), "head": (8, None)}

    def test_overrides_win_over_first_last_bits(self, make_net):
        config = OscQATConfig(overrides={"stem": {"weight_bits": 5, "activation_bits": 7}, "head": {"weight_bits": 2}})
        model = prepare_qat(make_net(), config)
        assert widths(model) == {"stem": (5, 7), "dw": (4, 4), "pw": (4, 4), "head": (2, 8)}

    def test_later_override_wins_key_by_key(self, make_net):
        config = OscQATConfig(
            overrides={"?w": {"weight_bits": 3, "activation_bits": 3}, "pw": {"weight_bits": 2}, "p*": {}}
        )
        assert widths(prepare_qat(make_net(), config))["pw"] == (2, 3)
        reversed_order = OscQATConfig(overrides={"pw": {"weight_bits": 2}, "?w": {"weight_bits": 3}})
        assert widths(prepare_qat(make_net(), reversed_order))["pw"] == (3, 4)

    def test_override_none_leaves_a_layer_float(self, make_net):
        config = OscQATConfig(overrides={"pw": {"weight_bits": None, "activation_bits": None}})
        assert "pw" not in widths(prepare_qat(make_net(), config))

    def test_override_quantizes_a_layer_of_a_model_that_stays_float_otherwise(self, make_net):
        config = OscQATConfig(weight_bits=None, activation_bits=None, overrides={"pw": {"weight_bits": 4}})
        assert widths(prepare_qat(make_net(), config)) == {"pw": (4, None)}

    def test_modules_to_not_convert_takes_globs(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(modules_to_not_convert=["?w"]))
        assert widths(model) == {"stem": (8, None), "head": (8, 8)}

    def test_ends_by_order_are_those_of_the_converted_layers(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(modules_to_not_convert=["stem", "head"]))
        assert widths(model) == {"dw": (8, None), "pw": (8, 8)}

    def test_patterns_match_case(self, make_net):
        with pytest.raises(ValueError, match="got pattern 'HEAD' in overrides"):
            prepare_qat(make_net(), OscQATConfig(overrides={"HEAD": {"weight_bits": 4}}))

    def test_scheme_and_granularity_reach_the_quantizers(self, make_net):
        config = OscQATConfig(
            weight_granularity="per_channel",
            weight_scheme="asymmetric",
            activation_scheme="asymmetric",
            lsq_gradient_scaling=True,
        )
        layer = prepare_qat(make_net(), config).dw
        assert layer.weight_quantizer.scale.shape == layer.weight_quantizer.zero_point.shape == (8,)
        assert layer.input_quantizer.scale.shape == layer.input_quantizer.zero_point.shape == (1,)
        assert layer.weight_quantizer.lsq_gradient_scaling
        assert layer.input_quantizer.lsq_gradient_scaling

    @pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv2_035"])
    def test_timm_model_keeps_stem_and_classifier_at_eight_bits(self, name):
        model = prepare_qat(
            timm.create_model(name, num_classes=3), OscQATConfig(weight_bits=3, range_estimator="minmax")
        )
        got = widths(model)
        assert got.pop("conv_stem") == (8, None)
        assert got.pop("classifier") == (8, 8)
        assert set(got.values()) == {(3, 4)}
        convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv_stem"]
        assert list(got) == convs

    def test_names_of_wrapper_and_bare_model_are_the_same_to_patterns(self, make_wrapper):
        config = OscQATConfig(overrides={"blocks.1.*": {"weight_bits": 2}}, modules_to_not_convert=["conv_head"])
        wrapped = prepare_qat(make_wrapper(), config)
        bare = prepare_qat(make_wrapper().timm_model, config)
        assert widths(wrapped) == {f"timm_model.{name}": bits for name, bits in widths(bare).items()}
        assert widths(bare)["conv_stem"] == (8, None)
        assert widths(bare)["blocks.1.0.conv_exp"] == (2, 4)
        assert "conv_head" not in widths(bare)


REFUSED = {
    "LSTM": (lambda: nn.LSTM(4, 4), "recurrent"),
    "GRU": (lambda: nn.GRU(4, 4), "recurrent"),
    "RNN": (lambda: nn.RNN(4, 4), "recurrent"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "without calling"),
    "CondConv2d": (lambda: CondConv2d(4, 4, 1), "several weights"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "weight is a matrix, and the class is not known"),
    "embedding": (lambda: nn.Embedding(4, 4), "weight is a matrix, and the class is not known"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Conv2d(4, 4, 1)), "parametrized"),
    # These two write a computed weight into the layer before each forward.
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), ""),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), ""),
}


class TestRefusals:
    @pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
    def test_layer_that_cannot_be_quantized_is_named_and_the_model_unchanged(self, make, reason):
        model = nn.Sequential(OrderedDict(stem=nn.Linear(4, 4), odd=make(), head=nn.Linear(4, 4)))
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"got layer 'odd' of class \w+, .*{reason}.*modules_to_not_convert"):
            prepare_qat(model, OscQATConfig())
        assert_unchanged(model, before)

    def test_branches_cannot_be_merged_afterwards(self):
        model = timm.create_model("repvit_m1", num_classes=3)
        prepare_qat(model, OscQATConfig(range_estimator="minmax"))
        with pytest.raises(RuntimeError, match=r"run timm.models.reparameterize_model\(model\) before prepare_qat"):
            timm.models.reparameterize_model(model)
        merged = timm.models.reparameterize_model(timm.create_model("repvit_m1", num_classes=3))
        prepare_qat(merged, OscQATConfig(range_estimator="minmax"))
        assert len(widths(merged)) < len(widths(model))

    def test_subclass_of_a_refused_class_is_refused(self):
        class MyConv(CondConv2d):
            pass

        with pytest.raises(ValueError, match="got layer '0' of class MyConv"):
            prepare_qat(nn.Sequential(MyConv(3, 4, 1)), OscQATConfig())

    def test_refused_layer_may_stay_float_with_all_that_is_in_it(self):
        model = nn.Sequential(
            OrderedDict(stem=nn.Linear(4, 4), attn=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 4))
        )
        prepare_qat(model, OscQATConfig(modules_to_not_convert=["attn"]))
        assert list(widths(model)) == ["stem", "head"]

    def test_all_layers_that_cannot_be_quantized_are_named_at_once(self):
        layers = {
            "stem": nn.Linear(4, 4),
            "a": nn.MultiheadAttention(4, 2),
            "b": nn.LSTM(4, 4),
            "head": nn.Linear(4, 4),
        }
        model = nn.Sequential(OrderedDict(layers))
        with pytest.raises(ValueError, match=r"layer 'a' of .*Leave it and 1 more in float with .*=\['a', 'b'\]$"):
            prepare_qat(model, OscQATConfig())
        prepare_qat(model, OscQATConfig(modules_to_not_convert=["a", "b"]))

    def test_name_in_the_error_is_what_leaves_the_layer_float(self, make_wrapper):
        model = make_wrapper()
        model.timm_model.conv_head = CondConv2d(64, 256, 1)
        with pytest.raises(ValueError, match=r"modules_to_not_convert=\['conv_head'\]"):
            prepare_qat(model, OscQATConfig())
        prepare_qat(model, OscQATConfig(modules_to_not_convert=["conv_head"]))
        assert "timm_model.conv_head" not in widths(model)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("overrides", {"haed": {"weight_bits": 8}}), ("modules_to_not_convert", ["head", "haed"])],
    )
    def test_pattern_that_matches_nothing_is_an_error(self, make_net, key, value):
        model = make_net()
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"got pattern 'haed' in {key}.*expected a glob on names such as"):
            prepare_qat(model, OscQATConfig(**{key: value}))
        assert_unchanged(model, before)

    def test_model_that_is_prepared_already_is_refused(self, make_prepared):
        model = make_prepared()
        before = snapshot(model)
        with pytest.raises(ValueError, match="prepared already, expected a float model"):
            prepare_qat(model, OscQATConfig())
        assert_unchanged(model, before)

    @pytest.mark.parametrize("written_by_pack", [{"layers": {}}, {"checkpoint_format": "packed"}])
    def test_config_that_pack_wrote_is_refused(self, make_net, written_by_pack):
        with pytest.raises(ValueError, match="as pack writes it, expected one for training"):
            prepare_qat(make_net(), OscQATConfig(**written_by_pack))

    def test_packed_model_is_refused(self, make_prepared):
        packed = pack(make_prepared())
        before = snapshot(packed)
        with pytest.raises(ValueError, match=r"^got .*packed"):
            prepare_qat(packed, OscQATConfig())
        assert_unchanged(packed, before)

    @pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.BatchNorm2d(3)])
    def test_model_without_a_layer_to_quantize_is_refused(self, model):
        with pytest.raises(ValueError, match="without a layer to quantize"):
            prepare_qat(model, OscQATConfig())

    def test_config_that_quantizes_nothing_is_refused(self, make_net):
        with pytest.raises(ValueError, match="leaves every layer in float"):
            prepare_qat(make_net(), OscQATConfig(weight_bits=None, activation_bits=None))

    @pytest.mark.parametrize(("fill", "reason"), [(0.0, "nothing but zeros"), (torch.nan, "NaN"), (torch.inf, "NaN")])
    def test_weight_without_a_range_is_named_and_the_model_unchanged(self, make_net, fill, reason):
        model = make_net()
        nn.init.constant_(model.pw.weight, fill)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"no range for (layer )?'pw': .*{reason}"):
            prepare_qat(model, OscQATConfig(calibration_policy={"no_range": "error"}))
        assert_unchanged(model, before)


class TestParameters:
    @pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
    def test_both_lists_are_disjoint_and_together_everything_trainable(self, make_net, scheme):
        model = prepare_qat(make_net(), OscQATConfig(weight_scheme=scheme, activation_scheme=scheme))
        model.bn.weight.requires_grad_(False)
        of_quantizers = {id(p) for p in quantizer_parameters(model)}
        of_model = {id(p) for p in model_parameters(model)}
        assert not of_quantizers & of_model
        assert of_quantizers | of_model == {id(p) for p in model.parameters() if p.requires_grad}
        assert id(model.bn.weight) not in of_model
        assert len(quantizer_parameters(model)) == len(of_quantizers) == 7 * (1 if scheme == "symmetric" else 2)

    def test_scales_and_zero_points_are_the_quantizers_parameters(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(activation_scheme="asymmetric"))
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)].split(".")[-1] for p in quantizer_parameters(model)} == {"scale", "zero_point"}
        assert {names[id(p)].split(".")[-1] for p in model_parameters(model)} == {"weight", "bias"}

    def test_float_model_has_no_quantizer_parameters(self, make_net):
        model = make_net()
        assert quantizer_parameters(model) == []
        assert model_parameters(model) == list(model.parameters())

    def test_float_checkpoint_loads_as_latent_weights(self, make_net):
        other = make_net()
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        model = prepare_qat(make_net(), OscQATConfig())
        result = model.load_state_dict(other.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert all("_quantizer." in name for name in result.missing_keys)
        for name, tensor in other.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(model.pw.latent_weight, other.pw.weight)

    def test_state_dict_of_the_training_form_makes_another_model_equal(self, make_net, make_prepared, images):
        trained = make_prepared(activation_scheme="asymmetric").eval()
        model = prepare_qat(make_net(), OscQATConfig(activation_scheme="asymmetric")).eval()
        model.load_state_dict(trained.state_dict())
        assert torch.equal(model(images), trained(images))

    def test_prepare_changes_no_weight(self, make_net):
        model = make_net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prepared = prepare_qat(model, OscQATConfig())
        assert prepared is model
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class TestSharedModules:
    def test_module_with_two_names_is_quantized_once(self):
        shared = nn.Linear(4, 4)
        model = prepare_qat(nn.Sequential(nn.Linear(4, 4), shared, shared, nn.Linear(4, 2)), OscQATConfig())
        assert widths(model) == {"0": (8, None), "1": (4, 4), "3": (8, 8)}
        assert model[1] is model[2]
        calibrate(model, [torch.randn(8, 4)])
        assert model(torch.randn(2, 4)).shape == (2, 2)

    def test_parameter_of_two_layers_stays_one(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        prepare_qat(model, OscQATConfig())
        assert model[2].latent_weight is model[1].latent_weight
        assert len(model_parameters(model)) == 5


class TestPerChannel:
    @pytest.mark.parametrize(
        ("layer", "x", "axis"),
        [
            (nn.Linear(6, 4), (2, 6), 0),
            (nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5), 0),
            (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5), 0),
            (nn.Conv3d(6, 4, 3), (2, 6, 5, 5, 5), 0),
            (nn.ConvTranspose1d(6, 4, 3), (2, 6, 5), 1),
            (nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 5), 1),
            (nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 5, 5), 1),
            (nn.ConvTranspose3d(6, 4, 3, groups=2), (2, 6, 3, 3, 3), 1),
            (nn.ConvTranspose2d(6, 6, 3, groups=6), (2, 6, 5, 5), 0),
        ],
        ids=lambda part: str(part).replace(" ", "") if isinstance(part, nn.Module) else "",
    )
    def test_one_scale_per_output_channel_of_the_weight(self, layer, x, axis):
        # Channels of very different size: with scales along another axis the error would be far larger.
        shape = [1] * layer.weight.ndim
        shape[axis] = -1
        channels = layer.weight.shape[axis]
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight) * (100.0 ** torch.arange(channels)).view(shape))
        model = prepare_qat(
            nn.Sequential(layer),
            OscQATConfig(weight_granularity="per_channel", range_estimator="minmax", first_last_bits=8),
        )
        scale = model[0].weight_quantizer.scale
        others = [i for i in range(layer.weight.ndim) if i != axis]
        expected = model[0].latent_weight.detach().abs().amax(others) / 127
        torch.testing.assert_close(scale.detach(), expected)
        error = (model[0].weight - model[0].latent_weight).abs().amax(others)
        assert bool((error <= scale / 2 * 1.001).all())
        assert model(torch.randn(x)).isfinite().all()

    def test_dead_channel_gets_a_step_of_the_others(self):
        layer = nn.Linear(3, 4)
        nn.init.zeros_(layer.weight[1])
        model = prepare_qat(nn.Sequential(layer), OscQATConfig(weight_granularity="per_channel"))
        scale = model[0].weight_quantizer.scale
        assert scale[1] == scale.max()
        assert torch.equal(model[0].weight[1], torch.zeros(3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, a, b=None):
        b = torch.zeros_like(a) if b is None else b
        return self.drop(self.left(self.stem(a)) + self.right(b))


class UsesTheWeightOnly(nn.Module):
    """Calls one layer and multiplies with the weight of another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)
        self.shy = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.called(self.stem(x)) @ self.shy.weight)


class TestCalibrate:
    def test_model_refuses_to_run_before(self, make_net, images):
        with pytest.raises(RuntimeError, match="calibrate"):
            prepare_qat(make_net(), OscQATConfig())(images)

    def test_weights_alone_need_no_calibration(self, make_net, images):
        assert prepare_qat(make_net(), OscQATConfig(activation_bits=None))(images).isfinite().all()

    def test_range_is_that_of_the_data_in_the_float_model(self, make_net, images):
        float_model = make_net().eval()
        config = OscQATConfig(weight_bits=2, range_estimator="minmax", activation_scheme="asymmetric")
        model = prepare_qat(make_net(), config)
        calibrate(model, [images, 2 * images])
        seen = torch.cat([float_model[:4](images), float_model[:4](2 * images)])
        inputs = model.pw.input_quantizer
        low, high = seen.min().clamp(max=0), seen.max().clamp(min=0)
        torch.testing.assert_close(inputs.scale, ((high - low) / 15).reshape(1))
        torch.testing.assert_close(inputs.zero_point, (-low / inputs.scale).round())

    def test_symmetric_grid_is_unsigned_where_nothing_is_negative(self, make_prepared):
        model = make_prepared()
        assert (model.dw.input_quantizer.qmin, model.dw.input_quantizer.qmax) == (0, 15)  # after ReLU6
        assert (model.pw.input_quantizer.qmin, model.pw.input_quantizer.qmax) == (-8, 7)
        assert (model.dw.weight_quantizer.qmin, model.dw.weight_quantizer.qmax) == (-8, 7)

    def test_one_negative_batch_makes_the_grid_signed(self):
        model = prepare_qat(nn.Sequential(nn.Identity(), nn.Linear(3, 3), nn.Linear(3, 3)), OscQATConfig())
        model[1].bias.data.fill_(100.0)
        x = torch.rand(4, 3)
        calibrate(model, [x])
        assert model[2].input_quantizer.qmin == 0
        model[1].bias.data.fill_(-100.0)
        calibrate(model, [x, x])
        assert model[2].input_quantizer.qmin == -128

    def test_weight_ranges_follow_weights_that_were_loaded_later(self, make_net, images):
        config = OscQATConfig(range_estimator="minmax")
        model = prepare_qat(make_net(), config)
        model.pw.latent_weight.data.mul_(10)
        calibrate(model, [images])
        torch.testing.assert_close(
            model.pw.weight_quantizer.scale.detach(), model.pw.latent_weight.detach().abs().max().reshape(1) / 7
        )

    def test_batches_may_be_dicts(self):
        model = prepare_qat(TwoInputs(), OscQATConfig(overrides={"stem": {"activation_bits": 4}}))
        x = torch.rand(8, 4)
        calibrate(model, [{"a": x, "b": x - 5}])
        assert model.stem.input_quantizer.qmin == 0
        assert model.right.input_quantizer.qmin < 0

    def test_batches_may_come_from_a_generator(self, make_net, images):
        model = prepare_qat(make_net(), OscQATConfig())
        calibrate(model, (images for _ in range(2)))
        assert all(quantizer.calibrated for _, quantizer in quantizers(model))

    def test_batch_of_another_type_is_an_error(self, make_net, images):
        with pytest.raises(TypeError, match="got a batch of type list, expected a tensor or a dict"):
            calibrate(prepare_qat(make_net(), OscQATConfig()), [[images, 0]])

    def test_bare_timm_model_and_wrapper_get_the_same_ranges(self, make_wrapper, pixel_values):
        wrapped, bare = make_wrapper(), make_wrapper().timm_model
        for model, batch in ((wrapped, {"pixel_values": pixel_values}), (bare, pixel_values)):
            calibrate(prepare_qat(model, OscQATConfig()), [batch])
        ours = {f"timm_model.{name}": quantizer.scale for name, quantizer in quantizers(bare)}
        theirs = dict(quantizers(wrapped))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(scale, theirs[name].scale) for name, scale in ours.items())
        assert torch.equal(wrapped.eval()(pixel_values).logits, bare.eval()(pixel_values))

    @pytest.mark.parametrize("training", [True, False])
    def test_mode_of_each_module_is_restored(self, make_net, images, training):
        model = prepare_qat(make_net(), OscQATConfig()).train(training)
        model.bn.train(not training)
        calibrate(model, [images])
        assert model.training is training
        assert model.bn.training is not training

    def test_batchnorm_statistics_stay(self, make_net, images):
        model = prepare_qat(make_net(), OscQATConfig()).train()
        before = {n: b.clone() for n, b in model.bn.named_buffers()}
        calibrate(model, [images])
        assert all(torch.equal(b, before[n]) for n, b in model.bn.named_buffers())

    def test_dropout_is_off(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.99), nn.Linear(4, 2))
        prepare_qat(model, OscQATConfig(range_estimator="minmax", first_last_bits=8)).train()
        x = torch.rand(64, 4)
        calibrate(model, [x])
        high = nn.functional.linear(x, model[0].latent_weight, model[0].bias).abs().max()
        torch.testing.assert_close(model[2].input_quantizer.scale, high.detach().reshape(1) / 127)

    def test_twice_gives_the_same_ranges_as_once(self, make_prepared, images):
        model = make_prepared()
        scales = [quantizer.scale.clone() for _, quantizer in quantizers(model)]
        calibrate(model, [images])
        assert all(torch.equal(q.scale, s) for (_, q), s in zip(quantizers(model), scales, strict=True))

    def test_float_model_is_an_error(self, make_net, images):
        with pytest.raises(ValueError, match=r"^got .*prepare_qat"):
            calibrate(make_net(), [images])


def nan_image(images):
    spoiled = images.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    return spoiled


class TestCalibrationErrors:
    @pytest.fixture
    def model(self, make_prepared):
        return make_prepared().train()

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (lambda x: [], "got no batches"),
            (lambda x: [torch.full_like(x, -torch.inf)], "no range for layer 'dw'.*NaN or infinite"),
            (lambda x: [x, nan_image(x)], "no range for layer 'dw'.*NaN or infinite"),
        ],
        ids=["none", "infinite", "nan"],
    )
    def test_nothing_has_changed_after_bad_data(self, model, images, batches, message):
        before = snapshot(model)
        modes = [module.training for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            calibrate(model, batches(images))
        assert_unchanged(model, before)
        assert [module.training for module in model.modules()] == modes
        assert model(images).isfinite().all()

    def test_input_of_zeros_is_named_and_nothing_has_changed(self, model, images):
        model.bn.weight.data.zero_()
        model.bn.bias.data.zero_()
        before = snapshot(model)
        with pytest.raises(ValueError, match="no range for 'dw': got nothing but zeros"):
            calibrate(model, [3 * images], {"no_range": "error"})
        assert_unchanged(model, before)

    def test_exception_of_the_data_passes_and_nothing_has_changed(self, model, images):
        def failing():
            yield images
            raise OSError("disk")

        before = snapshot(model)
        with pytest.raises(OSError, match="disk"):
            calibrate(model, failing())
        assert_unchanged(model, before)
        assert all(isinstance(layer, QuantizedLayer) for layer in (model.stem, model.dw, model.pw, model.head))

    def test_layer_that_is_never_called_is_named_with_the_way_out(self):
        model = prepare_qat(UsesTheWeightOnly(), OscQATConfig())
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"quantizers of shy: .*modules_to_not_convert=\['shy'\]"):
            calibrate(model, [torch.rand(8, 4)])
        assert_unchanged(model, before)
        way_out = prepare_qat(UsesTheWeightOnly(), OscQATConfig(modules_to_not_convert=["shy"]))
        calibrate(way_out, [torch.rand(8, 4)])
        assert way_out(torch.rand(8, 4)).isfinite().all()


class TestCalibrationPolicy:
    """What can be wrong is named, and is an error or a warning as the policy has it."""

    def test_weight_of_zeros_gets_the_unit_range(self, make_net, caplog):
        model = make_net()
        nn.init.zeros_(model.pw.weight)
        prepare_qat(model, OscQATConfig())
        assert "no range for 'pw': got nothing but zeros" in caplog.text
        assert model.pw.weight_quantizer.scale.item() == pytest.approx(1 / 7)

    @pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
    def test_input_of_zeros_gets_the_unit_range(self, make_prepared, images, caplog, scheme):
        model = make_prepared(activation_scheme=scheme)
        nn.init.zeros_(model.bn.weight)
        nn.init.zeros_(model.bn.bias)
        calibrate(model, [images])
        assert "no range for 'dw': got nothing but zeros" in caplog.text
        assert model.dw.input_quantizer.scale.item() == pytest.approx(1 / 7 if scheme == "symmetric" else 2 / 15)
        assert model(images).isfinite().all()

    def test_constant_input_is_named(self, make_prepared, images, caplog):
        model = make_prepared()
        nn.init.zeros_(model.bn.weight)
        nn.init.ones_(model.bn.bias)
        calibrate(model, [images])
        assert "got the same value everywhere at the inputs of dw" in caplog.text
        with pytest.raises(ValueError, match="at the inputs of dw"):
            calibrate(model, [images], {"constant": "error"})

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_constant_images_are_said(self, make_prepared, images, caplog, value):
        # Biases and batch-norm make values of many kinds of them, and no layer would notice.
        model = make_prepared()
        batches = [{"x": torch.full_like(images, value)}, torch.full_like(images, value)]
        model.forward = lambda x: nn.Sequential.forward(model, x)
        calibrate(model, batches)
        assert "got the same value everywhere in all batches" in caplog.text
        with pytest.raises(ValueError, match="the same value everywhere in all batches"):
            calibrate(model, batches, {"constant": "error"})
        caplog.clear()
        calibrate(model, [*batches, images])
        assert "in all batches" not in caplog.text

    def test_untouched_batchnorm_is_named(self, make_net, images, caplog):
        model = prepare_qat(make_net(), OscQATConfig())
        calibrate(model, [images])
        assert "batch-norm statistics that nothing has touched, in bn and 1 layers" in caplog.text
        with pytest.raises(ValueError, match="in bn and 1 layers"):
            calibrate(model, [images], {"untouched_batchnorm": "error"})
        caplog.clear()
        reestimate_batchnorm(model, [images])
        calibrate(model, [images])
        assert not caplog.text

    def test_layer_that_is_never_called_may_be_left_with_a_quantizer_that_does_nothing(self, caplog):
        model = prepare_qat(UsesTheWeightOnly(), OscQATConfig())
        calibrate(model, [torch.rand(8, 4)], {"never_called": "warn"})
        assert "quantizers of shy" in caplog.text
        assert model(torch.rand(8, 4)).isfinite().all()

    @pytest.mark.parametrize("policy", [{"no_rang": "warn"}, {"no_range": "ignore"}])
    def test_bad_policy_is_an_error(self, make_prepared, images, policy):
        with pytest.raises(ValueError, match=r"^got .*(no_rang|ignore)"):
            calibrate(make_prepared(), [images], policy)

    def test_policy_of_the_models_config_is_taken(self, make_wrapper, pixel_values):
        model = prepare_qat(make_wrapper(), OscQATConfig(calibration_policy={"constant": "error"}))
        nn.init.zeros_(model.timm_model.bn2.weight)
        with pytest.raises(ValueError, match="the same value everywhere"):
            calibrate(model, [{"pixel_values": pixel_values}])


class TestDescribe:
    def test_row_per_layer_with_its_widths(self, make_net):
        model = prepare_qat(make_net(), OscQATConfig(weight_bits=3, modules_to_not_convert=["pw"]))
        rows = {row.name: row for row in describe(model)}
        assert list(rows) == ["stem", "dw", "pw", "head"]
        assert [(r.weight_bits, r.input_bits) for r in rows.values()] == [(8, None), (3, 4), (None, None), (8, 8)]
        assert rows["dw"].shape == (8, 1, 3, 3)
        assert [row.layer_class for row in rows.values()] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]

    def test_parameters_and_bytes_are_those_of_the_packed_file(self, make_prepared):
        model = make_prepared(weight_bits=3, weight_granularity="per_channel", modules_to_not_convert=["pw"])
        rows = {row.name: row for row in describe(model)}
        assert {name: row.parameters for name, row in rows.items()} == {"stem": 216, "dw": 72, "pw": 48, "head": 30}
        packed = pack(model)
        for name in ("stem", "dw", "head"):
            assert rows[name].bytes == packed.get_submodule(name).weight_packed.numel()
        assert rows["pw"].bytes == 4 * 48
        assert describe(packed) == describe(model)

    def test_layer_of_which_only_the_input_is_quantized(self, make_prepared):
        model = make_prepared(overrides={"dw": {"weight_bits": None}})
        row = next(row for row in describe(model) if row.name == "dw")
        assert (row.weight_bits, row.input_bits, row.bytes) == (None, 4, 4 * 72)
        assert row.why_float == "left in float by the config"
        assert describe(pack(model)) == describe(model)

    def test_module_in_several_places_is_one_row(self):
        layer = nn.Linear(4, 4)
        model = prepare_qat(nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(), layer, nn.Linear(4, 4)), OscQATConfig())
        assert [row.name for row in describe(model)] == ["0", "1", "4"]

    def test_float_model_is_all_float(self, make_net):
        assert {(row.weight_bits, row.input_bits) for row in describe(make_net())} == {(None, None)}

    def test_parameters_outside_of_layers_are_listed(self):
        class WithPosition(nn.Module):
            def __init__(self):
                super().__init__()
                self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
                self.scale = nn.Parameter(torch.ones(8))
                self.proj = nn.Linear(8, 8)

        names = [row.name for row in describe(prepare_qat(WithPosition(), OscQATConfig()))]
        assert names == ["pos_embed", "proj"]

    def test_names_are_those_of_patterns(self, make_wrapper):
        names = [row.name for row in describe(make_wrapper())]
        assert "conv_stem" in names
        assert not any(name.startswith("timm_model.") for name in names)


class TestWrapper:
    def test_config_of_the_model_says_that_it_is_quantized(self, make_wrapper):
        config = OscQATConfig()
        model = prepare_qat(make_wrapper(), config)
        assert model.config.quantization_config == config
        assert model.is_quantized
        assert model.quantization_method == "oscqat"

    def test_head_that_was_replaced_afterwards_is_named(
        self, make_wrapper, make_prepared_wrapper, pixel_values, tmp_path
    ):
        for model in (prepare_qat(make_wrapper(), OscQATConfig()), make_prepared_wrapper()):
            model.timm_model.reset_classifier(5)
            with pytest.raises(ValueError, match="got float layers classifier, which the config quantizes"):
                calibrate(model, [pixel_values])
            with pytest.raises(ValueError, match="got float layers classifier, which the config quantizes"):
                model.save_pretrained(tmp_path)
            assert not (tmp_path / "model.safetensors").exists()

    def test_config_shared_with_another_model_stays_float(self, make_wrapper):
        model = make_wrapper()
        shared = model.config
        prepare_qat(model, OscQATConfig())
        assert not hasattr(shared, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(make_net, dtype):
    model = make_net().to(dtype)
    with pytest.raises(ValueError, match=rf"with weights of {dtype}, expected float32.*dtype=torch.float32"):
        prepare_qat(model, OscQATConfig())
    assert not any(True for _ in quantized_layers(model))


def test_a_compiled_model_is_calibrated_like_the_one_in_it(make_wrapper, pixel_values):
    config = OscQATConfig(modules_to_not_convert=["blocks.1.0.*"])
    plain, compiled = (prepare_qat(make_wrapper(), config) for _ in range(2))
    calibrate(plain, [pixel_values])
    calibrate(torch.compile(compiled, backend="eager"), [pixel_values])
    for (name, one), (_, other) in zip(quantizers(plain), quantizers(compiled), strict=True):
        assert torch.equal(one.scale, other.scale), name
