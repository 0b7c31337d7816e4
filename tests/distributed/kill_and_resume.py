"""Kill a run at random moments, start it again each time, and compare its end with that of an undisturbed run.

    python tests/distributed/kill_and_resume.py --kills 30 --processes 1 FOLDER

The run trains the digits with augmentation, two worker processes, evaluation, re-estimation and a checkpoint every few
steps. What a run leaves behind is compared bit for bit: weights, scales, statistics, frozen integers and batch-norm
statistics of `qat`, the packed file with its metadata, optimizer, scheduler and generators of the last checkpoint, and
the accuracies. Logged losses are not: an entry after a restart averages over the steps since the restart.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from launching import REPOSITORY, command, environment
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from hf_oscqat.integration.checkpoints import checkpoints, what_is_wrong

logger = logging.getLogger("kill_and_resume")

SETTINGS = [
    "--dataset_name", "digits", "--model_name_or_path", "test_efficientnet", "--img_size", "32",
    "--model_license", "mit",
    "--max_train_samples", "200", "--max_eval_samples", "64", "--per_device_train_batch_size", "8",
    "--max_steps", "60", "--logging_steps", "5", "--save_strategy", "steps", "--save_steps", "7",
    "--save_total_limit", "2", "--eval_strategy", "steps", "--eval_steps", "20", "--dataloader_num_workers", "2",
    "--report_to", "none", "--disable_tqdm", "true", "--calibration_batches", "2", "--use_cpu", "true",
    "--learning_rate", "0.02", "--scale_learning_rate", "1e-3", "--quantization.batchnorm_reestimation_batches", "4",
    "--quantization.freezing.momentum", "0.05", "--quantization.freezing.threshold", "0.06",
    "--quantization.freezing.threshold_final", "0.06", "--quantization.freezing.anneal_start", "0",
    "--seed", "1", "--max_grad_norm", "1",
]  # fmt: skip


def start(folder: Path, processes: int, log: Path) -> "subprocess.Popen[bytes]":
    """Start the run in a process group of its own."""
    script = REPOSITORY / "training" / "run_qat.py"
    arguments = [*SETTINGS, "--output_dir", str(folder)]
    line = command(script, *arguments) if processes > 1 else [sys.executable, str(script), *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(line, env=environment(), stdout=output, stderr=output, start_new_session=True)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it has started; a launcher's workers would go on without it."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(processes, timeout=60)


def finish(folder: Path, processes: int, log: Path) -> float:
    """Run to the end; return the seconds it took.

    Raises:
        RuntimeError: with the end of the log, if it fails.
    """
    began = time.monotonic()
    if start(folder, processes, log).wait() != 0:
        raise RuntimeError(log.read_text(encoding="utf-8")[-4000:])
    return time.monotonic() - began


def left_behind(folder: Path) -> dict[str, Any]:
    """Digest of each thing that a finished run left."""
    found: dict[str, Any] = {}
    last = checkpoints(folder)[0]
    found["checkpoint"] = last.name
    found["config"] = json.loads((folder / "qat" / "config.json").read_text(encoding="utf-8"))
    for place in (folder / "qat", folder / "packed", last):
        # Not by the bytes of the file: safetensors puts the entries of its metadata in any order.
        with safe_open(place / "model.safetensors", "pt") as file:
            content = {name: _digest(file.get_tensor(name)) for name in file.keys()}
            found["weights of " + place.name] = content | (file.metadata() or {})
    for file in sorted(last.glob("*.pt*")):
        with safe_globals():
            found[file.name] = _digest(torch.load(file, weights_only=True))
    found["accuracy"] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["accuracy"]
    for measured in found["accuracy"].values():
        measured.pop("images_per_second", None)
    return found


def _digest(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): _digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_digest(item) for item in value]
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else value


def assert_loadable(folder: Path) -> None:
    """Check that what is in its place is whole: every checkpoint, and `qat` and `packed` once they are there.

    Raises:
        AssertionError: if not.
    """
    for checkpoint in checkpoints(folder):
        problem = what_is_wrong(checkpoint)
        assert problem is None, (checkpoint, problem)
    needed = {"qat": ["config.json", "model.safetensors"], "packed": ["config.json", "model.safetensors", "README.md"]}
    for name, files in needed.items():
        if (folder / name).exists():
            assert all((folder / name / file).stat().st_size > 0 for file in files), name


def disturb(folder: Path, processes: int, kills: int, seconds: float, seed: int, log: Path) -> list[float]:
    """Kill the run so many times at random moments, starting a new run whenever one ends before its time.

    Returns:
        The moments, seconds after each start.
    """
    chance = random.Random(seed)
    moments = []
    while len(moments) < kills:
        moment = chance.uniform(0.3 * seconds, 1.05 * seconds)
        process = start(folder, processes, log)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            moments.append(round(moment, 2))
            there = ", ".join(path.name for path in checkpoints(folder)) or "nothing"
            logger.info("killed after %.1f s; %s there", moment, there)
            assert_loadable(folder)
            continue
        assert process.returncode == 0, log.read_text(encoding="utf-8")[-4000:]
        return moments
    return moments


def main() -> None:
    """Run everything and say what was found.

    Raises:
        SystemExit: with code 1, if a disturbed run ended differently.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"
    seconds = finish(options.folder / "undisturbed", options.processes, log)
    expected = left_behind(options.folder / "undisturbed")
    logger.info("undisturbed: %.1f s", seconds)
    killed, runs = 0, 0
    while killed < options.kills:
        folder = options.folder / f"disturbed-{runs}"
        moments = disturb(folder, options.processes, options.kills - killed, seconds, options.seed + runs, log)
        finish(folder, options.processes, log)
        killed, runs = killed + len(moments), runs + 1
        found = left_behind(folder)
        differ = [name for name in expected if found.get(name) != expected[name]]
        logger.info("run %d: %d kills, %d so far; differs in: %s", runs, len(moments), killed, differ or "nothing")
        if differ or found.keys() != expected.keys():
            raise SystemExit(1)
    logger.info(
        "%d kills in %d runs of %d process(es): every end equals the undisturbed one", killed, runs, options.processes
    )


if __name__ == "__main__":
    main()
