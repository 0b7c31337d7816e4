"""What quantization-aware training costs: a training step of this package, of float training and of other libraries.

    make bench                                # everything, in an environment of its own with the other libraries
    python training/benchmarks/bench.py [--rows lsq freeze ..] [--json FILE] [--picture FILE.png]
    python training/benchmarks/bench.py --sweep batch resolution width processes [--rows lsq lsq-compiled]

A step is forward, cross entropy, remedy, backward and all optimizers: SGD with momentum for weights, Adam for learned
scales. Images, labels and weights are random: the time does not depend on them. In each repeat every row takes one
step, and each repeat starts with another row. Ratios and overheads are taken within repeats.

Rows: `float`; `lsq`, this package without a remedy; `freeze`, with a tick that may freeze in every step; `dampen`,
with the dampening loss; the same with `-compiled`, the whole model under torch.compile; `plain`, LSQ as most papers'
code writes it; and the libraries in peers.py. A row that cannot run says why.

Columns: `kept` is what is held between forward and backward; `peak` the most that a step holds, both above what it
starts with (measure.py says how); `start-up` is what the warm-up steps take longer than other steps, compilation most
of all. Rows that train the same graph share what is compiled, and the first of them pays.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler says on each use that there is no GPU

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# This file is run by its path, also where the package that stands beside it cannot be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.measure import bytes_kept_for_backward, memory_of, overhead, ratio, spread, take_turns, timed
from benchmarks.peers import PACKAGES, PEERS, Prepare, Prepared, Unavailable, plain, plain_fake_quantize
from benchmarks.show import draw_comparison, say, show_comparison, show_sweep
from hf_oscqat import (
    OscillationTracker,
    OscQATConfig,
    calibrate,
    dampening_loss,
    fake_quantize,
    prepare_qat,
    quantizer_parameters,
    reestimate_batchnorm,
)
from hf_oscqat.integration.optimizer import create_optimizer
from hf_oscqat.quantization.layers import quantizers

FREEZE_THRESHOLD, DAMPENING_WEIGHT = 0.01, 0.1
ACTIVATION = {"cpu": (32, 96, 48, 48), "cuda": (256, 96, 112, 112)}
"""Shape of the activation whose fake-quantization is set against a copy."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"batch_size": 32, "img_size": 96, "precision": "float32", "channels_last": False},
    "cuda": {"batch_size": 256, "img_size": 224, "precision": "bf16", "channels_last": True},
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    model: str
    batch_size: int
    img_size: int
    bits: int
    repeats: int
    warmup: int
    rows: tuple[str, ...]
    device: str
    precision: str
    channels_last: bool
    threads: int


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        prepare: makes the float model trainable that way.
        remedy: "freeze", "dampen" or nothing.
        compiled: whether the whole model goes through torch.compile.
        ours: whether it is this package that trains.
    """

    prepare: Prepare
    remedy: str = ""
    compiled: bool = False
    ours: bool = False


def float_model(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """Leave the model as it is."""
    return Prepared(model, None, "float")


def ours(model: nn.Module, images: Tensor, bits: int, end_bits: int = 8) -> Prepared:
    """Prepare with this package: W and A at `bits`, per tensor, learned scales; the image stays in float."""
    prepare_qat(model, OscQATConfig(weight_bits=bits, activation_bits=bits, first_last_bits=end_bits))
    calibrate(model, [images])
    positive = [q.scale for _, q in quantizers(model) if isinstance(q.scale, nn.Parameter)]
    return Prepared(
        model,
        bits,
        f"W{bits}A{bits}, per tensor, learned scales, ends at {end_bits} bits",
        quantizer_parameters(model),
        positive,
    )


ROWS: dict[str, Row] = {
    "float": Row(float_model),
    "float-compiled": Row(float_model, compiled=True),
    "lsq": Row(ours, ours=True),
    "freeze": Row(ours, "freeze", ours=True),
    "dampen": Row(ours, "dampen", ours=True),
    "lsq-compiled": Row(ours, compiled=True, ours=True),
    "freeze-compiled": Row(ours, "freeze", compiled=True, ours=True),
    "dampen-compiled": Row(ours, "dampen", compiled=True, ours=True),
    "plain-compiled": Row(plain, compiled=True),
    **{name: Row(prepare) for name, prepare in PEERS.items()},
}
DEFAULT_ROWS = tuple(name for name in ROWS if name != "plain-compiled")
"""Compiling takes longest, and a second graph for a row that nobody would train with is left to those who ask."""


class Trainee:
    """A row while it trains.

    Args:
        row: what it is.
        prepared: its model and parameters.
        images: batch, on the device.
        labels: their classes.
        precision: "float32" or "bf16".
        wrap: what to put around the model, such as DistributedDataParallel.
    """

    def __init__(
        self,
        row: Row,
        prepared: Prepared,
        images: Tensor,
        labels: Tensor,
        precision: str,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.row, self.images, self.labels = row, images, labels
        self.model, self.weights = prepared.model, prepared.weights
        self.autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = _optimizer(prepared)
        self.tracker = OscillationTracker(self.model, momentum=0.001) if row.remedy == "freeze" else None
        wrapped = self.model if wrap is None else wrap(self.model)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(wrapped) if row.compiled else wrapped

    def loss(self) -> Tensor:
        """What the remedy adds, forward and cross entropy, in the order of `OscQATTrainer`."""
        extra = DAMPENING_WEIGHT * dampening_loss(self.model) if self.row.remedy == "dampen" else 0
        with self.autocast:
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        return loss + extra

    def step(self) -> None:
        """Take a whole training step."""
        self.loss().backward()
        if self.tracker is not None:
            self.tracker.tick(threshold=FREEZE_THRESHOLD)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _optimizer(prepared: Prepared) -> torch.optim.Optimizer:
    groups = [{"params": prepared.weights, "weight_decay": 5e-5}]
    if not prepared.scales:
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    return create_optimizer(
        groups,
        prepared.scales,
        prepared.positive,
        weight_optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        adam_betas=(0.9, 0.999),
        adam_epsilon=1e-8,
        scale_learning_rate=1e-5,
    )


def distinct_values(output: Tensor) -> tuple[int | None, int | None]:
    """Most different values that the convolutions behind the first one get to see.

    Args:
        output: of an eager forward; its graph holds what the convolutions got.

    Returns:
        In one output channel of a weight, and in one channel of an input; None without such convolutions.
    """
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
    convolutions = sorted((n for n in seen if n.name() == "ConvolutionBackward0"), key=lambda n: n._sequence_nr())[1:]
    if not convolutions:
        return None, None
    weights = max(node._saved_weight[0].unique().numel() for node in convolutions)
    return weights, max(node._saved_input[:, 0].unique().numel() for node in convolutions)


@contextlib.contextmanager
def _quiet(enabled: bool) -> Iterator[None]:
    """Keep to itself what other libraries say while they prepare a model."""
    if not enabled:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def with_baselines(rows: tuple[str, ...]) -> list[str]:
    """Put the float rows that the others are compared with first, in the order of `ROWS` otherwise."""
    wanted = {*rows, "float"} | ({"float-compiled"} if any(ROWS[name].compiled for name in rows) else set())
    return [name for name in ROWS if name in wanted]


def compare(
    settings: Settings, *, memory: bool = True, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> dict[str, dict[str, Any]]:
    """Train all rows side by side.

    Args:
        settings: what to measure; baselines are added to its rows.
        memory: also measure bytes.
        wrap: see `Trainee`.

    Returns:
        By name, what was measured of a row, or the `reason` why it could not run.
    """
    device = torch.device(settings.device)
    torch.manual_seed(0)
    model = timm.create_model(settings.model).to(device)
    images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size, device=device)
    labels = torch.randint(model.num_classes, (settings.batch_size,), device=device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    reestimate_batchnorm(model, [images])  # or activations vanish on their way, and no range would be one of training
    model.train()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        float_output = copy.deepcopy(model)(images)

    names = with_baselines(settings.rows)
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    trainees: dict[str, Trainee] = {}
    # Libraries come first, because torch.export makes dynamo forget what it has compiled.
    for name in sorted(names, key=lambda name: name not in PEERS):
        try:
            with _quiet(name in PEERS):
                start = time.perf_counter()
                prepared = ROWS[name].prepare(copy.deepcopy(model), images, settings.bits)
                rows[name] |= {"prepare_s": time.perf_counter() - start, "ours": ROWS[name].ours}
                rows[name] |= {"trains": prepared.trains, "bits": prepared.bits}
                rows[name] |= {"scales": sum(p.numel() for p in prepared.scales)}
                if name != "torchao":  # an exported graph trains as it was exported, and refuses
                    prepared.model.train()
                trainee = Trainee(ROWS[name], prepared, images, labels, settings.precision, wrap)
                rows[name] |= _first_forward(prepared, trainee, float_output)
        except Exception as error:  # whatever another library does, the other rows are measured
            rows[name] = {"reason": _reason(error)}
        else:
            trainees[name] = trainee
    for name in names:
        if name in trainees:
            try:
                with _quiet(name in PEERS):
                    rows[name]["warmup_s"] = _warm_up(trainees[name], settings.warmup)
                    _check_gradients(trainees[name])
            except Exception as error:
                rows[name] = {"reason": _reason(error)}
                del trainees[name]
        say(f"{name}: {rows[name].get('reason', 'ready')}")

    times = take_turns({n: trainees[n].step for n in names if n in trainees}, settings.repeats, device)
    for name, taken in times.items():
        rows[name] |= _summary(taken, times)
        once = (rows[name]["first_forward_s"], *rows[name]["warmup_s"])
        rows[name]["startup_s"] = sum(max(0.0, t - rows[name]["step_median_s"]) for t in once)
    if memory:
        for name, trainee in trainees.items():
            rows[name]["bytes_kept_for_backward"] = bytes_kept_for_backward(trainee.loss, device)
            rows[name]["peak_bytes"] = memory_of(trainee.step, device).peak
    return rows


def _first_forward(prepared: Prepared, trainee: Trainee, float_output: Tensor) -> dict[str, Any]:
    """Make sure, before anything is trained, that a row computes what it says.

    Raises:
        Unavailable: if its output is that of the float model or its weights take more values than its bits have.
    """
    start = time.perf_counter()
    with trainee.autocast:
        output = prepared.model(trainee.images)
    found: dict[str, Any] = {"first_forward_s": time.perf_counter() - start}
    found["weight_values"], found["input_values"] = distinct_values(output)
    if prepared.bits is None:
        return found
    found["output_change"] = float((output.detach() - float_output).abs().mean() / float_output.abs().mean())
    if found["output_change"] == 0:
        raise Unavailable("it does not quantize: its output is that of the float model")
    if found["weight_values"] is not None and found["weight_values"] > 2**prepared.bits:
        raise Unavailable(f"a weight takes {found['weight_values']} values, expected at most {2**prepared.bits}")
    return found


def _warm_up(trainee: Trainee, steps: int) -> list[float]:
    # All rows compile the code of the same classes, and by default dynamo gives up at the eighth graph of one of them.
    patch = torch._dynamo.config.patch(recompile_limit=64) if trainee.row.compiled else contextlib.nullcontext()
    with patch:
        return [timed(trainee.step, trainee.images.device) for _ in range(steps)]


def _check_gradients(trainee: Trainee) -> None:
    """Make sure that a row trains.

    Raises:
        Unavailable: if most of its weights get no gradient.
    """
    trainee.loss().backward()
    without = sum(weight.grad is None or not weight.grad.any() for weight in trainee.weights)
    trainee.optimizer.zero_grad()
    if without > len(trainee.weights) / 2:
        raise Unavailable(f"it does not train: {without} of {len(trainee.weights)} weights get no gradient")


def _summary(taken: list[float], times: Mapping[str, list[float]]) -> dict[str, Any]:
    step = spread(taken)
    summary: dict[str, Any] = {
        "step_s": taken,
        "step_median_s": step.median,
        "step_quartiles_s": [step.low, step.high],
    }
    for key, base in (("ratio_to_float", "float"), ("ratio_to_float_compiled", "float-compiled")):
        if base in times:
            summary[key] = ratio(taken, times[base])._asdict()
    return summary


def overheads(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each remedy adds to the row without one, from the differences within each repeat.

    Args:
        rows: as `compare` returns them.

    Returns:
        By name of the row: `median_s`, `quartiles_s` and `share` of the median step without the remedy.
    """
    found = {}
    for name, row in ROWS.items():
        base = "lsq-compiled" if row.compiled else "lsq"
        if row.remedy and "step_s" in rows.get(name, {}) and "step_s" in rows.get(base, {}):
            added = overhead(rows[name]["step_s"], rows[base]["step_s"])
            found[name] = {
                "median_s": added.median,
                "quartiles_s": [added.low, added.high],
                "share": added.median / rows[base]["step_median_s"],
            }
    return found


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unavailable):
        return text
    return f"not installed: {text}" if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


