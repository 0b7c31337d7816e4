"""The pictures are drawn, of what they are given."""

import pytest
from PIL import Image

from hf_oscqat.report.pictures import draw_distances, draw_oscillation

LOG = [
    {"step": 10, "loss": 1.0, "oscillating_percent": 0.5, "frozen_percent": 0.0},
    {"step": 20, "eval_accuracy": 0.4},
    {"step": 20, "loss": 0.8, "oscillating_percent": 2.5, "frozen_percent": 1.0},
]


def colours(path):
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}


def test_both_curves_are_in_the_picture(tmp_path):
    draw_oscillation(LOG, tmp_path / "oscillation.png")
    assert {(0xC8, 0x55, 0x3D), (0x1F, 0x6F, 0x8B)} <= colours(tmp_path / "oscillation.png")


def test_both_histograms_are_in_the_picture(tmp_path):
    before, after = {"counts": [1, 2, 1], "low": -0.5, "high": 0.5}, {"counts": [0, 9, 0], "low": -0.5, "high": 0.5}
    draw_distances(before, after, tmp_path / "distances.png")
    assert {(0x9A, 0x9A, 0x9A), (0x1F, 0x6F, 0x8B)} <= colours(tmp_path / "distances.png")


def test_a_log_without_oscillation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="oscillating_percent"):
        draw_oscillation([{"step": 1, "loss": 1.0}], tmp_path / "oscillation.png")
