"""The benchmark of the data pipeline, on few images: that it measures every choice, and its arithmetic."""

import datasets
import numpy as np
import pytest
from PIL import Image

from benchmarks.data import main

OPTIONS = ["--images", "4", "--img-size", "16", "--batch-size", "2", "--workers", "0", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_it_makes_up_photographs_and_says_what_is_missing(capsys):
    found = main([*OPTIONS, "--cores", "3", "--needed", "1e9"])
    of_training = ("read and decode: Pillow *", "augment, to uint8 *", "collate uint8 *")
    assert found["fed"] == pytest.approx(3e6 / sum(found["steps"][name] for name in of_training))
    assert all(value > 0 for value in found["steps"].values())
    assert len(found["pipeline"]) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert f"3 such cores that do nothing else feed {found['fed']:,.0f} images/s of 1,000,000,000" in out
    assert "100% short" in out


def test_it_reads_a_folder_and_computes_the_need_from_a_step(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / "validation" / label).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / "validation" / label / f"{number}.jpg")
    found = main([*OPTIONS, "--data", str(tmp_path / "pets"), "--step-ms", "1e9"])
    assert found["needed"] == pytest.approx(256e-6)
    out = capsys.readouterr().out
    assert "4 images of" in out
    assert "which is enough" in out
