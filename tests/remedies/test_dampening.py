"""The dampening loss by its formula, where its gradient goes, and its weight over training."""

import pytest
import torch
from torch import nn

from hf_oscqat import OscQATConfig, dampening_loss, prepare_qat
from hf_oscqat.quantization.layers import quantized_layers
from hf_oscqat.remedies.dampening import Dampening, DampeningSettings
from hf_oscqat.remedies.schedules import cosine_anneal


def two_channels(**kwargs):
    """Two output channels with three latent weights each, on a grid of 3 bits and step 0.5."""
    model = nn.Sequential(nn.Linear(3, 2))
    prepare_qat(model, OscQATConfig(first_last_bits=3, activation_bits=None, **kwargs))
    with torch.no_grad():
        model[0].latent_weight.copy_(torch.tensor([[0.6, -0.2, 9.0], [-1.9, -2.2, 0.0]]))
    return model


def test_loss_by_hand_is_summed_over_channels_and_averaged_over_the_rest():
    model = two_channels()
    model[0].weight_quantizer.set_range(torch.tensor([0.5]))
    # grid -2 to 1.5; centres 0.5, 0 (-0.4 rounds to -0), 1.5 | -2, -2, 0; latents clipped to the grid's own ends
    expected = (0.1**2 + 0.2**2 + 0.0) / 3 + (0.1**2 + 0.0 + 0.0) / 3
    assert dampening_loss(model).item() == pytest.approx(expected)


def test_loss_by_hand_with_scale_and_zero_point_per_channel():
    model = two_channels(weight_granularity="per_channel", weight_scheme="asymmetric")
    model[0].weight_quantizer.set_range(torch.tensor([0.5, 1.0]), torch.tensor([1.2, 4.0]))
    # channel 0: integers 0 to 7 less 1, so -0.5 to 3; centres 0.5, 0, 3
    # channel 1: integers 0 to 7 less 4, so -4 to 3; centres -2, -2, 0
    expected = (0.1**2 + 0.2**2 + 0.0) / 3 + (0.1**2 + 0.2**2 + 0.0) / 3
    assert dampening_loss(model).item() == pytest.approx(expected)


def test_gradient_pulls_latent_weights_inside_the_grid_and_no_others():
    model = two_channels()
    model[0].weight_quantizer.set_range(torch.tensor([0.5]))
    dampening_loss(model).backward()
    expected = torch.tensor([[2 * 0.1 / 3, 2 * -0.2 / 3, 0.0], [2 * 0.1 / 3, 0.0, 0.0]])
    torch.testing.assert_close(model[0].latent_weight.grad, expected)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_nothing_but_latent_weights_gets_a_gradient(make_prepared, scheme):
    model = make_prepared(weight_scheme=scheme, activation_scheme=scheme)
    dampening_loss(model).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {f"{name}.weight" for name, _ in quantized_layers(model)}


def test_layers_add_up_and_those_in_float_do_not_count(make_prepared):
    whole = make_prepared()
    parts = [make_prepared(overrides={"[!s]*": {"weight_bits": None}}), make_prepared(first_last_bits=None)]
    parts.append(make_prepared(overrides={"[!h]*": {"weight_bits": None}}))
    torch.testing.assert_close(dampening_loss(whole), sum(dampening_loss(part) for part in parts))


def test_transposed_convolution_counts_its_output_channels():
    config = OscQATConfig(activation_bits=None, first_last_bits=3, range_estimator="minmax")
    model = prepare_qat(nn.Sequential(nn.ConvTranspose2d(4, 2, 1)), config)
    distance = (model[0].weight - model[0].latent_weight).square()
    torch.testing.assert_close(dampening_loss(model), distance.mean((0, 2, 3)).sum())


def test_weights_in_the_centre_of_their_bins_cost_nothing(make_prepared):
    model = make_prepared()
    with torch.no_grad():
        for _, layer in quantized_layers(model):
            layer.latent_weight.copy_(layer.weight)
    assert dampening_loss(model).item() == pytest.approx(0, abs=1e-12)


def test_frozen_weight_is_pulled_to_its_frozen_integer():
    model = two_channels()
    quantizer = model[0].weight_quantizer
    quantizer.set_range(torch.tensor([0.5]))
    before = dampening_loss(model).item()
    quantizer.allow_freezing(model[0].latent_weight)[0, 0] = -1
    quantizer.refresh()
    assert dampening_loss(model).item() == pytest.approx(before + ((0.6 + 0.5) ** 2 - 0.1**2) / 3)


@pytest.mark.parametrize("prepare", [False, True])
def test_model_without_quantized_weights_is_an_error(make_net, prepare):
    model = make_net()
    if prepare:
        prepare_qat(model, OscQATConfig(weight_bits=None))
    with pytest.raises(ValueError, match="without quantized weights, expected a prepared one"):
        dampening_loss(model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1}, "got dampening weight=-1, expected a finite number of at least 0"),
        ({"weight_final": -0.1}, "got dampening weight_final=-0.1"),
        ({"weight": float("nan")}, "got dampening weight=nan"),
        ({"anneal_start": 1.0}, "got anneal_start=1.0, expected a share"),
    ],
)
def test_bad_setting_is_an_error_that_says_what_is_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DampeningSettings(**kwargs)


def test_weight_follows_the_cosine_over_training():
    dampening = Dampening(DampeningSettings(weight=0.0, weight_final=0.4, anneal_start=0.25))
    assert {dampening.weight(step, 100) for step in range(1, 26)} == {0.0}
    assert dampening.weight(60, 100) == cosine_anneal(60, 100, 0.0, 0.4, 0.25)
    assert dampening.weight(100, 100) == pytest.approx(0.4)
    assert dampening.scalars(100, 100) == {"dampening_weight": dampening.weight(100, 100)}


def test_loss_is_left_out_while_its_weight_is_zero(make_prepared):
    dampening = Dampening(DampeningSettings(weight=0.0, weight_final=0.4, anneal_start=0.5))
    assert dampening.loss(make_prepared(), 50, 100) is None


def test_loss_carries_its_weight(make_prepared):
    model = make_prepared()
    dampening = Dampening(DampeningSettings(weight=0.3, weight_final=0.3))
    torch.testing.assert_close(dampening.loss(model, 1, 100), 0.3 * dampening_loss(model))
