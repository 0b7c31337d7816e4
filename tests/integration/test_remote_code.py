"""The one file that a published repository carries: made from the package, and enough without it."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from hf_oscqat import pack
from hf_oscqat.integration import remote_code
from hf_oscqat.integration.remote_code import MODULES, TARGET, bundle


def test_file_in_the_package_is_what_its_modules_make_now():
    assert TARGET.read_text(encoding="utf-8") == bundle(), "run python -m hf_oscqat.integration.remote_code"


def test_file_needs_nothing_but_torch_timm_transformers_and_safetensors():
    tree = ast.parse(bundle())
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):  # what is tried may be missing: the package, to push with
            node.body = [ast.Pass() if isinstance(line, ast.ImportFrom) else line for line in node.body]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert outside <= {"torch", "timm", "transformers", "safetensors"}


def names_at_top_level(source):
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_file_has_every_definition_of_its_modules_constants_included():
    defined = names_at_top_level(bundle())
    assert "GRADIENT_ESTIMATORS" in defined
    for module in MODULES:
        assert names_at_top_level(remote_code._source(module)) <= defined, module


def test_name_that_two_modules_define_is_an_error(monkeypatch):
    twice = (*MODULES, "hf_oscqat.integration.modeling_oscqat")
    monkeypatch.setattr(remote_code, "MODULES", twice)
    with pytest.raises(ValueError, match="expected one name once"):
        bundle()


SCRIPT = """
import json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_oscqat":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

good, bad, again = sys.argv[1:4]
x = load_file(good + "/../reference.safetensors")["pixel_values"]
report = {}

def error_of(function):
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]

load = AutoModelForImageClassification.from_pretrained
with torch.no_grad():
    report["without"] = error_of(lambda: AutoModel.from_pretrained(good))
    report["without_head"] = error_of(lambda: load(good))
    report["corrupted"] = error_of(lambda: load(bad, trust_remote_code=True))
    model = load(good, trust_remote_code=True)
    report["logits"] = model(x).logits.tolist()
    report["kept_packed"] = model.keep_packed()(x).logits.tolist()
    features = AutoModel.from_pretrained(good, trust_remote_code=True)(x).last_hidden_state
    report["features"] = features.double().sum().item()
    model.save_pretrained(again)
    image = Image.new("RGB", (200, 180), (200, 40, 90))
    processor = AutoImageProcessor.from_pretrained(good)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    report["pixels"] = list(pixels.shape)
    report["expected"] = model(pixels).logits.softmax(-1)[0].tolist()
    classify = pipeline("image-classification", model=good, trust_remote_code=True)
    report["scores"] = {entry["label"]: entry["score"] for entry in classify(image, top_k=5)}
report["imported"] = [name for name in sys.modules if name.split(".")[0] == "hf_oscqat"]
Path(sys.argv[4]).write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def published(make_prepared_wrapper, pixel_values, tmp_path_factory):
    """A packed checkpoint on disk, the model it was made from, and what a process without the package makes of it."""
    model = make_prepared_wrapper(
        weight_bits=3,
        weight_granularity="per_channel",
        activation_scheme="asymmetric",
        range_estimator="minmax",
    )
    # The process is slow to start: the workers of pytest-xdist share one.
    shared = tmp_path_factory.getbasetemp()
    root = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "published"
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "report.json").exists():
            run_without_the_package(model, pixel_values, root)
    return root, model, json.loads((root / "report.json").read_text(encoding="utf-8"))


def run_without_the_package(model, pixel_values, root):
    pack(model).save_pretrained(root / "good")
    pack(model).save_pretrained(root / "bad")
    weights = root / "bad" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    at = 8 + int.from_bytes(content[:8], "little")
    offset = json.loads(content[8:at])["timm_model.conv_stem.weight_packed"]["data_offsets"][0]
    content[at + offset] ^= 1
    weights.write_bytes(content)
    save_file({"pixel_values": pixel_values}, root / "reference.safetensors")
    arguments = [str(root / name) for name in ("good", "bad", "again", "report.json")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


class TestWithoutThePackage:
    def test_it_was_not_imported(self, published):
        assert published[2]["imported"] == []

    @pytest.mark.parametrize("key", ["without", "without_head"])
    def test_loading_ends_in_the_request_for_trust_remote_code(self, published, key):
        kind, message = published[2][key]
        assert kind == "ValueError"
        assert "trust_remote_code=True" in message

    def test_logits_are_equal(self, published, pixel_values):
        _, model, report = published
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(report["logits"]), model(pixel_values).logits, rtol=0, atol=1e-6)

    def test_kept_packed_logits_are_the_same(self, published):
        assert published[2]["kept_packed"] == published[2]["logits"]

    def test_features_of_the_headless_model_are_equal(self, published, pixel_values):
        _, model, report = published
        with torch.no_grad():
            expected = model.timm_model.forward_features(pixel_values).double().sum().item()
        assert report["features"] == pytest.approx(expected, rel=1e-5)

    def test_altered_file_is_refused_by_name(self, published):
        kind, message = published[2]["corrupted"]
        assert kind == "CheckpointError"
        assert "timm_model.conv_stem.weight_packed" in message

    def test_processor_and_pipeline_work(self, published):
        report = published[2]
        assert report["pixels"] == [1, 3, 160, 160]
        assert report["scores"] == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(report["expected"])}, abs=1e-5)

    def test_saved_again_it_is_the_same_repository(self, published):
        root = published[0]
        for name in ("config.json", "modeling_oscqat.py"):
            assert (root / "again" / name).read_bytes() == (root / "good" / name).read_bytes(), name
        first, second = (load_file(root / folder / "model.safetensors") for folder in ("good", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_repository_carries_the_file_and_points_at_it(published):
    good = published[0] / "good"
    assert (good / "modeling_oscqat.py").read_text(encoding="utf-8") == bundle()
    config = json.loads((good / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "modeling_oscqat.OscQATTimmConfig",
        "AutoModel": "modeling_oscqat.OscQATTimmModel",
        "AutoModelForImageClassification": "modeling_oscqat.OscQATTimmForImageClassification",
    }
    assert load_file(good / "model.safetensors")
