"""Other libraries at the same work, on digits: our own row, one that is missing, and one that was traced."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import bench, peers_accuracy
from benchmarks.peers import Prepared
from benchmarks.peers_accuracy import TracedModel, main
from hf_oscqat.quantization.kernels import fused_kernels
from hf_oscqat.quantization.layers import quantized_layers

DOCS = Path(__file__).parents[2] / "docs"
SMOKE = ["--dataset_name", "digits", "--budget", "smoke", "--max_eval_samples", "40", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    with fused_kernels(False):
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of the study, so that its float model is trained once."""
    return str(tmp_path_factory.mktemp("study"))


def missing(model, images, bits):
    import a_library_that_nobody_has  # noqa: F401


def eight_bits(model, images, bits):
    return Prepared(model, 8, "W8A8")


def diverging(model, images, bits):
    prepared = bench.ours(model, images, bits)
    model.register_forward_hook(lambda module, args, output: output * (float("nan") if module.training else 1))
    return prepared


@pytest.mark.parametrize("name", ["peers.json", "peers_10_epochs.json"])
def test_the_documented_rows_are_those_of_the_files(name):
    widths = json.loads((DOCS / "studies" / "cifar10" / name).read_text(encoding="utf-8"))["widths"]
    documented = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for page in (DOCS / "results.md", DOCS / "studies" / "cifar10.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rows = [row for record in widths.values() for row in record["rows"].values() if "before" in row]
    assert len(rows) >= 6
    for row in rows:
        low, high = (f"{1000 * seconds:.0f}" for seconds in row["step_quartiles_s"])
        assert [
            f"{row['before']:.2f}",
            f"{row['after']:.2f}" if "after" in row else "",
            f"{row['loss']:.3f}",
            f"{1000 * row['step_median_s']:.0f} ({low} to {high})",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['state_dict_bytes']:,}",
            f"{row['packed_bytes']:,}" if "packed_bytes" in row else "",
            row["trains"],
        ] in documented


def test_rows_are_trained_or_say_why_not(study, tmp_path, capsys, monkeypatch):
    for name, prepare in (("absent", missing), ("wider", eight_bits)):
        monkeypatch.setitem(peers_accuracy.ROWS, name, bench.Row(prepare))
    path = tmp_path / "made" / "peers.json"
    options = [*SMOKE, "--output_dir", study, "--json", str(path), "--rows", "lsq", "absent", "wider"]
    main([*options, "--bits", "3"])
    found = main([*options, "--bits", "4", "--scale_learning_rates", "1e-5"])
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert list(found["widths"]) == ["3", "4"]
    rows = found["widths"]["3"]["rows"]
    assert list(rows) == ["lsq, 1e-05", "lsq, 0.001", "absent", "wider"]
    assert rows["absent"]["reason"] == "not installed: No module named 'a_library_that_nobody_has'"
    assert rows["wider"]["reason"] == "it trains W8A8, not W3A3"
    assert list(found["widths"]["4"]["rows"]) == ["lsq, 1e-05", "absent", "wider"]
    for row in (rows["lsq, 1e-05"], rows["lsq, 0.001"]):
        assert row["steps"] == row["history"][-1]["step"] == 4
        assert 0 <= row["before"] <= 100 >= row["after"] >= 0
        assert 0 < row["packed_bytes"] < row["state_dict_bytes"]
        assert row["step_median_s"] > 0 < row["peak_bytes"]
    run = rows["lsq, 1e-05"]["run"]
    assert run["command"].startswith("python training/benchmarks/peers_accuracy.py --dataset_name digits")
    assert (found["widths"]["3"]["test_images"], run["machine"]["threads"]) == (40, 1)
    out = capsys.readouterr().out
    assert "not run: it trains W8A8, not W3A3" in out
    assert f"{rows['lsq, 0.001']['state_dict_bytes']:,}" in out


def test_rows_join_those_that_they_compare_with(study, tmp_path, monkeypatch):
    monkeypatch.setitem(peers_accuracy.ROWS, "absent", bench.Row(missing))
    path = tmp_path / "peers.json"
    options = [*SMOKE, "--output_dir", study, "--json", str(path), "--bits", "3", "--scale_learning_rates", "1e-5"]
    first = main([*options, "--rows", "lsq"])["widths"]["3"]["rows"]
    both = main([*options, "--rows", "absent"])["widths"]["3"]["rows"]
    assert both == first | {"absent": both["absent"]}
    assert both["absent"]["run"]["command"] != both["lsq, 1e-05"]["run"]["command"]
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"with W3A3 of another epochs, threads, expected rows to compare .* another --json"
    ):
        main([*options, "--rows", "absent", "--epochs", "3", "--threads", "2"])
    assert path.read_bytes() == before


