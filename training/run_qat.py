"""From a float timm model to a packed low-bit checkpoint, in one command.

    accelerate launch training/run_qat.py training/recipes/mobilenetv2_w4a4_freeze.yaml \
        --train_dir imagenet/train --validation_dir imagenet/val

Float training if asked for, baselines, calibration, training on the grid, packing, and a check of the result: the
packed checkpoint is loaded the way its users will and must compute what the trained model computes. The same command
again continues from the last checkpoint.
"""

import errno
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments, set_seed

from accelerate import PartialState
from arguments import ModelArguments, RunArguments, Settings, load_recipe, parse, read_yaml
from hf_oscqat import OscQATTrainer, OscQATTrainingArguments, calibrate, pack, prepare_qat
from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.hub.card import RECIPE, RESULTS
from hf_oscqat.hub.push import check_push, push_folder
from hf_oscqat.integration.checkpoints import fresh_folder, last_good_checkpoint, put_in_place, whole_folder
from hf_oscqat.integration.data import (
    ImageData,
    ImageDataset,
    build_transforms,
    collate,
    is_commit,
    load_image_data,
    loading_speed,
    pin_dataset,
    randomness_of,
    resolve_data_config,
)
from hf_oscqat.integration.evaluate import Evaluation, accuracy_metrics, evaluate_accuracy, keep_top5
from hf_oscqat.integration.image_trainer import ImageTrainer, Preempted, leave_process_group
from hf_oscqat.integration.models import check_classes, timm_wrapper
from hf_oscqat.integration.pixels import normalize_pixels
from hf_oscqat.integration.publish import (
    float_bytes,
    layer_facts,
    oscillation_facts,
    provenance,
    published_step,
    run_facts,
    scheme_facts,
    write_companions,
)
from hf_oscqat.integration.verify import claim_arguments
from hf_oscqat.quantization.layers import quantized_layers
from hf_oscqat.report.recorder import distance_histogram

__all__ = ["ModelArguments", "RunArguments", "load_recipe", "main", "parse"]

logger = logging.getLogger("run_qat")

