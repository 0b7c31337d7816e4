"""Charts of a recorded run, for the page.

matplotlib draws them as SVG. Each colour is one of `COLOURS` and becomes a CSS variable in the page, so one drawing
serves the light scheme, the dark one and paper. They are as wide as a phone, and the page lays them side by side where
there is room; lettering is thus readable on both.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_oscqat.report.pictures import BEFORE, FROZEN, OSCILLATING, tidy
from hf_oscqat.report.recording import Recording

INK, LINE = "#1c1d1f", "#d8d8d4"
COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    OSCILLATING: "var(--oscillating)",
    FROZEN: "var(--frozen)",
    BEFORE: "var(--before)",
}
"""Colour of a drawing -> what stands for it in the page."""

WIDTH = 3.7
"""Inches; with lettering of 7.5 points."""
WIDEST_LEGEND = 44
"""Characters of all names in a line of a legend."""
DASHES = (0, (4, 1.5))
STYLES = ({"color": FROZEN, "linestyle": "-"}, {"color": OSCILLATING, "linestyle": DASHES})
"""Of the first and the second curve of a chart; not told apart by colour alone."""

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be searched and selected
    "text.parse_math": False,  # names of runs may hold dollar signs
    "font.size": 7.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.labelsize": 7.5,
    "axes.titlesize": 7,
    "legend.fontsize": 7.5,
}
_styled = matplotlib.rc_context(_SETTINGS)


def to_svg(figure: Figure, name: str) -> Markup:
    """Turn a drawing into SVG for the page, whose caption is what is read aloud.

    Args:
        figure: drawn in `COLOURS`.
        name: unique in the page.
    """
    # The settings of the backend are read when it writes; the salt makes the same drawing the same text.
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="|(?<=url\()#|(?<=href=")#', lambda match: f"{match.group()}{name}-", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    head = f'<svg {size.group()} aria-hidden="true">'
    return Markup(head + re.sub(r"\n\s*", "\n", text[text.index(">") + 1 :]))


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps.

    Attributes:
        name: for the legend.
        steps: `[N]`.
        values: `[N]`.
        style: of the line, one of `STYLES`.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    style: Mapping[str, Any]


@_styled
def curves(
    series: Sequence[Curve], label: str, *, last_step: int, lowest: float | None, highest: float | None
) -> Figure:
    """Draw curves over optimizer steps.

    Args:
        series: what to draw.
        label: of the vertical axis.
        last_step: end of the horizontal axis.
        lowest: beginning of the vertical axis; None leaves it to the values.
        highest: its end, likewise.
    """
    figure, axes = _figure(1.95)
    for curve in series:
        # Of few points, which a line alone would not show, and the last of which is on the edge.
        marker: dict[str, Any] = {"marker": "o", "markersize": 3, "clip_on": False} if len(curve.steps) < 4 else {}
        axes.plot(curve.steps, curve.values, **curve.style, **marker, label=curve.name, linewidth=1.4)
    axes.set(xlabel="optimizer step", ylabel=label, xlim=(0, last_step))
    axes.set_ylim(lowest, highest)
    axes.grid(axis="y")
    fits = sum(len(curve.name) for curve in series) <= WIDEST_LEGEND
    _finish(figure, legend_of=axes if len(series) > 1 else None, columns=2 if fits else 1)
    return figure


@_styled
def heat_map(
    recording: Recording, shares: np.ndarray, colour: str, *, highest: float, last_step: int, label: str
) -> Figure:
    """Draw the layers' shares, `[T, L]`, over time and depth.

    Args:
        recording: whose they are.
        shares: in [0, 1].
        colour: of the highest value; the lowest is transparent.
        highest: share that has this colour.
        last_step: end of the horizontal axis.
        label: of the scale of colours.
    """
    depth = len(recording.layers)
    figure, axes = _figure(max(1.9, min(3.4, 1.0 + 0.045 * depth)))
    last = int(recording.steps[-1])
    # Recordings are not evenly spaced at the beginning and the end; pixels are.
    ends = np.linspace(0, last, max(1, len(recording.steps)) + 1)[1:]
    latest = np.maximum(np.searchsorted(recording.steps, ends, side="right") - 1, 0)
    strength = LinearSegmentedColormap.from_list("", [(*to_rgb(colour), 0.0), (*to_rgb(colour), 1.0)])
    image = axes.imshow(
        100 * shares[latest].T,
        cmap=strength,
        # Most layers are near zero and few are far above: the root lets both be seen.
        norm=PowerNorm(0.5, 0, 100 * max(highest, 1e-4)),
        aspect="auto",
        interpolation="none",
        extent=(0, last, depth + 0.5, 0.5),
    )
    axes.set(xlabel="optimizer step", ylabel="layer, by depth", xlim=(0, last_step))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, fraction=0.06)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    _finish(figure)
    return figure


@_styled
def watched_paths(recording: Recording, i: int, count: int = 4) -> Figure | None:
    """Draw, step by step, the weights that were watched before `steps[i]`; None if none was."""
    window = recording.windows[i]
    if window is None:
        return None
    weights = sorted(window.weights, key=lambda weight: -np.count_nonzero(np.diff(weight.ints)))[:count]
    figure, panels = _panels(0.45 + 0.72 * len(weights), len(weights))
    for axes, weight in zip(panels, weights, strict=True):
        steps = np.arange(window.first, window.first + len(weight.ints))
        axes.plot(
            steps, weight.positions, color=BEFORE, linewidth=1.1, marker=".", markersize=2.5, label="latent weight"
        )
        axes.step(steps, weight.ints, where="mid", color=OSCILLATING, linewidth=1.3, label="its integer")
        name = f"{recording.layers[weight.layer].name} {weight.index}"
        _name_panel(axes, f"{name}, {100 * weight.frequency:.1f}% of steps")
        _integer_axis(axes, weight.ints, weight.positions)
        for threshold in range(min(weight.ints), max(weight.ints)):
            axes.axhline(threshold + 0.5, color=BEFORE, linewidth=0.7, linestyle=":")
    panels[-1].set(xlabel="optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.supylabel("integer")
    _finish(figure, legend_of=panels[0])
    return figure


@_styled
def sampled_paths(recording: Recording, *, last_step: int, count: int = 5) -> Figure | None:
    """Draw, over all of training, the sampled weights of which the integer turned back most often."""
    ints = recording.sampled_ints
    if len(ints) < 3:
        return None
    turns, direction = (np.zeros(ints.shape[1], dtype=int) for _ in range(2))
    for move in np.sign(np.diff(ints, axis=0)):
        turns += move * direction < 0
        direction = np.where(move != 0, move, direction)
    chosen = [int(j) for j in np.argsort(-turns, kind="stable")[:count] if turns[j] > 0]
    if not chosen:
        return None
    figure, panels = _panels(0.45 + 0.58 * len(chosen), len(chosen))
    for axes, j in zip(panels, chosen, strict=True):
        axes.step(recording.steps, ints[:, j], where="post", color=OSCILLATING, linewidth=1.1)
        layer, index = recording.sampled_weight(j)
        _name_panel(axes, f"{layer} {index}, turned back {turns[j]} times")
        _integer_axis(axes, ints[:, j])
    panels[-1].set(xlabel="optimizer step", xlim=(0, last_step))
    figure.supylabel("integer")
    _finish(figure)
    return figure


@_styled
def distances(recording: Recording, chosen: Sequence[int], *, highest: float) -> Figure:
    """Draw how far latent weights lie from the grid at `steps[i]` for the chosen i, each with the first behind it."""
    rows = -(-len(chosen) // 2)
    figure, panels = _panels(0.5 + 1.05 * rows, rows, min(2, len(chosen)), share_y=True)
    edges = np.linspace(-0.5, 0.5, recording.distances.shape[-1] + 1)
    for axes, i in zip(panels, chosen, strict=False):
        axes.stairs(100 * recording.histogram(chosen[0]), edges, color=BEFORE, linewidth=1.1)
        axes.stairs(100 * recording.histogram(i), edges, color=FROZEN, linewidth=1.4)
        axes.set(xlim=(-0.5, 0.5), ylim=(0, 105 * max(highest, 1e-4)), xticks=(-0.5, 0, 0.5))
        _name_panel(axes, f"step {recording.steps[i]:,}")
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel("distance to the nearest grid point, in grid steps")
    figure.supylabel("weights, %")
    _finish(figure)
    return figure


@_styled
def batchnorm(before: np.ndarray, after: np.ndarray, *, limits: tuple[float, float]) -> Figure:
    """Draw how far each batch-norm layer's statistics are off, before and after re-estimation."""
    figure, axes = _figure(2.2)
    depth = np.arange(1, len(before) + 1)
    for values, colour, marker, label in (
        (before, OSCILLATING, "o", "before re-estimation"),
        (after, FROZEN, "s", "after it, on other images"),
    ):
        shown = np.isfinite(values) & (values > 0)
        if shown.any():
            axes.scatter(depth[shown], values[shown], s=11, color=colour, marker=marker, label=label, linewidth=0)
    axes.set(xlabel="batch-norm layer, by depth", ylabel="KL divergence, nats", yscale="log", ylim=limits)
    axes.grid(axis="y")
    _finish(figure, legend_of=axes)
    return figure


