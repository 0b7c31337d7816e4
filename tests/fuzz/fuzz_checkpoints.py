"""Load thousands of damaged packed checkpoints: each computes what it did before, or is refused.

    python tests/fuzz/fuzz_checkpoints.py [--count 5000] [--seed 0]

Refused means `CheckpointError`, or for a config.json that transformers cannot read its own OSError or ValueError;
within 2 seconds and with less than 500 MB more than before. Anything else is printed with the seed that makes it
again, and the exit code is 1.
"""

import collections
import json
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fuzzing import Outcomes, run
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from hf_oscqat import CheckpointError, OscQATConfig, calibrate, pack, prepare_qat
from hf_oscqat.integration.models import timm_wrapper

SECONDS, MEGABYTES = 2.0, 500
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def make_checkpoint(folder: Path) -> None:
    """Write a small packed checkpoint with every kind of tensor: per channel, asymmetric, float layers."""
    torch.manual_seed(0)
    model = timm_wrapper("test_efficientnet", list("abcde"))
    config = OscQATConfig(
        weight_bits=3, activation_bits=4, weight_granularity="per_channel", activation_scheme="asymmetric",
        overrides={"blocks.1.*": {"weight_bits": 5, "activation_bits": None}}, modules_to_not_convert=["conv_head"],
    )  # fmt: skip
    prepare_qat(model, config)
    calibrate(model, [torch.randn(8, 3, 32, 32)])
    pack(model).save_pretrained(folder)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the weights file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


# --- Damage: each takes the folder and a generator and says what it did ---


def flip_header_bytes(folder: Path, chance: np.random.Generator) -> str:
    """Change a few bytes of length or header."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    places = chance.integers(0, end, chance.integers(1, 4))
    for place in places:
        content[place] ^= int(chance.integers(1, 256))
    (folder / WEIGHTS).write_bytes(content)
    return f"bytes {places.tolist()} of the header"


def change_length(folder: Path, chance: np.random.Generator) -> str:
    """Say another length of the header, also an absurd one."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    length = int(chance.choice([0, 1, 7, 2**31, 2**40, 2**63 - 1, int(chance.integers(0, len(content)))]))
    content[:8] = struct.pack("<Q", length)
    (folder / WEIGHTS).write_bytes(content)
    return f"header length {length}"


def cut(folder: Path, chance: np.random.Generator) -> str:
    """Lose the end of the file, or get something behind it."""
    content = (folder / WEIGHTS).read_bytes()
    keep = int(chance.integers(0, len(content)))
    (folder / WEIGHTS).write_bytes(content[:keep] if chance.random() < 0.8 else content + content[:keep])
    return f"{keep} bytes kept or added"


def flip_quantizer_bytes(folder: Path, chance: np.random.Generator) -> str:
    """Change a value of a quantizer tensor."""
    return _change_tensor(folder, chance, _flipped, ("weight_packed", "_scale", "_zero_point"))


def drop_tensor(folder: Path, chance: np.random.Generator) -> str:
    """Leave a tensor out."""
    return _change_tensor(folder, chance, lambda tensor, chance: None)


def rename_tensor(folder: Path, chance: np.random.Generator) -> str:
    """Give a tensor another name, which may be another tensor's."""
    tensors, metadata = read(folder)
    name, other = (str(n) for n in chance.choice(sorted(tensors), 2, replace=False))
    if chance.random() < 0.5:
        other = f"{name}{chance.choice(['', '2', '.weight', '/../../x'])}x"
    tensors[other] = tensors.pop(name)
    save_file(tensors, str(folder / WEIGHTS), metadata)
    return f"{name} renamed to {other}"


def swap_tensors(folder: Path, chance: np.random.Generator) -> str:
    """Exchange two quantizer tensors of one shape and type that are not equal."""
    tensors, metadata = read(folder)
    names = [n for n in tensors if n.endswith(("weight_packed", "_scale", "_zero_point"))]
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[:i]
        if (tensors[a].shape, tensors[a].dtype) == (tensors[b].shape, tensors[b].dtype)
        and not torch.equal(tensors[a], tensors[b])
    ]
    a, b = pairs[int(chance.integers(len(pairs)))]
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, str(folder / WEIGHTS), metadata)
    return f"{a} and {b} exchanged"


