"""Read the header of a safetensors file, and parts of it, on disk or on the Hub, and believe nothing unchecked.

A header says how long it is, and where in the file each tensor lies. All of that is compared with the size of the file
before anything is allocated by it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hf_oscqat.checkpoint import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
READ_TOGETHER = 1 << 16
"""Parts that lie at most this many bytes apart are read at once, because a request costs more than the bytes."""


class File(Protocol):
    """A file that can be read in part."""

    name: str
    size: int

    def read(self, start: int, length: int) -> bytes:
        """Return so many bytes."""


class LocalFile:
    """A file on disk."""

    def __init__(self, path: Path) -> None:
        self.name, self.size, self._path = str(path), path.stat().st_size, path

    def read(self, start: int, length: int) -> bytes:
        """Return so many bytes."""
        with self._path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: in the words of the format, such as "U8".
        shape: of the tensor.
        start: its first byte in the file.
        length: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked.

    Attributes:
        tensors: by name.
        metadata: text by key.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: File) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: if the file is no safetensors file, or not whole.
    """
    if file.size < 8:
        raise CheckpointError(f"got {file.name} of {file.size} bytes, expected a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(file.size - 8, MAX_HEADER):
        raise CheckpointError(
            f"got {file.name} of {file.size} bytes with a header of {length}, expected a whole safetensors file: "
            "fetch or write it again"
        )
    try:
        content = json.loads(file.read(8, length))
        metadata = content.pop("__metadata__", None) or {}
        if not all(isinstance(part, str) for item in metadata.items() for part in item):
            raise TypeError("metadata that are no text")
        tensors = {name: _entry(entry, 8 + length) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"got {file.name} with a header that cannot be read: {error}") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].length)):
        if tensor.start != end:
            raise CheckpointError(f"got {file.name}, in which {name!r} begins at {tensor.start} and not at {end}")
        end += tensor.length
    if end != file.size:
        raise CheckpointError(
            f"got {file.name} of {file.size} bytes, expected {end} by its header: fetch or write it again"
        )
    return Header(tensors, metadata)


def _entry(entry: Any, offset: int) -> TensorEntry:
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES or not all(type(size) is int and size >= 0 for size in (*shape, first, last)):
        raise ValueError(f"a tensor of type {dtype!r}, shape {shape} from {first} to {last}")
    if math.prod(shape) * ITEM_BYTES[dtype] != last - first:
        raise ValueError(f"a tensor of type {dtype} and shape {shape} in {last - first} bytes")
    return TensorEntry(dtype, tuple(shape), offset + first, last - first)


def read_tensors(file: File, entries: Mapping[str, TensorEntry], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read some tensors of types U8, I8 and F32, those that lie close together at once.

    Args:
        file: as given to `read_header`.
        entries: from its header.
        names: which of them.

    Returns:
        By name, each in its shape.
    """
    dtypes: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "I8": np.dtype("i1"), "F32": np.dtype("<f4")}
    wanted = sorted((entries[name].start, name) for name in names)
    tensors: dict[str, np.ndarray] = {}
    position = 0
    while position < len(wanted):
        start, together = wanted[position][0], []
        end = start
        while position < len(wanted) and wanted[position][0] <= end + READ_TOGETHER:
            name = wanted[position][1]
            together.append(name)
            end = entries[name].start + entries[name].length
            position += 1
        content = file.read(start, end - start)
        if len(content) != end - start:
            raise CheckpointError(f"got {len(content)} bytes of {file.name} from {start}, expected {end - start}")
        for name in together:
            entry = entries[name]
            part = content[entry.start - start :][: entry.length]
            tensors[name] = np.frombuffer(part, dtypes[entry.dtype]).reshape(entry.shape)
    return tensors
