"""The benchmark of the range search, on a network too small to be sampled."""

from benchmarks.range_search import main


def test_error_is_at_most_the_published_and_both_times_are_printed(capsys):
    found = main(["--model", "test_efficientnet", "--batch-size", "2", "--img-size", "32"])
    assert found["our_error"] <= found["published_error"] * (1 + 1e-7)
    out = capsys.readouterr().out
    assert f"{found['ours']:.2f}" in out
    assert f"{found['published']:.2f}" in out
