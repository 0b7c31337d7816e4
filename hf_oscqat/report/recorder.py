"""Measure what the report and the pictures of a run show.

What costs little is measured over all weights, the rest on a sample: always the same few hundred of each layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_oscqat.prepare import short_name
from hf_oscqat.quantization.functional import grid_zero, is_frozen, positive_scale
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers
from hf_oscqat.remedies.batchnorm import batchnorm_layers, kl_divergence
from hf_oscqat.remedies.tracker import OscillationTracker, oscillation_state
from hf_oscqat.report.recording import (
    BINS,
    FILE,
    FORMAT_VERSION,
    append_row,
    begin,
    finite,
    pack_ints,
    sample_positions,
)

Coordinates = tuple[Tensor, ...]
"""Indices of some weights, one tensor per dimension."""

Statistics = list[tuple[Tensor, ...]]
"""Running mean and variance of each batch-norm layer."""

WINDOW = 32
"""Steps in a row, up to a recording, in which weights are watched; some more where recordings are less far apart."""
WATCHED = 8
WATCHED_OF_A_LAYER = 2


@dataclass(frozen=True)
class DistanceHistogram:
    """How far latent weights lie from their nearest grid point, in steps of the grid.

    Attributes:
        counts: weights in each of the equal bins between `low` and `high`.
        low: -0.5, halfway to the grid point below.
        high: 0.5.
    """

    counts: list[int]
    low: float = -0.5
    high: float = 0.5

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"counts": self.counts, "low": self.low, "high": self.high}


@torch.no_grad()
def distance_histogram(model: nn.Module, max_bits: int = 4, bins: int = BINS) -> DistanceHistogram:
    """Count the distances `w / scale - round(w / scale)` of the low-bit weights of a prepared model.

    Oscillating weights gather at both edges, halfway between two grid points (Nagel et al., ICML 2022, fig. 3).
    Weights beyond the ends of the grid, which cannot oscillate, are left out, and frozen ones are counted where their
    latent weight lies.

    Args:
        model: a model that `prepare_qat` has prepared.
        max_bits: leave out wider weights.
        bins: number of bins.
    """
    counts = torch.zeros(bins)
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.num_bits > max_bits:
            continue
        position = quantizer.to_grid(layer.float_weight)
        inside = position[(position >= quantizer.qmin) & (position <= quantizer.qmax)].float()
        counts += torch.histc((inside - inside.round()).cpu(), bins=bins, min=-0.5, max=0.5)
    return DistanceHistogram([int(count) for count in counts])


class Recorder:
    """Records the oscillations of a model while it is trained, by any loop.

    At each recording: layer by layer, the shares of oscillating and of frozen weights, over all weights; scales; of a
    few hundred sampled weights the integers and the distances to the grid. In the steps before a recording, some of
    the most oscillating of the sampled weights are watched at each step. Everything is computed on the model's device
    and fetched at once.

        recorder = Recorder(model, tracker, "runs/mine", total_steps=1000)
        recorder.begin()
        for step in range(1, 1001):
            ...                      # forward and backward
            tracker.tick()
            recorder.tick(step)      # between the tracker's tick and the optimizer's step
            recorder.log(step, {"loss": loss.item()})

    Args:
        model: a prepared model.
        tracker: its tracker.
        run_dir: folder to write `oscillation.jsonl` to.
        total_steps: optimizer steps of the whole training.
        every: steps between recordings; 0 takes a 200th of training, and 10 at least.
        about: what the report shall say of the run, such as `{"model": "mobilenetv2_100"}`.

    Raises:
        ValueError: if the tracker tracks nothing, or `every` is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        tracker: OscillationTracker,
        run_dir: str | Path,
        *,
        total_steps: int,
        every: int = 0,
        about: Mapping[str, str] | None = None,
    ) -> None:
        if not tracker.layers:
            raise ValueError("got a tracker of no layer, expected one: no weight is narrow enough to be tracked")
        if every < 0:
            raise ValueError(f"got every={every!r}, expected a number of steps, or 0 for a 200th of training")
        self.path = Path(run_dir) / FILE
        self.model = model
        self.tracker = tracker
        self.total_steps = total_steps
        self.every = every or max(10, math.ceil(total_steps / 200))
        self._layers = list(tracker.layers.values())
        self._samples = [_coordinates(layer, sample_positions(layer.latent_weight.numel())) for layer in self._layers]
        self._sizes = [len(sample[0]) for sample in self._samples]
        # What is being watched: (layer, coordinates, frequency), and a row of numbers for each step since `_first`.
        self._watched: list[tuple[int, Coordinates, float]] = []
        self._first = 0
        self._rows: list[Tensor] = []
        self._header = self._make_header(about or {})

    def begin(self, step: int = 0) -> None:
        """Begin to record, or continue after `step`: what was recorded of later steps is dropped."""
        begin(self.path, self._header, step)
        self._stop_watching()

    @torch.no_grad()
    def tick(self, step: int) -> None:
        """Look at a step; call it after the tracker's tick, before the optimizer's step.

        Args:
            step: the optimizer step being made, counted from 1.
        """
        ahead = -step % self.every
        if step <= self.total_steps:
            ahead = min(ahead, self.total_steps - step)
        if not self._watched and ahead == min(WINDOW, self.every) - 1:
            self._choose(step)
        if self._watched:
            self._watch()
        if ahead == 0 or step == 1:
            self._record(step)

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record what is logged at a step; what is no finite number is left out."""
        numbers = {k: v for k, v in scalars.items() if isinstance(v, int | float) and math.isfinite(v)}
        if numbers:
            append_row(self.path, {"row": "log", "step": step, "scalars": numbers})

    def batchnorm(self, step: int, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Record how far batch-norm statistics were off, before a re-estimation and after it.

        Args:
            step: optimizer steps made.
            before: `batchnorm_divergence` of the running statistics from the re-estimated ones, `[channels]` for each
                layer of `batchnorm_layers(model)`.
            after: that of the re-estimated statistics from those of other images; empty where there are none.
        """
        means = [finite([float(kl.mean()) if kl.numel() else math.nan for kl in kls]) for kls in (before, after)]
        append_row(
            self.path,
            {"row": "batchnorm", "step": step, "before": means[0], "after": means[1] or [None] * len(means[0])},
        )

    def _make_header(self, about: Mapping[str, str]) -> dict[str, Any]:
        layers = []
        for name, layer in self.tracker.layers.items():
            quantizer = layer.weight_quantizer
            assert quantizer is not None
            layers.append(
                {
                    "name": short_name(name),
                    "shape": list(layer.latent_weight.shape),
                    "bits": quantizer.num_bits,
                    "qmin": quantizer.qmin,
                    "qmax": quantizer.qmax,
                }
            )
        norms, before = {id(norm) for norm in batchnorm_layers(self.model)}, None
        followed: list[tuple[str, str | None]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedLayer):
                before = short_name(name)
            elif id(module) in norms:
                followed.append((short_name(name), before))
        return {
            "row": "run",
            "format_version": FORMAT_VERSION,
            "about": dict(about),
            "total_steps": self.total_steps,
            "every": self.every,
            "momentum": self.tracker.momentum,
            "oscillating_above": self.tracker.oscillating_above,
            "layers": layers,
            "batchnorm_layers": followed,
        }

    def _watch(self) -> None:
        row = [
            numbers
            for i, coordinates, _ in self._watched
            for numbers in (
                oscillation_state(self._layers[i]).previous_int[coordinates].float(),
                grid_position(self._layers[i], coordinates).float(),
            )
        ]
        self._rows.append(torch.cat(row))

    def _choose(self, step: int) -> None:
        """Choose what to watch: of the sampled weights that are not frozen the most oscillating, few of one layer."""
        frequencies = []
        for layer, sample in zip(self._layers, self._samples, strict=True):
            frequency = oscillation_state(layer).frequency[sample].float()
            assert layer.weight_quantizer is not None
            frozen_int = layer.weight_quantizer.frozen_if_any
            if frozen_int is not None:
                frequency = frequency.masked_fill(is_frozen(frozen_int[sample]), 0.0)
            frequencies.append(frequency)
        found = torch.cat(frequencies).cpu().split(self._sizes)
        best = sorted(
            ((float(f), i, int(j)) for i, of_layer in enumerate(found) for f, j in _highest(of_layer)), reverse=True
        )
        self._first, self._rows = step, []
        self._watched = [
            (i, tuple(axis[j : j + 1] for axis in self._samples[i]), f) for f, i, j in best[:WATCHED] if f > 0
        ]

    def _stop_watching(self) -> None:
        self._watched, self._rows = [], []

    def _record(self, step: int) -> None:
        numbers: dict[str, list[Tensor]] = {
            key: [] for key in ("oscillating", "frozen", "weight_scale", "input_scale", "ints", "positions")
        }
        for layer, sample in zip(self._layers, self._samples, strict=True):
            quantizer, inputs, state = layer.weight_quantizer, layer.input_quantizer, oscillation_state(layer)
            assert quantizer is not None
            count = layer.latent_weight.numel()
            frozen_int = quantizer.frozen_if_any
            zero = quantizer.scale.new_zeros(())
            numbers["oscillating"].append((state.frequency > self.tracker.oscillating_above).sum() / count)
            numbers["frozen"].append(zero if frozen_int is None else is_frozen(frozen_int).sum() / count)
            numbers["weight_scale"].append(quantizer.scale.mean())
            numbers["input_scale"].append(zero + math.nan if inputs is None else inputs.scale.mean())
            numbers["ints"].append(state.previous_int[sample].float())
            numbers["positions"].append(grid_position(layer, sample).float())
        joined = {key: torch.cat([t.float().reshape(-1) for t in tensors]) for key, tensors in numbers.items()}
        fetched = torch.cat([*joined.values()]).cpu().split([t.numel() for t in joined.values()])
        found = {key: tensor.numpy() for key, tensor in zip(joined, fetched, strict=True)}
        positions = np.split(found["positions"], np.cumsum(self._sizes)[:-1])
        row: dict[str, Any] = {"row": "step", "step": step}
        row |= {key: finite(found[key].tolist()) for key in ("oscillating", "frozen", "weight_scale", "input_scale")}
        row["distances"] = [
            _count_distances(where, layer["qmin"], layer["qmax"])
            for where, layer in zip(positions, self._header["layers"], strict=True)
        ]
        row["ints"] = pack_ints(found["ints"])
        row["window"] = None
        if len(self._rows) >= WINDOW or (self._rows and step >= self.total_steps):
            row["window"] = self._window()
            self._stop_watching()
        append_row(self.path, row)

    def _window(self) -> dict[str, Any]:
        table = torch.stack(self._rows).cpu()
        weights = []
        for k, (i, coordinates, frequency) in enumerate(self._watched):
            weights.append(
                {
                    "layer": i,
                    "index": [int(axis) for axis in coordinates],
                    "frequency": finite([frequency])[0],
                    "ints": table[:, 2 * k].int().tolist(),
                    "positions": finite(table[:, 2 * k + 1].tolist(), 4),
                }
            )
        return {"first": self._first, "weights": weights}