def test_what_was_measured_stays_and_takes_the_place_of_what_could_not_run():
    done, failed = {"before": 1.0}, {"reason": "not installed"}
    joined = peers_accuracy._joined
    assert joined({"a": failed}, {"a, 1e-05": done}) == {"a, 1e-05": done}
    assert joined({"a, 1e-05": done}, {"a": failed}) == {"a, 1e-05": done}
    assert joined({"b": done}, {"b": failed}) == {"b": done}
    assert joined({"b": failed}, {"b": done}) == {"b": done}
    assert joined({"c, 1e-05": done}, {"c, 0.001": failed}) == {"c, 1e-05": done, "c, 0.001": failed}, "it diverged"
    assert joined({"d": {"before": 1.0}}, {"d": {"before": 2.0}}) == {"d": {"before": 2.0}}


def test_a_row_that_diverges_leaves_the_others(study, monkeypatch):
    monkeypatch.setitem(peers_accuracy.ROWS, "nan", bench.Row(diverging))
    monkeypatch.setattr(bench, "_check_gradients", lambda contender: None)
    options = [*SMOKE, "--output_dir", study, "--bits", "3", "--scale_learning_rates", "1e-5"]
    rows = main([*options, "--rows", "nan", "lsq"])["widths"]["3"]["rows"]
    assert "it diverged" in rows["nan, 1e-05"]["reason"]
    assert rows["lsq, 1e-05"]["steps"] == 4


def test_a_traced_model_evaluates_with_its_statistics_and_takes_any_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(3))
            self.register_buffer("var", torch.full((3,), 4.0))

        def forward(self, x):
            return nn.functional.batch_norm(x, self.mean, self.var, training=True).mean((2, 3))

    x = torch.randn(5, 3, 2, 2)
    model = TracedModel(torch.fx.symbolic_trace(Net()), batch_size=2)
    assert model(x[:2]).mean(0).abs().max() < 1e-6
    model.eval()
    mean, var = model.graph.mean.clone(), model.graph.var.clone()
    expected = nn.functional.batch_norm(x, mean, var).mean((2, 3))
    torch.testing.assert_close(model(x), expected)
    assert model.graph.mean.equal(mean)
    model.train()
    assert model(x[:2]).mean(0).abs().max() < 1e-6


def test_options_are_checked(study):
    for options, match in (
        (["--bits", "9"], "widths from 2 to 8"),
        (["--rows", "nobody"], "--rows"),
        (["--budget", "none"], "--budget"),
    ):
        with pytest.raises(ValueError, match=match):
            main([*SMOKE, "--output_dir", study, *options])


@pytest.mark.parametrize(("name", "ends"), [("lsq", 8), ("lsq-every-layer", 3)])
def test_rows_of_this_package_differ_in_the_width_of_the_ends(name, ends):
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=10)
    prepared = peers_accuracy.ROWS[name].prepare(net, torch.randn(4, 3, 32, 32), 3)
    widths = [layer.weight_quantizer.num_bits for _, layer in quantized_layers(prepared.model)]
    assert (widths[0], widths[-1], set(widths[1:-1])) == (ends, ends, {3})
    assert prepared.trains.endswith(f"ends at {ends} bits")


of_brevitas = pytest.mark.filterwarnings("ignore")  # brevitas warns of itself on import


@of_brevitas
@pytest.mark.parametrize(("name", "ends"), [("brevitas", 3), ("brevitas-ends-8", 8)])
def test_rows_of_brevitas_differ_in_the_width_of_the_ends(name, ends):
    pytest.importorskip("brevitas", reason="pip install -e .[bench]")
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)])
    prepared = peers_accuracy.ROWS[name].prepare(net, torch.randn(4, 3, 8, 8), 3)
    layers = list(prepared.model)
    assert [int(layer.weight_quant.bit_width()) for layer in layers] == [ends, 3, 3, ends]
    assert layers[0].input_quant.is_quant_enabled == (name == "brevitas")
    assert all(layer.input_quant.is_quant_enabled for layer in layers[1:])


@of_brevitas
@pytest.mark.parametrize("name", ["brevitas", "brevitas-ends-8"])
def test_brevitas_has_unsigned_inputs_where_none_is_negative(name):
    pytest.importorskip("brevitas", reason="pip install -e .[bench]")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    layers = peers_accuracy.ROWS[name].prepare(net, torch.randn(4, 3, 8, 8), 3).model
    signs = [layers[i].input_quant.is_signed for i in (1, 3, 4)]
    assert signs == [True, False, True]
