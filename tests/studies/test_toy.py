"""One weight, one target: frequencies that can be worked out by hand."""

import csv
import json

import pytest
import torch

from hf_oscqat.config import OscQATConfig
from hf_oscqat.quantization.gradient_estimators import GRADIENT_ESTIMATORS
from hf_oscqat.remedies import REMEDIES
from hf_oscqat.studies import toy
from hf_oscqat.studies.base import write

SETTINGS = toy.ToySettings(num_targets=9, steps=600)


def regress(method, settings=SETTINGS):
    config = OscQATConfig(
        activation_bits=None,
        first_last_bits=4,
        weight_granularity="per_channel",
        tracker_momentum=0.01,
        **toy.METHODS[method],
    )
    return toy.regress(config, settings)


@pytest.mark.parametrize("method", ["ste", "ewgs", "stacked_sigmoid", "dsq"])
def test_other_slopes_oscillate_twice_the_distance_a_step(method):
    run = regress(method)
    distance = (run.targets - run.targets.round()).abs()
    away_from_ties = distance < 0.45
    torch.testing.assert_close(run.frequency[away_from_ties], 2 * distance[away_from_ties], atol=0.04, rtol=0)


def test_psg_oscillates_too():
    run = regress("psg")
    distance = (run.targets - run.targets.round()).abs()
    assert bool((run.frequency > 1.3 * distance).all())


@pytest.mark.parametrize("method", REMEDIES)
def test_remedies_stop_it(method):
    assert regress(method).frequency.max() == 0


@pytest.mark.parametrize("method", ["stochastic_rounding", "additive_noise"])
def test_random_rounding_rests_away_from_the_threshold(method):
    run = regress(method)
    assert run.frequency[(run.targets - run.targets.round()).abs() < 0.25].max() == 0


def test_every_estimator_and_remedy_is_compared():
    assert GRADIENT_ESTIMATORS.keys() | REMEDIES.keys() == toy.METHODS.keys()


def test_same_seed_same_result():
    first, second = regress("additive_noise"), regress("additive_noise")
    assert torch.equal(first.latent, second.latent)


def test_study_writes_table_picture_and_record(tmp_path):
    settings = toy.ToySettings(str(tmp_path), num_targets=4, steps=100)
    result = toy.run(settings)
    files = write(toy.STUDY, settings, result)
    assert {path.name for path in files} == {"toy.csv", "toy.png", "toy.json"}
    with files[0].open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(toy.METHODS)
    assert files[1].stat().st_size > 10_000
    record = json.loads(files[2].read_text())
    assert record["settings"]["num_targets"] == 4
    assert record["finding"] == result.finding


def test_too_few_steps_are_an_error():
    with pytest.raises(ValueError, match="got num_targets=9 and steps=3, expected at least 2 and at least 10"):
        toy.ToySettings(num_targets=9, steps=3)