@_styled
def scales(recording: Recording, values: np.ndarray, *, last_step: int, count: int = 3) -> Figure:
    """Draw each layer's scale, `[T, L]`, in multiples of its first value; those that change most have names."""
    figure, axes = _figure(2.2)
    ratios = values / values[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        change = np.nan_to_num(np.abs(np.log(ratios[-1])))
    named = [int(j) for j in np.argsort(-change, kind="stable")[:count]]
    for j in range(ratios.shape[1]):
        if j not in named and np.isfinite(ratios[:, j]).all():
            axes.plot(recording.steps, ratios[:, j], color=BEFORE, linewidth=0.6)
    styles = ((OSCILLATING, "-"), (FROZEN, "-"), (INK, DASHES))
    for j, (colour, style) in zip(named, styles, strict=False):
        axes.plot(
            recording.steps, ratios[:, j], color=colour, linestyle=style, linewidth=1.4, label=recording.layers[j].name
        )
    axes.set(xlabel="optimizer step", ylabel="scale / first scale", yscale="log", xlim=(0, last_step))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y")
    _finish(figure, legend_of=axes, columns=1)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _panels(height: float, rows: int, columns: int = 1, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flat)


def _finish(figure: Figure, *, legend_of: Axes | None = None, columns: int = 2) -> None:
    for axes in figure.axes:
        tidy(axes)
    if legend_of is not None:
        # Above, where it covers no curve.
        handles = legend_of.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)


def _name_panel(axes: Axes, name: str) -> None:
    axes.set_title(name, loc="left", color=INK, pad=2)


def _integer_axis(axes: Axes, *values: Sequence[float] | np.ndarray) -> None:
    together = np.concatenate([np.asarray(v, dtype=float) for v in values])
    finite = together[np.isfinite(together)]
    if len(finite):
        axes.set_ylim(np.floor(finite.min()) - 0.3, np.ceil(finite.max()) + 0.3)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3, min_n_ticks=2))
    axes.grid(axis="y")
