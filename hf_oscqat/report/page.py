"""One page about one run or two: `report.html`, which needs nothing beside it, and pictures for a model card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from hf_oscqat.report import charts
from hf_oscqat.report.pictures import FROZEN, OSCILLATING, draw_distances, draw_oscillation
from hf_oscqat.report.recording import Recording, read_recording

PAGE, TEMPLATE = "report.html", "report.html.jinja"
RUN_LETTERS = "AB"


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption.

    Attributes:
        svg: for the page.
        caption: below it.
    """

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """What one question is answered with.

    Attributes:
        name: anchor in the page.
        title: its heading.
        text: how to read the charts.
        rows: rows of charts that belong side by side.
    """

    name: str
    title: str
    text: str
    rows: list[list[Chart]]


@dataclass(frozen=True)
class Column:
    """A column of the table of layers.

    Attributes:
        title: its heading.
        cells: (what is shown, what is sorted by) of each row.
        is_number: whether it is sorted and aligned as numbers.
    """

    title: str
    cells: Sequence[tuple[str, str | float]]
    is_number: bool = True


def write_report(
    run_dirs: Sequence[str | Path], output: str | Path | None = None, steps: Sequence[int] | None = None
) -> Path:
    """Write the report of one run, or of two side by side.

    Args:
        run_dirs: folders with a recording; of runs that have ended, were stopped or go on.
        output: folder to write to; None takes `report` in the folder of the run, and `report_<name of the other run>`
            in that of the first where there are two.
        steps: training steps to show histograms and weights of; each is replaced by the nearest recorded one. None
            takes four, from the first to the last.

    Returns:
        The page. For one run, `oscillation.png`, `distances.png` and `layers.png` lie beside it.

    Raises:
        ValueError: if there is nothing recorded in a folder, or not one folder or two different ones are given.
    """
    if not 1 <= len(run_dirs) <= 2:
        raise ValueError(f"got {len(run_dirs)} folders, expected that of one run, or of two to compare")
    if len({Path(run_dir).resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise ValueError(f"got {run_dirs[0]} twice, expected two runs to compare")
    recordings = [read_recording(run_dir) for run_dir in run_dirs]
    if output is None:
        folder = Path(run_dirs[0])
        folder = folder if folder.is_dir() else folder.parent
        output = folder / ("report" if len(recordings) == 1 else f"report_{recordings[1].name}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    page = output / PAGE
    beside = output / f".{PAGE}.new"
    beside.write_text(render_page(recordings, steps), encoding="utf-8")
    beside.replace(page)
    if len(recordings) == 1:
        _draw_pictures(recordings[0], output)
    return page


def render_page(recordings: Sequence[Recording], steps: Sequence[int] | None = None) -> str:
    """Make the page of one recording or two; see `write_report`."""
    labels = [_label(i, recordings) for i in range(len(recordings))]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(recording.name for recording in recordings),
        labels=labels,
        summary=_summary(recordings),
        sections=_sections(recordings, labels, steps),
        columns=_columns(recordings),
    )


def _label(i: int, recordings: Sequence[Recording]) -> str:
    return recordings[i].name if len(recordings) == 1 else f"{RUN_LETTERS[i]}: {recordings[i].name}"


def _summary(recordings: Sequence[Recording]) -> list[tuple[str, list[str]]]:
    """Rows of the table at the top: what, and its value in each run."""

    def last(recording: Recording, key: str) -> float | None:
        return next((scalars[key] for scalars in reversed(recording.log.values()) if key in scalars), None)

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.2f}%"  # noqa: RUF001

    rows: list[tuple[str, Callable[[Recording], str]]] = [
        ("Model", lambda r: " ".join(filter(None, (r.about.get("model"), r.about.get("scheme")))) or "–"),  # noqa: RUF001
        ("Against oscillation", lambda r: r.about.get("remedies") or "nothing"),
        ("Steps recorded", lambda r: f"to {r.steps[-1]:,} of {r.total_steps:,}"),
        ("Top-1 accuracy at the end", lambda r: percent(last(r, "eval_accuracy"))),
        ("Training loss at the end", lambda r: "–" if (v := last(r, "loss")) is None else f"{v:.4g}"),  # noqa: RUF001
        (
            "Counts as oscillating",
            lambda r: f"above {100 * r.oscillating_above:g}% of steps, over some {1 / r.momentum:,.0f} steps",
        ),
        ("Oscillating weights, peak", lambda r: percent(r.of_all_weights(r.oscillating).max())),
        ("Oscillating weights, end", lambda r: percent(r.of_all_weights(r.oscillating)[-1])),
        (
            "Of the last oscillations, by a moving scale",
            lambda r: "–" if (v := last(r, "scale_caused_percent")) is None else f"{v:.0f}%",  # noqa: RUF001
        ),
        ("Frozen weights, end", lambda r: percent(r.of_all_weights(r.frozen)[-1])),
    ]
    return [(title, [value(recording) for recording in recordings]) for title, value in rows]


def _sections(recordings: Sequence[Recording], labels: list[str], steps: Sequence[int] | None) -> list[Section]:
    # More is logged than recorded, also after the last recording of a run that goes on.
    last_step = max(max(int(recording.steps[-1]), 0, *recording.log) for recording in recordings)
    chosen = [_nearest(recording, steps) for recording in recordings]
    highest = max(r.histogram(i).max() for r, those in zip(recordings, chosen, strict=True) for i in those)

    def each(
        draw: Callable[[Recording], Figure | None], name: str, caption: Callable[[Recording], str]
    ) -> list[Chart]:
        found = []
        for i, (recording, label) in enumerate(zip(recordings, labels, strict=True)):
            figure, text = draw(recording), caption(recording)
            if figure is not None:
                text = text if len(recordings) == 1 else f"{label}. {text}"
                found.append(Chart(charts.to_svg(figure, f"{name}{i}"), text))
        return found

    def heat(key: str, colour: str, what: str) -> list[Chart]:
        top = max(getattr(recording, key).max() for recording in recordings)

        def caption(recording: Recording) -> str:
            shares = getattr(recording, key)
            worst = int(shares.max(0).argmax())
            if shares.max() == 0:
                return f"No weight was {what}."
            return f"Most {what}: {recording.layers[worst].name} (depth {worst + 1}), {100 * shares.max():.2f}%."

        return each(
            lambda r: charts.heat_map(
                r, getattr(r, key), colour, highest=top, last_step=last_step, label=f"{what} weights, %"
            ),
            key,
            caption,
        )

    def shares_caption(recording: Recording) -> str:
        values = 100 * recording.of_all_weights(recording.oscillating)
        frozen = 100 * recording.of_all_weights(recording.frozen)[-1]
        return (
            f"Oscillating: {values[0]:.2f}% at the start, {values.max():.2f}% at the peak, {values[-1]:.2f}% at the "
            f"end. Frozen at the end: {frozen:.2f}%."
        )

    sections = [
        Section(
            "training",
            "Accuracy and loss",
            "Accuracy is measured after batch-norm statistics were re-estimated, where that is switched on.",
            [_log_charts(recordings, labels, last_step)],
        ),
        Section(
            "shares",
            "Oscillating and frozen weights",
            "A weight oscillates if its integer keeps moving back and forth: its oscillation frequency, a moving "
            "average, is above the threshold given at the top. Runs with different averages cannot be compared in "
            "this. Shares are of all tracked weights, those of at most 4 bits.",
            [each(lambda r: _shares(r, recordings, last_step), "shares", shares_caption)],
        ),
        Section(
            "layers",
            "Layer by layer",
            "Time runs to the right and depth downwards; the table below has the layers' names. The deeper a colour, "
            "the larger the share of the layer's weights. Depthwise convolutions, with few weights for each output, "
            "often stand out.",
            [heat("oscillating", OSCILLATING, "oscillating"), heat("frozen", FROZEN, "frozen")],
        ),
        Section(
            "paths",
            "The most oscillating weights",
            "Of the sampled weights: their integers at each step before a recording, with the latent weight that "
            "rounding makes them of, and over all of training, as far as it was recorded. A weight that oscillates "
            "keeps crossing the threshold between two integers. Percentages are oscillation frequencies.",
            [
                *_windows(recordings, chosen, each),
                each(
                    lambda r: charts.sampled_paths(r, last_step=last_step),
                    "sampled",
                    lambda r: "Over all of training, as recorded: the sampled weights that turned back most often.",
                ),
            ],
        ),
        Section(
            "distances",
            "Distance of latent weights to the grid",
            "Each weight lies between two grid points; 0 is on a grid point, and both edges are the threshold halfway "
            "between two. Oscillating weights pile up at the edges; dampening takes weights to 0. Freezing fixes "
            "the integer only: a frozen weight counts where its latent value lies. Grey: the first recording.",
            [
                each(
                    lambda r: charts.distances(r, _nearest(r, steps), highest=highest),
                    "distances",
                    lambda r: (
                        f"Within a tenth of a step of a threshold: {_near_threshold(r, 0):.2f}% at step "
                        f"{r.steps[0]:,}, {_near_threshold(r, -1):.2f}% at step {r.steps[-1]:,}."
                    ),
                )
            ],
        ),
        Section(
            "batchnorm",
            "Batch-norm statistics",
            "How far running statistics are from those of the network as it is, layer by layer: in training, where "
            "they average over integers that weights no longer have, and after re-estimation. At the last evaluation.",
            [each(lambda r: _batchnorm(r, recordings), "batchnorm", _batchnorm_caption)],
        ),
        Section(
            "scales",
            "Scales of the grids",
            "How the learned steps of the grids move, in multiples of their first value. A grid that moves changes "
            "integers without any weight moving.",
            [
                each(
                    lambda r: charts.scales(r, r.weight_scale, last_step=last_step),
                    "weightscale",
                    lambda r: "Weights.",
                ),
                each(
                    lambda r: (
                        charts.scales(r, r.input_scale, last_step=last_step)
                        if np.isfinite(r.input_scale).any()
                        else None
                    ),
                    "inputscale",
                    lambda r: "Inputs of layers.",
                ),
            ],
        ),
    ]
    for section in sections:
        section.rows[:] = [row for row in section.rows if row]
    return [section for section in sections if section.rows]


def _log_charts(recordings: Sequence[Recording], labels: list[str], last_step: int) -> list[Chart]:
    found = []
    for name, keys, axis, factor in (
        ("accuracy", {"eval_accuracy": "top-1", "eval_top5_accuracy": "top-5"}, "accuracy, %", 100),
        ("loss", {"loss": "training", "eval_loss": "evaluation"}, "loss", 1),
    ):
        series, said = [], []
        for i, (recording, label) in enumerate(zip(recordings, labels, strict=True)):
            for k, (key, what) in enumerate(keys.items()):
                if len(recordings) == 2 and k != (0 if name == "accuracy" else 1):
                    continue  # one curve of each run: more of them could not be told apart
                points = {step: s[key] * factor for step, s in recording.log.items() if key in s}
                shown = f"{label}, {what}" if len(recordings) == 2 else what
                if points:
                    style = charts.STYLES[i if len(recordings) == 2 else k]
                    series.append(charts.Curve(shown, [*points], [*points.values()], style))
                    said.append(f"{shown}: {points[max(points)]:.4g} at the end")
        if series:
            text = f"{axis.partition(',')[0].capitalize()}. {'; '.join(said)}."
            figure = charts.curves(
                series, axis, last_step=last_step, lowest=None if name == "accuracy" else 0, highest=None
            )
            found.append(Chart(charts.to_svg(figure, name), text))
    return found


def _shares(recording: Recording, recordings: Sequence[Recording], last_step: int) -> Figure:
    of_all = {key: [100 * r.of_all_weights(getattr(r, key)) for r in recordings] for key in ("oscillating", "frozen")}
    i = next(i for i, other in enumerate(recordings) if other is recording)
    return charts.curves(
        [
            charts.Curve(key, recording.steps.tolist(), values[i].tolist(), {"color": colour, "linestyle": style})
            for (key, values), colour, style in zip(
                of_all.items(), (OSCILLATING, FROZEN), ("-", charts.DASHES), strict=True
            )
        ],
        "tracked weights, %",
        last_step=last_step,
        lowest=0,
        highest=max(1e-3, 1.05 * max(v.max() for values in of_all.values() for v in values)),
    )


def _windows(
    recordings: Sequence[Recording], chosen: list[list[int]], each: Callable[..., list[Chart]]
) -> list[list[Chart]]:
    """A row of charts for each of the last two chosen steps: the window that ended nearest to it."""
    of_runs = []
    for recording, those in zip(recordings, chosen, strict=True):
        lengths = np.array([0 if window is None else len(window.weights[0].ints) for window in recording.windows])
        # The last one ends with training, however short it is by then.
        ended = np.flatnonzero((lengths > 0) & (lengths >= lengths.max() / 2))
        nearest = [
            int(ended[np.abs(recording.steps[ended] - recording.steps[i]).argmin()]) for i in those if ended.size
        ]
        of_runs.append(sorted(set(nearest))[-2:])
    rows = []
    for k in range(2):
        of_run = {id(r): those[k] for r, those in zip(recordings, of_runs, strict=True) if k < len(those)}

        def draw(recording: Recording, of_run: dict[int, int] = of_run) -> Figure | None:
            return charts.watched_paths(recording, of_run[id(recording)]) if id(recording) in of_run else None

        def caption(recording: Recording, of_run: dict[int, int] = of_run) -> str:
            return f"Step by step, up to step {recording.steps[of_run.get(id(recording), -1)]:,}."

        rows.append(each(draw, f"window{k}", caption))
    return rows


def _batchnorm(recording: Recording, recordings: Sequence[Recording]) -> Figure | None:
    found = [np.concatenate(r.batchnorm[max(r.batchnorm)]) for r in recordings if r.batchnorm]
    shown = [values[np.isfinite(values) & (values > 0)] for values in found]
    if not recording.batchnorm or not any(values.size for values in shown):
        return None
    limits = min(v.min() for v in shown if v.size) / 1.5, max(v.max() for v in shown if v.size) * 1.5
    return charts.batchnorm(*recording.batchnorm[max(recording.batchnorm)], limits=limits)


def _batchnorm_caption(recording: Recording) -> str:
    if not recording.batchnorm:
        return ""
    step = max(recording.batchnorm)
    means = [np.nanmean(values) if np.isfinite(values).any() else None for values in recording.batchnorm[step]]
    before, after = ("not measured" if mean is None else f"{mean:.3g}" for mean in means)
    return f"Mean over layers at step {step:,}: {before} before re-estimation, {after} after it."


def _near_threshold(recording: Recording, i: int) -> float:
    histogram = recording.histogram(i)
    outer = len(histogram) // 10
    return 100 * float(histogram[:outer].sum() + histogram[-outer:].sum())


def _nearest(recording: Recording, steps: Sequence[int] | None) -> list[int]:
    """Positions in `recording.steps` of what is to be shown, in order, each once."""
    last = int(recording.steps[-1])
    wanted = np.linspace(int(recording.steps[0]), last, 4) if not steps else np.array(sorted(steps))
    return sorted({int(np.abs(recording.steps - step).argmin()) for step in wanted})


def _columns(recordings: Sequence[Recording]) -> list[Column]:
    """The table of layers; layers of the second run that the first lacks come last."""
    layers = {layer.name: layer for recording in recordings for layer in recording.layers}
    columns = [
        Column("Depth", [(str(i), i) for i in range(1, len(layers) + 1)]),
        Column("Layer", [(name, name) for name in layers], is_number=False),
        Column("Shape", [(" x ".join(map(str, la.shape)), la.num_weights) for la in layers.values()]),
    ]
    measures: list[tuple[str, Callable[[Recording], dict[str, float]], str]] = [
        ("Bits", lambda r: {layer.name: layer.bits for layer in r.layers}, ".0f"),
        ("Oscillating, end, %", lambda r: _by_layer(r, 100 * r.oscillating[-1]), ".2f"),
        ("Oscillating, peak, %", lambda r: _by_layer(r, 100 * r.oscillating.max(0)), ".2f"),
        ("Frozen, end, %", lambda r: _by_layer(r, 100 * r.frozen[-1]), ".2f"),
        ("Weight scale, end / start", lambda r: _by_layer(r, r.weight_scale[-1] / r.weight_scale[0]), ".3f"),
        ("Batch-norm KL before", lambda r: _batchnorm_by_layer(r, 0), ".3g"),
        ("Batch-norm KL after", lambda r: _batchnorm_by_layer(r, 1), ".3g"),
    ]
    for title, measure, form in measures:
        for i, recording in enumerate(recordings):
            found = measure(recording)
            cells = [_cell(found.get(name), form) for name in layers]
            if any(shown for shown, _ in cells):
                columns.append(Column(title if len(recordings) == 1 else f"{RUN_LETTERS[i]}: {title}", cells))
    return columns


def _cell(value: float | None, form: str) -> tuple[str, float]:
    return ("", -1.0) if value is None or not np.isfinite(value) else (format(value, form), float(value))


def _by_layer(recording: Recording, values: np.ndarray) -> dict[str, float]:
    return {layer.name: float(value) for layer, value in zip(recording.layers, values, strict=True)}


def _batchnorm_by_layer(recording: Recording, which: int) -> dict[str, float]:
    """By the layer that batch-norm follows."""
    if not recording.batchnorm:
        return {}
    values = recording.batchnorm[max(recording.batchnorm)][which]
    return {
        layer: float(value)
        for (_, layer), value in zip(recording.batchnorm_layers, values, strict=True)
        if layer is not None
    }


def _draw_pictures(recording: Recording, folder: Path) -> None:
    shares = (100 * recording.of_all_weights(share) for share in (recording.oscillating, recording.frozen))
    draw_oscillation(
        [
            {"step": int(step), "oscillating_percent": float(oscillating), "frozen_percent": float(frozen)}
            for step, oscillating, frozen in zip(recording.steps, *shares, strict=True)
        ],
        folder / "oscillation.png",
    )
    first, last = ({"counts": recording.histogram(i).tolist(), "low": -0.5, "high": 0.5} for i in (0, -1))
    draw_distances(first, last, folder / "distances.png")
    figure = charts.heat_map(
        recording,
        recording.oscillating,
        OSCILLATING,
        highest=recording.oscillating.max(),
        last_step=int(recording.steps[-1]),
        label="oscillating weights, %",
    )
    figure.savefig(folder / "layers.png", dpi=200, facecolor="white")
