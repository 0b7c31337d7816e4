"""The recipe and the command line of `run_qat.py`: YAML files, then `--key value`, then typed settings.

A recipe's keys are flat and are those of the four argument classes; `quantization` is a mapping of `OscQATConfig`
arguments, reached from the command line with dots: `--quantization.freezing.threshold 0.02`. A recipe may `include`
others. A key that nothing reads is an error.
"""

import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import default_yaml_config_file
from transformers import HfArgumentParser

from hf_oscqat import OscQATConfig, OscQATTrainingArguments
from hf_oscqat.config import check_keys
from hf_oscqat.integration.data import DataArguments
from hf_oscqat.integration.publish import command_line
from hf_oscqat.remedies import REMEDIES

USAGE = """usage: accelerate launch training/run_qat.py [RECIPE.yaml ..] [--KEY VALUE ..] [--quantization.KEY VALUE ..]

Trains a timm model on a low-bit grid and writes a packed checkpoint. Recipes are merged in order, then the options.
The quantization keys are the arguments of hf_oscqat.OscQATConfig. docs/publishing.md says what is pushed to the Hub.
"""


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(
        default="mobilenetv2_100",
        metadata={"help": "A timm name, a folder or a Hub id with a timm model saved by transformers or timm."},
    )
    pretrained: bool = field(default=False, metadata={"help": "Download the pretrained weights of a timm name."})
    model_args: dict | str | None = field(
        default=None, metadata={"help": 'Arguments of timm.create_model, as JSON: {"output_stride": 8}.'}
    )

    def __post_init__(self) -> None:
        """Read `model_args` where the command line gave text.

        Raises:
            ValueError: if it is no JSON object.
        """
        if isinstance(self.model_args, str):
            try:
                self.model_args = json.loads(self.model_args)
            except json.JSONDecodeError as error:
                raise ValueError(f"got model_args={self.model_args!r}, expected a JSON object") from error
        if self.model_args is not None and not isinstance(self.model_args, dict):
            raise ValueError(f"got model_args={self.model_args!r}, expected a mapping")


@dataclass
class RunArguments:
    """What to do with the model besides training it on the grid."""

    float_epochs: float = field(
        default=0.0, metadata={"help": "Epochs of float training first: from scratch, or to fine-tune a new head."}
    )
    float_learning_rate: float = field(default=1e-3, metadata={"help": "Its learning rate; the optimizer is AdamW."})
    calibration_batches: int = field(default=8, metadata={"help": "Training batches that initial ranges come from."})
    evaluate_baselines: bool = field(
        default=True, metadata={"help": "Also measure the float model and its plain rounding before training."}
    )
    eval_only: bool = field(default=False, metadata={"help": "Evaluate the model as it is, and stop."})
    model_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the result, such as apache-2.0. Needed for a model trained from scratch, or where "
            "the float model states none; otherwise that of the float model is inherited."
        },
    )


@dataclass(frozen=True)
class Settings:
    """Everything a run is told.

    Attributes:
        model: see `ModelArguments`.
        data: see `DataArguments`.
        run: see `RunArguments`.
        training: see `OscQATTrainingArguments`.
        quantization: see `OscQATConfig`.
        recipe: the merged recipe and options as plain data, to be written beside the results.
        command: the command line.
    """

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: OscQATTrainingArguments
    quantization: OscQATConfig
    recipe: dict[str, Any]
    command: str


class RecipeError(ValueError):
    """A recipe or an option cannot be used."""


NOT_READ = {
    "optim": "use weight_optimizer (sgd or adamw)",
    "optim_args": "use weight_optimizer and momentum",
    "resume_from_checkpoint": "a run continues by itself from the last checkpoint in its output_dir",
    "do_train": "it always trains, unless --eval_only is given",
    "do_eval": "it always evaluates",
    "do_predict": "use --eval_only",
}
"""Arguments of transformers that would be without effect here, and what to use."""

SECRETS = ("hub_token",)
"""Keys that are used and never written down."""

OFF_IS_NO = ("eval_strategy", "save_strategy", "logging_strategy")
"""Keys whose value may be the word `no`."""

ARGUMENT_CLASSES = (ModelArguments, DataArguments, RunArguments, OscQATTrainingArguments)

TEXT_KEYS = {f.name for of in ARGUMENT_CLASSES for f in fields(of) if f.type in (str, str | None)} - NOT_READ.keys()
"""Keys whose value is text, whatever it looks like."""

LIST_KEYS = ("quantization.modules_to_not_convert",)
"""Options that make a list also of one value."""


