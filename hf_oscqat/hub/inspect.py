"""What quantization does to a timm name or has done to a packed checkpoint, layer by layer, without loading either."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import HfApi, HfFileSystem
from torch import nn

from hf_oscqat.checkpoint import FORMAT_VERSION, METADATA_KEY, CheckpointError
from hf_oscqat.config import OscQATConfig
from hf_oscqat.hub.card import WEIGHTS
from hf_oscqat.hub.client import check_repo_id, explained, patiently
from hf_oscqat.hub.safetensors_file import File, LocalFile, TensorEntry, read_header, read_tensors
from hf_oscqat.prepare import LayerDescription, describe, insert_quantizers, short_name
from hf_oscqat.quantization.packed import FormatError, GridFormat, LayerFormat
from hf_oscqat.quantization.packing import packed_width, unpack_bits

INDEX = "model.safetensors.index.json"


def inspect_timm(name: str, config: OscQATConfig) -> list[LayerDescription]:
    """Prepare a timm model on the meta device and list what is quantized and what stays float.

    Args:
        name: a timm name, with or without the tag of pretrained weights.
        config: how to quantize.

    Returns:
        One row per layer, and per other parameter of two or more dimensions; the last row is all the rest.

    Raises:
        ValueError: if timm has no such model, or it cannot be prepared.
    """
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        close = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ", as timm.list_models() lists them"
        raise ValueError(f"got model {name!r}, expected a timm name{meant}")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters())
    insert_quantizers(model, config)
    rows = describe(model)
    rest = total - sum(row.parameters for row in rows)
    name_of_rest = "(biases, normalisation)"
    return [*rows, LayerDescription(name_of_rest, "", (rest,), None, None, 4 * rest, "no weight of a layer")]


@dataclass(frozen=True)
class PackedRow:
    """One layer of a packed checkpoint.

    Attributes:
        name: module name without `timm_model.`.
        weight: grid of the weight; None where it is float.
        input: grid of the input; None where it is float.
        scale: smallest and largest scale of the weight; None where it is float.
        used: how many integers of the grid the weight uses; None where it is float.
        parameters: numbers in the weight, 0 where it is float: the file does not say which tensor is one.
        bytes: of everything that the layer's quantizers have in the file.
    """

    name: str
    weight: GridFormat | None
    input: GridFormat | None
    scale: tuple[float, float] | None
    used: int | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PackedInspection:
    """What the files of a packed checkpoint say.

    Attributes:
        name: folder, or Hub id with its commit.
        rows: one per layer.
        float_parameters: parameters that are stored in float, scales left out.
        float_bytes: bytes of those and of batch-norm statistics.
        file_bytes: of all weight files, headers included.
    """

    name: str
    rows: list[PackedRow]
    float_parameters: int
    float_bytes: int
    file_bytes: int


class _RemoteFile:
    """A file of one commit on the Hub, of which a part is one request."""

    def __init__(self, filesystem: HfFileSystem, path: str) -> None:
        self.name = path
        self._stream = filesystem.open(path, "rb", cache_type="none")
        self.size = int(self._stream.size)

    def read(self, start: int, length: int) -> bytes:
        def request() -> bytes:
            self._stream.seek(start)
            return bytes(self._stream.read(length))

        return patiently(request, f"reading {self.name}")


def inspect_packed(source: str, *, revision: str | None = None, token: str | None = None) -> PackedInspection:
    """Read the layers of a packed checkpoint from its header, scales and integers from the file, and build no model.

    Args:
        source: a folder, or a Hub id.
        revision: for a Hub id, a branch, tag or commit.
        token: for a Hub id; None takes the stored one, or HF_TOKEN.

    Raises:
        ValueError: if it is no packed checkpoint, its files contradict each other, a folder is to have a revision, or
            the Hub refuses.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"got revision {revision!r} of {source}, a folder, which has none: leave it out")
        return _inspect_files(source, _local_files(Path(source)))
    check_repo_id(source)
    api = HfApi(token=token)
    with explained(source, "looking at", api.endpoint):
        info = patiently(lambda: api.repo_info(source, revision=revision), f"reading {source}")
        present = {sibling.rfilename for sibling in info.siblings or ()}
        filesystem = HfFileSystem(token=token)
        at = f"{source}@{info.sha}"
        names = [WEIGHTS]
        if WEIGHTS not in present and INDEX in present:
            index = patiently(lambda: filesystem.cat_file(f"{at}/{INDEX}"), f"reading {INDEX}")
            names = _shards(index, source)
        missing = [name for name in names if name not in present]
        if missing:
            raise CheckpointError(
                f"got {source} without {missing[0]}, expected a packed checkpoint of hf_oscqat; it has "
                f"{', '.join(sorted(present)) or 'no files'}"
            )
        return _inspect_files(f"{source}, commit {info.sha}", [_RemoteFile(filesystem, f"{at}/{n}") for n in names])