def retype_tensor(folder: Path, chance: np.random.Generator) -> str:
    """Store a quantizer tensor as another type."""
    types = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool]
    kinds = ("weight_packed", "_scale", "_zero_point")
    return _change_tensor(folder, chance, lambda t, chance: t.to(types[int(chance.integers(len(types)))]), kinds)


def reshape_tensor(folder: Path, chance: np.random.Generator) -> str:
    """Store a tensor in another shape."""
    shapes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.flatten().clone() if t.ndim > 1 else t[None].clone(),
        lambda t: torch.cat([t, t]) if t.ndim else t[None].clone(),
        lambda t: t[:0].clone() if t.ndim else t[None].clone(),
    ]
    return _change_tensor(folder, chance, lambda t, chance: shapes[int(chance.integers(3))](t))


def ruin_scale(folder: Path, chance: np.random.Generator) -> str:
    """Make a scale NaN, infinite, zero or negative."""
    value = float(chance.choice([np.nan, np.inf, -np.inf, 0.0, -0.1]))
    return _change_tensor(folder, chance, lambda t, chance: _filled(t, value, chance), ("_scale",))


def ruin_zero_point(folder: Path, chance: np.random.Generator) -> str:
    """Move a zero-point off its grid, or on it."""
    return _change_tensor(
        folder, chance, lambda t, chance: _filled(t, int(chance.integers(1, 127)), chance), ("_zero_point",)
    )


def extra_tensor(folder: Path, chance: np.random.Generator) -> str:
    """Add a tensor that nobody asked for."""
    tensors, metadata = read(folder)
    name = str(chance.choice(sorted(tensors))) + "_extra"
    tensors[name] = torch.zeros(int(chance.integers(1, 5)))
    save_file(tensors, str(folder / WEIGHTS), metadata)
    return f"extra {name}"


def change_metadata(folder: Path, chance: np.random.Generator) -> str:
    """Change one value in the header's JSON, and nothing in config.json."""
    tensors, metadata = read(folder)
    content = json.loads(metadata["oscqat"])
    what = _change_somewhere(content, chance)
    save_file(tensors, str(folder / WEIGHTS), metadata | {"oscqat": json.dumps(content)})
    return f"header: {what}"


