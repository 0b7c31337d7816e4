"""The file that a run is recorded in: `oscillation.jsonl`, one JSON object a line, only ever appended to.

Text, because it survives what happens to training: a killed process leaves whole lines and at most one piece, a run
that continues from an earlier checkpoint drops the lines of later steps, and one can look into it while it grows.

    {"row": "run", "format_version": 1, "layers": [..], ..}      first: what is recorded
    {"row": "step", "step": 10, "oscillating": [..], ..}         at each recording; lists go by layer
    {"row": "batchnorm", "step": 10, "before": [..], ..}         at each re-estimation; lists go by batch-norm layer
    {"row": "log", "step": 10, "scalars": {"loss": 0.1, ..}}     what is logged
"""

import base64
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

FILE = "oscillation.jsonl"
FORMAT_VERSION = 1
BINS = 40
"""Bins of a histogram of distances to the grid, from -0.5 to 0.5 of its step."""


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of a layer from the beginning.

    Attributes:
        name: of the module, without the wrapper's `timm_model.`.
        shape: of its weight.
        bits: width of its integers.
        qmin: smallest integer of its grid.
        qmax: largest.
    """

    name: str
    shape: list[int]
    bits: int
    qmin: int
    qmax: int

    @property
    def num_weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WatchedWeight:
    """A weight that was watched at every step for a while.

    Attributes:
        layer: its layer's position among the recorded ones.
        index: its place in the weight, one number per dimension.
        frequency: its oscillation frequency when watching began.
        ints: its integer at each step.
        positions: where its latent value lay on the grid, in steps of the grid; an integer is a grid point, and NaN a
            value that was not finite.
    """

    layer: int
    index: list[int]
    frequency: float
    ints: list[int]
    positions: list[float]


@dataclass(frozen=True)
class Window:
    """Steps in a row, up to a recording, in which some weights were watched.

    Attributes:
        first: the first of the steps.
        weights: the most oscillating ones of the sampled weights, at that time.
    """

    first: int
    weights: list[WatchedWeight]


@dataclass(frozen=True)
class Recording:
    """A run as it was recorded; arrays are float unless stated.

    Attributes:
        name: of the run's folder.
        about: what else was known of the run, in words: `model`, `scheme`, ..
        total_steps: optimizer steps of the whole training.
        momentum: of the tracker; its frequencies are averages over some 1 / momentum steps.
        oscillating_above: frequency above which a weight counts as oscillating.
        layers: in the order of definition.
        batchnorm_layers: (name, name of the layer before it or None) of each batch-norm layer.
        steps: int `[T]`, the steps at which it was recorded.
        oscillating: `[T, L]`, share of weights whose frequency is above the tracker's threshold, in [0, 1].
        frozen: `[T, L]`, share of weights that are frozen, in [0, 1].
        weight_scale: `[T, L]`, mean over channels.
        input_scale: `[T, L]`; NaN where inputs stay float.
        distances: int `[T, L, BINS]`, sampled weights by their distance to the nearest grid point, -0.5 to 0.5.
        sampled_ints: int `[T, S]`, integers of the sampled weights, layer after layer.
        windows: for each of `steps` that which ended there, or None.
        batchnorm: by step, `(before, after)`, each `[number of batchnorm_layers]`; see `Recorder.batchnorm`.
        log: by step, what was logged.
    """

    name: str
    about: dict[str, str]
    total_steps: int
    momentum: float
    oscillating_above: float
    layers: list[RecordedLayer]
    batchnorm_layers: list[tuple[str, str | None]]
    steps: np.ndarray
    oscillating: np.ndarray
    frozen: np.ndarray
    weight_scale: np.ndarray
    input_scale: np.ndarray
    distances: np.ndarray
    sampled_ints: np.ndarray
    windows: list[Window | None]
    batchnorm: dict[int, tuple[np.ndarray, np.ndarray]]
    log: dict[int, dict[str, float]]

    @property
    def num_weights(self) -> np.ndarray:
        """Weights of each layer, `[L]`."""
        return np.array([layer.num_weights for layer in self.layers])

    def of_all_weights(self, shares: np.ndarray) -> np.ndarray:
        """Share of the weights of all layers together, `[T]`, given the layers' shares, `[T, L]`."""
        return shares @ self.num_weights / self.num_weights.sum()

    def sampled_weight(self, j: int) -> tuple[str, list[int]]:
        """Name of the layer, and index in its weight, of the weight at `sampled_ints[:, j]`."""
        for layer in self.layers:
            positions = sample_positions(layer.num_weights)
            if j < len(positions):
                return layer.name, [int(k) for k in np.unravel_index(positions[j], layer.shape)]
            j -= len(positions)
        raise IndexError(f"got {j} more than there are sampled weights")

    def histogram(self, i: int) -> np.ndarray:
        """Distances of all layers' weights at `steps[i]`, each layer as heavy as it has weights; `[BINS]`, sum 1."""
        counts = self.distances[i].astype(float)
        # What is sampled is as many weights of a small layer as of a large one; the sample's size is in the sum of
        # counts but for weights beyond the ends of the grid, which are left out on both sides.
        sampled = np.array([len(sample_positions(n)) for n in self.num_weights])
        weighted = (self.num_weights / sampled) @ counts
        return weighted / max(weighted.sum(), 1e-30)


