"""The packed file: what its header says, and that nothing is believed which contradicts it."""

import base64
import copy
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_oscqat import CheckpointError, pack
from hf_oscqat.checkpoint import check_checkpoint, digest, header_metadata, layers_to_dict, packed_layers
from hf_oscqat.quantization.packed import LayerFormat, fill_packed, make_packed

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


def sha256(content):
    """As the header has it: base64 without padding."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def quantizer_tensors(tensors):
    return [name for name in tensors if name.split(".")[-1] in PARTS]


@pytest.fixture(scope="module")
def packed(make_prepared):
    """Every tensor of the contract occurs: per channel, zero-points of weights and inputs, a layer without input."""
    model = make_prepared(
        weight_bits=3,
        weight_granularity="per_channel",
        weight_scheme="asymmetric",
        activation_scheme="asymmetric",
        overrides={"pw": {"activation_bits": 3}},
    )
    return pack(model)


class File:
    """A packed checkpoint taken apart, to be written with something wrong in it."""

    def __init__(self, model):
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.content = json.loads(header_metadata(model)["oscqat"])
        self.layers = layers_to_dict(model)

    def rehash(self):
        """Make the header agree with the tensors again."""
        self.content["sha256"] = {
            layer: [digest(self.tensors[f"{layer}.{part}"]) for part in PARTS if f"{layer}.{part}" in self.tensors]
            for layer in self.content["sha256"]
        }

    def write(self, path):
        save_file(self.tensors, path, metadata={"format": "pt", "oscqat": json.dumps(self.content)})
        return path


@pytest.fixture
def file(packed):
    return File(packed)


class TestHeader:
    def test_metadata_of_a_layer_by_hand(self):
        data = {
            "weight": {"bits": 3, "qmin": -4, "qmax": 3, "granularity": "per_tensor", "shape": [2, 3]},
            "input": {"bits": 4, "qmin": 0, "qmax": 15, "granularity": "per_tensor", "shape": [1]},
        }
        layer = make_packed(nn.Linear(3, 2), LayerFormat.from_dict("0", data))
        integers = torch.tensor([[-4, 3, 0], [1, -1, 2]])
        fill_packed(
            layer, {"weight_int": integers, "weight_scale": torch.ones(1), "input_scale": torch.full((1,), 2.0)}
        )
        # integers + 4: 0 7 4 and 5 3 6; three bits each, least significant first: 000 111 001(0000000), 101 110 011
        written = [bytes([0b00111000, 0b1, 0b10011101, 0b1]), b"\x00\x00\x80\x3f", b"\x00\x00\x00\x40"]
        metadata = header_metadata(nn.Sequential(layer))
        assert list(metadata) == ["oscqat"]
        assert json.loads(metadata["oscqat"]) == {
            "format_version": 1,
            "layers": {"0": data},
            "sha256": {"0": [sha256(content) for content in written]},
        }

    def test_every_quantizer_tensor_has_a_digest_in_the_order_of_the_contract(self, packed):
        state = packed.state_dict()
        expected = {
            layer: [digest(state[f"{layer}.{part}"]) for part in PARTS if f"{layer}.{part}" in state]
            for layer in ("stem", "dw", "pw", "head")
        }
        assert [len(digests) for digests in expected.values()] == [3, 5, 5, 5]
        assert json.loads(header_metadata(packed)["oscqat"])["sha256"] == expected

    def test_grids_say_what_the_contract_asks_for(self, packed):
        assert layers_to_dict(packed)["pw"] == {
            "weight": {
                "bits": 3,
                "qmin": 0,
                "qmax": 7,
                "granularity": "per_channel",
                "scheme": "asymmetric",
                "shape": [6, 8, 1, 1],
            },
            "input": {
                "bits": 3,
                "qmin": 0,
                "qmax": 7,
                "granularity": "per_tensor",
                "scheme": "asymmetric",
                "shape": [1],
            },
        }
        assert layers_to_dict(packed)["stem"]["input"] is None

    def test_metadata_is_read_without_loading_a_tensor(self, file, tmp_path):
        path = file.write(tmp_path / "model.safetensors")
        with safe_open(path, "pt") as opened:
            assert json.loads(opened.metadata()["oscqat"]) == file.content
        # ... and from the first bytes of the file alone, as a program without safetensors would.
        start = path.read_bytes()
        header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
        assert json.loads(header["__metadata__"]["oscqat"])["layers"] == file.layers

    def test_grids_survive_json(self, packed):
        layers = layers_to_dict(packed)
        assert json.loads(json.dumps(layers)) == layers
        assert layers.keys() == packed_layers(packed).keys() == {"stem", "dw", "pw", "head"}

    def test_digest_is_that_of_the_bytes_in_c_order(self):
        tensor = torch.tensor([[1, 2, 3]], dtype=torch.int16)
        assert digest(tensor) == sha256(b"\x01\x00\x02\x00\x03\x00")
        assert digest(tensor.T) == digest(tensor)
        assert digest(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T) == sha256(b"\x01\x03\x02\x04")

    def test_scales_of_equal_value_and_other_bits_have_other_digests(self):
        assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


class TestWhole:
    def test_whole_file_passes(self, packed, file, tmp_path):
        check_checkpoint([file.write(tmp_path / "a.safetensors")], file.layers, packed)

    def test_model_without_values_will_do(self, packed, file, tmp_path):
        empty = copy.deepcopy(packed).to("meta")
        check_checkpoint([file.write(tmp_path / "a.safetensors")], file.layers, empty)

    def test_tensors_may_be_spread_over_files(self, packed, file, tmp_path):
        names = sorted(file.tensors)
        paths = []
        for i in range(3):
            part = copy.copy(file)
            part.tensors = {name: file.tensors[name] for name in names[i::3]}
            paths.append(part.write(tmp_path / f"{i}.safetensors"))
        check_checkpoint(paths, file.layers, packed)
        with pytest.raises(CheckpointError, match=f"without '{names[1]}', '{names[4]}'.* and .* more"):
            check_checkpoint([paths[0], paths[2]], file.layers, packed)

    def test_tensors_and_layers_under_ignored_prefixes_are_passed_over(self, packed, file, tmp_path):
        headless = copy.deepcopy(packed)
        headless.head = nn.Identity()
        path = file.write(tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="head"):
            check_checkpoint([path], file.layers, headless)
        check_checkpoint([path], file.layers, headless, ("head.",))

    def test_prefix_does_not_cover_names_that_only_begin_like_it(self, packed, file, tmp_path):
        file.tensors["header.bias"] = torch.zeros(1)
        with pytest.raises(CheckpointError, match=r"'header\.bias'"):
            check_checkpoint([file.write(tmp_path / "a.safetensors")], file.layers, packed, ("head.",))

    def test_checking_changes_neither_file_nor_model(self, packed, file, tmp_path):
        path = file.write(tmp_path / "a.safetensors")
        before = path.read_bytes(), {n: t.clone() for n, t in packed.state_dict().items()}
        check_checkpoint([path], file.layers, packed)
        assert path.read_bytes() == before[0]
        assert all(torch.equal(t, before[1][n]) for n, t in packed.state_dict().items())


def swap(file, first, second):
    file.tensors[first], file.tensors[second] = file.tensors[second], file.tensors[first]


def change(file, name, index, value):
    file.tensors[name][index] = value


def retype(file, name, dtype):
    file.tensors[name] = file.tensors[name].to(dtype)


def flip_a_bit(file, name):
    file.tensors[name].view(torch.uint8).view(-1)[0] ^= 1


QUANTIZER_TENSORS = [f"pw.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point")]
QUANTIZER_TENSORS += ["pw.input_scale", "pw.input_zero_point"]
ON_FILE = {
    **{f"missing {n}": (lambda f, n=n: f.tensors.pop(n), f"without '{n}'") for n in QUANTIZER_TENSORS},
    "missing bias": (lambda f: f.tensors.pop("pw.bias"), r"without 'pw\.bias'"),
    "missing statistics": (lambda f: f.tensors.pop("bn.running_var"), r"without 'bn\.running_var'"),
    **{f"altered {n}": (lambda f, n=n: flip_a_bit(f, n), f"'{n}'.*sha256") for n in QUANTIZER_TENSORS},
    "swapped inputs": (lambda f: swap(f, "dw.input_scale", "pw.input_scale"), r"'(dw|pw)\.input_scale'.*sha256"),
    "swapped zero-points": (
        lambda f: swap(f, "pw.input_zero_point", "head.input_zero_point"),
        r"'(pw|head)\.input_zero_point'",
    ),
    "swapped layers": (lambda f: swap(f, "stem.weight_packed", "dw.weight_packed"), r"'(stem|dw)\.weight_packed'"),
    "extra": (lambda f: f.tensors.update({"surplus": torch.ones(1)}), "'surplus'.*no place"),
    "extra quantizer": (
        lambda f: f.tensors.update({"stem.input_scale": torch.ones(1)}),
        r"'stem\.input_scale'.*no place",
    ),
    "extra latent": (lambda f: f.tensors.update({"pw.weight": torch.ones(6, 8, 1, 1)}), r"'pw\.weight'.*no place"),
    "misshapen packed": (
        lambda f: f.tensors.update({"pw.weight_packed": torch.zeros(6, 4, dtype=torch.uint8)}),
        r"'pw\.weight_packed' of shape \[6, 4\], expected \[6, 3\]",
    ),
    "misshapen scale": (
        lambda f: f.tensors.update({"pw.weight_scale": torch.ones(1)}),
        r"'pw\.weight_scale' of shape \[1\], expected \[6\]",
    ),
    "scalar scale": (
        lambda f: f.tensors.update({"pw.input_scale": torch.tensor(1.0)}),
        r"'pw\.input_scale' of shape \[\], expected \[1\]",
    ),
    "misshapen bias": (lambda f: f.tensors.update({"pw.bias": torch.ones(7)}), r"'pw\.bias' of shape \[7\]"),
    **{
        f"retyped {n} as {dtype}": (lambda f, n=n, dtype=dtype: retype(f, n, dtype), f"'{n}' of type")
        for n, dtype in (
            ("pw.weight_packed", torch.int8),
            ("pw.weight_packed", torch.int32),
            ("pw.weight_scale", torch.float16),
            ("pw.weight_scale", torch.float64),
            ("pw.input_scale", torch.bfloat16),
            ("pw.weight_zero_point", torch.int8),
            ("pw.input_zero_point", torch.float32),
        )
    },
    "version of the future": (lambda f: f.content.update(format_version=2), "got format_version 2 .*expected 1"),
    "version in words": (lambda f: f.content.update(format_version="1"), "got format_version '1'"),
    "no version": (lambda f: f.content.pop("format_version"), "without readable 'oscqat' metadata"),
    "no layers": (lambda f: f.content.pop("layers"), "got layers=None in the header"),
    "layers in a list": (lambda f: f.content.update(layers=[]), r"got layers=\[\] in the header"),
    "no digests": (lambda f: f.content.pop("sha256"), "got sha256=None in the header"),
    "digests without a layer": (lambda f: f.content["sha256"].pop("pw"), "sha256=None of layer 'pw'"),
    "one digest less": (lambda f: f.content["sha256"]["pw"].pop(), "sha256=.* of layer 'pw' .*expected 5"),
    "digests of a layer swapped": (
        lambda f: f.content["sha256"]["pw"].reverse(),
        r"'pw\.(weight|input)_\w+'.*sha256",
    ),
    "header without a layer": (lambda f: f.content["layers"].pop("pw"), "layer 'pw' in config.json only"),
    "config without a layer": (lambda f: f.layers.pop("pw"), "layer 'pw' in the header only"),
    **{
        f"{place} with another {key}": (
            lambda f, place=place, part=part, key=key, value=value: (
                f.content["layers"] if place == "header" else f.layers
            )["pw"][part].update({key: value}),
            "layer 'pw' as .* in the header and as .* in config.json",
        )
        for place in ("header", "config")
        for part, key, value in (
            ("weight", "bits", 4),
            ("weight", "qmin", -4),
            ("weight", "qmax", 15),
            ("weight", "granularity", "per_tensor"),
            ("weight", "shape", [8, 6, 1, 1]),
            ("input", "scheme", "symmetric"),
        )
    },
    "header without the input": (lambda f: f.content["layers"]["pw"].update(input=None), "layer 'pw' as"),
}
VALUES = {
    **{
        f"{n} {value}": (lambda f, n=n, value=value: change(f, n, 0, value), f"not finite and positive in '{n}'")
        for n in ("pw.weight_scale", "pw.input_scale", "stem.weight_scale")
        for value in (torch.nan, torch.inf, 0.0, -1.0)
    },
    **{
        f"{n} off grid": (lambda f, n=n: change(f, n, 0, 8), f"zero-point outside 0 to 7 in '{n}'")
        for n in ("pw.weight_zero_point", "pw.input_zero_point")
    },
}


@pytest.mark.parametrize("name", ON_FILE)
def test_file_with_this_wrong_is_refused_by_name(packed, file, tmp_path, name):
    spoil, message = ON_FILE[name]
    spoil(file)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint([file.write(tmp_path / "a.safetensors")], file.layers, packed)


@pytest.mark.parametrize("name", VALUES)
def test_impossible_value_is_refused_by_name_whatever_its_digest(packed, file, tmp_path, name):
    spoil, message = VALUES[name]
    spoil(file)
    file.rehash()
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint([file.write(tmp_path / "a.safetensors")], file.layers, packed)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"oscqat": "{"}, {"oscqat": "[]"}, {"oscqat": "1"}, {"oscqat": "null"}]
)
def test_file_without_readable_metadata_is_refused(packed, file, tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    save_file(file.tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"a\.safetensors without readable 'oscqat' metadata"):
        check_checkpoint([path], file.layers, packed)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_truncated_file_is_refused(packed, file, tmp_path, keep):
    path = file.write(tmp_path / "a.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"a\.safetensors, which is no whole safetensors file"):
        check_checkpoint([path], file.layers, packed)


def test_file_with_bytes_after_its_end_is_refused(packed, file, tmp_path):
    path = file.write(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        check_checkpoint([path], file.layers, packed)


def test_any_flipped_bit_of_a_quantizer_tensor_is_noticed(packed, file, tmp_path):
    path = file.write(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    generator = torch.Generator().manual_seed(0)
    for name in quantizer_tensors(file.tensors):
        begin, end = header[name]["data_offsets"]
        at = start + begin + int(torch.randint(end - begin, (1,), generator=generator))
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            check_checkpoint([path], file.layers, packed)
        content[at] ^= 4


def test_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


def test_file_written_and_read_is_the_state_dict(file, tmp_path):
    read = load_file(file.write(tmp_path / "a.safetensors"))
    assert read.keys() == file.tensors.keys()
    assert all(torch.equal(tensor, file.tensors[name]) for name, tensor in read.items())