def change_layers_in_config(folder: Path, chance: np.random.Generator) -> str:
    """Change one value of the layers in config.json, and nothing in the header."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    what = _change_somewhere(content["quantization_config"]["layers"], chance)
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return f"config: {what}"


def change_both(folder: Path, chance: np.random.Generator) -> str:
    """Change one value of the layers in header and config.json alike."""
    tensors, metadata = read(folder)
    header = json.loads(metadata["oscqat"])
    what = _change_somewhere(header["layers"], chance)
    save_file(tensors, str(folder / WEIGHTS), metadata | {"oscqat": json.dumps(header)})
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content["quantization_config"]["layers"] = header["layers"]
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return f"both: {what}"


def break_config(folder: Path, chance: np.random.Generator) -> str:
    """Cut config.json or change bytes of it so that it is no JSON."""
    content = (folder / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(content[: int(chance.integers(0, len(content) - 2))], encoding="utf-8")
    return "config.json cut"


def lose_file(folder: Path, chance: np.random.Generator) -> str:
    """Have no weights, or a pickle in their place."""
    (folder / WEIGHTS).unlink()
    if chance.random() < 0.5:
        torch.save({"timm_model.classifier.weight": torch.zeros(5, 5)}, folder / "pytorch_model.bin")
        return "a pickle instead of weights"
    return "no weights"


def leave_folder(folder: Path, chance: np.random.Generator) -> str:
    """Name a file outside of the folder in an index; its content would be right."""
    tensors, _ = read(folder)
    outside = f"../{folder.name}-outside.safetensors"
    shutil.move(folder / WEIGHTS, folder / outside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, outside)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return f"weights in {outside}"


def _flipped(tensor: torch.Tensor, chance: np.random.Generator) -> torch.Tensor:
    array = tensor.numpy().copy()
    array.view(np.uint8).reshape(-1)[int(chance.integers(array.nbytes))] ^= np.uint8(chance.integers(1, 256))
    return torch.from_numpy(array)


def _filled(tensor: torch.Tensor, value: float, chance: np.random.Generator) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[int(chance.integers(tensor.numel()))] = value
    return tensor


def _change_tensor(
    folder: Path,
    chance: np.random.Generator,
    change: Callable[[torch.Tensor, np.random.Generator], torch.Tensor | None],
    endings: tuple[str, ...] = ("",),
) -> str:
    tensors, metadata = read(folder)
    name = str(chance.choice(sorted(name for name in tensors if name.endswith(endings))))
    changed = change(tensors.pop(name), chance)
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, str(folder / WEIGHTS), metadata)
    return f"{name} changed to {None if changed is None else (changed.dtype, list(changed.shape))}"


VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    2,
    8,
    9,
    2**40,
    1.5,
    "per_tensor",
    "",
    "x",
    [],
    {},
    [3, 3],
    [2**20, 2**20, 3, 3],
    True,
]


def _change_somewhere(content: Any, chance: np.random.Generator) -> str:
    """Walk down to a random place of a JSON object, and change, drop or add something there."""
    path = []
    while True:
        keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[int(chance.integers(len(keys)))]
        path.append(str(key))
        below = content[key]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.2:
            break
        content = below
    how = chance.random()
    if how < 0.2 and isinstance(content, dict):
        del content[key]
        return f"{'.'.join(path)} dropped"
    if how < 0.3 and isinstance(content, dict):
        content[f"{key}x"] = content.pop(key)
        return f"{'.'.join(path)} renamed"
    content[key] = VALUES[int(chance.integers(len(VALUES)))]
    return f"{'.'.join(path)} = {content[key]!r}"


DAMAGES = (
    flip_header_bytes, flip_header_bytes, change_length, cut, flip_quantizer_bytes, drop_tensor, rename_tensor,
    swap_tensors, retype_tensor, reshape_tensor, ruin_scale, ruin_zero_point, extra_tensor, change_metadata,
    change_layers_in_config, change_both, break_config, lose_file, leave_folder,
)  # fmt: skip


def try_one(original: Path, folder: Path, seed: int, images: torch.Tensor, expected: torch.Tensor) -> tuple[str, str]:
    """Damage a copy and load it.

    Returns:
        What came of it, and a description; the first word is "unexpected" if it should not have been.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    chance = np.random.default_rng(seed)
    damage = DAMAGES[int(chance.integers(len(DAMAGES)))]
    what = f"{damage.__name__}: {damage(folder, chance)}"
    memory, began = _peak_megabytes(), time.process_time()
    try:
        model = AutoModelForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            same = torch.equal(model.eval()(images).logits, expected)
        outcome = "same logits" if same else "unexpected: other logits"
    except CheckpointError as error:
        outcome = "CheckpointError"
        what += f" -> {error}"
    except (OSError, ValueError) as error:
        allowed = damage in (break_config, lose_file)
        outcome = f"{'' if allowed else 'unexpected: '}{type(error).__name__} of transformers"
        what += f" -> {error}"
    except Exception as error:  # what this looks for
        outcome = f"unexpected: {type(error).__name__}"
        what += f" -> {error}"
    seconds, megabytes = time.process_time() - began, _peak_megabytes() - memory
    if seconds > SECONDS or megabytes > MEGABYTES:
        outcome = f"unexpected: {seconds:.1f} s and {megabytes:.0f} MB"
    return outcome, what


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(count: int, seed: int) -> Outcomes:
    """Try so many.

    Returns:
        How often each outcome came, and a line for each unexpected one.
    """
    unexpected = []
    outcomes: collections.Counter[str] = collections.Counter()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as root:
        original = Path(root, "original")
        make_checkpoint(original)
        with torch.no_grad():
            expected = AutoModelForImageClassification.from_pretrained(original).eval()(images).logits
        for number in range(seed, seed + count):
            outcome, what = try_one(original, Path(root, "damaged"), number, images, expected)
            outcomes[outcome] += 1
            if outcome.startswith("unexpected"):
                unexpected.append(f"seed {number}: {outcome}: {what}")
    return outcomes, unexpected


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    run(__doc__, fuzz, count=5000)
