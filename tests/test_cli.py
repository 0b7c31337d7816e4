"""`oscqat`: what it says, what it refuses and with which status."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from transformers import CONFIG_MAPPING, HfArgumentParser

from hf_oscqat import OscQATConfig, OscQATTimmConfig, calibrate, pack, prepare_qat
from hf_oscqat.cli import main
from hf_oscqat.hub.inspect import inspect_timm
from hf_oscqat.studies import STUDIES


def test_study_without_a_name_lists_them(capsys):
    assert main(["study"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in STUDIES)


def test_unknown_study_is_an_error_that_lists_the_known(capsys):
    assert main(["study", "toys"]) == 2
    assert capsys.readouterr().err == f"error: got study 'toys', expected one of {', '.join(STUDIES)}\n"


def test_toy_study_runs(tmp_path, capsys):
    assert main(["study", "toy", "--output_dir", str(tmp_path), "--steps", "40", "--num_targets", "4"]) == 0
    assert (tmp_path / "toy.png").is_file()
    assert "bin_regularization" in capsys.readouterr().out


def test_bad_setting_is_an_error(capsys):
    assert main(["study", "toy", "--steps", "1"]) == 2
    assert "expected at least 2 and at least 10" in capsys.readouterr().err


def test_bad_data_is_an_error(tmp_path, capsys):
    assert (
        main(
            [
                "study",
                "batchnorm",
                "--output_dir",
                str(tmp_path),
                "--train_dir",
                "nowhere",
                "--validation_dir",
                "nowhere",
            ]
        )
        == 2
    )
    assert "nowhere" in capsys.readouterr().err


def test_unknown_option_is_an_error_that_names_the_one_that_was_meant(capsys):
    assert main(["study", "toy", "--stepz", "4"]) == 2
    assert "got unknown key 'stepz' in the options of study toy. Did you mean 'steps'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["steps", "40"], ["-steps", "40"], ["--steps", "40", "80"]])
def test_words_that_nothing_reads_are_an_error(words, capsys):
    assert main(["study", "toy", *words]) == 2
    assert "expected an option such as" in capsys.readouterr().err


class TestInspect:
    def test_lists_layers_what_stays_float_and_the_bytes(self, capsys):
        assert main(["inspect", "test_vit", "--weight-bits", "3", "--modules-to-not-convert", "blocks.0.mlp.fc1"]) == 0
        out = capsys.readouterr().out
        assert "test_vit, W3A4" in out
        rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert "left in float by the config" in rows["blocks.0.mlp.fc1"]
        assert "no weight of a layer" in rows["pos_embed"]
        assert "8" in rows["patch_embed.proj"]
        assert "371,240 parameters" in out

    def test_bytes_are_those_of_the_packed_file(self):
        model = timm.create_model("test_vit")
        config = OscQATConfig(weight_bits=3, weight_granularity="per_channel", range_estimator="minmax")
        prepare_qat(model, config)
        calibrate(model, [torch.randn(2, 3, 160, 160)])
        packed = {n: b for n, b in pack(model).named_buffers() if n.endswith("weight_packed")}
        rows = {row.name: row.bytes for row in inspect_timm("test_vit", config) if row.weight_bits}
        assert rows == {name.removesuffix(".weight_packed"): b.numel() for name, b in packed.items()}

    def test_weights_alone_may_be_quantized(self, capsys):
        assert main(["inspect", "test_vit", "--activation-bits", "float"]) == 0
        out = capsys.readouterr().out
        assert "test_vit, W4A32" in out
        rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert rows["blocks.0.attn.qkv"].split()[5:7] == ["4", "float"]

    def test_pretrained_tag_is_no_part_of_the_architecture(self, capsys):
        assert main(["inspect", "test_vit.r160_in1k"]) == 0
        assert "371,240 parameters" in capsys.readouterr().out

    def test_narrow_window_folds_no_line(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "20")
        assert main(["inspect", "test_vit"]) == 0
        assert "pos_embed                VisionTransformer  1 x 101 x 64" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["test_vit", "--modules-to-not-convert", "haed"], "got pattern 'haed' in modules_to_not_convert"),
            (["mobilenetv2"], "got model 'mobilenetv2', expected a timm name; did you mean mobilenetv"),
            (["test_vit.r16_in1k"], "got model 'test_vit.r16_in1k', expected a timm name; did you mean test_vit"),
            (["zzz"], "got model 'zzz', expected a timm name, as timm.list_models() lists them"),
            (["test_vit", "--weight-bits", "9"], "got weight_bits=9, expected a whole number from 2 to 8"),
            (["sequencer2d_s"], "of class LSTM, which cannot be quantized"),
            (["test_vit", "--revision", "main"], "got --revision main for test_vit, expected a Hub id"),
            (["org/net", "--weight-bits", "3"], "got --weight-bits for the checkpoint org/net, which has its own"),
        ],
    )
    def test_what_cannot_be_done_is_said(self, words, message, capsys):
        assert main(["inspect", *words]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("words", [[], ["test_vit", "--weight-bits", "four"], ["test_vit", "more"]])
    def test_words_that_are_none_of_its_options_are_refused(self, words, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *words])
        assert stopped.value.code == 2
        assert "error:" in capsys.readouterr().err

    def test_it_waits_for_nothing_that_it_does_not_use(self):
        report = json.loads(subprocess.run([sys.executable, "-c", AS_PROGRAM], capture_output=True, check=True).stderr)
        assert report["status"] == 0
        assert report["heavy"] == []
        assert report["collects"]
        assert not report["registered"]
        assert report["registered_with_a_public_name"]

    def test_help_has_an_example(self, capsys):
        with pytest.raises(SystemExit):
            main(["inspect", "--help"])
        assert "example: oscqat inspect mobilenetv2_100" in capsys.readouterr().out


AS_PROGRAM = """
import gc, json, sys

