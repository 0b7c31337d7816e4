"""A global batch of 32 leaves behind the same model however it is split over processes and micro-batches."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import launch, run
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("same_result.py")
METHODS = ("lsq", "dampen", "freeze")
INTEGERS = ("previous_int", "direction", "frozen_int")


def jobs(*accumulations):
    """For each method and split, 60 steps with fixed statistics; and 10 with batch-norm over the global batch."""
    fixed = {
        f"{method}-{split}": {"method": method, "accumulation": split, "batchnorm": "fixed", "steps": 60}
        for method in METHODS
        for split in accumulations
    }
    return fixed | {"synced": {"method": "freeze", "accumulation": 1, "batchnorm": "synced", "steps": 10}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of the runs in one process, folder of those in two)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run([sys.executable, str(SCRIPT), str(one), json.dumps(jobs(1, 2, 4))], cwd=one)
    launch(SCRIPT, str(two), json.dumps(jobs(1)), cwd=two)
    return one, two


def read(folder, rank=0):
    report = json.loads((folder / f"{rank}.json").read_text())
    return load_file(folder / f"{rank}.safetensors"), report


def assert_same(one, other, tolerance=1e-9):
    (state, report), (other_state, other_report) = one, other
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        if name.endswith(INTEGERS):
            assert torch.equal(tensor, other_state[name]), name
        else:
            torch.testing.assert_close(
                tensor.double(), other_state[name].double(), rtol=0, atol=tolerance, equal_nan=True, msg=name
            )
    assert max(abs(a - b) for a, b in zip(report["losses"], other_report["losses"], strict=True)) <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", ["accumulation 2", "accumulation 4", "2 processes"])
def test_split_batch_leaves_the_same_behind(folders, method, split):
    whole = read(folders[0] / f"{method}-1")
    other = folders[1] / f"{method}-1" if split == "2 processes" else folders[0] / f"{method}-{split[-1]}"
    assert_same(whole, read(other))
    assert len(whole[1]["losses"]) == 60


def test_it_is_no_trivial_setting(folders):
    state, report = read(folders[0] / "freeze-1")
    assert report["processes"] == 1
    assert read(folders[1] / "freeze-1")[1]["processes"] == 2
    assert report["frozen"] > 0
    assert report["oscillating"] > 0
    losses = {method: read(folders[0] / f"{method}-1")[1]["losses"][-1] for method in METHODS}
    assert len(set(losses.values())) == 3
    assert all(tensor.dtype != torch.float32 for name, tensor in state.items() if name.endswith("weight"))


def test_both_processes_hold_the_same(folders):
    for name in jobs(1):
        assert_same(read(folders[1] / name, 0), read(folders[1] / name, 1), tolerance=0)


def test_batchnorm_over_the_global_batch(folders):
    assert_same(read(folders[0] / "synced"), read(folders[1] / "synced"))