def sample_positions(count: int, wanted: int = 256) -> list[int]:
    """Choose positions among `count`, the same ones always, spread evenly and in step with no dimension of a weight.

    They are multiples of the golden ratio, modulo `count`. Evenly spaced ones would, in a layer of 3 x 3 kernels,
    hit the same tap of each kernel whenever the spacing is a multiple of 9.

    Args:
        count: number of weights.
        wanted: number of positions, at most; all where there are no more than that.
    """
    if count <= wanted:
        return list(range(count))
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int(i * golden % 1 * count) for i in range(1, wanted + 1)})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; the file is open only meanwhile."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n")


def begin(path: Path, header: Mapping[str, Any], step: int) -> None:
    """Begin a recording, or continue one after a step: rows of later steps and half-written lines are dropped.

    Args:
        path: the file; it may be missing.
        header: the first row.
        step: the last step that stays; 0 begins anew. A recording of other layers is not continued.
    """
    kept: list[Mapping[str, Any]] = []
    if step > 0 and path.is_file():
        rows = list(read_rows(path))
        if rows and rows[0].get("layers") == header["layers"]:
            kept = [row for row in rows[1:] if row["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    for row in (header, *kept):
        append_row(beside, row)
    beside.replace(path)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; a last line that was not written to its end is left out.

    Raises:
        ValueError: if any other line is no row.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    complete, unfinished = lines[:-1], lines[-1]
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(complete) and not unfinished:
                return
            raise ValueError(f"got {path} whose line {number} is no JSON ({error}), expected a recording") from error
        if not isinstance(row, dict) or not (row.get("row") == "run" or isinstance(row.get("step"), int)):
            raise ValueError(f"got {path} whose line {number} is no row of a recording, expected one")
        yield row


def read_recording(run_dir: str | Path) -> Recording:
    """Read what was recorded of a run, finished or not.

    Args:
        run_dir: its folder, or the file in it.

    Raises:
        ValueError: if nothing was recorded there, or by a newer version of this package.
    """
    path = Path(run_dir)
    path = path if path.is_file() else path / FILE
    what_to_do = "train with OscQATTrainer or training/run_qat.py, which record unless record_oscillations is False"
    if not path.is_file():
        raise ValueError(f"got {run_dir}, which holds no {FILE}, expected the folder of a recorded run: {what_to_do}")
    rows = list(read_rows(path))
    if not rows or rows[0].get("row") != "run":
        raise ValueError(f"got {path}, which does not begin like a recording, expected one: {what_to_do}")
    header = rows[0]
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"got {path} of format_version {header.get('format_version')!r}, expected {FORMAT_VERSION}: use the "
            "version of hf_oscqat that recorded it"
        )
    try:
        return _assemble(path.parent.resolve().name, header, rows[1:])
    except (KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"got {path}, of which a row is not whole ({error!r}), expected a recording") from error


def _assemble(name: str, header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Recording:
    # A run that is asked twice to evaluate the same step says so twice; the last word counts.
    steps = {row["step"]: row for row in rows if row["row"] == "step"}
    if not steps:
        raise ValueError(f"got run {name}, of which no step is recorded yet, expected one: wait until it has begun")
    ordered = [steps[step] for step in sorted(steps)]
    log: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["row"] == "log":
            log.setdefault(row["step"], {}).update(row["scalars"])

    def stack(key: str, dtype: type = float) -> np.ndarray:
        return np.array([row[key] for row in ordered], dtype=dtype)

    return Recording(
        name=name,
        about=header["about"],
        total_steps=header["total_steps"],
        momentum=header["momentum"],
        oscillating_above=header["oscillating_above"],
        layers=[RecordedLayer(**layer) for layer in header["layers"]],
        batchnorm_layers=[(name, layer) for name, layer in header["batchnorm_layers"]],
        steps=stack("step", int),
        oscillating=stack("oscillating"),
        frozen=stack("frozen"),
        weight_scale=stack("weight_scale"),
        input_scale=stack("input_scale"),
        distances=stack("distances", int),
        sampled_ints=np.stack([unpack_ints(row["ints"]) for row in ordered]),
        windows=[_window(row["window"]) for row in ordered],
        batchnorm={
            row["step"]: (np.array(row["before"], dtype=float), np.array(row["after"], dtype=float))
            for row in rows
            if row["row"] == "batchnorm"
        },
        log=dict(sorted(log.items())),
    )


def pack_ints(ints: np.ndarray) -> str:
    """Write integers of at most 8 bits as text; some ten thousand of 4 bits take some 8 kB."""
    return base64.b64encode(zlib.compress(ints.astype("<i2").tobytes())).decode("ascii")


def unpack_ints(text: str) -> np.ndarray:
    """Read what `pack_ints` wrote, `[S]`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i2")


def finite(values: Sequence[float], digits: int = 6) -> list[float | None]:
    """Numbers for JSON: a few digits, and None for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _window(row: Mapping[str, Any] | None) -> Window | None:
    if row is None:
        return None
    weights = [WatchedWeight(**weight) for weight in row["weights"]]
    return Window(row["first"], [replace(w, positions=np.array(w.positions, dtype=float).tolist()) for w in weights])
