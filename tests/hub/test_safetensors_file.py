"""Headers of files that cannot be trusted: nothing is allocated by them before they are checked."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hf_oscqat.checkpoint import CheckpointError
from hf_oscqat.hub.safetensors_file import LocalFile, read_header, read_tensors


@pytest.fixture
def path(tmp_path):
    tensors = {
        "a.weight": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "b.zero": torch.tensor([-3], dtype=torch.int8),
        "c.scale": torch.tensor([0.5, 0.25]),
        "d.half": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def with_header(path, change):
    """Write the file again with a header that `change` has altered, of any length."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def test_header_says_what_is_in_the_file(path):
    header = read_header(LocalFile(path))
    assert header.metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape, t.length) for name, t in header.tensors.items()} == {
        "a.weight": ("U8", (2, 3), 6),
        "b.zero": ("I8", (1,), 1),
        "c.scale": ("F32", (2,), 8),
        "d.half": ("BF16", (3,), 6),
    }


def test_tensors_are_read_together_and_in_their_shapes(path):
    file = LocalFile(path)
    reads = []
    read = file.read
    file.read = lambda start, length: reads.append((start, length)) or read(start, length)
    found = read_tensors(file, read_header(file).tensors, ["c.scale", "a.weight", "b.zero"])
    assert len(reads) == 3  # length, header, and one for all of them
    assert found["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found["b.zero"].tolist(), found["c.scale"].tolist()) == ([-3], [0.5, 0.25])


def test_tensors_far_apart_are_read_apart(path, monkeypatch):
    monkeypatch.setattr("hf_oscqat.hub.safetensors_file.READ_TOGETHER", 0)
    file = LocalFile(path)
    entries = read_header(file).tensors
    reads = []
    read = file.read
    file.read = lambda start, length: reads.append(length) or read(start, length)
    assert len(read_tensors(file, entries, ["a.weight", "c.scale"])) == 2
    assert sorted(reads) == [6, 8]


def test_truncated_file(path):
    content = path.read_bytes()
    for length in (0, 5, 8, 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="expected"):
            read_header(LocalFile(path))


def test_longer_file(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="by its header"):
        read_header(LocalFile(path))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_wrong_header_length(path, length):
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="with a header of"):
        read_header(LocalFile(path))


def test_pickle_in_its_place(path):
    path.write_bytes(pickle.dumps({"weight": list(range(1000))}))
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        read_header(LocalFile(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a.weight"].update(shape=[2**40, 2**40]),
        lambda header: header["a.weight"].update(shape=[-2, -3]),
        lambda header: header["a.weight"].update(shape=[2.0, 3]),
        lambda header: header["a.weight"].update(shape=[True, 6]),
        lambda header: header["a.weight"].update(shape="23"),
        lambda header: header["a.weight"].update(dtype="U128"),
        lambda header: header["a.weight"].update(data_offsets=[0, 2**60]),
        lambda header: header["a.weight"].update(data_offsets=[0]),
        lambda header: header["c.scale"].update(data_offsets=[1, 9]),
        lambda header: header["a.weight"].pop("shape"),
        lambda header: header.update({"e": 3}),
        lambda header: header.update({"__metadata__": {"format": 3}}),
        lambda header: header.update({"__metadata__": [1]}),
        lambda header: header.pop("b.zero"),
    ],
)
def test_absurd_entries(path, change):
    with_header(path, change)
    with pytest.raises(CheckpointError, match=r"got .*model\.safetensors"):
        read_header(LocalFile(path))


def test_header_that_is_no_json(path):
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"[" * (int.from_bytes(content[:8], "little")) + content[-21:])
    with pytest.raises(CheckpointError):
        read_header(LocalFile(path))
