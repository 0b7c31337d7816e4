"""Distances of latent weights to the grid."""

import pytest
import torch

from hf_oscqat.report.recorder import distance_histogram


def test_counts_where_weights_lie_between_grid_points(make_prepared):
    model = make_prepared(first_last_bits=8, activation_bits=None)
    for name in ("dw", "pw"):
        layer = getattr(model, name)
        layer.weight_quantizer.set_range(torch.ones(1))
        with torch.no_grad():
            layer.latent_weight.fill_(2.26)
    histogram = distance_histogram(model, bins=4)
    assert histogram.counts == [0, 0, 0, model.dw.latent_weight.numel() + model.pw.latent_weight.numel()]


def test_weights_beyond_the_grid_are_left_out(make_prepared):
    model = make_prepared()
    for name in ("dw", "pw"):
        layer = getattr(model, name)
        layer.weight_quantizer.set_range(torch.ones(1))
        with torch.no_grad():
            layer.latent_weight.fill_(100.0)
    assert sum(distance_histogram(model).counts) == 0


def test_wide_weights_are_left_out(make_prepared):
    model = make_prepared(weight_bits=8)
    assert sum(distance_histogram(model).counts) == 0
    assert sum(distance_histogram(model, max_bits=8).counts) == pytest.approx(
        sum(layer.latent_weight.numel() for layer in (model.stem, model.dw, model.pw, model.head)), rel=0.1
    )