BEFORE = "before_training.json"
IMAGES = "images.json"
BASELINES = "baselines.json"
PACKED_BESIDE = ".packed.writing"
# What may differ between a run and its continuation: where it writes and what it shows, not what it computes.
FREE_TO_CHANGE = {
    "output_dir", "logging_steps", "logging_strategy", "report_to", "disable_tqdm", "save_total_limit", "log_level",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
    "per_device_eval_batch_size", "run_name", "model_license", "evaluate_baselines", "cache_images", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_revision", "max_skipped_steps", "compare_ranks_steps",
    "train_dir", "validation_dir",  # the images in them are compared
}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything.

    Args:
        argv: the command line without the program's name; None takes the real one.

    Returns:
        The results, as written to `results.json`; with `--eval_only`, what was measured.

    Raises:
        ValueError: for anything in recipe, data or model that cannot be used; the message says what to do.
    """
    settings = parse(sys.argv[1:] if argv is None else argv)
    training, run = settings.training, settings.run
    logging.basicConfig(level=logging.INFO if training.process_index == 0 else logging.ERROR, format="%(message)s")
    for client in ("httpx", "httpx2"):  # it would log each request, with addresses that are signed
        logging.getLogger(client).setLevel(logging.WARNING)
    set_seed(training.seed)
    output_dir = Path(training.output_dir)

    origin = None if run.eval_only else _ask_the_hub(settings)
    data = load_image_data(settings.data, seed=training.seed, need_train=not run.eval_only, token=training.hub_token)
    if origin is None:
        return _evaluate_only(settings, data)
    with _lock(output_dir) if training.should_save else nullcontext():
        return _run(settings, data, origin)


def _run(settings: Settings, data: ImageData, origin: "Origin") -> dict[str, Any]:
    """Train and publish, or continue to, or show what was found if that has been done."""
    training, run = settings.training, settings.run
    output_dir = Path(training.output_dir)
    with training.main_process_first(local=False):  # the folder is one for all machines
        checkpoint = open_output_dir(output_dir, settings)
        _check_same_images(output_dir, data, write=training.should_save)
        evaluations = _measured_before(output_dir) if run.evaluate_baselines else {}

    if (output_dir / RESULTS).is_file():
        logger.info("the run in %s has ended; this is what it found", output_dir)
        finished: dict[str, Any] = json.loads((output_dir / RESULTS).read_text(encoding="utf-8"))
        if training.should_save:
            show(finished)
            _push(settings)
        return finished

    model = float_model(settings, data)
    measures = run.evaluate_baselines and not evaluations
    if any(True for _ in quantized_layers(model)):
        _check_same_quantization(model, settings)
    else:
        if measures:
            evaluations["float"] = _evaluate(model, data.validation, training)
        prepare_qat(model, settings.quantization)
        model.to(training.device)
        calibrate(model, _calibration_batches(model, data, settings))
        if measures:
            evaluations["rounded"] = _evaluate(model, data.validation, training)
            if training.should_save:
                _write_json(output_dir / BASELINES, {name: asdict(found) for name, found in evaluations.items()})
    if checkpoint is None and training.should_save:
        _write_json(output_dir / BEFORE, distance_histogram(model).to_dict())

    trainer = OscQATTrainer(
        model=model,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collate,
    )
    data_speed = _data_speed(data, trainer)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()  # re-estimates batch-norm on the final weights
    if training.should_save:
        with whole_folder(output_dir / "qat") as folder:
            trainer.save_model(str(folder))
    trainer.save_state()

    # In mixed precision accelerate has wrapped forward; what is packed and checked is the float32 model.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).cpu().eval()
    # In another memory format convolutions sum in another order, and a value on a rounding threshold would flip.
    model = model.to(memory_format=torch.contiguous_format)
    # Beside its place until it has been checked and has its card.
    beside = output_dir / PACKED_BESIDE
    if training.should_save:
        packed: PreTrainedModel = pack(model)
        packed.save_pretrained(fresh_folder(beside))
    trainer.accelerator.wait_for_everyone()
    loaded = AutoModelForImageClassification.from_pretrained(beside)
    difference = _largest_difference(model, loaded, data.validation)
    if not difference <= 1e-5:
        raise RuntimeError(f"the packed model differs from the trained one by {difference:.1e} of the largest logit")
    evaluations["packed"] = _evaluate(loaded, data.validation, training)
    metrics = outcome.metrics if checkpoint is None else {}
    results = _results(settings, data, trainer, evaluations, difference, metrics, data_speed, origin)
    if training.should_save:
        before = json.loads((output_dir / BEFORE).read_text(encoding="utf-8"))
        write_companions(
            beside,
            results,
            recipe=_recipe_for_others(settings),
            log_history=trainer.state.log_history,
            distances=(before, distance_histogram(model).to_dict()),
        )
        put_in_place(beside, output_dir / "packed")
        _write_json(output_dir / RESULTS, results)
        show(results)
        _push(settings)
    return results


def _push(settings: Settings) -> None:
    """Push the packed checkpoint, if that was asked for; what is there already is not sent again."""
    training = settings.training
    if not training.push_to_hub:
        return
    pushed = push_folder(
        Path(training.output_dir, "packed"),
        _hub_id(settings),
        token=training.hub_token,
        private=training.hub_private_repo or None,
        revision=training.hub_revision,
        license=settings.run.model_license,
    )
    logger.info("%s: %s", "pushed" if pushed.changed else "nothing to push, all of it is there", pushed.url)


def _hub_id(settings: Settings) -> str:
    return settings.training.hub_model_id or Path(settings.training.output_dir).name


def open_output_dir(output_dir: Path, settings: Settings) -> str | None:
    """Find out whether this run begins or continues, and write down what it is told.

    Args:
        output_dir: folder of the run.
        settings: of the run.

    Returns:
        The checkpoint to continue from, or None.

    Raises:
        ValueError: if the folder holds something else, or a run with other settings.
    """
    recipe = json.loads(json.dumps(settings.recipe))
    path = output_dir / RECIPE
    if path.is_file():
        previous = read_yaml(path.read_text(encoding="utf-8"))
        # Without a note of its images nothing says that other folders hold the same ones.
        free = FREE_TO_CHANGE if (output_dir / IMAGES).is_file() else FREE_TO_CHANGE - {"train_dir", "validation_dir"}
        changed = sorted(
            key for key in (previous.keys() | recipe.keys()) - free if not _same(previous.get(key), recipe.get(key))
        )
        if changed:
            raise ValueError(
                f"got output_dir {output_dir} with a run that was told otherwise about {', '.join(changed)}; expected "
                "the same settings to continue it, or another --output_dir to begin anew"
            )
        checkpoint = last_good_checkpoint(output_dir)
        logger.info("continuing the run in %s from %s", output_dir, checkpoint or "its beginning")
        return checkpoint
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"got output_dir {output_dir}, which is not empty and holds no run to continue; expected a new or empty "
            "folder. Nothing in it was touched"
        )
    if settings.training.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump(recipe, sort_keys=False))
    return None


def _measured_before(output_dir: Path) -> dict[str, Evaluation]:
    """Return the accuracies that a run has measured before it was interrupted."""
    path = output_dir / BASELINES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: Evaluation(**measured) for name, measured in found.items()}


def _check_same_images(output_dir: Path, data: ImageData, *, write: bool) -> None:
    """Note which images a run is about, or compare with what it has noted; their folder may have moved.

    Raises:
        ValueError: if there are others.
    """
    assert data.train is not None
    splits = {"train": data.train, "validation": data.validation}
    found = {name: {"images": len(images), "sha256": images.sha256} for name, images in splits.items()}
    path = output_dir / IMAGES
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if differing := [name for name in found if found[name] != begun[name]]:
            counts = " and ".join(
                f"{found[name]['images']:,} {name} images ({begun[name]['images']:,} before)" for name in differing
            )
            raise ValueError(
                f"got {counts} for the run in {output_dir}, which began with others by number, name or class; "
                "expected the same to continue it, or another --output_dir to begin anew"
            )
    elif write:
        _write_json(path, found)


def _same(one: Any, other: Any) -> bool:
    """Whether two settings say the same; the later one of two overrides wins, so their order matters."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return bool(one == other)
    ordered = [list(dict(setting.get("overrides") or {}).items()) for setting in (one, other)]
    return ordered[0] == ordered[1] and one | {"overrides": None} == other | {"overrides": None}


@contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    """Hold the folder by a file beside it, which the system lets go of however this process ends.

    Raises:
        ValueError: if another process holds it.
    """
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir.parent):  # rights alone do not say whether it can be written
            pass
        if output_dir.exists() and not output_dir.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
    except OSError as error:
        raise ValueError(
            f"got output_dir {output_dir}, which cannot be made ({error.strerror}), expected a folder that can be "
            "written and beside which files can be: pass another --output_dir"
        ) from error
    lock = FileLock(output_dir.with_name(f".{output_dir.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"got output_dir {output_dir}, which another run is writing to; expected a folder of its own. If the "
            "launcher of that run was killed, its processes may go on: end them first"
        ) from error
    try:
        yield
    finally:
        lock.release()


def float_model(settings: Settings, data: ImageData) -> PreTrainedModel:
    """Make the model that training on the grid starts from, and set the transforms of the data by its config.

    Args:
        settings: of the run; with `float_epochs`, float training comes first and is kept in `<output_dir>/float`.
        data: receives the transforms.

    Returns:
        A float model, or one in training form if that is what `model_name_or_path` holds.

    Raises:
        ValueError: if the model is packed, or in training form with `float_epochs`.
    """
    arguments, training = settings.model, settings.training
    finished = Path(training.output_dir, "float")
    model_args = arguments.model_args if isinstance(arguments.model_args, dict) else None
    if (finished / RESULTS).is_file():
        source, model_args = str(finished), None
    else:
        source = arguments.model_name_or_path
    model = timm_wrapper(source, data.class_names, pretrained=arguments.pretrained, model_args=model_args)
    if packed_layers(model):
        raise ValueError(
            f"got {arguments.model_name_or_path}, a packed checkpoint, expected a float model or one in training form:"
            " integers cannot be trained. Use --eval_only to evaluate it"
        )
    if settings.run.float_epochs > 0 and any(True for _ in quantized_layers(model)):
        raise ValueError(
            f"got float_epochs={settings.run.float_epochs:g} and {arguments.model_name_or_path}, which is in training "
            "form already, expected a float model, or no float_epochs"
        )
    random = timm.is_model(source) and not arguments.pretrained and "checkpoint_path" not in (model_args or {})
    if random and settings.run.float_epochs == 0:
        logger.warning(
            "%s has random weights: pass --pretrained true, a folder with trained weights, or --float_epochs", source
        )
    _set_transforms(model, data, settings)
    if settings.run.float_epochs > 0 and source != str(finished):
        _train_float(model, data, settings, finished)
    return model


def _train_float(model: PreTrainedModel, data: ImageData, settings: Settings, finished: Path) -> None:
    training = settings.training
    shared = {
        name: getattr(training, name)
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "seed",
            "data_seed", "bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
            "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
            "dataloader_pin_memory", "dataloader_drop_last", "use_cpu", "disable_tqdm", "save_total_limit",
            "logging_steps", "report_to", "remove_unused_columns", "label_smoothing_factor", "full_determinism",
        )
    }  # fmt: skip
    args = TrainingArguments(
        output_dir=str(finished),
        num_train_epochs=settings.run.float_epochs,
        learning_rate=settings.run.float_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        save_strategy="epoch",
        eval_strategy="no",
        **shared,
    )
    trainer = ImageTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collate,
        compute_metrics=accuracy_metrics,
        preprocess_logits_for_metrics=keep_top5,
    )
    checkpoint = last_good_checkpoint(finished)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    # In mixed precision accelerate has wrapped forward; the baselines are those of the float32 model.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if training.should_save:
        model.save_pretrained(finished)
        _write_json(finished / RESULTS, metrics)
    trainer.accelerator.wait_for_everyone()


