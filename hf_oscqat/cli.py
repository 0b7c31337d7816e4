"""`oscqat`: the command line of the package."""

import argparse
import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from hf_oscqat.prepare import LayerDescription


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
    for option, default in (("--weight-bits", 4), ("--activation-bits", 4), ("--first-last-bits", 8)):
        inspect.add_argument(option, type=_bits, default=default, metavar="BITS", help="2 to 8, or float")
    inspect.add_argument(
        "--modules-to-not-convert", nargs="+", default=[], metavar="PATTERN", help="layers that stay float"
    )
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if rest and args.command != "study":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "inspect":
            with _without_garbage_collection():
                return _inspect(args)
        # `import hf_oscqat` leaves this to the command line, where what only lists layers should not wait for it.
        from hf_oscqat.integration.register import register

        register()
        return _study(args.name, rest)
    except ValueError as error:
        # Bad input: the message is for the user, the traceback is not.
        logging.getLogger(__name__).debug("", exc_info=True)
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2


def _study(name: str | None, options: list[str]) -> int:
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
    parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    quantized = sum(row.parameters for row in rows if row.weight_bits)
    # In plain text, a layer to a line however narrow the window: models have up to a thousand of them.
    Console().out(
        f"{args.name}, W{config.weight_bits or 32}A{config.activation_bits or 32}\n",
        _table(rows),
        f"\n{parameters:,} parameters, {100 * quantized / parameters:.2f}% of them quantized; {size:,} bytes instead "
        f"of {4 * parameters:,}, {4 * parameters / size:.2f} times smaller, without scales and header",
        sep="\n",
        highlight=False,
    )
    return 0


def _table(rows: "list[LayerDescription]") -> str:
    columns = {"layer": "<", "class": "<", "shape": "<", "weight": ">", "input": ">"}
    columns |= {"parameters": ">", "bytes": ">", "why float": "<"}
    cells: list[tuple[str, ...]] = [tuple(columns)]
    for row in rows:
        inputs = "" if row.weight_bits is None and row.input_bits is None else str(row.input_bits or "float")
        described = (row.name, row.layer_class, " x ".join(map(str, row.shape)), str(row.weight_bits or "float"))
        cells.append((*described, inputs, f"{row.parameters:,}", f"{row.bytes:,}", row.why_float or ""))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    formats = [f"{direction}{width}" for direction, width in zip(columns.values(), widths, strict=True)]
    return "\n".join("  ".join(map(format, line, formats)).rstrip() for line in cells)


def _bits(word: str) -> int | None:
    if word != "float" and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"got {word!r}, expected 2 to 8, or float")
    return None if word == "float" else int(word)


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
