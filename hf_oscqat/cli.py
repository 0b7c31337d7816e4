"""`oscqat`: the command line of the package."""

import argparse
import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; None takes the real one.

    Returns:
        Exit status: 0; 1 where `evaluate` measures something else than was claimed; 2 for input that cannot be used,
        which is explained on standard error.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    args.rest = rest  # a study has options of its own
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # it would log each request, with addresses that are signed
        logging.getLogger(client).setLevel(logging.WARNING)
    if rest and args.run is not _study:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if not args.loads_models:
            with _without_garbage_collection():
                return args.run(args)
        # `import hf_oscqat` leaves this to the command line, where what loads no model should not wait for it.
        from hf_oscqat.integration.register import register

        register()
        return args.run(args)
    except Exception as error:
        # Bad input: the message is for the user, the traceback is not. A status of 1 would say that `evaluate` has
        # measured something else, so whatever else goes wrong there ends in 2 as well.
        of_paths = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError
        expected = isinstance(error, ValueError | of_paths)
        if not expected and args.run is not _evaluate:
            raise
        logging.getLogger(__name__).log(logging.DEBUG if expected else logging.ERROR, "", exc_info=True)
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, []) else action.help


Run = Callable[[argparse.Namespace], int]


def _parser() -> argparse.ArgumentParser:
    """Return the parser; what it has parsed says which function to `run`, and whether that `loads_models`."""
    parser = argparse.ArgumentParser(
        prog="oscqat",
        description="Low-bit training of timm models that overcomes weight oscillations.",
        epilog="example: oscqat study toy --output_dir runs/studies",
    )
    parser.set_defaults(loads_models=True)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, help: str, description: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"example: oscqat {example}",
            formatter_class=_Help,
        )
        made.set_defaults(run=run)
        return made

    evaluate = command(
        "evaluate",
        _evaluate,
        "measure again what a model's card claims",
        "Measure again what the card of a packed model claims, on the same images prepared in the same way, and "
        "compare. Exit status: 0 reproduced, 1 different, 2 cannot be run again. On all images of the claim 0.1 "
        "points of difference are allowed, or one image; on a subset three standard errors.",
        "evaluate runs/quickstart/packed",
    )
    evaluate.add_argument("source", help="a folder with a packed model, or a Hub id such as org/name")
    evaluate.add_argument("--revision", help="branch, tag or commit of a Hub id")
    evaluate.add_argument(
        "--dataset", help="the images: a folder with a folder per class, one that `datasets` reads, or a Hub id"
    )
    evaluate.add_argument("--max-samples", type=_count, metavar="N", help="measure on a random subset")
    evaluate.add_argument("--batch-size", type=_count, default=64, metavar="N", help="images at once")
    evaluate.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that load images")
    evaluate.add_argument("--device", choices=("cpu", "cuda", "mps"), help="by default the accelerator there is")
    evaluate.add_argument("--json", metavar="FILE", help="write what was claimed and measured")
    evaluate.add_argument("--open-pr", action="store_true", help="propose the measured values as one pull request")

    push = command(
        "push",
        _push,
        "push a packed model to the Hub in one commit",
        "Push weights, config, card, pictures, recipe and results in one commit. Edits that people have made to the "
        "card are kept, pickles are left out, and what is there already is not sent again.",
        "push runs/quickstart/packed org/mbv2-w4a4-osc",
    )
    push.add_argument("folder", help="what a run calls packed")
    push.add_argument("repo_id", help="org/name, or name for the account of the token")
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--revision", help="the branch, made if it does not exist")
    push.add_argument("--license", help="of the model, instead of the one stated")
    push.add_argument("--message", help="title of the commit")

    card = command(
        "card",
        _card,
        "render the card of a packed model anew",
        "Render README.md of a packed model from its results.json; sections that people have edited are kept.",
        "card runs/quickstart/packed",
    )
    card.add_argument("folder", help="what a run calls packed")
    card.add_argument("--license", help="of the model, instead of the one stated")

    report = command(
        "report",
        _report,
        "a page about the oscillations of one run, or of two side by side",
        "Write one HTML page that needs nothing beside it, and pictures, from what was recorded while training; of a "
        "run that has ended, was stopped or goes on. docs/report.md says how to read it.",
        "report runs/quickstart",
    )
    report.set_defaults(loads_models=False)
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output_dir of a run; two are compared")
    report.add_argument("--output", metavar="DIR", help="where to write; by default `report` in the folder of the run")
    report.add_argument(
        "--steps", nargs="+", type=_count, metavar="STEP", help="training steps to show; by default four"
    )

    inspect = command(
        "inspect",
        _inspect,
        "what is quantized, layer by layer: in a packed model, or in a timm model if it were",
        "List the layers of a packed model, a folder or a Hub id, from its file and without building it; "
        "or those of a timm model as they would be quantized, without downloading weights. An existing folder is "
        "taken first, then anything with a / as a Hub id, then a timm name.",
        "inspect mobilenetv2_100 --weight-bits 4 --activation-bits 4",
    )
    inspect.set_defaults(loads_models=False)
    inspect.add_argument("name", help="a folder, a Hub id or a timm name")
    inspect.add_argument("--revision", help="branch, tag or commit of a Hub id")
    for option, default in (("--weight-bits", 4), ("--activation-bits", 4), ("--first-last-bits", 8)):
        inspect.add_argument(
            option,
            type=_bits,
            default=argparse.SUPPRESS,
            metavar="BITS",
            help=f"of a timm model: 2 to 8, or float; by default {default}",
        )
    inspect.add_argument(
        "--modules-to-not-convert",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="PATTERN",
        help="layers of a timm model that stay float",
    )

    study = commands.add_parser(
        "study", add_help=False, help="run one of the paper's studies; `oscqat study` lists them"
    )
    study.set_defaults(run=_study)
    study.add_argument("name", nargs="?")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    from hf_oscqat.hub.card import METRICS
    from hf_oscqat.hub.push import check_push
    from hf_oscqat.integration import verify

    if args.open_pr:
        folder, subset, other = Path(args.source).is_dir(), args.max_samples is not None, args.dataset is not None
        verify.check_proposable(folder=folder, subset=subset, other_data=other)
        if args.revision is not None:
            raise ValueError(
                f"got --revision {args.revision} with --open-pr, expected the newest commit, beside whose weights the "
                "numbers will stand: leave --revision out"
            )
        check_push(args.source, create_pr=True)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"got --json {args.json}, expected a file in a folder that exists")
    result = verify.verify(
        args.source,
        revision=args.revision,
        dataset=args.dataset,
        max_samples=args.max_samples,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
    )
    console = Console()
    place = args.source if result.commit is None else f"{args.source}, commit {result.commit}"
    table = Table(title=place, title_justify="left")
    for column in ("", "claimed", "measured", "difference", "allowed", ""):
        table.add_column(column, justify="right" if column else "left")
    for metric, difference in result.differences.items():
        key, title = METRICS[metric]
        allowed = result.tolerance[metric]
        claimed, measured = result.claim.accuracy[metric], getattr(result.measured, key)
        numbers = [
            f"{100 * claimed:.2f}%",
            f"{100 * measured:.2f}%",
            f"{100 * difference:+.2f}",
            f"{100 * allowed:.2f}",
        ]
        table.add_row(title, *numbers, "same" if abs(difference) <= allowed else "different")
    console.print(table)
    count, whole = result.measured.num_images, result.claim.num_images
    images = f"{count:,} images" if count == whole else f"{count:,} of {whole:,} images, drawn at random"
    console.print(
        f"{result.claim.dataset}, split {result.claim.split}: {images}, "
        f"{result.measured.images_per_second:.0f} images/s: " + ("reproduced" if result.reproduced else "DIFFERENT"),
        highlight=False,
        soft_wrap=True,
    )
    record = json.dumps(result.to_dict(), indent=4)
    if args.json:
        Path(args.json).write_text(record + "\n", encoding="utf-8")
    console.out(f"--result\n{record}", highlight=False)
    if args.open_pr:
        pushed = verify.propose_results(result)
        said = "the card has these values already" if pushed is None else f"pull request: {pushed.url}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    return 0 if result.reproduced else 1


