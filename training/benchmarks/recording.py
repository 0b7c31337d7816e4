"""Measure what recording for the report adds to a training step.

    python training/benchmarks/recording.py [--model mobilenetv2_100] [--batch-size 32] [--img-size 64] [--every 10]

Steps with and without the recorder take turns, so that both meet the same noise; they are added up over an interval,
which has one recording and its share of watched steps, and medians over the intervals are compared. Beside the time of
the clock stands that of the processor, which other programs on the machine disturb less, and the time that passes
inside the recorder alone, which is the steadiest.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch
from rich.console import Console
from torch.nn import functional as F

from hf_oscqat.config import OscQATConfig
from hf_oscqat.prepare import calibrate, model_parameters, prepare_qat, quantizer_parameters
from hf_oscqat.remedies.batchnorm import reestimate_batchnorm
from hf_oscqat.remedies.tracker import OscillationTracker
from hf_oscqat.report.recorder import Recorder


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure and print.

    Returns:
        Shares that recording adds: of `wall` and `cpu` time, and `inside`; seconds of a `step`; `bytes` a recording.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--every", type=int, default=10, help="steps between recordings")
    parser.add_argument("--intervals", type=int, default=8, help="recordings to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(0, 10, (args.batch_size,), device=device)
    model = timm.create_model(args.model, num_classes=10).to(device)
    reestimate_batchnorm(model, [images])
    prepare_qat(model, OscQATConfig(weight_bits=3, activation_bits=4))
    calibrate(model, [images])
    model.train()
    weights = torch.optim.SGD(model_parameters(model), lr=0.05, momentum=0.9)
    scales = torch.optim.Adam(quantizer_parameters(model), lr=1e-5)
    tracker = OscillationTracker(model, momentum=0.01)

    def now() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def step(recorder: Recorder | None, number: int) -> tuple[float, float, float]:
        began, began_cpu = now()
        F.cross_entropy(model(images), labels).backward()
        tracker.tick()
        inside = 0.0
        if recorder is not None:
            before, _ = now()
            recorder.tick(number)
            inside = now()[0] - before
        for optimizer in (weights, scales):
            optimizer.step()
            optimizer.zero_grad()
        ended, ended_cpu = now()
        return ended - began, ended_cpu - began_cpu, inside

    for _ in range(args.every):  # kernels are compiled, weights begin to oscillate
        step(None, 0)
    with_it, without, inside = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        total = args.every * (args.intervals + 1)
        recorder = Recorder(model, tracker, folder, total_steps=total, every=args.every)
        recorder.begin()
        for interval in range(args.intervals + 1):
            rows = []
            for i in range(args.every):
                rows.append((step(recorder, interval * args.every + i + 1), step(None, 0)))
            if interval > 0:  # the first has a recording more, that of step 1
                with_it.append([sum(recorded[k] for recorded, _ in rows) for k in range(2)])
                without.append([sum(plain[k] for _, plain in rows) for k in range(2)])
                inside.append(sum(recorded[2] for recorded, _ in rows))
        size = Path(recorder.path).stat().st_size / (args.intervals + 2)
    medians = [[median(row[k] for row in rows) for k in range(2)] for rows in (with_it, without)]
    found = {
        "wall": medians[0][0] / medians[1][0] - 1,
        "cpu": medians[0][1] / medians[1][1] - 1,
        "inside": median(inside) / medians[1][0],
        "step": medians[1][0] / args.every,
        "bytes": size,
    }
    console = Console(width=110, highlight=False)
    console.print(
        f"{args.model}, batch of {args.batch_size} at {args.img_size} pixels, {device.type}, "
        f"{torch.get_num_threads()} threads, a recording every {args.every} steps, {args.intervals} of them:\n"
        f"a step takes {1000 * found['step']:.0f} ms; recording adds {100 * found['wall']:+.2f}% of the clock's time, "
        f"{100 * found['cpu']:+.2f}% of the processor's; {100 * found['inside']:.2f}% pass inside the recorder\n"
        f"{size / 1000:.1f} kB a recording"
    )
    return found


if __name__ == "__main__":
    main()