def _set_transforms(model: PreTrainedModel, data: ImageData, settings: Settings) -> None:
    timm_cfg = dict(model.timm_model.pretrained_cfg or {}) | (getattr(model.config, "pretrained_cfg", None) or {})
    data_config = resolve_data_config(timm_cfg, settings.data)
    # Saved with the model, so that its image processor prepares images the same way.
    model.config.pretrained_cfg = {k: v for k, v in (timm_cfg | data_config).items() if k != "num_classes"}
    # As bytes, which are a fourth of what floats are to copy; the device does the rest.
    train_transform, eval_transform = build_transforms(data_config, settings.data, normalize=False)
    data.validation.transform = eval_transform
    if data.train is not None:
        data.train.transform = train_transform
        data.train.seed = settings.training.seed


def _calibration_batches(model: PreTrainedModel, data: ImageData, settings: Settings) -> Iterator[torch.Tensor]:
    """Random training images, the same on each process, so that all begin with the same ranges."""
    assert data.train is not None
    training = settings.training
    generator = torch.Generator().manual_seed(training.seed)
    loader = DataLoader(
        data.train,
        batch_size=min(training.per_device_train_batch_size, len(data.train)),
        shuffle=True,
        generator=generator,
        collate_fn=collate,
        num_workers=training.dataloader_num_workers,
    )
    set_seed(training.seed)
    for batch in islice(loader, max(1, settings.run.calibration_batches)):
        yield normalize_pixels(batch["pixel_values"], model.config)


def _evaluate(
    model: PreTrainedModel,
    dataset: ImageDataset,
    training: OscQATTrainingArguments,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Measure in float32 unless told otherwise: what the card claims is what whoever loads the checkpoint gets."""
    return evaluate_accuracy(
        model,
        dataset,
        batch_size=training.per_device_eval_batch_size,
        collate=collate,
        num_workers=training.dataloader_num_workers,
        cpu=training.use_cpu,
        autocast=autocast,
        show_progress=not training.disable_tqdm,
    )


def _data_speed(data: ImageData, trainer: OscQATTrainer) -> float:
    """Images per second that the loaders of all processes, running at once, deliver where no model is waited for."""
    assert data.train is not None
    args = trainer.args
    with randomness_of(args.seed):
        speed = loading_speed(
            data.train,
            batch_size=args.per_device_train_batch_size,
            num_workers=args.dataloader_num_workers,
            seed=args.seed + args.process_index,
        )
    return float(trainer.accelerator.reduce(torch.tensor(speed, device=args.device), "sum"))


def _check_same_quantization(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse to train a model on another grid than it is on.

    Raises:
        ValueError: if recipe or options ask for another quantization than the model has.
    """
    has, wanted = model.config.quantization_config.to_dict(), settings.quantization.to_dict()
    changed = sorted(key for key in wanted if has.get(key) != wanted[key])
    if settings.recipe.get("quantization") and changed:
        raise ValueError(
            f"got {settings.model.model_name_or_path}, which is quantized already, with other settings of "
            f"{', '.join(changed)}; expected the same quantization or none, or a float model"
        )


def _evaluate_only(settings: Settings, data: ImageData) -> dict[str, Any]:
    model_args = settings.model.model_args if isinstance(settings.model.model_args, dict) else None
    name = settings.model.model_name_or_path
    model = timm_wrapper(name, None, pretrained=settings.model.pretrained, model_args=model_args)
    check_classes(model.config, data.class_names, name)
    _set_transforms(model, data, settings)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.training.mixed_precision)
    measured = asdict(_evaluate(model, data.validation, settings.training, precision))
    if settings.training.process_index == 0:
        logger.info("--result\n%s", json.dumps({"model": name, **measured}, indent=4))
    return measured


