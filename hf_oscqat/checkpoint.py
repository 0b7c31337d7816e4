"""The packed checkpoint file: what its header says, and everything that is checked before it is believed.

A safetensors file whose header metadata holds one JSON object under `oscqat`: the format version, the grids of each
layer, and the sha256 of every quantizer tensor. config.json repeats the grids. Whoever reads the header knows widths
and shapes without loading a tensor, and a file whose tensors were swapped, altered or lost is refused with the name of
the layer, where transformers by itself would go on with uninitialised memory.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_oscqat.quantization.functional import output_axis
from hf_oscqat.quantization.packed import PackedLayer, quantizer_tensors

FORMAT_VERSION = 1
METADATA_KEY = "oscqat"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of the files that hold a checkpoint's weights, or say which ones do."""
DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}


class CheckpointError(ValueError):
    """A packed checkpoint that cannot be trusted; the message names the tensor or layer."""


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def layers_to_dict(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the grids of each packed layer as plain data, for config.json and the header."""
    return {name: layer.format.to_dict() for name, layer in packed_layers(model).items()}


def header_metadata(model: nn.Module) -> dict[str, str]:
    """Return what goes into the header of the file that holds this packed model."""
    digests = {
        name: [digest(layer.get_buffer(part)) for part in quantizer_tensors("", layer.format, output_axis(layer))]
        for name, layer in packed_layers(model).items()
    }
    content = {"format_version": FORMAT_VERSION, "layers": layers_to_dict(model), "sha256": digests}
    return {METADATA_KEY: json.dumps(content, separators=(",", ":"))}


def sort_metadata(path: Path) -> None:
    """Write the metadata of a safetensors file in order, in place, so that equal checkpoints are equal files.

    safetensors itself writes them in an order that differs from time to time. The header keeps its length.

    Args:
        path: a file that safetensors has just written.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
        content["__metadata__"] = dict(sorted(content.get("__metadata__", {}).items()))
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) <= length:
            file.seek(8)
            file.write(header.ljust(length))


def digest(tensor: Tensor) -> str:
    """Sha256 of a tensor's bytes in C order, little-endian, in base64 without padding, for a short header."""
    return _digest(tensor.detach().cpu().contiguous().numpy())


def _digest(content: Any) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def check_checkpoint(
    files: Iterable[str], layers: Mapping[str, Any], model: nn.Module, ignored_prefixes: tuple[str, ...] = ()
) -> None:
    """Compare a packed checkpoint with config.json and with the model that is to hold it.

    Args:
        files: paths of its safetensors files.
        layers: the grids in config.json, as `layers_to_dict` writes them.
        model: a model in packed form, still empty, on any device.
        ignored_prefixes: tensors and layers under these are ignored: the head of a model loaded without one.

    Raises:
        CheckpointError: at the first contradiction, with the name of the tensor or layer.
    """
    layers = {name: data for name, data in layers.items() if not _is_under(name, ignored_prefixes)}
    expected = model.state_dict()
    specs = {
        name: spec
        for layer_name, layer in packed_layers(model).items()
        for name, spec in quantizer_tensors(layer_name, layer.format, output_axis(layer)).items()
    }
    seen: set[str] = set()
    for path in files:
        try:
            # As arrays of numpy, because making torch's tensors would take three times as long as all the checks.
            with safe_open(path, "np") as file:
                content = _read_metadata(path, file.metadata())
                _compare_layers(content["layers"], layers, ignored_prefixes)
                digests = _digests_by_tensor(content["sha256"], specs)
                for name in file.keys():
                    if _is_under(name, ignored_prefixes):
                        continue
                    _check_tensor(name, file.get_slice(name), expected, specs)
                    if name in specs:
                        _check_values(name, file.get_tensor(name), digests.get(name), layers)
                    seen.add(name)
        except SafetensorError as error:
            raise CheckpointError(f"got {path}, which is no whole safetensors file: {error}") from error
    missing = sorted(expected.keys() - seen)
    if missing:
        raise CheckpointError(
            f"got a checkpoint without {_listed(missing)}: it is incomplete, fetch or write it again"
        )


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return f"{name}.".startswith(prefixes)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_metadata(path: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        content = json.loads((metadata or {})[METADATA_KEY])
        version = content["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"got {path} without readable {METADATA_KEY!r} metadata, expected a file that hf_oscqat.pack wrote"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"got format_version {version!r} in {path}, expected {FORMAT_VERSION}: a newer hf_oscqat may read it"
        )
    for key in ("layers", "sha256"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"got {key}={content.get(key)!r} in the header of {path}, expected an object")
    return content


def _digests_by_tensor(sha256: Mapping[str, Any], specs: Iterable[str]) -> dict[str, Any]:
    """Pair the digests, which the header lists by layer, with the names of the tensors in their order."""
    names: dict[str, list[str]] = {}
    for name in specs:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    paired: dict[str, Any] = {}
    for layer, tensors in names.items():
        digests = sha256.get(layer)
        if not isinstance(digests, list) or len(digests) != len(tensors):
            raise CheckpointError(f"got sha256={digests!r} of layer {layer!r} in the header, expected {len(tensors)}")
        paired |= dict(zip(tensors, digests, strict=True))
    return paired


def _compare_layers(header: Mapping[str, Any], config: Mapping[str, Any], ignored_prefixes: tuple[str, ...]) -> None:
    for name in sorted(header.keys() | config.keys()):
        if _is_under(name, ignored_prefixes):
            continue
        if name not in header or name not in config:
            place = "config.json" if name in config else "the header"
            raise CheckpointError(f"got layer {name!r} in {place} only, expected header and config.json to agree")
        if header[name] != config[name]:
            raise CheckpointError(
                f"got layer {name!r} as {header[name]} in the header and as {config[name]} in config.json, "
                "expected them to agree: one of the two was changed"
            )


def _check_tensor(
    name: str, stored: Any, expected: Mapping[str, Tensor], specs: Mapping[str, tuple[torch.dtype, list[int]]]
) -> None:
    if name not in expected:
        raise CheckpointError(f"got tensor {name!r}, which the model has no place for")
    shape, wanted = list(stored.get_shape()), list(expected[name].shape)
    if shape != wanted:
        raise CheckpointError(f"got tensor {name!r} of shape {shape}, expected {wanted}")
    if name in specs and DTYPES.get(stored.get_dtype()) != specs[name][0]:
        raise CheckpointError(f"got tensor {name!r} of type {stored.get_dtype()}, expected {specs[name][0]}")


def _check_values(name: str, values: Any, sha256: Any, layers: Mapping[str, Any]) -> None:
    layer, _, part = name.rpartition(".")
    if part.endswith("_scale") and not ((values > 0) & (values < math.inf)).all():
        raise CheckpointError(f"got a scale that is not finite and positive in {name!r}")
    if part.endswith("_zero_point"):
        grid = layers[layer][part.removesuffix("_zero_point")]
        if not ((values >= grid["qmin"]) & (values <= grid["qmax"])).all():
            raise CheckpointError(f"got a zero-point outside {grid['qmin']} to {grid['qmax']} in {name!r}")
    if sha256 != _digest(values):
        raise CheckpointError(f"got other contents of {name!r} than were written: its sha256 is not the header's")
