"""The file of a recording: what is read is what was written, whatever became of the process that wrote it."""

import json

import numpy as np
import pytest

from hf_oscqat.report.recording import (
    FILE,
    append_row,
    begin,
    pack_ints,
    read_recording,
    read_rows,
    sample_positions,
    unpack_ints,
)

HEADER = {"row": "run", "layers": [{"name": "a"}]}


def log_row(step):
    return {"row": "log", "step": step, "scalars": {"loss": 1.0 / step}}


@pytest.mark.parametrize("count", [1, 7, 256])
def test_all_positions_are_taken_where_there_are_few(count):
    assert sample_positions(count) == list(range(count))


@pytest.mark.parametrize("count", [257, 300, 864, 2304, 1_280_000])
def test_positions_are_spread_and_the_same_always(count):
    positions = sample_positions(count)
    assert positions == sample_positions(count) == sorted(set(positions))
    assert 200 <= len(positions) <= 256
    assert 0 <= positions[0]
    assert positions[-1] < count
    assert np.histogram(positions, bins=8, range=(0, count))[0].min() >= 20


def test_positions_hit_each_tap_of_a_kernel():
    taps = np.bincount(np.array(sample_positions(9 * 960)) % 9, minlength=9)
    assert taps.min() >= 15


@pytest.mark.parametrize("shape", [(0,), (1,), (3000,)])
def test_packed_integers_come_back(shape):
    ints = np.random.default_rng(0).integers(-8, 256, shape)
    np.testing.assert_array_equal(unpack_ints(pack_ints(ints)), ints)


class TestContinuing:
    def write(self, path, *steps):
        begin(path, HEADER, 0)
        for step in steps:
            append_row(path, log_row(step))

    def steps(self, path):
        return [row.get("step") for row in read_rows(path)]

    def test_drops_what_was_recorded_after_the_checkpoint(self, tmp_path):
        path = tmp_path / FILE
        self.write(path, 10, 20, 30)
        begin(path, HEADER, 20)
        append_row(path, log_row(25))
        assert self.steps(path) == [None, 10, 20, 25]

    @pytest.mark.parametrize("rest", ['{"row":"log","st', '{"row":"log","step":30,"scalars":{}}', '{"row"\n'])
    def test_a_line_that_was_not_finished_is_left_out(self, tmp_path, rest):
        path = tmp_path / FILE
        self.write(path, 10, 20)
        with path.open("a") as file:
            file.write(rest)
        assert self.steps(path) == [None, 10, 20]
        begin(path, HEADER, 20)
        append_row(path, log_row(30))
        assert self.steps(path) == [None, 10, 20, 30]

    def test_from_the_beginning_begins_anew(self, tmp_path):
        path = tmp_path / FILE
        self.write(path, 10)
        begin(path, HEADER, 0)
        assert self.steps(path) == [None]

    def test_of_another_model_begins_anew(self, tmp_path):
        path = tmp_path / FILE
        self.write(path, 10)
        begin(path, HEADER | {"layers": [{"name": "b"}]}, 10)
        assert self.steps(path) == [None]

    def test_where_nothing_was_recorded_yet_begins(self, tmp_path):
        begin(tmp_path / "run" / FILE, HEADER, 10)
        assert self.steps(tmp_path / "run" / FILE) == [None]

    def test_leaves_nothing_else_behind(self, tmp_path):
        self.write(tmp_path / FILE, 10)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_reads_what_a_run_has_left(tmp_path, make_recording):
    recording = read_recording(make_recording(tmp_path / "mine").parent)
    assert recording.name == "mine"
    assert recording.steps.tolist() == [1, *range(10, 210, 10)]
    assert recording.oscillating.shape == recording.frozen.shape == (21, 6)
    assert np.isnan(recording.input_scale[:, 0]).all()
    assert list(recording.log) == recording.steps.tolist()
    assert recording.log[50].keys() == {"loss", "eval_accuracy", "eval_loss"}
    assert list(recording.batchnorm) == [50, 100, 150, 200]
    assert recording.windows[0] is None
    assert recording.windows[5].first + len(recording.windows[5].weights[0].ints) - 1 == recording.steps[5]


def test_shares_and_histograms_count_layers_by_their_weights(tmp_path, make_recording):
    recording = read_recording(make_recording(tmp_path, layers=2))
    sizes = np.array([24 * 16, 16 * 9])
    np.testing.assert_allclose(
        recording.of_all_weights(recording.oscillating), (recording.oscillating * sizes).sum(1) / sizes.sum()
    )
    recording.distances[0] = 0
    recording.distances[0][0, 3], recording.distances[0][1, 30] = len(sample_positions(384)), 144
    np.testing.assert_allclose(recording.histogram(0)[[3, 30]], sizes / sizes.sum())


def test_sampled_weights_have_names(tmp_path, make_recording):
    recording = read_recording(make_recording(tmp_path, layers=2))
    count = len(sample_positions(384))
    assert recording.sampled_weight(0) == ("blocks.0.0.conv_pw", [0, 0, 0, 0])
    assert recording.sampled_weight(count + 9) == ("blocks.0.1.conv_dw", [1, 0, 0, 0])


def test_a_folder_without_a_recording_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no oscillation\.jsonl, expected the folder of a recorded run"):
        read_recording(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin like a recording"),
        ("no json\nat all\n", "line 1 is no JSON"),
        ("[1]\n{}\n", "line 1 is no row"),
        (json.dumps(HEADER | {"format_version": 99}) + "\n", "format_version 99, expected 1"),
        (json.dumps(HEADER | {"format_version": 1}) + "\n", "no step is recorded yet"),
        (json.dumps(HEADER | {"format_version": 1}) + '\n{"row":"step","step":1}\n', "a row is not whole"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recording(tmp_path)