@torch.no_grad()
def _largest_difference(trained: PreTrainedModel, packed: PreTrainedModel, dataset: ImageDataset) -> float:
    """Largest difference of logits on a few images, as a share of the largest logit; both in float32 on the CPU."""
    images = collate([dataset[i] for i in range(min(16, len(dataset)))])["pixel_values"]
    images = normalize_pixels(images, trained.config)
    logits, reloaded = trained(pixel_values=images).logits, packed.cpu()(pixel_values=images).logits
    return float((logits - reloaded).abs().max() / logits.abs().max())


def _results(
    settings: Settings,
    data: ImageData,
    trainer: OscQATTrainer,
    evaluations: dict[str, Evaluation],
    difference: float,
    metrics: dict[str, float],
    data_speed: float,
    origin: "Origin",
) -> dict[str, Any]:
    """Collect what card and table show; `results.json` holds the same.

    `metrics` are those of a training that was not interrupted, else none: times would be of its last part.
    """
    training, model = settings.training, trainer.model
    pretrained_cfg = model.config.pretrained_cfg
    oscillation = oscillation_facts(trainer.state.log_history, published_step(trainer))
    results = {
        "model": {
            "name": Path(training.output_dir).name,
            "path": str(Path(training.output_dir, "packed")),
            "architecture": model.config.architecture,
            "origin": _origin(settings),
            "base_model": origin.base_model,
            "license": origin.license,
            "license_inherited": settings.run.model_license is None,
        },
        "scheme": scheme_facts(trainer.oscqat_config),
        "data": {
            "name": data.name,
            "dataset_id": data.dataset_id,
            "config": data.config,
            "revision": data.revision,
            "split": data.split,
            "num_train": len(data.train or ()),
            "skipped_images": data.skipped,
            "preprocessing": _preprocessing(pretrained_cfg),
            "evaluation": claim_arguments(settings.data, training.seed, pretrained_cfg, held_out=data.held_out),
        },
        "accuracy": {"float": None, "rounded": None} | {k: asdict(v) for k, v in evaluations.items()},
        "bytes": {
            "float": float_bytes(model),
            "packed": os.path.getsize(Path(training.output_dir, PACKED_BESIDE, "model.safetensors")),
        },
        "oscillation": None if oscillation is None else {**oscillation, "distances": True},
        "layers": layer_facts(model),
        "packed_difference": difference,
        "run": {
            **run_facts(trainer, command=settings.command, seconds=metrics.get("train_runtime"), recipe=True),
            "images_per_second": metrics.get("train_samples_per_second"),
            "data_images_per_second": data_speed,
            "data_workers": training.dataloader_num_workers,
        },
    }
    return json.loads(json.dumps(results))


@dataclass(frozen=True)
class Origin:
    """Where the float model comes from; see `provenance`."""

    base_model: str | None
    license: str


def _ask_the_hub(settings: Settings) -> Origin:
    """Ask once, before anything is computed, what a run has to know from the Hub; all processes get the same answers.

    Sets the commit of the dataset in the settings; a run that continues keeps the one it began with.

    Raises:
        ValueError: if there is no licence, or a push that was asked for will not be possible.
    """
    training, data = settings.training, settings.data
    answers: list[Any] = [None, None]
    if training.process_index == 0:
        answers[0] = provenance(
            settings.model.model_name_or_path,
            pretrained=settings.model.pretrained,
            license=settings.run.model_license,
            token=training.hub_token,
        )
        if training.push_to_hub:
            check_push(
                _hub_id(settings),
                token=training.hub_token,
                private=training.hub_private_repo or None,
                license=settings.run.model_license,
            )
        answers[1] = _dataset_commit(settings)
    broadcast_object_list(answers)
    if answers[1] != data.dataset_revision:
        data.dataset_revision = settings.recipe["dataset_revision"] = answers[1]
    return Origin(*answers[0])


