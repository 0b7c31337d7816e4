"""Draw a run: oscillation over training, and distances to the grid before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BEFORE, AFTER = "#9a9a9a", "#1f6f8b"
OSCILLATING, FROZEN = "#c8553d", "#1f6f8b"


def draw_oscillation(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the share of oscillating and of frozen weights over training.

    Args:
        log_history: Trainer's; entries with `oscillating_percent`, `frozen_percent` and `step` are used.
        path: PNG to write.

    Raises:
        ValueError: if no entry has them.
    """
    entries = [entry for entry in log_history if "oscillating_percent" in entry]
    if not entries:
        raise ValueError("got a log without oscillating_percent, expected one of OscQATTrainer with logging on")
    steps = [entry["step"] for entry in entries]
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for key, colour, label in (
        ("oscillating_percent", OSCILLATING, "oscillating"),
        ("frozen_percent", FROZEN, "frozen"),
    ):
        axes.plot(steps, [entry[key] for entry in entries], color=colour, label=label, linewidth=1.8)
    axes.set(xlabel="optimizer step", ylabel="low-bit weights, %", xlim=(0, steps[-1]))
    axes.set_ylim(bottom=0)
    _finish(figure, path)


def draw_distances(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> None:
    """Draw the histograms of latent weights' distance to the nearest grid point, before and after training.

    Args:
        before: `DistanceHistogram.to_dict()` of the calibrated model.
        after: the same of the trained one.
        path: PNG to write.
    """
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for histogram, colour, label in ((before, BEFORE, "before training"), (after, AFTER, "after training")):
        outline(axes, histogram, color=colour, label=label, linewidth=1.8)
    axes.set(xlabel="distance to the nearest grid point, in grid steps", ylabel="low-bit weights, %", xlim=(-0.5, 0.5))
    axes.set_ylim(bottom=0)
    _finish(figure, path)


def outline(axes: Axes, histogram: Mapping[str, Any], **style: Any) -> None:
    """Draw the outline of a histogram, in percent of its weights.

    Args:
        axes: where to draw.
        histogram: `DistanceHistogram.to_dict()`.
        **style: of the line.
    """
    counts, low, high = histogram["counts"], histogram["low"], histogram["high"]
    width = (high - low) / len(counts)
    edges = [low + width * i for i in range(len(counts) + 1)]
    total = sum(counts) or 1
    axes.stairs([100 * c / total for c in counts], edges, **style)


def tidy(axes: Axes, legend: Mapping[str, Any] | None = None) -> None:
    """Take away what no reader needs, and show the legend if its options are given."""
    axes.spines[["top", "right"]].set_visible(False)
    if legend is not None:
        axes.legend(frameon=False, **legend)


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        tidy(axes, legend={})
    figure.savefig(path)
