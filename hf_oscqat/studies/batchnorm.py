"""What oscillating weights do to batch-norm: how far running statistics are off, and what re-estimation gives back.

The running statistics average over steps in which oscillating weights had other integers. A weight of a depthwise
convolution is one of few that its output sums over, so that one integer more or less moves the output's mean and
variance by much; in a pointwise convolution hundreds average out (Nagel et al., ICML 2022, sec. 3.1, table 1).
"""

import copy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_oscqat.prepare import short_name
from hf_oscqat.quantization.layers import QUANTIZABLE
from hf_oscqat.remedies.batchnorm import batchnorm_layers, kl_divergence, reestimate_batchnorm
from hf_oscqat.report.pictures import AFTER, BEFORE, OSCILLATING, tidy
from hf_oscqat.studies.base import Study, StudyResult
from hf_oscqat.studies.experiment import Experiment, ExperimentSettings

KINDS = {"depthwise": OSCILLATING, "pointwise": AFTER, "full": BEFORE}


@dataclass
class BatchNormSettings(ExperimentSettings):
    """Options of the studies of batch-norm."""

    batches: int = field(default=50, metadata={"help": "Training batches that population statistics are taken from."})


@dataclass
class ReestimationSettings(BatchNormSettings):
    """Options of the study of re-estimation."""

    widths: list[int] = field(default_factory=lambda: [8, 4, 3], metadata={"help": "Widths of weights to compare."})
    seeds: int = field(default=1, metadata={"help": "Trainings at each width."})


def divergences(model: PreTrainedModel, experiment: Experiment, batches: int) -> dict[str, Tensor]:
    """KL divergence of each batch-norm layer's running statistics from those of the training images now.

    Args:
        model: left as it is.
        experiment: for its images.
        batches: training batches that the population statistics are taken from.

    Returns:
        Name of layer -> `[channels]`. Channels that never vary are left out.
    """
    fresh = copy.deepcopy(model)
    reestimate_batchnorm(fresh, experiment.training_batches(batches), total_variance=True)
    names = {id(module): name for name, module in fresh.named_modules()}
    found = {}
    for old, new in zip(batchnorm_layers(model), batchnorm_layers(fresh), strict=True):
        assert new.running_mean is not None and new.running_var is not None
        assert old.running_mean is not None and old.running_var is not None
        varies = (new.running_var > 1e-10) & (old.running_var > 1e-10)
        statistics = (new.running_mean, new.running_var, old.running_mean, old.running_var)
        found[short_name(names[id(new)])] = kl_divergence(*(s[varies].double() for s in statistics))
    return found


def kinds_of_convolutions(model: nn.Module) -> dict[str, str]:
    """Name of each batch-norm layer -> kind of the convolution defined before it: depthwise, pointwise or full."""
    kinds, kind = {}, "full"
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE):
            shape: Any = module.weight.shape
            groups = getattr(module, "groups", 1)
            kind = "depthwise" if groups > 1 and shape[1] == 1 else "pointwise" if shape[2:].numel() == 1 else "full"
        elif any(module is layer for layer in batchnorm_layers(module)):
            kinds[short_name(name)] = kind
    return kinds


def run_divergence(settings: BatchNormSettings) -> StudyResult:
    """Compare running with population statistics after plain low-bit training, and after the same with 8 bits."""
    experiment = _with_batchnorm(settings)
    model = experiment.train("lsq")
    on_grid = divergences(model, experiment, settings.batches)
    # A control that differs in width alone: running statistics lag behind any weights that still move.
    at_8_bits = divergences(experiment.train("lsq", weight_bits=8), experiment, settings.batches)
    kinds = kinds_of_convolutions(model)
    rows: list[dict[str, Any]] = [
        {
            "layer": name,
            "convolution": kinds[name],
            "mean_kl": values.mean().item(),
            "max_kl": values.max().item(),
            "mean_kl_at_8_bits": at_8_bits[name].mean().item(),
        }
        for name, values in on_grid.items()
        if values.numel()  # of a norm whose channels are all constant there is nothing to tell
    ]
    means = _by_kind(rows, "mean_kl")
    control = _by_kind(rows, "mean_kl_at_8_bits")
    finding = f"Mean KL divergence with {settings.weight_bits}-bit weights (with 8 bits): " + ", ".join(
        f"{kind} {means[kind]:.4g} ({control[kind]:.4g})" for kind in means
    )
    return StudyResult(rows, _draw_divergence(rows), finding + ".")


