"""Distances of latent weights to the grid, and what a recorder sees of a training."""

import math

import numpy as np
import pytest
import torch
from timm.layers import ScaledStdConv2d

from hf_oscqat import OscillationTracker
from hf_oscqat.quantization.layers import quantize_layer
from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.remedies.tracker import oscillation_state
from hf_oscqat.report.page import write_report
from hf_oscqat.report.recorder import (
    Recorder,
    batchnorm_divergence,
    distance_histogram,
    grid_position,
    running_statistics,
    set_running_statistics,
)
from hf_oscqat.report.recording import read_recording, sample_positions


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


class Run:
    """A plain training loop on made-up images, recorded."""

    def __init__(self, model, images, folder, **options):
        self.model, self.images = model, images
        self.tracker = OscillationTracker(model, momentum=0.1)
        self.recorder = Recorder(model, self.tracker, folder, **{"total_steps": 12, "every": 4, **options})
        self.recorder.begin()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        self.seen = {}

    def __call__(self, first, last, threshold=0.0):
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            self.model(self.images).square().mean().backward()
            expected = {
                name: layer.weight_quantizer.to_int(layer.float_weight) for name, layer in self.tracker.layers.items()
            }
            self.tracker.tick(threshold)
            positions = {
                name: layer.weight_quantizer.to_grid(layer.float_weight).detach()
                for name, layer in self.tracker.layers.items()
            }
            frequency = {
                name: oscillation_state(layer).frequency.clone() for name, layer in self.tracker.layers.items()
            }
            self.seen[step] = (expected, positions, frequency)
            self.recorder.tick(step)
            self.optimizer.step()
        return read_recording(self.recorder.path)


@pytest.fixture
def make_run(make_prepared, images, tmp_path):
    def make(config=None, **options):
        model = make_prepared(**{"weight_bits": 3, "first_last_bits": 3, **(config or {})})
        return Run(model, images, tmp_path / "run", **options)

    return make


@pytest.mark.parametrize(
    "config", [{}, {"weight_granularity": "per_channel"}, {"weight_scheme": "asymmetric"}, {"activation_bits": None}]
)
def test_what_is_recorded_is_what_tracker_and_quantizers_have(make_run, config):
    run = make_run(config)
    recording = run(1, 12)
    assert recording.steps.tolist() == [1, 4, 8, 12]
    assert [layer.name for layer in recording.layers] == list(run.tracker.layers)
    for t, step in enumerate(recording.steps.tolist()):
        ints, positions, frequency = run.seen[step]
        sampled = torch.cat(
            [w.flatten()[sample_positions(w.numel())] for w in (ints[name] for name in run.tracker.layers)]
        )
        assert recording.sampled_ints[t].tolist() == sampled.tolist()
        for i, (name, layer) in enumerate(run.tracker.layers.items()):
            share = (frequency[name] > run.tracker.oscillating_above).float().mean()
            assert recording.oscillating[t, i] == pytest.approx(float(share), rel=1e-5)
            where = positions[name].flatten()[sample_positions(positions[name].numel())]
            quantizer = layer.weight_quantizer
            inside = where[(where >= quantizer.qmin) & (where <= quantizer.qmax)]
            assert recording.distances[t, i].sum() == len(inside)
            assert (recording.layers[i].qmin, recording.layers[i].qmax) == (quantizer.qmin, quantizer.qmax)
    last = run.tracker.oscillating_fraction
    assert recording.of_all_weights(recording.oscillating)[-1] == pytest.approx(last, rel=1e-4)
    assert np.isfinite(recording.input_scale[:, 1:]).all() == (config.get("activation_bits", 4) is not None)


def test_oscillating_weights_are_watched_step_by_step(make_run):
    run = make_run()
    recording = run(1, 12)
    names = list(run.tracker.layers)
    window = recording.windows[-1]
    assert window.first == 5
    assert recording.windows[:-1] == [None] * 3, "too short yet"
    assert window.weights
    assert [w.frequency for w in window.weights] == sorted((w.frequency for w in window.weights), reverse=True)
    for weight in window.weights:
        index, name = tuple(weight.index), names[weight.layer]
        assert weight.ints == [int(run.seen[step][0][name][index]) for step in range(5, 13)]
        assert weight.positions == pytest.approx(
            [float(run.seen[step][1][name][index]) for step in range(5, 13)], rel=1e-3
        )
        assert weight.frequency == pytest.approx(float(run.seen[5][2][name][index]), rel=1e-5)