def _push(args: argparse.Namespace) -> int:
    from hf_oscqat.hub.push import push_folder

    pushed = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        create_pr=args.create_pr,
        revision=args.revision,
        license=args.license,
        message=args.message,
    )
    said = f"{len(pushed.changed)} files in commit {pushed.commit}" if pushed.changed else "all of it is there already"
    Console().print(f"{pushed.url}: {said}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _card(args: argparse.Namespace) -> int:
    from hf_oscqat.hub.card import write_card

    Console().print(write_card(Path(args.folder), args.license), highlight=False, markup=False, soft_wrap=True)
    return 0


def _report(args: argparse.Namespace) -> int:
    from hf_oscqat.report.page import write_report

    Console().print(
        str(write_report(args.run_dirs, args.output, args.steps)), highlight=False, markup=False, soft_wrap=True
    )
    return 0


def _study(args: argparse.Namespace) -> int:
    name, options = args.name, args.rest
    from transformers import HfArgumentParser

    from hf_oscqat.config import check_keys
    from hf_oscqat.studies import STUDIES
    from hf_oscqat.studies.base import show, write

    console = Console()
    if name is None:
        console.print("usage: oscqat study NAME [--OPTION VALUE ..]\n")
        for study in STUDIES.values():
            console.print(f"  {study.name:14}{study.question}", soft_wrap=True)
        console.print(
            "\nexample: oscqat study toy --output_dir runs/studies\noscqat study NAME --help lists its options"
        )
        return 0
    if name not in STUDIES:
        raise ValueError(f"got study {name!r}, expected one of {', '.join(STUDIES)}")
    study = STUDIES[name]
    parser = HfArgumentParser(
        study.settings,
        prog=f"oscqat study {name}",
        description=f"{study.question} ({study.source})",
        epilog=f"example: oscqat study {name} {study.example}",
        allow_abbrev=False,
    )
    settings, unknown = parser.parse_args_into_dataclasses(
        options, return_remaining_strings=True, look_for_args_file=False
    )
    for word in unknown:
        if not word.startswith("--"):
            raise ValueError(f"got {word!r}, expected an option such as --output_dir runs/studies; see --help")
        valid = [f.name for f in fields(study.settings)]
        check_keys([word.removeprefix("--").partition("=")[0]], valid, f"the options of study {name}")
    result = study.run(settings)
    show(study, result, write(study, settings, result), console)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    of_timm = ("weight_bits", "activation_bits", "first_last_bits", "modules_to_not_convert")
    given = {name: getattr(args, name) for name in of_timm if hasattr(args, name)}
    if Path(args.name).is_dir() or "/" in args.name:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"got {options} for the checkpoint {args.name}, which has its own, expected a timm name")
        return _inspect_packed(args)
    if args.revision is not None:
        raise ValueError(f"got --revision {args.revision} for {args.name}, expected a Hub id such as org/name")
    from hf_oscqat.config import OscQATConfig
    from hf_oscqat.hub.inspect import inspect_timm

    config = OscQATConfig(**given)
    rows = inspect_timm(args.name, config)
    parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    quantized = sum(row.parameters for row in rows if row.weight_bits)
    cells = []
    for row in rows:
        inputs = "" if row.weight_bits is None and row.input_bits is None else str(row.input_bits or "float")
        described = (row.name, row.layer_class, " x ".join(map(str, row.shape)), str(row.weight_bits or "float"))
        cells.append((*described, inputs, f"{row.parameters:,}", f"{row.bytes:,}", row.why_float or ""))
    columns = {"layer": "<", "class": "<", "shape": "<", "weight": ">", "input": ">"}
    columns |= {"parameters": ">", "bytes": ">", "why float": "<"}
    # In plain text, a layer to a line however narrow the window: models have up to a thousand of them.
    Console().out(
        f"{args.name}, W{config.weight_bits or 32}A{config.activation_bits or 32}\n",
        _table(columns, cells),
        f"\n{parameters:,} parameters, {100 * quantized / parameters:.2f}% of them quantized; {size:,} bytes instead "
        f"of {4 * parameters:,}, {4 * parameters / size:.2f} times smaller, without scales and header",
        sep="\n",
        highlight=False,
    )
    return 0


