"""`oscqat`: the command line of the package."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; None takes the real one.

    Returns:
        Exit status: 0, or 2 for input that cannot be used, which is explained on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="oscqat",
        description="Low-bit training of timm models that overcomes weight oscillations.",
        epilog="example: oscqat study toy --output_dir runs/studies",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    study = commands.add_parser(
        "study", add_help=False, help="run one of the paper's studies; `oscqat study` lists them"
    )
    study.add_argument("name", nargs="?")
    inspect = commands.add_parser(
        "inspect",
        help="what is quantized in a timm model, and what stays float and why",
        description="List the layers of a timm model as they would be quantized, without downloading weights.",
        epilog="example: oscqat inspect mobilenetv2_100 --weight-bits 4 --activation-bits 4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inspect.add_argument("name", help="a timm name")
    inspect.add_argument("--weight-bits", type=int, default=4)
    inspect.add_argument("--activation-bits", type=int, default=4)
    inspect.add_argument("--first-last-bits", type=int, default=8)
    inspect.add_argument(
        "--modules-to-not-convert", nargs="+", default=[], metavar="PATTERN", help="layers that stay float"
    )
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if rest and args.command != "study":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _study(args.name, rest) if args.command == "study" else _inspect(args)
    except ValueError as error:
        # Bad input: the message is for the user, the traceback is not.
        transformers.logging.get_logger("oscqat").debug("", exc_info=True)
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


def _study(name: str | None, options: list[str]) -> int:
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
        epilog=f"example: oscqat study {name} --output_dir runs/studies",
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
    from hf_oscqat.config import OscQATConfig
    from hf_oscqat.hub.inspect import inspect_timm

    config = OscQATConfig(
        weight_bits=args.weight_bits,
        activation_bits=args.activation_bits,
        first_last_bits=args.first_last_bits,
        modules_to_not_convert=args.modules_to_not_convert,
    )
    rows = inspect_timm(args.name, config)
    title = f"{args.name}, W{config.weight_bits}A{config.activation_bits}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "class", "shape", "weight", "input", "parameters", "bytes", "why float"):
        numeric = column in ("weight", "input", "parameters", "bytes")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        layer = row.layer
        shape = " x ".join(map(str, layer.shape))
        widths = (str(layer.weight_bits or "float"), str(layer.input_bits or "float") if layer.weight_bits else "")
        table.add_row(
            layer.name,
            layer.layer_class,
            shape,
            *widths,
            f"{row.parameters:,}",
            f"{row.bytes:,}",
            layer.why_float or "",
        )
    console = Console()
    # A pipe or a file has no width of its own.
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    quantized = sum(row.parameters for row in rows if row.layer.weight_bits)
    console.print(
        f"{parameters:,} parameters, {100 * quantized / parameters:.2f}% of them quantized; {size:,} bytes instead of "
        f"{4 * parameters:,}, {4 * parameters / size:.2f} times smaller, without scales and header",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
