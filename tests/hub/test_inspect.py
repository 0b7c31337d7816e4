"""Looking into a packed checkpoint, on disk and on the Hub, without loading it."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_oscqat.checkpoint import CheckpointError
from hf_oscqat.hub.client import HubError
from hf_oscqat.hub.inspect import inspect_packed
from hf_oscqat.hub.push import push_folder
from hf_oscqat.quantization.packing import unpack_bits

REPO = "org/mbv2-w4a4-osc"


def test_rows_are_what_the_tensors_say(digits_folder):
    found = inspect_packed(str(digits_folder))
    tensors = load_file(digits_folder / "model.safetensors")
    rows = {row.name: row for row in found.rows}
    assert rows.keys() == {
        n.removesuffix(".weight_packed").removeprefix("timm_model.") for n in tensors if "packed" in n
    }
    row = rows["blocks.1.0.conv_exp"]
    assert (row.weight.bits, row.weight.scheme, row.input.bits) == (3, "symmetric", 4)
    own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith("timm_model.blocks.1.0.conv_exp.")}
    assert row.scale == (own["weight_scale"].item(),) * 2
    count = row.parameters // own["weight_packed"].shape[0]
    assert row.used == unpack_bits(own["weight_packed"], 3, count).unique().numel()
    assert row.bytes == sum(t.numel() * t.element_size() for t in own.values())
    assert rows["conv_stem"].weight.bits == 8


def test_totals_are_those_of_the_file(digits_folder):
    found = inspect_packed(str(digits_folder))
    tensors = load_file(digits_folder / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.float_bytes + sum(row.bytes for row in found.rows) == size
    assert found.file_bytes == (digits_folder / "model.safetensors").stat().st_size
    sizes = json.loads((digits_folder / "results.json").read_text())["bytes"]
    assert found.float_bytes + 4 * sum(row.parameters for row in found.rows) == sizes["float"]


def test_statistics_are_no_parameters(digits_folder):
    found = inspect_packed(str(digits_folder))
    model = AutoModelForImageClassification.from_pretrained(digits_folder)
    assert found.float_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_has_no_revision(digits_folder):
    with pytest.raises(ValueError, match=r"got revision 'v1' of .*, a folder, which has none"):
        inspect_packed(str(digits_folder), revision="v1")


def test_on_the_hub_it_is_the_same_by_ranges(hub, folder):
    commit = push_folder(folder, REPO).commit
    hub.requests.clear()
    found = inspect_packed(REPO)
    here = inspect_packed(str(folder))
    assert found.name == f"{REPO}, commit {commit}"
    assert (found.rows, found.file_bytes) == (here.rows, here.file_bytes)
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and asked]
    assert 3 <= len(ranges) <= 8
    whole = [path for method, path, asked in hub.requests if method == "GET" and "safetensors" in path and not asked]
    assert not whole


def test_at_an_older_revision(hub, folder):
    old = push_folder(folder, REPO).commit
    hub.add_commit(REPO, {"model.safetensors": b"broken"})
    with pytest.raises(CheckpointError):
        inspect_packed(REPO)
    assert inspect_packed(REPO, revision=old).rows


def test_sharded_file(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    shards, whole = inspect_packed(str(tmp_path / "shards")), inspect_packed(str(folder))
    assert {row.name: row for row in shards.rows} == {row.name: row for row in whole.rows}
    assert shards.float_parameters == whole.float_parameters


def test_saving_one_file_over_shards_leaves_none_of_them(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "modeling_oscqat.py",
    }


def test_saving_leaves_files_that_are_not_its_own(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "ema.safetensors").write_bytes(b"mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ema.safetensors").read_bytes() == b"mine"


class TestRefused:
    def test_folder_around_it_is_told_where_it_is(self, folder):
        with pytest.raises(CheckpointError, match=f"you may mean {folder}"):
            inspect_packed(str(folder.parent))

    def test_missing_repository(self, hub):
        with pytest.raises(HubError, match="looking at org/nothing: there is no such repository, or it is private"):
            inspect_packed("org/nothing")

    def test_gated_repository_names_the_page(self, hub, folder):
        hub.create("alice/secret", {"model.safetensors": b"x" * 100}, gated=True)
        with pytest.raises(HubError, match=f"it is gated; ask for access on {hub.url}/alice/secret"):
            inspect_packed("alice/secret", token="hf_other")

    def test_repository_without_weights(self, hub):
        hub.create(REPO, {"config.json": b"{}"})
        with pytest.raises(CheckpointError, match=r"without model\.safetensors, expected a packed checkpoint"):
            inspect_packed(REPO)

    @pytest.mark.parametrize("names", [[], ["../x.safetensors"], ["x.bin"], [3]])
    def test_index_that_leads_elsewhere(self, folder, names):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="got an model"):
            inspect_packed(str(folder))

    def test_float_checkpoint(self, folder, make_wrapper):
        shutil.rmtree(folder)
        make_wrapper().save_pretrained(folder)
        with pytest.raises(CheckpointError, match="without readable 'oscqat' metadata"):
            inspect_packed(str(folder))
