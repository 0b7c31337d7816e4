"""A short slice of the commands in this folder."""

import pytest
from fuzz_checkpoints import DAMAGES, fuzz
from fuzz_recipes import fuzz as fuzz_recipes


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_compute_the_same_or_are_refused():
    outcomes, unexpected = fuzz(count=8 * len(DAMAGES), seed=0)
    assert unexpected == []
    assert outcomes["CheckpointError"] > 4 * len(DAMAGES)


@pytest.mark.filterwarnings("ignore")
def test_damaged_recipes_give_settings_or_say_what_is_wrong():
    outcomes, unexpected = fuzz_recipes(count=100, seed=0)
    assert unexpected == []
    assert min(outcomes["settings"], outcomes["ValueError"]) > 10