def grid_position(layer: QuantizedLayer, coordinates: Coordinates) -> Tensor:
    """Where some weights of a layer lie on its grid: `Quantizer.to_grid` of these weights alone.

    Args:
        layer: with a weight quantizer.
        coordinates: one tensor of indices per dimension of the weight.

    Returns:
        Tensor shaped like the indices.
    """
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = layer.float_weight[coordinates]
    scale = positive_scale(quantizer.scale, quantizer.scale.dtype, 1, 0)
    zero = None if quantizer.zero_point is None else grid_zero(quantizer.zero_point, quantizer.qmin, quantizer.qmax)
    if quantizer.per_channel:
        channels = coordinates[quantizer.axis]
        scale, zero = scale[channels], None if zero is None else zero[channels]
    return weight / scale if zero is None else weight / scale + zero


def batchnorm_divergence(old: Statistics, new: Statistics) -> list[Tensor]:
    """KL divergence of batch-norm statistics from newer ones, in nats.

    Args:
        old: of each layer.
        new: those that are taken for true.

    Returns:
        For each layer `[channels]`; channels that never vary are left out.
    """
    found = []
    for (old_mean, old_var), (mean, var) in zip(old, new, strict=True):
        varies = (var > 1e-10) & (old_var > 1e-10)
        found.append(kl_divergence(*(s[varies].double() for s in (mean, var, old_mean, old_var))))
    return found


