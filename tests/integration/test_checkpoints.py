"""Folders that are whole or not there, and checkpoints that are what was written."""

import json
import logging
import shutil

import pytest

from hf_oscqat.integration.checkpoints import (
    MANIFEST,
    checkpoints,
    last_good_checkpoint,
    processes_of,
    put_in_place,
    remove,
    rotate,
    what_is_wrong,
    whole_folder,
    write_manifest,
)


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(step):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "sub").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights" * step)
        (folder / "sub" / "more.txt").write_text("more")
        write_manifest(folder)
        return folder

    return make


class TestWholeFolder:
    def test_appears_when_it_is_written(self, tmp_path):
        place = tmp_path / "here"
        with whole_folder(place) as folder:
            (folder / "a").write_text("new")
            assert not place.exists()
        assert (place / "a").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["here"]

    def test_replaces_what_was_there_as_a_whole(self, tmp_path):
        place = tmp_path / "here"
        with whole_folder(place) as folder:
            (folder / "a").write_text("old")
        with whole_folder(place) as folder:
            (folder / "b").write_text("new")
            assert (place / "a").read_text() == "old"
        assert [path.name for path in place.iterdir()] == ["b"]

    def test_failure_leaves_what_was_there(self, tmp_path):
        place = tmp_path / "here"
        with whole_folder(place) as folder:
            (folder / "a").write_text("old")
        with pytest.raises(IsADirectoryError), whole_folder(place) as folder:
            folder.write_text("a folder cannot be written to")
        assert (place / "a").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["here"]

    def test_what_a_killed_process_left_is_no_part_of_it(self, tmp_path):
        (tmp_path / ".here.writing").mkdir()
        (tmp_path / ".here.writing" / "half").write_text("half")
        (tmp_path / ".here.old").mkdir()
        with whole_folder(tmp_path / "here") as folder:
            (folder / "a").write_text("new")
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["a"]
        assert [path.name for path in tmp_path.iterdir()] == ["here"]

    def test_put_in_place_needs_a_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            put_in_place(tmp_path / "nothing", tmp_path / "here")


class TestWhatIsWrong:
    def test_nothing(self, make_checkpoint):
        assert what_is_wrong(make_checkpoint(3)) is None

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (
                lambda folder: (folder / MANIFEST).unlink(),
                "it has no checkpoint.json, so it was not written to its end",
            ),
            (lambda folder: (folder / MANIFEST).write_text("{"), "its checkpoint.json cannot be read"),
            (lambda folder: (folder / MANIFEST).write_text("[]"), "its checkpoint.json cannot be read"),
            (
                lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'),
                "its checkpoint.json cannot be read",
            ),
            (lambda folder: (folder / "sub" / "more.txt").unlink(), "sub/more.txt is missing"),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
                "model.safetensors has 1 bytes and not 21",
            ),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(b"w" * 21),
                "model.safetensors has other contents than were written",
            ),
        ],
        ids=["no list", "cut list", "other list", "list of numbers", "missing", "short", "altered"],
    )
    def test_is_said(self, make_checkpoint, damage, said):
        folder = make_checkpoint(3)
        damage(folder)
        assert said in what_is_wrong(folder)


class TestLastGoodCheckpoint:
    def test_newest(self, make_checkpoint, tmp_path):
        for step in (5, 10, 9):
            make_checkpoint(step)
        assert last_good_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-5"]

    def test_damaged_ones_are_named_and_left(self, make_checkpoint, tmp_path, caplog):
        good, bad, worse = (make_checkpoint(step) for step in (1, 2, 3))
        (bad / "model.safetensors").write_bytes(b"")
        (worse / MANIFEST).unlink()
        with caplog.at_level(logging.WARNING):
            assert last_good_checkpoint(tmp_path) == str(good)
        assert len(caplog.messages) == 2
        assert str(worse) in caplog.messages[0]
        assert str(bad) in caplog.messages[1]
        assert "has 0 bytes and not 14" in caplog.messages[1]
        assert bad.is_dir()
        assert worse.is_dir()

    def test_none(self, tmp_path):
        assert last_good_checkpoint(tmp_path) is None
        assert last_good_checkpoint(tmp_path / "nothing") is None

    def test_other_folders_are_no_checkpoints(self, make_checkpoint, tmp_path):
        make_checkpoint(1)
        (tmp_path / "checkpoint-last").mkdir()
        (tmp_path / "checkpoint-7").write_text("a file")
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]

    def test_list_names_every_file_but_itself(self, make_checkpoint):
        assert processes_of(make_checkpoint(2)) == 1
        listed = json.loads((make_checkpoint(1) / MANIFEST).read_text())["files"]
        assert sorted(listed) == ["model.safetensors", "sub/more.txt"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [40, 30, 20, 10]),
        (0, None, [40, 30, 20, 10]),
        (2, None, [40, 30]),
        (2, 10, [40, 10]),
        (1, 20, [40, 20]),
        (1, 40, [40]),
        (9, 10, [40, 30, 20, 10]),
    ],
)
def test_the_oldest_are_removed_and_newest_and_best_stay(tmp_path, limit, best, left):
    for step in (10, 20, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".checkpoint-5.old").mkdir()  # of a process that was killed while it removed one
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_checkpoint_is_gone_from_its_place_before_a_file_of_it_is(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-10"
    checkpoint.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed there
    remove(checkpoint)
    assert checkpoints(tmp_path) == []
    assert (tmp_path / ".checkpoint-10.old").is_dir()


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, caplog):
    remove(tmp_path / "checkpoint-10")
    assert "checkpoint-10 cannot be removed" in caplog.text