sys.argv = ["/usr/local/bin/oscqat", "inspect", "test_vit"]
from hf_oscqat.cli import main

status = main()
heavy = ("transformers.modeling_utils", "transformers.trainer", "accelerate", "datasets", "sklearn", "matplotlib")
report = {"status": status, "heavy": [name for name in heavy if name in sys.modules], "collects": gc.isenabled()}
from transformers import CONFIG_MAPPING

report["registered"] = "oscqat_timm" in CONFIG_MAPPING
from hf_oscqat import OscQATConfig

report["registered_with_a_public_name"] = "oscqat_timm" in CONFIG_MAPPING
json.dump(report, sys.stderr)
"""
"""The console script, which does no more than this, and what it has imported."""


def test_other_commands_register_the_published_model(monkeypatch, capsys):
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, OscQATTimmConfig.model_type)
    assert main(["study"]) == 0
    assert CONFIG_MAPPING[OscQATTimmConfig.model_type] is OscQATTimmConfig


@pytest.mark.parametrize("argv", [["studies"], []])
def test_unknown_words_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_help_of_each_study_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", name, "--help"])
    assert stopped.value.code == 0
    words = " ".join(capsys.readouterr().out.split()).partition(f"example: oscqat study {name} ")[2].split()
    assert words
    HfArgumentParser(STUDIES[name].settings).parse_args_into_dataclasses(words)  # which refuses what cannot be run


class TestOnAPackedModel:
    """`folder` is runs/quickstart/packed below `tmp_path`."""

    @pytest.fixture(autouse=True)
    def _there(self, hub, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("command", ["evaluate", "push", "card", "inspect"])
    def test_example_of_the_help_runs(self, command, capsys):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        words = " ".join(capsys.readouterr().out.split()).partition("example: oscqat ")[2].split()
        assert words[0] == command
        assert main(words) == 0

    def test_example_of_the_whole_help_runs(self, capsys, monkeypatch):
        with pytest.raises(SystemExit):
            main(["--help"])
        words = capsys.readouterr().out.partition("example: oscqat ")[2].split()
        assert main([*words, "--steps", "40", "--num_targets", "4"]) == 0

    def test_evaluate_ends_with_result_and_json(self, capsys, tmp_path):
        assert main(["evaluate", "runs/quickstart/packed", "--device", "cpu", "--json", "out.json"]) == 0
        out = capsys.readouterr().out
        assert "reproduced" in out
        record = json.loads(out.partition("--result\n")[2])
        assert record == json.loads((tmp_path / "out.json").read_text())
        assert record["num_images"] == 60

    def test_evaluate_says_with_its_status_that_it_is_different(self, capsys, folder):
        card = folder / "README.md"
        card.write_text(
            card.read_text().replace("  - type: accuracy\n      value: 0.", "  - type: accuracy\n      value: 0.9")
        )
        assert main(["evaluate", "runs/quickstart/packed"]) == 1
        out = capsys.readouterr().out
        assert "DIFFERENT" in out
        assert json.loads(out.partition("--result\n")[2])["reproduced"] is False

    def test_evaluate_says_with_its_status_that_it_cannot(self, capsys):
        assert main(["evaluate", "org/nothing"]) == 2
        assert "error: reading org/nothing: there is no such repository" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        [
            ["runs/quickstart/packed", "--open-pr"],
            ["org/x", "--open-pr", "--max-samples", "5"],
            ["org/x", "--open-pr", "--revision", "v1"],
        ],
    )
    def test_what_cannot_be_proposed_is_said_before_it_is_measured(self, words, capsys, hub):
        assert main(["evaluate", *words]) == 2
        said = capsys.readouterr().err
        reasons = ("got a folder to open a pull request in", "expected one on all of them", "leave --revision out")
        assert any(reason in said for reason in reasons)
        assert not hub.requests

    def test_evaluate_of_a_pushed_model_proposes_what_it_measured(self, capsys, hub):
        assert main(["push", "runs/quickstart/packed", "org/net"]) == 0
        assert f"{hub.url}/org/net: 7 files in commit {hub.head('org/net')}" in capsys.readouterr().out
        card = hub.files("org/net")["README.md"].replace(
            b"  - type: accuracy\n      value: 0.", b"  - type: accuracy\n      value: 0.9"
        )
        hub.add_commit("org/net", {"README.md": card})
        assert main(["evaluate", "org/net", "--open-pr"]) == 1
        assert f"pull request: {hub.url}/org/net/discussions/1" in capsys.readouterr().out

    def test_push_again_says_that_all_is_there(self, capsys):
        for said in ("7 files in commit", "all of it is there already"):
            assert main(["push", "runs/quickstart/packed", "org/net"]) == 0
            assert said in capsys.readouterr().out

    def test_inspect_shows_scales_and_integers_of_a_folder_and_of_a_hub_id(self, capsys):
        assert main(["push", "runs/quickstart/packed", "org/net"]) == 0
        capsys.readouterr()
        tables = []
        for name in ("runs/quickstart/packed", "org/net"):
            assert main(["inspect", name]) == 0
            tables.append(capsys.readouterr().out.split("\n", 1)[1])
        assert tables[0] == tables[1]
        row = next(line for line in tables[0].splitlines() if line.startswith("blocks.1.0.conv_exp")).split()
        assert row[1:8] == ["64", "x", "16", "x", "3", "x", "3"]
        assert row[8:10] == ["3", "symmetric"]
        assert "of" in row
        assert "times smaller" in tables[0]

    def test_card_of_a_folder_without_one(self, capsys, tmp_path):
        (tmp_path / "empty").mkdir()
        assert main(["card", "empty"]) == 2
        assert "expected a packed checkpoint with its card" in capsys.readouterr().err

    @pytest.mark.parametrize("count", ["0", "-1", "many"])
    def test_count_that_is_none(self, count, capsys):
        with pytest.raises(SystemExit):
            main(["evaluate", "runs/quickstart/packed", "--max-samples", count])
        assert "expected a whole number of at least 1" in capsys.readouterr().err
