"""What a checkpoint is published with: words that say how it was made, and no secret among them."""

import pytest

from hf_oscqat.integration.publish import command_line, commit_of_code, float_bytes, oscillation_facts

SECRET = "hf_" + "a" * 30


@pytest.mark.parametrize(
    "argv",
    [
        ["train.py", "--hub_token", SECRET],
        ["train.py", f"--hub_token={SECRET}"],
        ["train.py", "--hf-token", "short"],
        ["train.py", "--password", "short"],
        ["train.py", "--note", f"with {SECRET} inside"],
        ["train.py", "--known", "short"],
        ["train.py", "--api_key=short"],
    ],
)
def test_command_shows_no_secret(argv):
    shown = command_line(argv, "short", None)
    assert SECRET not in shown
    assert "short" not in shown
    assert shown.startswith("train.py ")
    assert "***" in shown


def test_stored_token_is_a_secret_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "stored")
    assert command_line(["a", "stored"]) == "a '***'"


def test_oscillation_is_told_by_start_peak_and_end():
    log = [{"loss": 1.0, "step": 1}]
    values = ((1.0, 0.0), (5.0, 0.5), (2.0, 3.0), (9.0, 9.0))
    log += [{"step": i, "oscillating_percent": o, "frozen_percent": f} for i, (o, f) in enumerate(values, start=1)]
    assert oscillation_facts(log, 3) == {"start": 1.0, "peak": 5.0, "end": 2.0, "frozen": 3.0}
    assert oscillation_facts(log[:1], 3) is None


def test_command_is_quoted_for_a_shell():
    assert command_line(["a", "b c", "--hub_token_file", "--x", "1"]) == "a 'b c' --hub_token_file --x 1"


def test_float_bytes_are_the_same_from_both_forms(make_prepared_wrapper, make_wrapper):
    from hf_oscqat import pack

    model = make_prepared_wrapper(weight_bits=3)
    expected = sum(t.numel() * t.element_size() for t in make_wrapper().state_dict().values())
    assert float_bytes(model) == float_bytes(pack(model)) == expected


def test_commit_of_the_code_is_one_or_is_not_known():
    commit = commit_of_code()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
