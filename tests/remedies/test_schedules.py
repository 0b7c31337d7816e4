"""The cosine along which remedies become strong."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_oscqat.remedies.schedules import check_anneal_start, cosine_anneal


def test_value_by_hand():
    # 100 steps, a quarter of them before the cosine: it goes from 25 to 100.
    values = {step: cosine_anneal(step, 100, start=2.0, final=0.0, anneal_start=0.25) for step in range(1, 101)}
    assert {values[step] for step in range(1, 26)} == {2.0}
    assert values[50] == pytest.approx(1 + math.cos(math.pi / 3))
    assert values[75] == pytest.approx(1 + math.cos(2 * math.pi / 3))
    assert values[100] == pytest.approx(0.0, abs=1e-12)


def test_final_value_is_reached_at_the_last_step_and_kept_after_it():
    for step in (10, 11, 1000):
        assert cosine_anneal(step, 10, start=0.1, final=0.01, anneal_start=0.5) == pytest.approx(0.01)


def test_without_a_start_share_it_moves_from_the_first_step():
    assert cosine_anneal(0, 10, 1.0, 0.0, 0.0) == 1.0
    assert cosine_anneal(5, 10, 1.0, 0.0, 0.0) == pytest.approx(0.5)
    assert 0.9 < cosine_anneal(1, 10, 1.0, 0.0, 0.0) < 1.0


@given(
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.floats(0, 10),
    st.floats(0, 10),
    st.floats(0, 1, exclude_max=True),
)
def test_value_moves_one_way_and_stays_between_start_and_final(step, total_steps, start, final, anneal_start):
    value = cosine_anneal(step, total_steps, start, final, anneal_start)
    following = cosine_anneal(step + 1, total_steps, start, final, anneal_start)
    low, high = min(start, final) - 1e-9, max(start, final) + 1e-9
    assert low <= value <= high
    assert abs(following - final) <= abs(value - final) + 1e-9


@pytest.mark.parametrize("anneal_start", [1, 1.5, -0.1, math.nan])
def test_start_that_is_no_share_of_training_is_an_error(anneal_start):
    with pytest.raises(
        ValueError, match=rf"got anneal_start={anneal_start}, expected a share of training in \[0, 1\)"
    ):
        check_anneal_start(anneal_start)


@pytest.mark.parametrize("anneal_start", [0, 0.25, 0.999])
def test_share_of_training_is_accepted(anneal_start):
    assert check_anneal_start(anneal_start) is None