def _dataset_commit(settings: Settings) -> str | None:
    """Return the commit of a dataset of the Hub that this run, or the one it continues, is about."""
    name, asked = settings.data.dataset_name, settings.data.dataset_revision
    if name is None or name == "digits" or Path(name).exists():
        return asked
    before = Path(settings.training.output_dir, RECIPE)
    if before.is_file() and not is_commit(asked):
        begun = read_yaml(before.read_text(encoding="utf-8")) or {}
        if begun.get("dataset_name") == name:
            commit: str | None = begun.get("dataset_revision")
            if asked is not None:  # a branch may have moved on since, and the Hub be out of reach
                logger.warning("the run goes on with commit %s of %s, whatever %r is by now", commit, name, asked)
            return commit
    return pin_dataset(name, asked, settings.training.hub_token)


def _recipe_for_others(settings: Settings) -> dict[str, Any]:
    """Return the recipe as anyone can run it: without where this run wrote and pushed."""
    recipe = json.loads(json.dumps(settings.recipe))
    for key in [key for key in recipe if key == "push_to_hub" or key.startswith("hub_")]:
        del recipe[key]
    return recipe | {"output_dir": f"runs/{Path(settings.training.output_dir).name}"}


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the one table a run ends with."""
    console = console or Console()
    table = Table(title=f"{results['model']['name']}: {results['scheme']['name']}", title_justify="left")
    for column in ("", "top-1", "top-5", "bytes"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("float", "float", results["bytes"]["float"]),
        ("rounded without training", "rounded", None),
        (f"{results['scheme']['name']} after training, packed", "packed", results["bytes"]["packed"]),
    )
    for label, key, size in rows:
        measured = results["accuracy"][key]
        if measured is not None:
            top1, top5 = (f"{100 * measured[k]:.2f}%" for k in ("accuracy", "top5_accuracy"))
            table.add_row(label, top1, top5, f"{size:,}" if size else "")
    console.print(table)
    if results["oscillation"]:
        o = results["oscillation"]
        console.print(
            f"Oscillating weights: {o['start']:.2f}% at the start, {o['peak']:.2f}% at the peak, {o['end']:.2f}% at "
            f"the end; frozen at the end: {o['frozen']:.2f}%"
        )
    run = results["run"]
    if "data_images_per_second" in run:
        speed = run["images_per_second"]
        data = f"{run['data_images_per_second']:.0f} images/s (dataloader_num_workers {run['data_workers']})"
        if speed is None:
            console.print(f"Training data alone: {data}")
        else:
            console.print(f"Training: {speed:.0f} images/s, evaluation included; its data alone: {data}")
    console.print(f"The checkpoint, loaded with AutoModelForImageClassification: {results['model']['path']}")


def _origin(settings: Settings) -> str:
    arguments, run = settings.model, settings.run
    weights = "with pretrained weights" if arguments.pretrained else ""
    trained = f"trained in float for {run.float_epochs:g} epochs" if run.float_epochs else ""
    return ", ".join(part for part in (arguments.model_name_or_path, weights, trained) if part)


def _preprocessing(cfg: dict[str, Any]) -> str:
    size = cfg["input_size"]
    return (
        f"{size[1]} x {size[2]} pixels, {cfg['crop_mode']} crop of {cfg['crop_pct']:g}, {cfg['interpolation']}, "
        f"mean {tuple(cfg['mean'])}, std {tuple(cfg['std'])}"
    )


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that nobody ever reads half a file."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    code: int | str | None = 0
    try:
        main()
        PartialState().wait_for_everyone()  # whoever leaves first would break the others' connections
    except ValueError as error:
        # Bad input: the message is for the user, the traceback is not.
        transformers.logging.get_logger("run_qat").debug("", exc_info=True)
        raise SystemExit(f"error: {error}") from error
    except Preempted as preempted:
        logger.warning("stopped at step %d after saving; the same command continues", preempted.step)
        code = preempted.code  # and not `raise`: its traceback would keep the trainer alive
    finally:
        leave_process_group()
    raise SystemExit(code)
