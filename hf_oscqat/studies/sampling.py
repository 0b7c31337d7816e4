"""Is the state in which training leaves oscillating weights a good one? Sample others, and search for a better one.

At the end of training an oscillating weight is at one of two integers by chance. Here those states are drawn anew, up
with the probability that the weight was up during the last steps, and then chosen together by a binary optimisation in
the manner of AdaRound (Nagel et al., ICML 2020), on the task loss. If sampled states are as good as the trained one
and optimised ones better, then oscillations have kept training from its minimum (Nagel et al., ICML 2022, table 3).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.remedies.batchnorm import batchnorm_layers, reestimate_batchnorm
from hf_oscqat.remedies.tracker import OscillationTracker, oscillation_state
from hf_oscqat.report.pictures import AFTER, BEFORE, OSCILLATING, tidy
from hf_oscqat.studies.base import Study, StudyResult
from hf_oscqat.studies.experiment import TRACKER_MOMENTUM, Experiment, ExperimentSettings

# AdaRound's rectified sigmoid is stretched to [-0.1, 1.1] and cut to [0, 1], so that it reaches both ends.
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1


@dataclass
class SamplingSettings(ExperimentSettings):
    """Options of the study of sampling."""

    samples: int = field(default=10, metadata={"help": "States to draw."})
    oscillating_above: float = field(default=0.005, metadata={"help": "Frequency above which a weight is drawn."})
    optimization_steps: int = field(default=300, metadata={"help": "Of the binary optimisation."})
    optimization_learning_rate: float = field(default=0.02, metadata={"help": "Of its Adam."})
    regularization: float = field(
        default=0.01, metadata={"help": "Weight of the term that drives each choice to one of its two ends."}
    )


@dataclass(frozen=True)
class Choice:
    """The two states of one layer's oscillating weights.

    Attributes:
        mask: which weights oscillate, shaped like the weight.
        lower: lower integer of each, `[oscillating]`.
        probability: share of recent steps in which it was at the upper one, `[oscillating]`, in [0, 1].
    """

    mask: Tensor
    lower: Tensor
    probability: Tensor


class SoftChoice(nn.Module):
    """Stands in for a weight quantizer: oscillating weights between their two integers, all others at theirs.

    Args:
        quantizer: the weight's.
        weight: the latent weight.
        choice: the two states.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor, choice: Choice) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.choice = choice
        with torch.no_grad():
            self.rest = quantizer.to_int(weight)
            share = choice.probability.clamp(0.01, 0.99)
            self.logit = nn.Parameter(torch.logit((share - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)))

    def position(self) -> Tensor:
        """Where each oscillating weight is between its two integers, in [0, 1]."""
        stretched = self.logit.sigmoid() * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
        return stretched.clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the real weight; the latent one is not looked at."""
        w_int = self.rest.masked_scatter(self.choice.mask, self.choice.lower + self.position())
        zero = self.quantizer.to_real(torch.zeros_like(self.rest))
        step = self.quantizer.to_real(torch.ones_like(self.rest)) - zero
        return (zero + step * w_int).to(weight.dtype)


def choices(tracker: OscillationTracker, above: float) -> dict[str, Choice]:
    """The two states of every oscillating weight, from the tracker's mean integers.

    Args:
        tracker: of a trained model, with mean integers.
        above: frequency above which a weight oscillates.
    """
    found = {}
    for name, layer in tracker.layers.items():
        state = oscillation_state(layer)
        quantizer = cast(Quantizer, layer.weight_quantizer)
        mask = state.frequency > above
        mean = state.mean_int[mask]
        lower = mean.floor().clamp(quantizer.qmin, quantizer.qmax - 1)
        found[name] = Choice(mask, lower, (mean - lower).clamp(0, 1))
    return found


def fix(tracker: OscillationTracker, states: dict[str, Choice], upper: Iterable[Tensor]) -> None:
    """Hold oscillating weights at the given integers, as freezing does.

    Args:
        tracker: of the model to change.
        states: the choices.
        upper: for each layer of `states`, whether each weight is at its upper integer, `[oscillating]`.
    """
    for (name, choice), is_upper in zip(states.items(), upper, strict=True):
        layer = tracker.layers[name]
        quantizer = cast(Quantizer, layer.weight_quantizer)
        frozen_int = quantizer.allow_freezing(layer.latent_weight)
        frozen_int[choice.mask] = (choice.lower + is_upper).to(frozen_int.dtype)
        quantizer.refresh()


def optimise(
    model: PreTrainedModel, states: dict[str, Choice], experiment: Experiment, settings: SamplingSettings
) -> list[Tensor]:
    """Choose the states together, by gradient descent on the task loss with choices that harden over time.

    Args:
        model: trained; its batch-norm statistics are used as they are. Left as it was.
        states: the choices.
        experiment: for training batches.
        settings: see `SamplingSettings`.

    Returns:
        For each layer of `states`, whether each weight is at its upper integer.
    """
    model = copy.deepcopy(model).eval()
    tracker = OscillationTracker(model, momentum=TRACKER_MOMENTUM)
    soft = []
    for name, choice in states.items():
        layer = tracker.layers[name]
        stand_in = SoftChoice(cast(Quantizer, layer.weight_quantizer), layer.float_weight.detach(), choice)
        layer.weight_quantizer = cast(Quantizer, stand_in)
        soft.append(stand_in)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for stand_in in soft:
        stand_in.logit.requires_grad_(True)
    optimizer = torch.optim.Adam([s.logit for s in soft], lr=settings.optimization_learning_rate)
    device = next(model.parameters()).device
    step, epoch = 0, 0
    while step < settings.optimization_steps:
        for batch in experiment.training_batches(settings.optimization_steps - step, seed=100 + epoch, labels=True):
            logits = model(pixel_values=batch["pixel_values"].to(device)).logits
            loss = nn.functional.cross_entropy(logits, batch["labels"].to(device))
            # From flat to steep, as in AdaRound: first the loss decides, then every choice is driven to an end.
            beta = 20 - 18 * step / settings.optimization_steps
            open_choices = sum((1 - (2 * s.position() - 1).abs().pow(beta)).sum() for s in soft)
            optimizer.zero_grad()
            (loss + settings.regularization * open_choices).backward()
            optimizer.step()
            step += 1
        epoch += 1
    return [(s.position() > 0.5).detach() for s in soft]


def run(settings: SamplingSettings) -> StudyResult:
    """Compare the trained state with sampled and with optimised ones."""
    experiment = Experiment(settings)
    # No weight oscillates in every step, so this freezes none; it makes the tracker keep mean integers.
    watch = {"threshold": 1.0, "threshold_final": None, "anneal_start": 0.5, "momentum": TRACKER_MOMENTUM}
    model = experiment.train("lsq", freezing=watch)
    reestimate_batchnorm(model, experiment.training_batches(50))
    tracker = OscillationTracker(model, momentum=TRACKER_MOMENTUM)
    states = choices(tracker, settings.oscillating_above)
    count = sum(int(choice.mask.sum()) for choice in states.values())
    if count == 0:
        raise ValueError(
            f"got a model without a weight that oscillates more often than {settings.oscillating_above}, expected "
            "some: train with fewer bits, at a higher learning rate, or lower oscillating_above"
        )
    rows = [{"state": "as trained", **_measure(experiment, model)}]
    generator = torch.Generator().manual_seed(settings.seed)
    for sample in range(settings.samples):
        drawn = [torch.rand(c.probability.shape, generator=generator) < c.probability.cpu() for c in states.values()]
        rows.append({"state": f"sample {sample}", **_with_states(experiment, model, states, drawn)})
    likelier = [c.probability > 0.5 for c in states.values()]
    rows.append({"state": "likelier state", **_with_states(experiment, model, states, likelier)})
    chosen = optimise(model, states, experiment, settings)
    rows.append({"state": "optimised", **_with_states(experiment, model, states, chosen)})
    losses = [row["training_loss"] for row in rows]
    sampled = losses[1 : 1 + settings.samples]
    share = 100 * count / tracker.num_weights
    finding = (
        f"{count} weights ({share:.2f}% of those with few bits) oscillate. Training loss as trained {losses[0]:.4f}; "
        + (f"sampled {fmean(sampled):.4f} on average, {min(sampled):.4f} at best; " if sampled else "")
        + f"each at its likelier state {losses[-2]:.4f}; optimised {losses[-1]:.4f}."
    )
    return StudyResult(rows, _draw(rows), finding)


def _with_states(
    experiment: Experiment, model: PreTrainedModel, states: dict[str, Choice], upper: list[Tensor]
) -> dict[str, Any]:
    changed = copy.deepcopy(model)
    fix(OscillationTracker(changed, momentum=TRACKER_MOMENTUM), states, [u.to(model.device) for u in upper])
    if batchnorm_layers(changed):
        reestimate_batchnorm(changed, experiment.training_batches(50))
    return _measure(experiment, changed)


def _measure(experiment: Experiment, model: PreTrainedModel) -> dict[str, Any]:
    return {"training_loss": experiment.training_loss(model), "top1": experiment.accuracy(model)}


def _draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    groups = {
        "as trained": (OSCILLATING, [r for r in rows if r["state"] == "as trained"]),
        "sampled": (BEFORE, [r for r in rows if r["state"].startswith("sample ")]),
        "likelier state": ("black", [r for r in rows if r["state"] == "likelier state"]),
        "optimised": (AFTER, [r for r in rows if r["state"] == "optimised"]),
    }
    for position, (colour, chosen) in enumerate(groups.values()):
        axes.scatter([position] * len(chosen), [r["training_loss"] for r in chosen], color=colour, s=28, alpha=0.8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel="training loss", xlim=(-0.5, len(groups) - 0.5))
    axes.set_ylim(0, 1.08 * max(row["training_loss"] for row in rows))
    tidy(axes)
    return figure


STUDY = Study(
    name="sampling",
    question="Is the state in which training leaves oscillating weights better than a drawn or a searched one?",
    source="Nagel et al. (ICML 2022), sec. 3.2, table 3; AdaRound: Nagel et al. (ICML 2020)",
    settings=SamplingSettings,
    run=run,
)