def parse(argv: list[str]) -> Settings:
    """Read recipes and options.

    Args:
        argv: the command line without the program's name.

    Raises:
        ValueError: for anything that cannot be used; the message names it.
        SystemExit: after printing the help that was asked for.
    """
    if "--help" in argv or "-h" in argv:
        # Its own line of usage would be empty.
        rest = _parser().format_help().partition("\n")[2].lstrip("\n")
        sys.stdout.write(f"{USAGE}\nquantization:\n{_quantization_keys()}\n\n{rest}")
        raise SystemExit(0)
    first_option = next((i for i, token in enumerate(argv) if token.startswith("--")), len(argv))
    recipe: dict[str, Any] = {}
    for path in argv[:first_option]:
        recipe = _merge(recipe, load_recipe(path))
    recipe = _merge(recipe, _read_options(argv[first_option:]))

    flat = {key: value for key, value in recipe.items() if key != "quantization"}
    names = [f.name for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init]
    check_keys(flat, [*names, "quantization"], "the recipe or the options")
    for key, instead in NOT_READ.items():
        if flat.get(key):
            raise RecipeError(f"got {key}={flat[key]!r}, which this script does not read; {instead}")
    quantization = recipe.get("quantization") or {}
    if not isinstance(quantization, Mapping):
        raise RecipeError(f"got quantization={quantization!r}, expected a mapping of OscQATConfig arguments")
    config = OscQATConfig(**quantization)
    processes = _launched_processes()
    if processes > 1 and not torch.accelerator.is_available():
        flat["use_cpu"] = True  # otherwise each process would take itself for the only one
    # argparse knows how to turn the text or number of each key into the type of its field.
    model, data, run, training = _parser().parse_args_into_dataclasses(_to_argv(flat), look_for_args_file=False)
    announced = _announced_processes()
    if processes == 1 and announced > 1:
        raise RecipeError(
            f"got one process from a launcher that was told to start {announced}, expected as many: accelerate starts "
            "one only with --cpu, and with MULTI_CPU in its configuration. Use accelerate launch --config_file "
            "training/accelerate/cpu_2proc.yaml, or --multi_gpu on GPUs"
        )
    if training.world_size != processes:
        raise RecipeError(
            f"got {processes} processes from the launcher but {training.world_size} in training, expected as many: "
            "each would train alone"
        )
    if not training.output_dir:
        raise RecipeError("got output_dir='', expected a folder: a variable of the shell may be empty")
    output_dir = Path(training.output_dir)
    if output_dir.name in ("", ".."):  # `.` has no name, and a run is named after its folder
        training.output_dir = str(output_dir.resolve())
    for secret in SECRETS:
        recipe.pop(secret, None)
    command = command_line(["python", "training/run_qat.py", *_for_others(argv)], flat.get("hub_token"))
    return Settings(model, data, run, training, config, recipe, command)


