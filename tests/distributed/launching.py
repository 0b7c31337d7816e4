"""Start a script as its users do: through accelerate, with a shipped configuration."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def command(script: Path, *arguments: str, config: str = "cpu_2proc") -> list[str]:
    """The command line that starts a script with `training/accelerate/<config>.yaml`."""
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(REPOSITORY / "training" / "accelerate" / f"{config}.yaml"), "--main_process_port", "0",
        str(script), *arguments,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Ours, for two processes on two cores and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}


def run(arguments: list[str], cwd: Path, expected: int = 0) -> str:
    """Run a command line and return all that it printed.

    Raises:
        AssertionError: with the output, if it ends with another code than expected.
    """
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=500, check=False, cwd=cwd
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def launch(script: Path, *arguments: str, cwd: Path) -> str:
    """Run a script on two processes through the shipped configuration."""
    return run(command(script, *arguments), cwd)
