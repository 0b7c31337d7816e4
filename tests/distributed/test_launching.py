"""Each shipped launch configuration starts what it says, here with as many processes as a machine without GPUs has."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY, command, environment, run

CONFIGS = REPOSITORY / "training" / "accelerate"
COUNT = """
import json, sys
from pathlib import Path
from hf_oscqat import OscQATTrainingArguments
from accelerate import PartialState
args = OscQATTrainingArguments(output_dir=sys.argv[1], report_to="none", use_cpu=True)
Path(sys.argv[1], f"{args.process_index}.json").write_text(json.dumps([args.world_size, args.process_index]))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "count.py"
    path.write_text(COUNT)
    return path


def options_before(script, line, *options):
    place = line.index(str(script))
    return [*line[:place], *options, *line[place:]]


def counted(folder):
    return sorted(json.loads(path.read_text()) for path in folder.glob("*.json"))


def test_these_are_all_configurations():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"cpu_2proc", "single_gpu", "multi_gpu", "multi_node"}


@pytest.mark.parametrize(("config", "processes"), [("single_gpu", 1), ("cpu_2proc", 2), ("multi_gpu", 2)])
def test_configuration_starts(script, tmp_path, config, processes):
    line = options_before(script, command(script, str(tmp_path), config=config), "--num_processes", str(processes))
    run(line, tmp_path)
    assert counted(tmp_path) == [[processes, rank] for rank in range(processes)]


def test_several_machines(script, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    processes = []
    for rank in range(2):
        line = command(script, str(tmp_path), config="multi_node")
        line[line.index("--main_process_port") + 1] = str(port)
        line = options_before(script, line, *shared, "--machine_rank", str(rank))
        processes.append(subprocess.Popen(line, env=environment(), cwd=tmp_path))
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert counted(tmp_path) == [[2, 0], [2, 1]]


@pytest.mark.parametrize("how", ["--cpu", "a configuration with MULTI_CPU"])
def test_launch_that_silently_starts_one_process_is_an_error(tmp_path, how):
    options = ["--cpu", "--num_processes", "2"]
    if how != "--cpu":
        config = yaml.safe_load((CONFIGS / "cpu_2proc.yaml").read_text()) | {"distributed_type": "MULTI_CPU"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        options = ["--config_file", str(tmp_path / "config.yaml")]
    arguments = [str(REPOSITORY / "training" / "run_qat.py"), "--dataset_name", "digits", "--output_dir", "run"]
    line = [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]
    output = run(line, tmp_path, expected=1)
    assert "got one process from a launcher that was told to start 2" in output
    assert not Path(tmp_path, "run").exists()