def _local_files(folder: Path) -> list[File]:
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = _shards((folder / INDEX).read_bytes(), str(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        inside = (folder / "packed" / WEIGHTS).is_file()
        hint = f": you may mean {folder / 'packed'}" if inside else ""
        raise CheckpointError(f"got {folder} without {missing[0]}, expected a packed checkpoint of hf_oscqat{hint}")
    return [LocalFile(folder / name) for name in names]


def _shards(index: bytes, source: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
        inside = all(name.endswith(".safetensors") and "/" not in name and "\\" not in name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"got an {INDEX} of {source} that cannot be read: {error}") from error
    if not inside or not names:
        raise CheckpointError(f"got an {INDEX} of {source} that names {names}, expected safetensors files beside it")
    return names


def _inspect_files(name: str, weight_files: Sequence[File]) -> PackedInspection:
    headers = [(file, read_header(file)) for file in weight_files]
    layers: dict[str, LayerFormat] = {}
    entries: dict[str, TensorEntry] = {}
    for file, header in headers:
        layers |= _layers(file, header.metadata)
        entries |= header.tensors
    tensors = {layer: _tensors_of(layer, grids, entries) for layer, grids in layers.items()}
    wanted = {f"{layer}.{part}" for layer, grids in layers.items() if grids.weight for part in _PARTS}
    values: dict[str, np.ndarray] = {}
    for file, header in headers:
        values |= read_tensors(file, header.tensors, wanted & header.tensors.keys())
    rows = [
        _row(layer, grids, sum(entry.length for entry in tensors[layer].values()), values)
        for layer, grids in layers.items()
    ]
    own = {tensor for found in tensors.values() for tensor in found}
    rest = {tensor: entry for tensor, entry in entries.items() if tensor not in own}
    return PackedInspection(
        name=name,
        rows=rows,
        float_parameters=sum(
            prod(entry.shape) for tensor, entry in rest.items() if tensor.rpartition(".")[2] not in _STATISTICS
        ),
        float_bytes=sum(entry.length for entry in rest.values()),
        file_bytes=sum(file.size for file in weight_files),
    )


_PARTS = ("weight_packed", "weight_scale")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _layers(file: File, metadata: Any) -> dict[str, LayerFormat]:
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, layers = content["format_version"], dict(content["layers"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"got {file.name} without readable {METADATA_KEY!r} metadata, expected a packed checkpoint of hf_oscqat"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"got format_version {version!r} in {file.name}, expected {FORMAT_VERSION}")
    try:
        return {name: LayerFormat.from_dict(name, data) for name, data in layers.items()}
    except FormatError as error:
        raise CheckpointError(f"got {file.name}: {error}") from error


def _tensors_of(layer: str, grids: LayerFormat, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the quantizer tensors of a layer, checked against its grids."""
    found = {
        f"{layer}.{part}": entries[f"{layer}.{part}"]
        for part in (*_PARTS, "weight_zero_point", "input_scale", "input_zero_point")
        if f"{layer}.{part}" in entries
    }
    grid = grids.weight
    if grid is not None:
        packed, scale = (found.get(f"{layer}.{part}") for part in _PARTS)
        if packed is None or scale is None:
            raise CheckpointError(f"got layer {layer!r} without its integers or their scale")
        rows = packed.shape[0] if len(packed.shape) == 2 else 0
        count = prod(grid.shape)
        fits = rows and not count % rows and packed.shape[1] == packed_width(count // rows, grid.bits)
        if not fits or packed.dtype != "U8":
            raise CheckpointError(
                f"got {layer}.weight_packed of type {packed.dtype} and shape {packed.shape}, which does not hold a "
                f"weight of shape {grid.shape} at {grid.bits} bits"
            )
        if scale.dtype != "F32" or scale.shape not in ((1,), (rows,)):
            raise CheckpointError(f"got {layer}.weight_scale of type {scale.dtype} and shape {scale.shape}")
    return found


def _row(layer: str, grids: LayerFormat, size: int, values: dict[str, np.ndarray]) -> PackedRow:
    grid, short = grids.weight, short_name(layer)
    if grid is None:
        return PackedRow(short, None, grids.input, None, None, 0, size)
    packed, scale = (values[f"{layer}.{part}"] for part in _PARTS)
    count = prod(grid.shape) // packed.shape[0]
    integers = unpack_bits(torch.tensor(packed), grid.bits, count)
    used = len(torch.unique(integers))
    return PackedRow(short, grid, grids.input, (float(scale.min()), float(scale.max())), used, prod(grid.shape), size)