def _quantization_keys() -> str:
    """List the arguments of `OscQATConfig` and of each remedy, with what they are and their defaults."""
    written_by_pack = ("checkpoint_format", "format_version", "layers", "quant_method")
    defaults = {key: value for key, value in OscQATConfig().to_dict().items() if key not in written_by_pack}
    described = _described_arguments(OscQATConfig)
    for remedy in REMEDIES:
        defaults.pop(remedy, None)
        chosen: dict[str, Any] = {remedy: {}}
        settings = getattr(OscQATConfig(**chosen), remedy)
        defaults |= {f"{remedy}.{field.name}": getattr(settings, field.name) for field in fields(settings)}
        described |= {f"{remedy}.{name}": text for name, text in _described_arguments(type(settings)).items()}
    lines = []
    for key, value in defaults.items():
        text = f"{described[key]} (default: {value})"
        lines += [
            f"  --quantization.{key}",
            textwrap.fill(text, 80, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    return "\n".join(lines)


def _described_arguments(documented: type) -> dict[str, str]:
    """What the docstring of a class says of each argument."""
    arguments = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {match[1]: " ".join(match[2].split()) for match in found}


def _for_others(argv: list[str]) -> list[str]:
    """The command line as others would give it: without where this run wrote and pushed."""
    kept: list[str] = []
    leaving_out = False
    for token in argv:
        if token.startswith("--"):
            key = token.removeprefix("--").partition("=")[0].replace("-", "_")
            leaving_out = key in ("output_dir", "push_to_hub") or key.startswith("hub_")
        if not leaving_out:
            kept.append(token)
    return kept


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _announced_processes() -> int:
    """How many processes the launcher that started this one was told to start; 1 where nobody says.

    accelerate tells its children nothing about it where it starts a single one, so its command line is asked.
    """
    try:
        launcher = psutil.Process().parent()
        command = [] if launcher is None else launcher.cmdline()
    except psutil.Error:
        return 1
    if not any("accelerate" in part or "torchrun" in part or "torch.distributed.run" in part for part in command[:4]):
        return 1
    script = next((i for i, part in enumerate(command) if part.endswith("run_qat.py")), len(command))
    options = command[:script]
    told = _value_of(options, "num_processes", "nproc_per_node")
    if told is None:
        path = (
            _value_of(options, "config_file") or os.environ.get("ACCELERATE_CONFIG_FILE") or default_yaml_config_file
        )
        try:
            told = str(yaml.safe_load(Path(path).read_text(encoding="utf-8"))["num_processes"])
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return 1
    return int(told) if told is not None and told.isdigit() else 1


def _value_of(options: list[str], *names: str) -> str | None:
    for i, option in enumerate(options):
        name, _, value = option.lstrip("-").replace("-", "_").partition("=")
        if option.startswith("--") and name in names:
            return value or next(iter(options[i + 1 : i + 2]), None)
    return None


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe with everything it includes.

    Args:
        path: YAML file; `include` in it lists others, relative to it. Later ones win, the file itself wins over all.

    Raises:
        RecipeError: if a file is missing or no YAML mapping, or includes itself.
    """
    return _load_recipe(Path(path), ())


def _load_recipe(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        raise RecipeError(f"got {path}, which includes itself")
    try:
        own = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"got recipe {path}, which cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"got recipe {path}, which is no YAML: {error}") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise RecipeError(f"got recipe {path} holding a {type(own).__name__}, expected keys with values")
    _check_names(own, path)
    merged: dict[str, Any] = {}
    includes = own.pop("include", None) or []
    if not isinstance(includes, list) or not all(isinstance(included, str) for included in includes):
        raise RecipeError(f"got include={includes!r} in recipe {path}, expected a list of files")
    for included in includes:
        merged = _merge(merged, _load_recipe(path.parent / included, (*including, path.resolve())))
    return _merge(merged, own)


def _check_names(mapping: Mapping[Any, Any], path: Path) -> None:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise RecipeError(f"got the key {key!r} in recipe {path}, expected a name: put quotes around it")
        if isinstance(value, Mapping):
            _check_names(value, path)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def _read_options(tokens: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if not token.startswith("--"):
            raise RecipeError(f"got {token!r}, expected an option such as --learning_rate 0.01; recipes come first")
        position += 1
        key, equals, inline = token.removeprefix("--").partition("=")
        values = [inline] if equals else []
        while not equals and position < len(tokens) and not tokens[position].startswith("--"):
            values.append(tokens[position])
            position += 1
        key = key.replace("-", "_")
        parsed = [value if _is_text(key, value) else _read_value(value) for value in values]
        nested: Any = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
        if key in LIST_KEYS and isinstance(nested, str):
            nested = [nested]
        for part in reversed(key.split(".")):
            nested = {part: nested}
        options = _merge(options, nested)
    return options


def _is_text(key: str, value: str) -> bool:
    """Whether an option's value stays as it is typed."""
    return (key in TEXT_KEYS and value != "None") or (key in LIST_KEYS and not value.startswith("["))


def _read_value(text: str) -> Any:
    try:
        return None if text == "None" else yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"got value {text!r}, which is no YAML: {error}") from error


def _to_argv(flat: Mapping[str, Any]) -> list[str]:
    argv: list[str] = []
    for key, value in flat.items():
        if value is None:
            continue
        if value == []:
            raise RecipeError(f"got an empty list for {key}, expected something in it, or the key left out")
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
            continue
        if isinstance(value, Mapping):
            value = json.dumps(value)
        elif value is False and key in OFF_IS_NO:  # YAML takes the word for a truth value
            value = "no"
        argv.append(f"--{key}={value}")  # in one: it may begin with a dash
    return argv


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}. See --help")


def _parser() -> _Parser:
    return _Parser(ARGUMENT_CLASSES, allow_abbrev=False, add_help=False, usage="")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for text, where people mean the number, and 2024-11-28 for a date, which no key is."""


YAML = "tag:yaml.org,2002:"
_Loader.add_implicit_resolver(
    f"{YAML}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{YAML}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """Read a recipe; what is text in its dataclass is as it is written: a revision such as 1.10 is no number.

    Raises:
        yaml.YAMLError: if it is no YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, _as_text(value) if _names_text(key) else value) for key, value in node.value]
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _names_text(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value in TEXT_KEYS


def _as_text(value: yaml.Node) -> yaml.Node:
    if not isinstance(value, yaml.ScalarNode) or value.tag == f"{YAML}null":
        return value
    return yaml.ScalarNode(f"{YAML}str", value.value)  # a node of its own: another key may have the same by an alias
