"""What a packed checkpoint is published with: results, card, pictures, recipe; and where its licence comes from."""

import filecmp
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import timm
import torch
import yaml
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import PreTrainedModel, TimmWrapperModel

from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.config import OscQATConfig
from hf_oscqat.hub.card import (
    CARD,
    RECIPE,
    RESULTS,
    WEIGHTS,
    eval_results_file,
    read_card,
    read_metadata,
    read_results,
    render_card,
)
from hf_oscqat.hub.client import explained, patiently
from hf_oscqat.hub.push import GENERATED, Pushed, push_folder
from hf_oscqat.integration.checkpoints import PREFIX
from hf_oscqat.integration.modeling import OscQATTimmForImageClassification
from hf_oscqat.prepare import describe
from hf_oscqat.quantization.packed import PackedLayer
from hf_oscqat.remedies import REMEDIES
from hf_oscqat.report.pictures import draw_distances, draw_oscillation

logger = logging.getLogger(__name__)

_SECRETIVE = re.compile("token|secret|password|api.?key", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
COMPANIONS = (CARD, *GENERATED)
"""Files beside the weights that go where the weights go."""


def provenance(
    name_or_path: str, *, pretrained: bool = False, license: str | None = None, token: str | None = None
) -> tuple[str | None, str]:
    """Find out which model on the Hub a model comes from, and under which licence it may be passed on.

    Args:
        name_or_path: a timm name, a folder or a Hub id, as in `timm_wrapper`.
        pretrained: for a timm name, whether its pretrained weights are used.
        license: if given, no other is looked for.
        token: to read the card of a Hub id; None takes the stored one, or HF_TOKEN.

    Returns:
        The Hub id of the base model, None for one trained from scratch; and the licence.

    Raises:
        ValueError: if no licence is given and none can be read.
    """
    base_model, stated = None, None
    if Path(name_or_path).is_dir():
        card = Path(name_or_path, CARD)
        if card.is_file():
            metadata = read_metadata(read_card(card), str(card))
            base_model, stated = metadata.get("base_model"), _license_in(metadata)
    elif timm.is_model(name_or_path):
        cfg = timm.get_pretrained_cfg(name_or_path) if pretrained else None
        if cfg is not None:
            base_model, stated = cfg.hf_hub_id, cfg.license
    elif "/" not in name_or_path:
        return None, license or "unknown"  # there is no such model; who loads it says so, and what may be meant
    else:
        base_model = name_or_path
        if license is None:
            api = HfApi(token=token)
            with explained(name_or_path, "reading the licence of", api.endpoint):
                info = patiently(lambda: api.model_info(name_or_path), f"reading {name_or_path}")
            stated = _license_in(info.card_data.to_dict() if info.card_data else {})
    if license is None and stated in (None, "", "unknown"):
        trained = "random weights" if timm.is_model(name_or_path) and not pretrained else "no licence that can be read"
        raise ValueError(
            f"got {name_or_path} with {trained}, expected a licence for what is made of it: pass one, such as "
            "--model_license apache-2.0"
        )
    return cast("str | None", base_model), str(license or stated)


def _license_in(metadata: Mapping[str, Any]) -> str | None:
    stated = metadata.get("license")
    return metadata.get("license_name", stated) if stated == "other" else stated


def scheme_facts(config: OscQATConfig) -> dict[str, str]:
    """Say in words how a model is quantized, for the card."""

    def width(bits: int | None, scheme: str, granularity: str) -> str:
        return "float" if bits is None else f"{bits} bits, {scheme}, {granularity.replace('_', ' ')}"

    weights, activations = config.weight_bits, config.activation_bits
    name = f"W{weights or 32}A{activations or 32}"
    used = [
        f"{remedy} ({', '.join(f'{k}={v}' for k, v in asdict(getattr(config, remedy)).items())})"
        for remedy in REMEDIES
        if getattr(config, remedy) is not None
    ]
    count = config.batchnorm_reestimation_batches
    ends = "float" if config.first_last_bits is None else f"{config.first_last_bits} bits; the image stays float"
    return {
        "name": name,
        "in_words": f"{weights}-bit weights" * bool(weights)
        + " and " * bool(weights and activations)
        + f"{activations}-bit inputs of layers" * bool(activations),
        "weights": width(weights, config.weight_scheme, config.weight_granularity),
        "activations": width(activations, config.activation_scheme, "per_tensor"),
        "first_last": ends,
        "remedies": "; ".join(used) or "none",
        "batchnorm": f"statistics re-estimated on {count} training batches" if count else "running statistics",
    }


def layer_facts(model: nn.Module) -> list[dict[str, Any]]:
    """Return the quantized layers of a model in training or packed form."""
    return [asdict(row) for row in describe(model) if row.weight_bits or row.input_bits]


def published_step(trainer: Any) -> int:
    """Step that the weights of a trainer are of after training: the last one, or that of the best checkpoint."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        # Not `best_global_step`: what was best between two checkpoints is not there to be loaded.
        return int(Path(state.best_model_checkpoint).name.removeprefix(PREFIX))
    step: int = state.global_step
    return step


def oscillation_facts(log_history: Sequence[Mapping[str, Any]], last_step: int) -> dict[str, Any] | None:
    """Return the share of oscillating and frozen weights at a few moments, in percent; None if nobody looked.

    Args:
        log_history: of a trainer.
        last_step: what was logged later is of other weights.
    """
    log = [entry for entry in log_history if "oscillating_percent" in entry and entry["step"] <= last_step]
    if not log:
        return None
    return {
        "start": log[0]["oscillating_percent"],
        "peak": max(entry["oscillating_percent"] for entry in log),
        "end": log[-1]["oscillating_percent"],
        "frozen": log[-1]["frozen_percent"],
    }


def float_bytes(model: nn.Module) -> int:
    """Bytes of the float model that a model in training or packed form was made from, heads of files left out."""
    added = (".weight_quantizer.", ".input_quantizer.", ".oscillation.")
    of_quantizers = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    own = {f"{name}.{part}" for name in packed for part in of_quantizers}
    total = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if name not in own and not any(part in name for part in added)
    )
    return total + sum(4 * torch.Size(m.format.weight.shape).numel() for m in packed.values() if m.format.weight)


def run_facts(trainer: Any, *, command: str, seconds: float | None, recipe: bool) -> dict[str, Any]:
    """Return how a run was made, for the card.

    Args:
        trainer: an `OscQATTrainer` after training.
        command: the command line.
        seconds: that training took; None if it was interrupted, and nobody knows.
        recipe: whether `recipe.yaml` lies beside the card.
    """
    step = published_step(trainer)
    return {
        "command": command,
        "recipe": recipe,
        "epochs": (trainer.state.epoch or 0) * step / max(1, trainer.state.global_step),
        "steps": step,
        "processes": trainer.args.world_size,
        "device": device_name(trainer.args.device),
        "seconds": seconds,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("hf_oscqat", "torch", "timm", "transformers")),
        "commit": commit_of_code(),
        "date": date.today().isoformat(),
    }


def command_line(argv: Sequence[str], *secrets: str | None) -> str:
    """Return a command as one would type it, without what may be a secret.

    Args:
        argv: its words.
        *secrets: what must not be in it, besides the stored token.
    """
    known = [secret for secret in (*secrets, get_token()) if secret]
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secretive = word.startswith("-") and bool(_SECRETIVE.search(name))
        if hide_next and not word.startswith("--"):
            word = "***"
        elif secretive and equals:
            word = f"{name}=***"
        hide_next = secretive and not equals
        for secret in known:
            word = word.replace(secret, "***")
        shown.append(_TOKEN.sub("***", word))
    return shlex.join(shown)


def device_name(device: torch.device) -> str:
    """Name the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def commit_of_code() -> str | None:
    """Return the git commit of this package's source, with "-dirty" if files were changed; None outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # In an installed package, the repository around it would be somebody else's.
        if Path(__file__).name not in git("ls-files", "--", str(here)).replace("/", "\n").split("\n"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_companions(
    folder: Path,
    results: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    distances: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> None:
    """Put card, pictures, recipe and results beside packed weights.

    Args:
        folder: that `save_pretrained` wrote to.
        results: as collected; the card shows them.
        recipe: of the run, as plain data without secrets.
        log_history: of Trainer, for the picture of oscillation.
        distances: of latent weights to the grid, before and after, for the other picture.
    """
    if results["oscillation"]:
        draw_oscillation(log_history, folder / "oscillation.png")
        if distances is not None:
            draw_distances(*distances, folder / "distances.png")
    if recipe is not None:
        (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    weights = folder / WEIGHTS
    if weights.is_file():  # which weights these numbers are about
        results = {**results, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(render_card(results), encoding="utf-8")
    listed = eval_results_file(results)
    if listed is not None:
        path = folder / listed[0]
        path.parent.mkdir(exist_ok=True)
        path.write_text(listed[1], encoding="utf-8")


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    license: str | None = None,
    commit_message: str | None = None,
    **push_arguments: Any,
) -> Pushed:
    """Push a packed model to the Hub in one commit, with the card it was loaded beside, or a plain one.

    Args:
        model: from `pack`, or loaded in packed form.
        repo_id: see `push_folder`.
        license: needed where the model was not loaded from a folder or repository whose card states it.
        commit_message: title of the commit.
        **push_arguments: see `push_folder`.

    Raises:
        ValueError: see `push_folder`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, origin = Path(temporary), model.config.name_or_path
        model.save_pretrained(folder)
        if isinstance(model, TimmWrapperModel):
            raise ValueError(
                "got a model without its head, as AutoModel loads it, expected one with it: config.json and card are "
                "those of the classifier. Load it with AutoModelForImageClassification"
            )
        if not packed_layers(model):  # loaded by the code beside the weights, whose classes are others
            model = OscQATTimmForImageClassification.from_pretrained(folder)
            model.config.name_or_path = origin
        beside = _loaded_from(model, push_arguments.get("token"))
        # They belong to those weights only: not to an older revision, and not to ones that were changed since.
        if beside is not None and _same_weights(beside, folder):
            for name in COMPANIONS:
                if (beside / name).is_file():
                    (folder / name).write_bytes((beside / name).read_bytes())
        if read_results(folder) is None and not (folder / CARD).is_file():
            results = plain_results(model, repo_id, license)
            results["bytes"]["packed"] = os.path.getsize(folder / "model.safetensors")
            write_companions(folder, results)
        return push_folder(folder, repo_id, license=license, message=commit_message, **push_arguments)


def _loaded_from(model: PreTrainedModel, token: str | None) -> Path | None:
    """Return a folder with what lies beside the weights that a model was loaded from; None if there is none."""
    origin = str(getattr(model.config, "name_or_path", None) or "")  # `pack` leaves it empty
    if not origin or Path(origin).is_dir():
        return Path(origin) if origin else None
    endpoint = HfApi().endpoint
    with explained(origin, "reading the card of", endpoint):
        patterns = [*COMPANIONS, WEIGHTS]
        try:
            return Path(
                patiently(lambda: snapshot_download(origin, allow_patterns=patterns, token=token), f"reading {origin}")
            )
        except (RepositoryNotFoundError, HFValidationError):
            logger.warning("%s, from which the model was loaded, is not there any more: without its card", origin)
            return None


def _same_weights(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).is_file() and filecmp.cmp(one / WEIGHTS, other / WEIGHTS, shallow=False)


def plain_results(model: PreTrainedModel, name: str, license: str | None) -> dict[str, Any]:
    """Return what is known of a packed model of which nobody has measured anything."""
    config = OscQATConfig.from_dict({**model.config.quantization_config.to_dict(), "layers": None})
    return {
        "model": {
            "name": name.rpartition("/")[2],
            "path": name,
            "architecture": model.config.architecture,
            "origin": model.config.architecture,
            "base_model": None,
            "license": license,
            "license_inherited": False,
        },
        "scheme": scheme_facts(config),
        "data": None,
        "accuracy": {"float": None, "rounded": None, "packed": None},
        "bytes": {"float": float_bytes(model), "packed": 0},
        "oscillation": None,
        "layers": layer_facts(model),
        "run": None,
    }
