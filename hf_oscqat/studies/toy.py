"""One weight, one target: why weights oscillate, and which estimators and remedies stop it.

The weight w is to reach the target w* through a quantizer: `min_w (w* - q(w))^2 / 2`. Between two grid points q(w) can
only be too low or too high, so the gradient never vanishes: it drives w up to the threshold between them, over it,
and back. With straight-through gradients w moves up by `lr * d` and down by `lr * (1 - d)` a step, for a target at
distance d <= 0.5 from the lower grid point in grid units, so that it crosses the threshold `2 * d` times a step.

All targets are trained side by side, each with a weight, a grid and a bin of its own.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from hf_oscqat.config import OscQATConfig
from hf_oscqat.prepare import prepare_qat
from hf_oscqat.quantization.layers import quantized_layers
from hf_oscqat.remedies.base import take_tick
from hf_oscqat.remedies.tracker import OscillationTracker, oscillation_state
from hf_oscqat.report.pictures import AFTER, BEFORE, OSCILLATING, tidy
from hf_oscqat.studies.base import Study, StudyResult

METHODS: dict[str, dict[str, Any]] = {
    "ste": {},
    "ewgs": {"gradient_estimator": "ewgs"},
    "stacked_sigmoid": {"gradient_estimator": "stacked_sigmoid", "gradient_estimator_args": {"alpha": 3.0}},
    "dsq": {"gradient_estimator": "dsq"},
    "psg": {"gradient_estimator": "psg"},
    "stochastic_rounding": {"gradient_estimator": "stochastic_rounding"},
    "additive_noise": {"gradient_estimator": "additive_noise"},
    "dampening": {"dampening": {"weight": 0.0, "weight_final": 1.0, "anneal_start": 0.0}},
    "bin_regularization": {"bin_regularization": {"weight": 1.0, "anneal_start": 0.25}},
    "freezing": {"freezing": {"threshold": 0.3, "threshold_final": 0.012, "anneal_start": 0.25, "momentum": 0.01}},
}
"""What is compared; each is an `OscQATConfig`."""

MEASURED = 10
"""One part in this many, at the end of training, is what frequencies and errors are taken from."""


@dataclass
class ToySettings:
    """Options of the toy regression."""

    output_dir: str = field(default="runs/studies", metadata={"help": "Folder for table and picture."})
    num_targets: int = field(default=99, metadata={"help": "Targets, evenly spread between two grid points."})
    steps: int = field(default=2000, metadata={"help": "Steps of gradient descent."})
    learning_rate: float = field(default=0.05, metadata={"help": "Of plain gradient descent, in grid units."})
    seed: int = field(default=0, metadata={"help": "Of the random estimators."})

    def __post_init__(self) -> None:
        if self.num_targets < 2 or self.steps < MEASURED:
            raise ValueError(
                f"got num_targets={self.num_targets} and steps={self.steps}, expected at least 2 "
                f"and at least {MEASURED}"
            )


@dataclass(frozen=True)
class ToyRun:
    """What one method did; tensors of shape `[num_targets]` or `[steps, num_targets]`, float32, in grid units.

    Attributes:
        targets: between 1 and 2.
        frequency: oscillations per step over the last tenth of training.
        latent: latent weights at each step.
        quantized: what they were rounded to at each step, in evaluation.
    """

    targets: Tensor
    frequency: Tensor
    latent: Tensor
    quantized: Tensor


def regress(config: OscQATConfig, settings: ToySettings) -> ToyRun:
    """Run one method on all targets."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return _regress(config, settings)


def _regress(config: OscQATConfig, settings: ToySettings) -> ToyRun:
    count = settings.num_targets
    targets = 1 + (torch.arange(count) + 1) / (count + 1)
    model = nn.Sequential(nn.Linear(1, count, bias=False))
    prepare_qat(model, config)
    ((_, layer),) = quantized_layers(model)
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    quantizer.set_range(torch.ones(1))
    with torch.no_grad():
        layer.latent_weight.copy_(targets[:, None])
    tracker = OscillationTracker(model, config.momentum, use_ema=config.use_ema, count_total=True)
    remedies = config.remedies()
    optimizer = torch.optim.SGD([layer.latent_weight], lr=settings.learning_rate)
    latent, quantized = [], []
    measured_from = settings.steps - settings.steps // MEASURED
    before = torch.zeros(count)
    for step in range(1, settings.steps + 1):
        if step == measured_from + 1:
            before = _total(layer)
        loss = (targets - model(torch.ones(1, 1))[0]).square().sum() / 2
        for remedy in remedies:
            extra = remedy.loss(model, step, settings.steps)
            loss = loss if extra is None else loss + extra
        optimizer.zero_grad()
        loss.backward()
        latent.append(layer.latent_weight.detach()[:, 0].clone())
        quantized.append(quantizer.to_int(layer.latent_weight)[:, 0])
        take_tick(tracker, remedies, step, settings.steps)
        optimizer.step()
    frequency = (_total(layer) - before) / (settings.steps - measured_from)
    return ToyRun(targets, frequency, torch.stack(latent), torch.stack(quantized))


