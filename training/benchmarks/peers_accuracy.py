"""What other libraries' quantization-aware training reaches in as many steps, beside this package's plain LSQ.

    python training/benchmarks/peers_accuracy.py --dataset_name cifar10 --output_dir runs/cifar10 --json peers.json
        [--bits 3 4] [--rows lsq brevitas ..] [--epochs 0.2] [--scale_learning_rates 1e-5 1e-3] [--threads 1]

Every row starts from the float model of `oscqat study cifar10` in `--output_dir` (trained if it is not there), is
calibrated on the same batch and then trained on the same batches with the same optimizers: SGD with momentum and a
cosine to 0 for weights, Adam for what a library learns of its quantizers, at each of some rates, all of which are
shown. Nothing else is tuned for anyone. In each round every row takes one step, and each round starts with another
row: what else the machine does slows down all alike.

Accuracy is top-1 on the test images, before and after batch-norm re-estimation. Rows without batch-norm layers have
none after it: they are graphs in which batch-norm is a function. A row that cannot run says why.
"""

import copy
import io
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save
from torch import Tensor, nn
from transformers import HfArgumentParser

# This file is run by its path, also where the package that stands beside it cannot be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench
from benchmarks.measure import memory_of, spread, timed
from benchmarks.peers import Prepared, Unavailable, brevitas
from benchmarks.show import say, show_table
from hf_oscqat import pack, reestimate_batchnorm
from hf_oscqat.config import check_keys
from hf_oscqat.integration.data import DataArguments
from hf_oscqat.remedies.batchnorm import batchnorm_layers
from hf_oscqat.studies.cifar10 import BUDGETS, Budget, Cifar10Settings, Table
from hf_oscqat.studies.small_images import accuracy, training_batches

DEFAULT_ROWS = (
    "lsq",
    "lsq-every-layer",
    "brevitas",
    "brevitas-ends-8",
    "torchao-per-channel",
    "torchao",
    "aimet",
    "modelopt",
    "nncf",
)
TRACED = ("torchao", "torchao-per-channel", "torch-fx")
"""Rows that are graphs traced in training."""
LAST_STEPS = 50
"""Steps that the loss at the end is averaged over."""