def _inspect_packed(args: argparse.Namespace) -> int:
    from hf_oscqat.hub.inspect import inspect_packed

    found = inspect_packed(args.name, revision=args.revision)
    cells = []
    for row in found.rows:
        grid = row.weight
        scale = "" if row.scale is None else f"{row.scale[0]:.4g}"
        if row.scale is not None and row.scale[0] != row.scale[1]:
            scale += f" to {row.scale[1]:.4g}"
        weight = (
            ("float", "", "") if grid is None else (str(grid.bits), grid.scheme, grid.granularity.replace("_", " "))
        )
        shape = "" if grid is None else " x ".join(map(str, grid.shape))
        used = "" if grid is None else f"{row.used} of {2**grid.bits}"
        inputs = "float" if row.input is None else f"{row.input.bits} {row.input.scheme}"
        cells.append((row.name, shape, *weight, inputs, scale, used, f"{row.bytes:,}"))
    columns = {"layer": "<", "shape": "<", "bits": ">", "scheme": "<", "granularity": "<", "input": "<"}
    columns |= {"scale": "<", "integers used": ">", "bytes": ">"}
    quantized = sum(row.parameters for row in found.rows)
    size = found.float_bytes + 4 * quantized
    Console().out(
        f"{found.name}\n",
        _table(columns, cells),
        f"\n{quantized + found.float_parameters:,} parameters, {found.float_parameters:,} of them in float, "
        f"{found.float_bytes:,} bytes with batch-norm statistics; {found.file_bytes:,} bytes in all instead of "
        f"{size:,}, {size / found.file_bytes:.2f} times smaller",
        sep="\n",
        highlight=False,
    )
    return 0


def _table(columns: dict[str, str], rows: Sequence[tuple[str, ...]]) -> str:
    """Lay out a table in plain text.

    Args:
        columns: how each is aligned.
        rows: the cells.
    """
    cells: list[tuple[str, ...]] = [tuple(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    formats = [f"{direction}{width}" for direction, width in zip(columns.values(), widths, strict=True)]
    return "\n".join("  ".join(map(format, line, formats)).rstrip() for line in cells)


def _bits(word: str) -> int | None:
    if word != "float" and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"got {word!r}, expected 2 to 8, or float")
    return None if word == "float" else int(word)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected a whole number of at least 1")
    return int(word)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Save the fifth of the time that the collector would spend on looking at what is imported, which is all kept."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


if __name__ == "__main__":
    raise SystemExit(main())
