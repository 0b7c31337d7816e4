"""The benchmark: its arithmetic, what it counts, and what a short run writes. Nothing here depends on a time."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from benchmarks import bench, show
from benchmarks.measure import bytes_kept_for_backward, memory_of, overhead, ratio, spread, take_turns
from benchmarks.peers import Prepared, Unavailable, plain, with_plain_batchnorm
from hf_oscqat.quantization.kernels import fused_kernels

CPU = torch.device("cpu")
TINY = ["--model", "test_efficientnet", "--img-size", "32", "--batch-size", "2", "--repeats", "1", "--warmup", "1"]
TINY += ["--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Compile nothing, and fake-quantize few values."""
    monkeypatch.setitem(bench.ACTIVATION, "cpu", (2, 3, 4, 4))
    with fused_kernels(False):
        yield


def unavailable(model, images, bits):
    raise Unavailable("it asks for a licence")


def missing(model, images, bits):
    import a_library_that_nobody_has  # noqa: F401


def pretending(model, images, bits):
    return Prepared(model, bits, "nothing at all")


def hardly(model, images, bits):
    for parameter in model.parameters():
        parameter.data *= 1.5
    return Prepared(model, bits, "floats")


class Detached(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.model(x).detach()[:, :1]).expand(-1, 1000)


def cut_off(model, images, bits):
    return Prepared(Detached(model), None, "its last layer")


def test_ratio_and_overhead_are_taken_within_each_repeat():
    base, times = [1.0, 2.0, 4.0], [2.0, 5.0, 8.0]
    assert ratio(times, base) == (2.0, 2.0, 2.25)
    assert overhead(times, base) == (3.0, 2.0, 3.5)
    # A repeat that was slow for both changes nothing.
    assert overhead([1.1, 11.1, 1.1], [1.0, 11.0, 1.0]).median == pytest.approx(0.1)
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no measurements"):
        spread([])
    with pytest.raises(ValueError, match="argument 2"):
        ratio([1.0], [1.0, 2.0])


def test_every_repeat_starts_with_another_row():
    order = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 4, CPU)
    assert "".join(order) == "abcbcacababc"
    assert [len(taken) for taken in times.values()] == [4, 4, 4]


def test_overheads_of_made_up_times():
    rows = {
        "lsq": {"step_s": [1.0, 2.0, 3.0], "step_median_s": 2.0},
        "freeze": {"step_s": [1.5, 2.5, 4.0]},
        "dampen": {"reason": "broken"},
        "freeze-compiled": {"step_s": [1.0, 1.0, 1.0]},
    }
    assert bench.overheads(rows) == {"freeze": {"median_s": 0.5, "quartiles_s": [0.5, 0.75], "share": 0.25}}


def test_bytes_kept_for_backward_are_those_of_a_hand_count():
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 5))
    x = torch.randn(2, 4)

    def forward():
        return net(x).square().sum()

    forward().backward()
    # ReLU's output, which the second layer keeps too, and what is squared; x and the weights are there before.
    assert bytes_kept_for_backward(forward, CPU) == 4 * (2 * 3 + 2 * 5)


def test_memory_of_a_call():
    def call():
        held = torch.zeros(1000)
        passing = held.repeat(2)
        del passing
        return held

    memory = memory_of(call, CPU)
    assert memory.left == 4000
    assert 12000 <= memory.peak < 12100  # and the number that fills it


def test_distinct_values_leave_out_the_first_convolution():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(99.0, 0.0), nn.Conv2d(4, 2, 3), nn.Flatten())
    net[2].weight.data.fill_(1.0)
    net[2].weight.data[0, 0, 0, 0] = 2.0
    assert bench.distinct_values(net(torch.randn(2, 3, 8, 8))) == (2, 1)
    assert bench.distinct_values(nn.Linear(3, 2)(torch.randn(1, 3))) == (None, None)


def test_plain_is_on_the_grid():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    prepared = plain(net, torch.randn(2, 3, 8, 8), 3)
    output = prepared.model(torch.randn(2, 3, 8, 8))
    assert max(bench.distinct_values(output)) <= 8
    output.sum().backward()
    assert len(prepared.scales) == 5
    assert all(p.grad is not None for p in prepared.model.parameters())
    assert len(prepared.scales) + len(prepared.weights) == len(list(prepared.model.parameters()))


