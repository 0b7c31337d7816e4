"""Bin regularization by its formula, where its gradient goes, and its two stages."""

import statistics

import pytest
import torch
from torch import nn

from hf_oscqat import OscQATConfig, prepare_qat
from hf_oscqat.quantization.functional import live_sentinel
from hf_oscqat.quantization.layers import quantized_layers
from hf_oscqat.remedies.bin_regularization import (
    BinRegularization,
    BinRegularizationSettings,
    bin_regularization_loss,
)


def linear(**kwargs):
    model = nn.Sequential(nn.Linear(12, 4, bias=False)).double()
    prepare_qat(model, OscQATConfig(first_last_bits=3, activation_bits=None, **kwargs))
    with torch.no_grad():
        model[0].latent_weight.copy_(torch.randn(4, 12))
    return model


def by_formula(layer, channels):
    quantizer, total = layer.weight_quantizer, 0.0
    for rows in channels:
        scale = quantizer.scale.flatten()[rows[0] if quantizer.per_channel else 0].item()
        zero = 0
        if quantizer.zero_point is not None:
            zero = quantizer.zero_point.round().flatten()[rows[0] if quantizer.per_channel else 0].item()
        values = layer.latent_weight[rows].flatten().tolist()
        for level in range(quantizer.qmin, quantizer.qmax + 1):
            members = [v for v in values if round(v / scale) + zero == level]
            if members:
                total += (statistics.fmean(members) - scale * (level - zero)) ** 2
            if len(members) > 1:
                total += statistics.variance(members)
    return total


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_loss_is_that_of_the_formula_per_tensor(scheme):
    model = linear(weight_scheme=scheme)
    model[0].weight_quantizer.set_range(torch.tensor([0.4]), None if scheme == "symmetric" else torch.tensor([3.3]))
    assert bin_regularization_loss(model).item() == pytest.approx(by_formula(model[0], [[0, 1, 2, 3]]), rel=1e-10)


def test_loss_is_that_of_the_formula_per_channel():
    model = linear(weight_granularity="per_channel")
    model[0].weight_quantizer.set_range(torch.tensor([0.4, 0.3, 0.7, 0.2]))
    assert bin_regularization_loss(model).item() == pytest.approx(
        by_formula(model[0], [[0], [1], [2], [3]]), rel=1e-10
    )


def test_gradient_is_that_of_the_formula():
    model = linear()
    model[0].weight_quantizer.set_range(torch.tensor([0.4]))
    bin_regularization_loss(model).backward()
    weight, grad = model[0].latent_weight, model[0].latent_weight.grad
    for index in ((0, 0), (1, 5), (3, 11)):
        differences = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] += step
                differences.append(by_formula(model[0], [[0, 1, 2, 3]]))
                weight[index] -= step
        assert grad[index].item() == pytest.approx((differences[0] - differences[1]) / 2e-6, abs=1e-7)
    clipped = (weight > 0.4 * 3.5) | (weight < -0.4 * 4.5)
    assert clipped.any()
    assert grad[clipped].abs().max() == 0


def test_frozen_weight_does_not_push_the_others():
    model = linear()
    model[0].weight_quantizer.set_range(torch.tensor([0.4]))
    with torch.no_grad():
        model[0].latent_weight.fill_(0.0)
        model[0].latent_weight[0, 0] = 1.3
    frozen = model[0].weight_quantizer.allow_freezing(model[0].latent_weight)
    assert live_sentinel(frozen.dtype) == frozen[0, 0]
    assert bin_regularization_loss(model).item() == pytest.approx((1.3 - 1.2) ** 2), "alone in its bin"
    frozen[0, 0] = 0
    model[0].weight_quantizer.refresh()
    loss = bin_regularization_loss(model)
    loss.backward()
    assert loss.item() == 0
    assert model[0].latent_weight.grad.abs().max() == 0


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_nothing_but_latent_weights_gets_a_gradient(make_prepared, scheme):
    model = make_prepared(weight_scheme=scheme, activation_scheme=scheme)
    bin_regularization_loss(model).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {f"{name}.weight" for name, _ in quantized_layers(model)}


def test_minimum_is_at_the_centres_of_the_bins(make_prepared):
    model = make_prepared()
    with torch.no_grad():
        for _, layer in quantized_layers(model):
            layer.latent_weight.copy_(layer.weight)
    assert bin_regularization_loss(model).item() == pytest.approx(0, abs=1e-12)


def test_two_stages(make_prepared):
    model = make_prepared()
    remedy = BinRegularization(BinRegularizationSettings(weight=0.5, anneal_start=0.5))
    assert remedy.loss(model, 4, 10) is None
    torch.testing.assert_close(remedy.loss(model, 5, 10), 0.5 * bin_regularization_loss(model))
    assert remedy.scalars(4, 10) == {"bin_regularization_weight": 0.0}
    assert remedy.scalars(10, 10) == {"bin_regularization_weight": 0.5}


def test_config_switches_it_on():
    config = OscQATConfig(bin_regularization={"weight": 0.3})
    assert [type(remedy) for remedy in config.remedies()] == [BinRegularization]
    assert OscQATConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"weight": float("nan")}, {"anneal_start": 1.0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"^got .*expected"):
        OscQATConfig(bin_regularization=settings)


def test_model_that_is_not_prepared(make_net):
    with pytest.raises(ValueError, match="run prepare_qat first"):
        bin_regularization_loss(make_net())
