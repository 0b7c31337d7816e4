"""The benchmark of the packed model, on a network so small that its ratios mean nothing."""

from benchmarks.packed import main

ROWS = {"float", "W4, inputs in float", "W4A4"}
KEPT = {"W4, inputs in float, kept packed", "W4A4, kept packed"}


def test_it_compares_loading_inference_and_memory_and_prints_all(capsys):
    options = ["--img-size", "32", "--repeats", "1", "--batch-sizes", "1", "2", "--threads", "1"]
    found = main(["--model", "test_efficientnet", *options])
    assert found["load"].keys() == ROWS
    assert found["batch 1"].keys() == found["batch 2"].keys() == found["bytes"].keys() == ROWS | KEPT
    assert found["load"]["float"] == found["batch 1"]["float"] == 1
    # Integers are an eighth of float weights, and beside them a model keeps its float weights or it does not.
    assert found["bytes"]["W4A4, kept packed"] < found["bytes"]["float"] / 2 < found["bytes"]["W4A4"]
    out = capsys.readouterr().out
    for name in ("load", "batch 1", "batch 2"):
        assert all(f"{ratio:.2f}" in out for ratio in found[name].values())
    assert all(f"{count:,}" in out for count in found["bytes"].values())
