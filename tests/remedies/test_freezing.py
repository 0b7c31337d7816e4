"""Settings and schedule of iterative freezing, and when it acts."""

import pytest

from hf_oscqat import OscillationTracker
from hf_oscqat.remedies.base import take_tick
from hf_oscqat.remedies.freezing import Freezing, FreezingSettings
from hf_oscqat.remedies.schedules import cosine_anneal


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": -0.1}, r"got freezing threshold=-0.1, expected an oscillation frequency in \[0, 1\]"),
        ({"threshold": 1.1}, "got freezing threshold=1.1"),
        ({"threshold": float("nan")}, "got freezing threshold=nan"),
        ({"threshold_final": 2}, "got freezing threshold_final=2"),
        ({"threshold": 0.001, "momentum": 0.01}, "got freezing threshold=0.001 with momentum=0.01, .*at least"),
        ({"threshold_final": 0.001, "momentum": 0.01}, "got freezing threshold_final=0.001 with momentum=0.01"),
        ({"momentum": 0}, r"got freezing momentum=0, expected a number in \(0, 1\]"),
        ({"momentum": 1.5}, "got freezing momentum=1.5"),
        ({"anneal_start": 1}, "got anneal_start=1"),
    ],
)
def test_bad_setting_is_an_error_that_says_what_is_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FreezingSettings(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"threshold": 0, "threshold_final": 0},
        {"threshold": 0, "threshold_final": None},
        {"threshold_final": None},
        {"threshold": 0.01, "momentum": 0.01},
    ],
)
def test_setting_at_its_limit_is_accepted(kwargs):
    assert FreezingSettings(**kwargs)


def test_threshold_is_zero_before_annealing_and_then_follows_the_cosine():
    freezing = Freezing(FreezingSettings(threshold=0.2, threshold_final=0.02, anneal_start=0.25))
    assert {freezing.freeze_threshold(step, 100) for step in range(1, 25)} == {0.0}
    assert freezing.freeze_threshold(25, 100) == 0.2
    assert freezing.freeze_threshold(60, 100) == cosine_anneal(60, 100, 0.2, 0.02, 0.25)
    assert freezing.freeze_threshold(100, 100) == pytest.approx(0.02)


def test_threshold_without_a_final_value_stays():
    freezing = Freezing(FreezingSettings(threshold=0.2, threshold_final=None, anneal_start=0.25))
    assert {freezing.freeze_threshold(step, 100) for step in range(25, 101)} == {0.2}


def test_threshold_zero_switches_freezing_off():
    freezing = Freezing(FreezingSettings(threshold=0, threshold_final=0, anneal_start=0))
    assert {freezing.freeze_threshold(step, 10) for step in range(1, 11)} == {0.0}


def test_nothing_freezes_before_annealing_and_what_oscillates_does_after(make_prepared):
    model = make_prepared()
    tracker = OscillationTracker(model, momentum=0.5)
    freezing = Freezing(FreezingSettings(threshold=0.4, threshold_final=None, anneal_start=0.5))
    for step in range(1, 5):
        model.pw.latent_weight.data.neg_()
        take_tick(tracker, [freezing], step, 10)
        assert tracker.frozen_fraction == 0
    take_tick(tracker, [freezing], 5, 10)
    assert tracker.frozen_fraction == 0  # its frequency has fallen below the threshold at this tick
    for step in (1, 6):
        model.pw.latent_weight.data.neg_()
        take_tick(tracker, [freezing], step, 10)
    assert 0 < tracker.frozen_fraction <= model.pw.latent_weight.numel() / tracker.num_weights


def test_threshold_is_what_it_logs():
    freezing = Freezing(FreezingSettings(threshold=0.2, threshold_final=None, anneal_start=0.25))
    assert freezing.scalars(10, 100) == {"freeze_threshold": 0.0}
    assert freezing.scalars(90, 100) == {"freeze_threshold": 0.2}


def test_it_adds_no_loss(make_prepared):
    assert Freezing(FreezingSettings()).loss(make_prepared(), 10, 10) is None
