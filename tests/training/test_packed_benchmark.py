"""The benchmark of the packed model, on a network so small that its ratios mean nothing."""

import torch

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


def test_compiled_models_are_compared_with_compiled_float(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    options = ["--img-size", "32", "--repeats", "1", "--batch-sizes", "1", "--threads", "1", "--compile"]
    found = main(["--model", "test_efficientnet", *options])
    assert found["batch 1"].keys() == ROWS | KEPT | {f"{name}, torch.compile" for name in ROWS}
    assert found["batch 1"]["float, torch.compile"] == 1
    assert len(compiled) == len(ROWS)
    row = next(line for line in capsys.readouterr().out.splitlines() if "W4A4, torch.compile" in line)
    assert "float, torch.compile" in row.split("W4A4, torch.compile")[1]


def test_memory_format_is_that_of_models_and_images(capsys, monkeypatch):
    stems = []  # of the models in turn; the first few calls prepare them
    original = torch.nn.functional.conv2d

    def conv2d(input, weight, *args):
        if input.shape[1] == 3:
            stems.append(input.is_contiguous(memory_format=torch.channels_last))
        return original(input, weight, *args)

    options = ["--model", "test_efficientnet", "--img-size", "32", "--repeats", "1", "--batch-sizes", "2"]
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    main([*options, "--threads", "1", "--channels-last"])
    assert stems[-5:] == [True] * 5
    assert "channels last" in " ".join(capsys.readouterr().out.split())
    main([*options, "--threads", "1"])
    assert stems[-5:] == [False] * 5
    assert "channels last" not in " ".join(capsys.readouterr().out.split())
