"""A recording as a run would have left it, made in no time."""

import math

import numpy as np
import pytest

from hf_oscqat.report.recording import BINS, FILE, append_row, finite, pack_ints, sample_positions


@pytest.fixture(scope="session")
def make_recording():
    """Writes a recording of made-up numbers into a folder; a freezing run, or one that goes on oscillating."""

    def make(folder, *, freezing=True, layers=6, steps=(1, *range(10, 210, 10)), seed=0):
        random = np.random.default_rng(seed)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = [[16, 1, 3, 3] if i % 3 == 1 else [24, 16, 1, 1] for i in range(layers)]
        names = [f"blocks.{i // 3}.{i % 3}.conv_{('pw', 'dw', 'pwl')[i % 3]}" for i in range(layers)]
        norms = [name.replace("conv_", "bn_") for name in names]
        header = {
            "row": "run", "format_version": 1, "total_steps": 200, "every": 10, "momentum": 0.02,
            "oscillating_above": 0.005,
            "about": {"model": "mobilenetv2_050", "scheme": "W4A4", "remedies": "freezing" if freezing else ""},
            "layers": [
                {"name": n, "shape": s, "bits": 4, "qmin": -8, "qmax": 7} for n, s in zip(names, shapes, strict=True)
            ],
            "batchnorm_layers": list(map(list, zip(norms, names, strict=True))),
        }  # fmt: skip
        path = folder / FILE
        append_row(path, header)
        sizes = [len(sample_positions(math.prod(shape))) for shape in shapes]
        ints = random.integers(-8, 8, sum(sizes))
        liable = random.random(layers) * np.where(np.arange(layers) % 3 == 1, 0.3, 0.06)
        for step in steps:
            at = step / steps[-1]
            rising = min(1.0, 2 * at)
            oscillating = liable * rising * (1 - 0.8 * max(0, at - 0.4) / 0.6 * freezing)
            ints = np.where(random.random(len(ints)) < 0.05 * rising, np.clip(ints ^ 1, -8, 7), ints)
            bins = np.abs(np.linspace(-0.5, 0.5, BINS))
            near = np.exp(-bins / (0.1 if freezing else 0.3)) if at > 0.1 else np.ones(BINS)
            first = max(1, step - 31)
            weights = [
                {
                    "layer": i, "index": [3, 0, i % 3, 1] if shapes[i][2] == 3 else [3, i, 0, 0],
                    "frequency": 0.31 - 0.01 * i,
                    "positions": (2.5 + 0.08 * random.standard_normal(step - first + 1)).round(4).tolist(),
                }
                for i in range(min(layers, 8))
            ]  # fmt: skip
            for weight in weights:
                weight["ints"] = [round(p) for p in weight["positions"]]
            append_row(
                path,
                {
                    "row": "step", "step": step,
                    "oscillating": finite(oscillating.tolist()),
                    "frozen": finite((liable * max(0, at - 0.4) * freezing).tolist()),
                    "weight_scale": finite((0.1 * np.exp(0.2 * at * np.sin(np.arange(layers)))).tolist()),
                    "input_scale": [None if i == 0 else 0.2 + 0.01 * i * at for i in range(layers)],
                    "distances": [(near / near.sum() * 200).astype(int).tolist() for _ in range(layers)],
                    "ints": pack_ints(ints),
                    "window": None if step == 1 else {"first": first, "weights": weights},
                },
            )  # fmt: skip
            append_row(path, {"row": "log", "step": step, "scalars": {"loss": 2 * math.exp(-2 * at) + 0.1}})
            if step % 50 == 0:
                append_row(
                    path,
                    {"row": "log", "step": step, "scalars": {"eval_accuracy": 0.9 * rising, "eval_loss": 1.5 - at}},
                )
                before = (0.02 + liable).tolist()
                append_row(
                    path, {"row": "batchnorm", "step": step, "before": before, "after": [b / 50 for b in before]}
                )
        return path

    return make