def _with_batchnorm(settings: BatchNormSettings) -> Experiment:
    experiment = Experiment(settings)
    if not batchnorm_layers(experiment.float_model):
        raise ValueError(
            f"got {settings.model_name_or_path}, which has no batch-norm with running statistics, expected a network "
            "that has, such as mobilenetv2_035"
        )
    return experiment


def _by_kind(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    values = {kind: [row[key] for row in rows if row["convolution"] == kind] for kind in KINDS}
    return {kind: fmean(found) for kind, found in values.items() if found}


def run_reestimation(settings: ReestimationSettings) -> StudyResult:
    """Measure accuracy before and after re-estimation at each width, and in float."""
    experiment = _with_batchnorm(settings)
    rows = [_before_and_after(experiment, experiment.float_model, "float", settings)]
    for bits in settings.widths:
        for seed in range(settings.seed, settings.seed + settings.seeds):
            model = experiment.train("lsq", seed=seed, weight_bits=bits)
            rows.append(_before_and_after(experiment, model, f"{bits} bits, seed {seed}", settings))
    gains = ", ".join(f"{row['weights']}: {row['after'] - row['before']:+.2f}" for row in rows)
    return StudyResult(
        rows, _draw_reestimation(rows), f"Change of top-1 accuracy by re-estimation, in points: {gains}."
    )


def _before_and_after(
    experiment: Experiment, model: PreTrainedModel, weights: str, settings: ReestimationSettings
) -> dict[str, Any]:
    fresh = copy.deepcopy(model)
    reestimate_batchnorm(fresh, experiment.training_batches(settings.batches))
    return {
        "weights": weights,
        "before": experiment.accuracy(model),
        "after": experiment.accuracy(fresh),
        "loss_before": experiment.training_loss(model),
        "loss_after": experiment.training_loss(fresh),
    }


def _draw_divergence(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 0.5 + 0.16 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kind, colour in KINDS.items():
        chosen = [(i, row) for i, row in enumerate(rows) if row["convolution"] == kind]
        if chosen:
            axes.barh([i for i, _ in chosen], [row["mean_kl"] for _, row in chosen], color=colour, label=kind)
    axes.scatter(
        [row["mean_kl_at_8_bits"] for row in rows], range(len(rows)), color="black", s=5, label="with 8-bit weights"
    )
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=6)
    axes.set_ylim(len(rows), -1)
    axes.set_xscale("log")
    axes.set(xlabel="KL divergence of running from population statistics, mean over channels, nats")
    tidy(axes)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_reestimation(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for key, offset, colour in (("before", -0.2, BEFORE), ("after", 0.2, AFTER)):
        axes.bar([i + offset for i in range(len(rows))], [row[key] for row in rows], 0.38, color=colour, label=key)
    axes.set_xticks(range(len(rows)), [row["weights"].replace(", ", "\n") for row in rows])
    lowest = min(min(row["before"], row["after"]) for row in rows)
    axes.set(ylabel="top-1 accuracy, %", ylim=(max(0, lowest - 5), 100))
    tidy(axes)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


DIVERGENCE = Study(
    name="batchnorm",
    question="How far are batch-norm's running statistics from those of the network, layer by layer?",
    source="Nagel et al. (ICML 2022), sec. 3.1, table 1",
    settings=BatchNormSettings,
    run=run_divergence,
)
REESTIMATION = Study(
    name="reestimation",
    question="How much accuracy does re-estimating batch-norm statistics give back, at which width?",
    source="Nagel et al. (ICML 2022), sec. 3.1, table 2",
    settings=ReestimationSettings,
    run=run_reestimation,
)