def measure_bandwidth(settings: Settings) -> dict[str, Any]:
    """Bytes per second of fake-quantizing one large activation, forward and backward.

    The bytes are those that cannot be avoided: forward reads the input and writes the output, backward reads input and
    gradient and writes a gradient. A copy reads and writes once; what comes near its rate has nothing left to gain.

    Returns:
        `shape`, `dtype`, `copy` in bytes per second, and `rows`: by name, `forward` and `backward` in bytes per second
        with the seconds of each repeat, or a `reason`.
    """
    device = torch.device(settings.device)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(ACTIVATION[settings.device], device=device, dtype=dtype)
    qmin, qmax = -(2 ** (settings.bits - 1)), 2 ** (settings.bits - 1) - 1
    x = x.contiguous(memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
    size = x.numel() * x.element_size()

    def package(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, None, qmin, qmax)

    def elementwise(x: Tensor, scale: Tensor) -> Tensor:
        return plain_fake_quantize(x, scale, qmin, qmax).to(x.dtype)

    def operator(x: Tensor, scale: Tensor) -> Tensor:
        zero_point = torch.zeros_like(scale)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, qmin, qmax, 1.0)

    functions = {"this package": package, "plain": elementwise, "torch's learnable operator": operator}
    if any(ROWS[name].compiled for name in settings.rows):
        functions["this package, compiled"] = torch.compile(package)
        functions["plain, compiled"] = torch.compile(elementwise)
    rows: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    target = torch.empty_like(x)
    for name, function in functions.items():
        both = _Both(function, x)
        try:
            for _ in range(settings.warmup):
                both.run_forward()
                both.run_backward()
        except Exception as error:
            rows[name] = {"reason": _reason(error)}
        else:
            steps |= {f"{name}/forward": both.run_forward, f"{name}/backward": both.run_backward}
    times = take_turns({"copy": lambda: target.copy_(x), **steps}, settings.repeats, device)
    for name in functions:
        if name not in rows:
            forward, backward = times[f"{name}/forward"], times[f"{name}/backward"]
            rows[name] = {
                "forward": 2 * size / spread(forward).median,
                "backward": 3 * size / spread(backward).median,
                "forward_s": forward,
                "backward_s": backward,
            }
    return {
        "shape": list(x.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "copy": 2 * size / spread(times["copy"]).median,
        "copy_s": times["copy"],
        "rows": rows,
    }


class _Both:
    """Forward and backward of a fake-quantizer, apart; backward may be taken again and again."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
        self.function = function
        self.x = x.clone().requires_grad_()
        self.scale = torch.full((1,), 0.3, device=x.device, requires_grad=True)
        self.gradient = torch.randn_like(x)
        self.output = x

    def run_forward(self) -> None:
        self.output = self.function(self.x, self.scale)

    def run_backward(self) -> None:
        torch.autograd.grad(self.output, (self.x, self.scale), self.gradient, retain_graph=True)


def variants(sweep: str, settings: Settings) -> dict[str, Settings]:
    """Settings along a sweep other than `processes`, by what changes."""
    cuda = settings.device == "cuda"
    if sweep == "batch":
        sizes = [max(2, int(settings.batch_size * factor)) for factor in (0.25, 0.5, 1, 2)]
        return {str(size): replace(settings, batch_size=size) for size in sizes}
    if sweep == "resolution":
        pixels = (128, 160, 192, 224, 288) if cuda else (64, 96, 128, 160)
        return {str(size): replace(settings, img_size=size) for size in pixels}
    models = [f"mobilenetv2_{width}" for width in ("035", "050", "100", "140")]
    return {model: replace(settings, model=model) for model in models}


def run_sweep(sweep: str, settings: Settings) -> dict[str, Any]:
    """Compare at each point of a sweep.

    Returns:
        By value, the rows as `compare` returns them, without memory.
    """
    if sweep == "processes":
        return {str(count): _in_processes(count, settings) for count in (1, 2)}
    points = {}
    for value, changed in variants(sweep, settings).items():
        say(f"{sweep} {value}")
        points[value] = compare(changed, memory=False)
    return points


def _in_processes(count: int, settings: Settings) -> dict[str, Any]:
    """Compare under DistributedDataParallel, each process with its own batch and its share of the threads."""
    if settings.device == "cuda" and torch.cuda.device_count() < count:
        reason = f"{count} processes need {count} GPUs, there are {torch.cuda.device_count()}"
        return {name: {"reason": reason} for name in with_baselines(settings.rows)}
    say(f"{count} {'process' if count == 1 else 'processes'}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, args=(count, settings, folder), nprocs=count)
        return json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))


def _process(rank: int, count: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(max(1, settings.threads // count))
    device = f"cuda:{rank}" if settings.device == "cuda" else "cpu"
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=count,
    )

    def wrap(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has a new name for not broadcasting buffers
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if settings.device == "cuda" else None, broadcast_buffers=False
            )

    try:
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO()):
            rows = compare(settings, memory=False, wrap=wrap)
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        torch.distributed.destroy_process_group()


def machine(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cpu = _cpu_model()
    return {
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("hf_oscqat", "torch", "transformers", "timm", *PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _record(settings: Settings, argv: list[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "training/benchmarks/bench.py", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(settings),
        "versions": _versions(),
        "settings": asdict(settings),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("OSCQAT_")},
    }


def _file(given: Path, ending: str, settings: Settings) -> Path:
    """The file itself, or in a folder one that is named after the machine."""
    if given.suffix:
        return given
    name = machine(settings)["device"] + ("" if settings.device == "cuda" else f" {settings.threads} threads")
    return given / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}{ending}"


def _save(path: Path, changes: Mapping[str, Any]) -> None:
    """Replace in the file what was measured again, and keep the rest."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sweeps = {**known.get("sweeps", {}), **changes.get("sweeps", {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **changes, "sweeps": sweeps}, indent=1) + "\n", encoding="utf-8")
    say(f"written: {path}")


def parse(argv: list[str]) -> tuple[Settings, argparse.Namespace]:
    """Read the command line.

    Returns:
        The settings, and `json`, `picture` and `sweep`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100", help="timm name")
    parser.add_argument("--batch-size", type=int, help="32 on a CPU, 256 on CUDA")
    parser.add_argument("--img-size", type=int, help="pixels; 96 on a CPU, 224 on CUDA")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="steps of each row before the clock runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is one")
    parser.add_argument("--precision", choices=("float32", "bf16"), help="float32 on a CPU, bf16 autocast on CUDA")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="on CUDA")
    parser.add_argument("--threads", type=int, help="as torch chooses")
    parser.add_argument("--json", type=Path, help="file to write, or a folder for one named after the machine")
    parser.add_argument("--picture", type=Path, help="PNG to write, or a folder for one named after the machine")
    parser.add_argument("--sweep", nargs="+", choices=("batch", "resolution", "width", "processes"), default=[])
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in DEFAULTS[device].items()}
    settings = Settings(
        model=args.model,
        bits=args.bits,
        repeats=args.repeats,
        warmup=args.warmup,
        rows=tuple(args.rows or (("lsq",) if args.sweep else DEFAULT_ROWS)),
        device=device,
        threads=args.threads or torch.get_num_threads(),
        **chosen,
    )
    return settings, args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write.

    Returns:
        What was measured: `comparison`, or `sweeps` by name.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings, args = parse(argv)
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    with _nothing_compiled_yet():
        found = _measure(settings, args.sweep, argv)
    if args.json:
        _save(_file(args.json, ".json", settings), found)
    if args.picture and not args.sweep:
        picture = _file(args.picture, ".png", settings)
        try:
            draw_comparison(found["comparison"], picture)
        except ImportError as error:
            say(f"no picture: {_reason(error)}")
        else:
            say(f"written: {picture}")
    return found


def _measure(settings: Settings, sweeps: list[str], argv: list[str]) -> dict[str, Any]:
    found: dict[str, Any]
    if sweeps:
        found = {"sweeps": {}}
        for sweep in sweeps:
            found["sweeps"][sweep] = _record(settings, argv) | {"points": run_sweep(sweep, settings)}
            show_sweep(sweep, found["sweeps"][sweep])
    else:
        record = _record(settings, argv)
        record["rows"] = compare(settings)
        record["overheads"] = overheads(record["rows"])
        record["bandwidth"] = measure_bandwidth(settings)
        found = {"comparison": record}
        show_comparison(record)
    return found


@contextlib.contextmanager
def _nothing_compiled_yet() -> Iterator[None]:
    """Compile into an empty cache, or start-up would depend on what ran before."""
    before = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(dict.fromkeys(before, folder))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


if __name__ == "__main__":
    main()