def test_a_short_run_writes_and_prints_what_it_promises(tmp_path, capsys, monkeypatch):
    broken = {"absent": missing, "refuses": unavailable, "pretends": pretending, "hardly": hardly, "cut": cut_off}
    for name, prepare in broken.items():
        monkeypatch.setitem(bench.ROWS, name, bench.Row(prepare))
    rows = ["lsq", "freeze", "dampen", *broken]
    path, picture = tmp_path / "made" / "bench.json", tmp_path / "bench.png"
    found = bench.main([*TINY, "--rows", *rows, "--json", str(path), "--picture", str(picture)])
    written = json.loads(path.read_text(encoding="utf-8"))["comparison"]
    assert written == json.loads(json.dumps(found["comparison"]))

    assert list(written["rows"]) == ["float", *rows]
    for name in ("float", "lsq", "freeze", "dampen"):
        row = written["rows"][name]
        assert len(row["step_s"]) == len(row["warmup_s"]) == 1
        assert row["step_median_s"] == row["step_s"][0]
        assert row["ratio_to_float"]["median"] == row["step_s"][0] / written["rows"]["float"]["step_s"][0]
        assert 0 < row["bytes_kept_for_backward"] < row["peak_bytes"]
        assert row["ours"] == (name != "float")
    assert written["rows"]["lsq"]["weight_values"] <= 16 < written["rows"]["float"]["weight_values"]
    assert written["rows"]["lsq"]["output_change"] > 0
    assert set(written["overheads"]) == {"freeze", "dampen"}
    assert written["rows"]["absent"] == {"reason": "not installed: No module named 'a_library_that_nobody_has'"}
    assert written["rows"]["refuses"] == {"reason": "it asks for a licence"}
    assert "does not quantize" in written["rows"]["pretends"]["reason"]
    assert "values, expected at most 16" in written["rows"]["hardly"]["reason"]
    assert "weights get no gradient" in written["rows"]["cut"]["reason"]
    assert written["bandwidth"]["shape"] == [2, 3, 4, 4]
    assert all(row["forward"] > 0 < row["backward"] for row in written["bandwidth"]["rows"].values())
    assert written["command"].startswith("python training/benchmarks/bench.py --model test_efficientnet")
    assert written["machine"]["threads"] == 1
    assert {"torch", "transformers", "timm"} <= set(written["versions"])
    assert written["settings"]["precision"] == "float32"
    assert picture.stat().st_size > 1000

    out = capsys.readouterr().out
    assert f"{1e3 * written['rows']['lsq']['step_median_s']:.1f}" in out
    assert "not run: it asks for a licence" in out


def test_a_sweep_is_added_to_what_the_file_has(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"comparison": "kept", "sweeps": {"width": "kept"}}), encoding="utf-8")
    bench.main([*TINY, "--sweep", "batch", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["comparison"] == written["sweeps"]["width"] == "kept"
    points = written["sweeps"]["batch"]["points"]
    assert list(points) == ["2", "4"]
    assert all(rows["lsq"]["ratio_to_float"]["median"] > 0 for rows in points.values())
    assert "along batch" in capsys.readouterr().out


def test_defaults_follow_the_device_and_files_the_machine(monkeypatch):
    settings, _ = bench.parse(["--device", "cuda"])
    assert (settings.batch_size, settings.img_size, settings.precision, settings.channels_last) == (
        256, 224, "bf16", True,
    )  # fmt: skip
    settings, _ = bench.parse(["--device", "cpu", "--img-size", "64", "--threads", "3"])
    assert (settings.batch_size, settings.img_size, settings.channels_last) == (32, 64, False)
    assert settings.rows == bench.DEFAULT_ROWS
    monkeypatch.setattr(bench, "_cpu_model", lambda: "Some(R) CPU @ 2.0GHz")
    assert bench._file(Path("docs/bench"), ".json", settings) == Path("docs/bench/some-r-cpu-2-0ghz-3-threads.json")
    assert bench._file(Path("a/b.json"), ".json", settings) == Path("a/b.json")
    assert {s.model for s in bench.variants("width", settings).values()} >= {"mobilenetv2_035", "mobilenetv2_140"}
    assert {s.img_size for s in bench.variants("resolution", settings).values()} == {64, 96, 128, 160}


def test_baselines_are_added():
    assert bench.with_baselines(("lsq",)) == ["float", "lsq"]
    assert bench.with_baselines(("lsq-compiled", "lsq")) == ["float", "float-compiled", "lsq", "lsq-compiled"]


def test_tables_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    show.show_table("Title", ("", "ms", "why"), [["float", "1.0", ""], ["peer", "", "not run: no"]])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "        ms  why",
        "float  1.0",
        "peer        not run: no",
    ]


def test_runs_without_datasets():
    code = "import sys; sys.modules['datasets'] = None; from benchmarks import bench; bench.parse([])"
    folder = Path(bench.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_batchnorm_is_taken_apart_without_changing_anything():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").train()
    images = torch.randn(4, 3, 32, 32)
    changed = with_plain_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(layer, BatchNormAct2d) for layer in changed.modules())
    assert torch.equal(changed(images), model(images))  # in training, so the statistics move in both
    assert torch.equal(changed.eval()(images), model.eval()(images))
    assert all(map(torch.equal, changed.buffers(), model.buffers()))
