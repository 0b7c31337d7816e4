"""Where latent weights lie between grid points, before training and after it with each remedy."""

import copy
from typing import Any

from matplotlib.figure import Figure

from hf_oscqat.remedies.batchnorm import reestimate_batchnorm
from hf_oscqat.remedies.tracker import OscillationTracker
from hf_oscqat.report.pictures import AFTER, BEFORE, outline, tidy
from hf_oscqat.report.recorder import DistanceHistogram, distance_histogram
from hf_oscqat.studies.base import Study, StudyResult
from hf_oscqat.studies.experiment import METHODS, OSCILLATING_ABOVE, TRACKER_MOMENTUM, Experiment, ExperimentSettings


def run(settings: ExperimentSettings) -> StudyResult:
    """Train with each method from the same float model."""
    experiment = Experiment(settings)
    before = distance_histogram(experiment.calibrated())
    histograms, rows = {}, []
    for method in METHODS:
        model = experiment.train(method)
        fresh = copy.deepcopy(model)
        reestimate_batchnorm(fresh, experiment.training_batches(50))
        tracker = OscillationTracker(model, momentum=TRACKER_MOMENTUM, oscillating_above=OSCILLATING_ABOVE)
        histograms[method] = distance_histogram(model)
        rows.append(
            {
                "method": method,
                "near_threshold_percent": near_threshold(histograms[method]),
                "oscillating_percent": 100 * tracker.oscillating_fraction,
                "caused_by_scale_percent": 100 * tracker.scale_caused_fraction,
                "frozen_percent": 100 * tracker.frozen_fraction,
                "top1_before_reestimation": experiment.accuracy(model),
                "top1": experiment.accuracy(fresh),
            }
        )
    near = ", ".join(f"{row['method']} {row['near_threshold_percent']:.2f}%" for row in rows)
    finding = (
        "Low-bit weights within a tenth of a step of the threshold between two grid points: "
        f"before training {near_threshold(before):.2f}%, after: {near}."
    )
    return StudyResult(rows, _draw(before, histograms), finding)


def near_threshold(histogram: DistanceHistogram, margin: float = 0.1) -> float:
    """Share of weights whose distance to the next threshold is at most `margin` steps, in percent."""
    bins = len(histogram.counts)
    outer = round(margin * bins / (histogram.high - histogram.low))
    total = sum(histogram.counts)
    return 100 * (sum(histogram.counts[:outer]) + sum(histogram.counts[-outer:])) / max(1, total)


def _draw(before: DistanceHistogram, after: dict[str, DistanceHistogram]) -> Figure:
    figure = Figure(figsize=(10, 2.8), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(after), sharey=True)
    for axes, (method, histogram) in zip(panels.flat, after.items(), strict=True):
        for shown, colour, label in ((before, BEFORE, "before training"), (histogram, AFTER, "after")):
            outline(axes, shown.to_dict(), color=colour, label=label, linewidth=1.6)
        axes.set_title(method.replace("_", " "), loc="left", fontsize=9)
        axes.set(xlim=(-0.5, 0.5))
        tidy(axes)
    panels.flat[0].set_ylabel("low-bit weights, %")
    panels.flat[0].set_ylim(bottom=0)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.supxlabel("distance of the latent weight to the nearest grid point, in grid steps", fontsize=9)
    return figure


STUDY = Study(
    name="distances",
    question="Where do latent weights lie between grid points, after training with each remedy?",
    source="Nagel et al. (ICML 2022), fig. 3 and sec. 4",
    settings=ExperimentSettings,
    run=run,
)
