"""`oscqat report`."""

from hf_oscqat.cli import main


def test_command_writes_it(make_recording, tmp_path, capsys):
    make_recording(tmp_path / "run", steps=(1, 10))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--steps", "10"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert (tmp_path / "out" / "report.html").is_file()


def test_command_says_what_is_missing(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no oscillation.jsonl, expected the folder of a recorded run" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_an_error(make_recording, tmp_path, capsys):
    make_recording(tmp_path / "run", steps=(1, 10))
    (tmp_path / "out").write_text("mine")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "File exists" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