def torchao_per_channel(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """Prepare as torchao in peers.py, but with a scale for each output channel of a weight, as its own config has.

    It scales weights by batch-norm before it rounds them. In a trained MobileNetV2 a few channels then are far larger
    than the others, which one scale for all rounds to 0: with 8 bits already the output has little left in it.
    """
    from torchao.quantization.pt2e import (
        LearnableFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    def learnable(observer: Any, **grid: Any) -> Any:
        quantizer = LearnableFakeQuantize.with_args(observer=observer, use_grad_scaling=True)
        return QuantizationSpec(is_dynamic=False, observer_or_fake_quant_ctr=quantizer, **grid)

    activations = learnable(
        MovingAverageMinMaxObserver,
        dtype=torch.uint8,
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_affine,
    )
    weights = learnable(
        MovingAveragePerChannelMinMaxObserver,
        dtype=torch.int8,
        quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    config = QuantizationConfig(activations, activations, weights, None, True)
    exported = torch.export.export(model.train(), (images,)).module()
    model = prepare_qat_pt2e(exported, X86InductorQuantizer().set_global(config)).to(images.device)
    with torch.no_grad():
        model(images)
    quantizers = [m for m in model.modules() if isinstance(m, LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.enable_range_learning()
    scales = [p for q in quantizers for p in (q.scale, q.zero_point)]
    return Prepared(model, bits, f"W{bits} per channel, A{bits} per tensor, learned scales", scales)


ROWS = {
    **bench.ROWS,
    # This package leaves the ends at 8 bits and brevitas does not: each also with the ends of the other.
    "lsq-every-layer": bench.Row(lambda model, images, bits: bench.ours(model, images, bits, bits), ours=True),
    "brevitas-ends-8": bench.Row(lambda model, images, bits: brevitas(model, images, bits, 8)),
    "torchao-per-channel": bench.Row(torchao_per_channel),
}


@dataclass
class PeersSettings(DataArguments):
    """What is compared, on which images, and for how long."""

    budget: str = field(default="cpu", metadata={"help": f"Of the study: {', '.join(BUDGETS)}."})
    output_dir: str = field(default="runs/cifar10", metadata={"help": "Folder of the study, with its float model."})
    bits: list[int] = field(default_factory=lambda: [3, 4], metadata={"help": "Widths of weights and activations."})
    rows: list[str] = field(
        default_factory=lambda: list(DEFAULT_ROWS), metadata={"help": f"What to train: {', '.join(DEFAULT_ROWS)}."}
    )
    epochs: float = field(default=0.2, metadata={"help": "Passes over the training images."})
    learning_rate: float = field(default=0.01, metadata={"help": "Of SGD for weights; a cosine takes it to 0."})
    scale_learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 1e-3],
        metadata={"help": "Of Adam for scales and zero-points; a row that learns some is trained with each of them."},
    )
    seed: int = field(default=0, metadata={"help": "Of order, crops and mirroring."})
    device: str = field(default="cpu", metadata={"help": "Such as cuda or cpu."})
    threads: int = field(default=1, metadata={"help": "Threads of a CPU."})
    json: str | None = field(
        default=None, metadata={"help": "File to write. Widths that it has and that are not asked for stay in it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keys([self.budget], BUDGETS, "--budget")
        check_keys(self.rows, ROWS, "--rows")
        if wrong := [bits for bits in self.bits if bits not in range(2, 9)]:
            raise ValueError(f"got --bits {wrong}, expected widths from 2 to 8: choose --bits 3 4")

    def study(self) -> Table:
        """The study whose float model and images are used."""
        images = {f.name: getattr(self, f.name) for f in fields(DataArguments)}
        return Table(Cifar10Settings(**images, budget=self.budget, output_dir=self.output_dir, device=self.device))


class TracedModel(nn.Module):
    """A graph that was traced in training, so that it can be evaluated and takes batches of any size.

    In such a graph the mode of batch-norm is a constant, which `train()` does not reach, and in an exported one so is
    the batch size. torchao has a function for the first, and none for graphs of FX.

    Args:
        graph: traced in training mode.
        batch_size: the only one that it takes.
    """

    def __init__(self, graph: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.graph, self.batch_size, self._mode = graph, batch_size, True

    def train(self, mode: bool = True) -> "TracedModel":
        """Change the mode of this module alone, which batch-norm follows; an exported graph refuses the call."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits, `[N, classes]`."""
        if self._mode != self.training:
            self._set_batchnorm(self.training)
        if len(images) == self.batch_size:
            return self.graph(images)
        parts = []
        for part in images.split(self.batch_size):
            missing = self.batch_size - len(part)
            parts.append(self.graph(torch.cat([part, part[:1].expand(missing, -1, -1, -1)]) if missing else part))
        return torch.cat(parts)[: len(images)]

    def _set_batchnorm(self, mode: bool) -> None:
        graph_module: Any = self.graph
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                node.update_arg(5, mode)
            elif node.target is nn.functional.batch_norm:
                node.update_kwarg("training", mode)
        graph_module.recompile()
        self._mode = mode


class Contender(bench.Trainee):
    """A row while it trains; notes its losses and the seconds of its steps."""

    def __init__(
        self,
        row: bench.Row,
        prepared: Prepared,
        images: Tensor,
        labels: Tensor,
        weight_decay: float,
        scale_rate: float,
    ) -> None:
        super().__init__(row, prepared, images, labels, "float32")
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        for group in self.optimizer.param_groups[1:]:
            group["lr"] = scale_rate
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step_on(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        """Take and time a step.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        self.images, self.labels = images, labels
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.seconds.append(timed(self.step, images.device))
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(f"got a loss of {self.losses[-1]}, expected a finite one: it diverged")

    def step(self) -> None:
        """Take a whole training step."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def compare(settings: PeersSettings, study: Table, bits: int) -> dict[str, dict[str, Any]]:
    """Train all rows at one width.

    Returns:
        By name, what was measured of a row, or the `reason` why it could not run.
    """
    budget, images = study.budget, study.images
    model = study._float_model(next(iter(budget.networks)))  # made or read, and checked against the protocol
    batch_size, device = budget.batch_size, study.settings.torch_device

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return training_batches(images.train, images.normalise, batch_size, seed, budget.mirror)

    pixels, labels = next(batches(seed=0))
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        float_output = copy.deepcopy(model)(pixels)
    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender] = {}

    def fails(name: str, error: Exception) -> None:
        rows[name] = {"reason": bench._reason(error)}
        contenders.pop(name, None)
        say(f"W{bits}A{bits} {name}: {rows[name]['reason']}")

    for name in settings.rows:
        for rate in settings.scale_learning_rates:
            try:
                with bench._quiet(not ROWS[name].ours):
                    contender, prepared = _prepare(name, copy.deepcopy(model), (pixels, labels), bits, budget, rate)
                    bench._first_forward(prepared, contender, float_output)
                    bench._check_gradients(contender)
            except Exception as error:  # whatever another library does, the other rows are measured
                fails(name, error)
                break
            trial = f"{name}, {rate:g}" if prepared.scales else name
            contenders[trial] = contender
            rows[trial] = {"trains": prepared.trains, "ours": contender.row.ours}
            if not prepared.scales:
                break
            rows[trial]["scale_learning_rate"] = rate

    steps = max(1, round(settings.epochs * (len(images.train) // batch_size)))
    for step, (pixels, labels) in enumerate(islice(batches(seed=1 + settings.seed), steps)):
        learning_rate = settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        names = list(contenders)
        first = step % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                with bench._quiet(not rows[name]["ours"]):
                    contenders[name].step_on(pixels, labels, learning_rate)
            except Exception as error:
                fails(name, error)
        if (step + 1) % max(1, steps // 20) == 0:
            say(f"W{bits}A{bits} step {step + 1} of {steps}: {_losses(contenders)}")

    for name, contender in list(contenders.items()):
        try:
            with bench._quiet(not rows[name]["ours"]):
                rows[name] |= _measure(contender)
                rows[name]["before"] = accuracy(contender.model, images.test, images.normalise)
                if batchnorm_layers(contender.model):
                    some = islice(batches(seed=0), budget.reestimation_batches)
                    reestimate_batchnorm(contender.model, (batch for batch, _ in some))
                    rows[name]["after"] = accuracy(contender.model, images.test, images.normalise)
                # One more step, so it comes last.
                contender.model.train()
                rows[name]["peak_bytes"] = memory_of(contender.step, device).peak
        except Exception as error:
            fails(name, error)
        else:
            say(f"W{bits}A{bits} {name}: {rows[name]['before']:.2f}, {rows[name].get('after', math.nan):.2f}")
    return rows


def _prepare(
    name: str, model: nn.Module, batch: tuple[Tensor, Tensor], bits: int, budget: Budget, scale_rate: float
) -> tuple[Contender, Prepared]:
    row = ROWS[name]
    prepared = row.prepare(model, batch[0], bits)
    if prepared.bits != bits:
        raise Unavailable(f"it trains {prepared.trains}, not W{bits}A{bits}")
    if name in TRACED:
        prepared = replace(prepared, model=TracedModel(prepared.model, len(batch[0])))
    prepared.model.train()
    return Contender(row, prepared, *batch, budget.weight_decay, scale_rate), prepared


def _losses(contenders: Mapping[str, Contender]) -> str:
    return ", ".join(f"{name} {contender.losses[-1]:.2f}" for name, contender in contenders.items())


def _history(losses: list[float]) -> list[dict[str, float]]:
    """Average the loss over some twenty stretches."""
    length = max(1, len(losses) // 20)
    stretches = ((start + length, losses[start : start + length]) for start in range(0, len(losses), length))
    return [{"step": min(end, len(losses)), "loss": round(sum(some) / len(some), 4)} for end, some in stretches]


def _measure(contender: Contender) -> dict[str, Any]:
    """What is known without evaluating; bytes are those of the trained model."""
    step = spread(contender.seconds)
    buffer = io.BytesIO()
    torch.save(contender.model.state_dict(), buffer)
    found = {
        "steps": len(contender.losses),
        "loss": sum(contender.losses[-LAST_STEPS:]) / len(contender.losses[-LAST_STEPS:]),
        "step_median_s": step.median,
        "step_quartiles_s": [step.low, step.high],
        "state_dict_bytes": len(buffer.getvalue()),
        "history": _history(contender.losses),
    }
    if contender.row.ours:
        found["packed_bytes"] = len(save({k: v.contiguous() for k, v in pack(contender.model).state_dict().items()}))
    return found


def show(content: Mapping[str, Any]) -> None:
    """Print one table of all widths that a file has."""
    cells = []
    for bits, record in sorted(content["widths"].items()):
        for name, row in record["rows"].items():
            first = f"W{bits}A{bits} {name}"
            if "reason" in row:
                cells.append([first, *[""] * 7, f"not run: {row['reason']}"])
                continue
            cells.append(
                [
                    first,
                    f"{row['before']:.2f}",
                    f"{row['after']:.2f}" if "after" in row else "",
                    f"{row['loss']:.3f}",
                    f"{1e3 * row['step_median_s']:.0f}",
                    f"{row['peak_bytes'] / 1e6:.1f}",
                    f"{row['state_dict_bytes']:,}",
                    f"{row['packed_bytes']:,}" if "packed_bytes" in row else "",
                    row["trains"],
                ]
            )
    columns = ("", "top-1, %", "re-estimated", "loss", "step, ms", "peak, MB", "state dict", "packed", "")
    show_table("Other libraries at the same work: one float model, the same batches and optimizers", columns, cells)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, print and write.

    Returns:
        `widths`: by bits, what all rows share and the rows, each with the run that it is of; with those that were in
        the file before.

    Raises:
        ValueError: if the file has rows of one of the widths that are not to be compared with these.
    """
    argv = sys.argv[1:] if argv is None else argv
    (settings,) = HfArgumentParser(PeersSettings).parse_args_into_dataclasses(argv)
    torch.set_num_threads(settings.threads)
    study = settings.study()
    network = next(iter(study.budget.networks))
    float_accuracy = accuracy(study._float_model(network), study.images.test, study.images.normalise)
    say(f"{network} in float: {float_accuracy:.2f}%")
    shared = {
        "network": network,
        "float": float_accuracy,
        "test_images": len(study.images.test),
        "epochs": settings.epochs,
        "calibration_images": study.budget.batch_size,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "device": study.settings.torch_device.type,
        "threads": settings.threads,
        "budget": json.loads(json.dumps(asdict(study.budget))),
    }
    path = Path(settings.json) if settings.json else None
    _known(path, shared, settings.bits)  # which complains before hours of training and not behind them
    widths: dict[str, Any] = {}
    for bits in settings.bits:
        described = bench.Settings(
            model=network,
            batch_size=study.budget.batch_size,
            img_size=study.budget.size,
            bits=bits,
            repeats=1,
            warmup=0,
            rows=tuple(settings.rows),
            device=study.settings.torch_device.type,
            precision="float32",
            channels_last=True,
            threads=settings.threads,
        )
        run = {
            "command": shlex.join(["python", "training/benchmarks/peers_accuracy.py", *argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": bench.machine(described),
            "versions": bench._versions(),
        }
        widths[str(bits)] = {name: row | {"run": run} for name, row in compare(settings, study, bits).items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    show({"widths": {bits: {"rows": rows} for bits, rows in widths.items()}})
    with nullcontext() if path is None else FileLock(path.with_name(f".{path.name}.lock")):
        known = _known(path, shared, settings.bits)  # again: another process may have written other rows meanwhile
        for bits, rows in widths.items():
            known[bits] = shared | {"rows": _joined(known.get(bits, {"rows": {}})["rows"], rows)}
        found = {"widths": known}
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            say(f"written: {path}")
    return found


def _joined(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of both. One that could not run never takes the place of one that was measured, and gives way to it."""
    rows = {
        **known,
        **{name: row for name, row in new.items() if "reason" not in row or "reason" in known.get(name, row)},
    }
    measured = {name.partition(",")[0] for name, row in rows.items() if "reason" not in row}
    return {name: row for name, row in rows.items() if "reason" not in row or name not in measured}


def _known(path: Path | None, shared: Mapping[str, Any], bits: list[int]) -> dict[str, Any]:
    """The widths that a file has; rows are added to some of them.

    Raises:
        ValueError: if they are not to be compared with what is added.
    """
    known: dict[str, Any] = {}
    if path is not None and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))["widths"]
    for width in map(str, bits):
        # A file of an older version has the command of all rows here.
        expected = {"command": None, **shared}
        differing = [key for key in expected if width in known and known[width].get(key) != expected[key]]
        if differing:
            raise ValueError(
                f"got {path} with W{width}A{width} of another {', '.join(differing)}, expected rows to compare in one "
                "file: choose another --json"
            )
    return known


if __name__ == "__main__":
    main()
