"""The shipped launch configuration really starts two processes, which stay together."""

import json
from pathlib import Path

from launching import launch

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [
    "--dataset_name", "digits", "--model_name_or_path", "test_efficientnet", "--img_size", "32",
    "--model_license", "mit",
    "--max_train_samples", "64", "--max_eval_samples", "30", "--per_device_train_batch_size", "8", "--max_steps", "3",
    "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--calibration_batches", "1",
    "--quantization.batchnorm_reestimation_batches", "2", "--quantization.freezing.momentum", "0.01",
]  # fmt: skip


def test_run_qat_on_two_processes(tmp_path):
    launch(REPOSITORY / "training" / "run_qat.py", *SETTINGS, "--output_dir", str(tmp_path / "run"), cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["processes"] == 2
    assert results["accuracy"]["packed"]["num_images"] == 30


def test_one_process_that_goes_its_own_way_stops_all_and_sigterm_to_one_ends_all(tmp_path):
    launch(Path(__file__).with_name("disturb_one_rank.py"), str(tmp_path), cwd=tmp_path)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert "the same on all, in blocks.1.0.conv_exp." in report["error"]
        assert "at step 4" in report["error"]
        assert "at step 2, expected the same on all, in conv_stem" in report["grid_error"]
        assert report["code"] == 143
        assert report["step"] == 10
        assert report["checkpoints"] == ["checkpoint-10"]
        # One that outlives the interpreter aborts the process now and then.
        assert report["gloo_threads"] == [True, False]


def test_both_ranks_end_with_the_same_weights_scales_statistics_and_frozen_integers(tmp_path):
    launch(Path(__file__).with_name("train_and_report.py"), str(tmp_path), cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == 2
    assert first["frozen"] > 0
    assert first["signed"] == second["signed"]
    assert first["float_state"] == second["float_state"]
    assert max(first["batchnorm_difference"], second["batchnorm_difference"]) < 1e-6
    assert {name for name in first["state"] if first["state"][name] != second["state"][name]} <= {
        name for name in first["state"] if name.endswith("num_batches_tracked")
    }
