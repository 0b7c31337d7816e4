"""Loading by name, as whoever downloads a model does it: what works, and what of a bad repository is refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModel, AutoModelForImageClassification

from hf_oscqat.checkpoint import CheckpointError
from hf_oscqat.hub.push import push_folder
from hf_oscqat.integration.verify import verify

REPO = "org/mbv2-w4a4-osc"


def load(name=REPO, **options):
    return AutoModelForImageClassification.from_pretrained(name, **options)


class TestWithThePackage:
    def test_same_logits_with_and_without_head(self, hub, folder, pixel_values):
        push_folder(folder, REPO)
        here = load(folder)
        with torch.no_grad():
            assert torch.equal(load()(pixel_values).logits, here(pixel_values).logits)
            features = AutoModel.from_pretrained(REPO)(pixel_values).last_hidden_state
            assert torch.equal(features, here.timm_model.forward_features(pixel_values))

    def test_at_a_revision(self, hub, folder):
        commit = push_folder(folder, REPO).commit
        HfApi().create_tag(REPO, tag="v1.0")
        hub.add_commit(REPO, {"model.safetensors": b"broken"})
        for revision in (commit, "v1.0"):
            assert load(revision=revision)
        with pytest.raises(CheckpointError):
            load()

    def test_gated_and_private_with_a_token(self, hub, folder, tmp_path):
        for options in ({"gated": True}, {"private": True}):
            hub.create(REPO, {p.name: p.read_bytes() for p in folder.iterdir()}, **options)
            load(token="hf_write", cache_dir=tmp_path / "may")
            with pytest.raises(OSError, match=r"gated repo|not a valid model identifier"):
                load(token="hf_other", cache_dir=tmp_path / f"may not, {options}")

    def test_connection_cut_in_the_download(self, hub, folder, pixel_values):
        push_folder(folder, REPO)
        hub.fail("GET", r"/cdn/.*model\.safetensors", cut=20_000)
        with torch.no_grad():
            assert torch.equal(load()(pixel_values).logits, load(folder)(pixel_values).logits)


SCRIPT = """
import json, os, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_oscqat":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

report = {}
images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
for name, kwargs in {"without": {}, "with": {"trust_remote_code": True}}.items():
    try:
        model = AutoModelForImageClassification.from_pretrained(sys.argv[1], **kwargs)
        with torch.no_grad():
            report[name] = model(images).logits.tolist()
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"
if "headless" in sys.argv:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
    report["classes"] = len(classify(Image.new("RGB", (40, 30)), top_k=5))
try:
    model.push_to_hub("org/other")
except Exception as error:
    report["push"] = f"{type(error).__name__}: {error}"
sys.stderr.write("\\n" + json.dumps(report))
"""


def without_the_package(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, REPO, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stderr.splitlines()[-1])


def test_without_the_package_by_name_and_then_offline_from_the_cache(hub, folder):
    push_folder(folder, REPO)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        expected = load(folder)(images).logits
    online = without_the_package("headless")
    requests = len(hub.requests)
    offline = without_the_package(HF_HUB_OFFLINE="1")
    assert len(hub.requests) == requests
    for report in (online, offline):
        assert "trust_remote_code=True" in report["without"]
        torch.testing.assert_close(torch.tensor(report["with"]), expected, rtol=0, atol=1e-6)
        assert report["push"].startswith("ImportError: pushing a packed model needs its package")
    assert online["classes"] == 5


class Payload:
    """A pickle that leaves a trace if anyone loads it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (Path(self.trace),)


def damaged(folder, damage, trace):
    """The files of a repository, one of them bad."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = files["model.safetensors"]
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    name = "timm_model.conv_stem.weight_packed"
    if damage == "truncated":
        weights = weights[:-100]
    elif damage == "header length":
        weights = (2**60).to_bytes(8, "little") + weights[8:]
    elif damage == "absurd shape":
        header[name]["shape"] = [2**45, 2**10]
        changed = json.dumps(header).encode()
        weights = len(changed).to_bytes(8, "little") + changed + weights[8 + length :]
    elif damage == "contradicting config":
        config = json.loads(files["config.json"])
        config["quantization_config"]["layers"]["timm_model.conv_stem"]["weight"]["bits"] = 4
        files["config.json"] = json.dumps(config).encode()
    elif damage == "absurd config":
        config = json.loads(files["config.json"])
        config["quantization_config"]["layers"]["timm_model.conv_stem"]["weight"]["shape"] = [2**40, 2**20, 3, 3]
        files["config.json"] = json.dumps(config).encode()
    elif damage == "pickle in its place":
        weights = pickle.dumps(Payload(trace))
    elif damage == "pickle instead":
        torch.save({name: Payload(trace)}, trace.with_suffix(".bin"))
        files["pytorch_model.bin"] = trace.with_suffix(".bin").read_bytes()
        del files["model.safetensors"]
        return files
    files["model.safetensors"] = weights
    return files


DAMAGES = [
    "truncated", "header length", "absurd shape", "contradicting config", "absurd config", "pickle in its place",
    "pickle instead",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_repository_is_refused_and_nothing_in_it_runs(hub, folder, tmp_path, damage):
    trace = tmp_path / "trace"
    hub.create(REPO, damaged(folder, damage, trace))
    with pytest.raises(ValueError, match=r"expected|got") as loading:
        load()
    with pytest.raises(ValueError, match=r"expected|got"):
        verify(REPO, device="cpu", show_progress=False)
    assert isinstance(loading.value, CheckpointError)
    assert not trace.exists()
