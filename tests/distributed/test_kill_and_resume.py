"""A short slice of the command in this folder, which kills thirty times."""

import pytest
from kill_and_resume import disturb, finish, left_behind


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_run_ends_like_an_undisturbed_one(tmp_path, processes):
    log = tmp_path / "log.txt"
    seconds = finish(tmp_path / "undisturbed", processes, log)
    moments = disturb(tmp_path / "disturbed", processes, kills=2, seconds=seconds, seed=3, log=log)
    assert moments, "the run ended before it was killed once"
    finish(tmp_path / "disturbed", processes, log)
    expected, found = left_behind(tmp_path / "undisturbed"), left_behind(tmp_path / "disturbed")
    assert [name for name in expected if found[name] != expected[name]] == []