def running_statistics(model: nn.Module) -> Statistics:
    """Copies of the running mean and variance of each batch-norm layer, in the order of `batchnorm_layers`."""
    return [tuple(s.clone() for s in pair) for pair in _statistics(model)]


def set_running_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Put back what `running_statistics` copied."""
    for into, pair in zip(_statistics(model), statistics, strict=True):
        for statistic, value in zip(into, pair, strict=True):
            statistic.copy_(value)


def _statistics(model: nn.Module) -> Statistics:
    return [
        tuple(s.detach() for s in (n.running_mean, n.running_var) if s is not None) for n in batchnorm_layers(model)
    ]


def _coordinates(layer: QuantizedLayer, positions: list[int]) -> Coordinates:
    """Indices for each dimension, which also find their weights where the memory format is another."""
    weight = layer.latent_weight
    return torch.unravel_index(torch.tensor(positions, device=weight.device), weight.shape)


def _highest(frequencies: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*frequencies.topk(min(WATCHED_OF_A_LAYER, len(frequencies))), strict=True))


def _count_distances(positions: np.ndarray, qmin: int, qmax: int) -> list[int]:
    inside = positions[(positions >= qmin) & (positions <= qmax)]
    return np.histogram(inside - np.round(inside), bins=BINS, range=(-0.5, 0.5))[0].tolist()