@pytest.mark.parametrize("lost_at", [10, 5])
def test_weights_that_are_lost_leave_a_report(make_run, lost_at):
    run = make_run()
    run(1, lost_at - 1)
    with torch.no_grad():
        for layer in run.tracker.layers.values():
            layer.latent_weight.fill_(torch.nan)
    recording = run(lost_at, 12)
    (weight, *_) = recording.windows[-1].weights
    assert [math.isnan(position) for position in weight.positions] == [step >= lost_at for step in range(5, 13)]
    assert write_report([run.recorder.path.parent]).is_file()


def test_scales_that_are_lost_from_the_first_step_leave_a_report(make_run):
    run = make_run()
    with torch.no_grad():
        for layer in run.tracker.layers.values():
            layer.weight_quantizer.scale.fill_(torch.nan)
            layer.latent_weight.fill_(torch.nan)
    run(1, 12)
    assert write_report([run.recorder.path.parent]).is_file()


def test_frozen_weights_are_counted_and_not_watched(make_run):
    run = make_run()
    recording = run(1, 12, threshold=0.05)
    assert recording.of_all_weights(recording.frozen)[-1] == pytest.approx(run.tracker.frozen_fraction, rel=1e-4)
    assert run.tracker.frozen_fraction > 0
    assert recording.of_all_weights(recording.frozen)[0] == 0


def test_last_step_is_recorded_whatever_the_interval(make_run):
    assert make_run(every=5)(1, 12).steps.tolist() == [1, 5, 10, 12]


@pytest.mark.parametrize(("total_steps", "every"), [(50, 10), (2000, 10), (100_000, 500)])
def test_interval_is_a_200th_of_training_and_10_at_least(make_run, total_steps, every):
    assert make_run(total_steps=total_steps, every=0).recorder.every == every


def test_recording_changes_nothing_about_training(make_run, make_prepared, images, tmp_path):
    run = make_run()
    run(1, 12)
    other = Run(make_prepared(weight_bits=3, first_last_bits=3), images, tmp_path / "other", every=100)
    for _ in range(12):
        other.optimizer.zero_grad()
        other.model(images).square().mean().backward()
        other.tracker.tick()
        other.optimizer.step()
    for mine, its in zip(run.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


def test_other_memory_formats_are_read_by_the_same_indices(make_run):
    plain = make_run().recorder
    run = make_run()
    run.model.to(memory_format=torch.channels_last)
    for layer, other, sample in zip(plain._layers, run.recorder._layers, plain._samples, strict=True):
        torch.testing.assert_close(grid_position(other, sample), grid_position(layer, sample))


def test_standardised_weights_are_what_is_recorded():
    conv = ScaledStdConv2d(3, 8, 3)
    layer = quantize_layer(conv, Quantizer(3, channels=8, symmetric=True, signed=True), None)
    layer.weight_quantizer.set_range(torch.linspace(0.1, 0.4, 8))
    sample = torch.unravel_index(torch.arange(0, 216, 7), layer.latent_weight.shape)
    with torch.no_grad():
        expected = layer.weight_quantizer.to_grid(layer.float_weight)[sample]
        torch.testing.assert_close(grid_position(layer, sample), expected)


def test_numbers_that_are_logged_are_kept_and_nothing_else(make_run):
    run = make_run()
    run.recorder.log(1, {"loss": 0.5, "grad_norm": math.nan, "note": "text"})
    run.recorder.log(2, {"note": "text"})
    assert run(1, 1).log == {1: {"loss": 0.5}}


def test_batchnorm_layers_are_recorded_with_the_layers_they_follow(make_run):
    run = make_run()
    old = running_statistics(run.model)
    run.model.bn.running_mean += 1.0
    new = running_statistics(run.model)
    run.recorder.batchnorm(3, batchnorm_divergence(old, new), [])
    set_running_statistics(run.model, old)
    torch.testing.assert_close(running_statistics(run.model)[0], old[0])
    recording = run(1, 1)
    assert recording.batchnorm_layers == [("bn", "stem")]
    before, after = recording.batchnorm[3]
    assert before[0] == pytest.approx(float((0.5 / old[0][1]).mean()), rel=1e-3)
    assert np.isnan(after).all()


def test_a_model_of_which_nothing_is_tracked_is_refused(make_prepared, tmp_path):
    model = make_prepared(weight_bits=8)
    with pytest.raises(ValueError, match="tracker of no layer"):
        Recorder(model, OscillationTracker(model), tmp_path, total_steps=1)


def test_a_negative_interval_is_refused(make_run):
    with pytest.raises(ValueError, match="got every=-1"):
        make_run(every=-1)