def run(settings: ToySettings) -> StudyResult:
    """Compare all methods."""
    runs = {
        name: regress(
            OscQATConfig(
                weight_bits=4,
                activation_bits=None,
                first_last_bits=4,
                weight_granularity="per_channel",
                tracker_momentum=0.01,
                **config,
            ),
            settings,
        )
        for name, config in METHODS.items()
    }
    rows = [_row(name, toy) for name, toy in runs.items()]
    stopped = [row["method"] for row in rows if row["oscillating_percent"] < 5]
    others = [row["method"] for row in rows if row["oscillating_percent"] >= 5]
    finding = (
        f"Oscillation stops with {_listed(stopped)}; it goes on with {_listed(others)}. "
        f"With straight-through gradients its frequency is {rows[0]['frequency_per_distance']:.2f} times the distance "
        "of the target to the nearer grid point."
    )
    return StudyResult(rows, _draw(runs), finding)


def _total(layer: Any) -> Tensor:
    total = oscillation_state(layer).total
    assert total is not None
    return total[:, 0].float()


def _row(name: str, toy: ToyRun) -> dict[str, Any]:
    distance = (toy.targets - toy.targets.round()).abs()
    last = len(toy.quantized) // MEASURED
    mean_square = (toy.quantized[-last:] - toy.targets).square().mean().item()
    return {
        "method": name,
        "oscillating_percent": 100 * (toy.frequency > 0.005).float().mean().item(),
        "mean_frequency": toy.frequency.mean().item(),
        "frequency_per_distance": ((toy.frequency * distance).sum() / distance.square().sum()).item(),
        "mean_squared_error": mean_square,
    }


def _draw(runs: dict[str, ToyRun]) -> Figure:
    figure = Figure(figsize=(10, 7.2), dpi=150, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    top, bottom = halves
    axes = top.subplots()
    ste = runs["ste"]
    index = round(0.3 * len(ste.targets)) - 1
    shown = min(80, len(ste.latent))
    steps = range(shown)
    axes.step(steps, ste.quantized[-shown:, index], color=BEFORE, linewidth=1, where="post", label="quantized weight")
    axes.plot(steps, ste.latent[-shown:, index], color=OSCILLATING, linewidth=1.6, label="latent weight")
    axes.axhline(ste.targets[index].item(), color=AFTER, linestyle="--", linewidth=1.2, label="target")
    axes.axhline(1.5, color="black", linestyle=":", linewidth=1, label="threshold")
    axes.set(xlabel=f"step, of the last {shown}", ylabel="grid units", yticks=(1, 1.5, 2))
    axes.set_title("Straight-through estimator: the weight oscillates around the threshold for ever", loc="left")
    tidy(axes, legend={"loc": "center left", "bbox_to_anchor": (1, 0.5)})
    columns = -(-len(runs) // 2)
    grid: list[Axes] = list(bottom.subplots(2, columns, sharex=True, sharey=True).flat)
    for panel, (name, toy) in zip(grid, runs.items(), strict=False):
        distance = (toy.targets - toy.targets.round()).abs()
        panel.plot((0, 0.5), (0, 1), color=BEFORE, linewidth=1, linestyle="--")
        panel.scatter(distance, toy.frequency, s=7, color=OSCILLATING)
        panel.set_title(name.replace("_", " "), loc="left", fontsize=9)
        tidy(panel)
    for panel in grid[len(runs) :]:
        panel.set_visible(False)
    bottom.supxlabel("distance of the target to the nearer grid point, in grid units", fontsize=9)
    bottom.supylabel("oscillations a step", fontsize=9)
    bottom.suptitle("How often it oscillates; dashed: twice the distance", fontsize=10)
    return figure


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


STUDY = Study(
    name="toy",
    question="Which gradient estimators and remedies stop a single weight from oscillating?",
    source="Nagel et al. (ICML 2022), sec. 2.2 and 2.3",
    settings=ToySettings,
    run=run,
)
