"""The benchmark of recording, on a tiny network."""

from benchmarks.recording import main


def test_what_recording_adds_is_printed(capsys):
    found = main(
        ["--model", "test_efficientnet", "--batch-size", "2", "--img-size", "32", "--every", "2", "--intervals", "2"]
    )
    assert 0 < found["inside"] < 5
    assert found["bytes"] < 50_000
    assert f"{100 * found['inside']:.2f}% pass inside" in capsys.readouterr().out
