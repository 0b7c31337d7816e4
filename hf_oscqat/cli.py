"""`oscqat`: the command line of the package."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

import transformers
from rich.console import Console
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
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return _study(args.name, rest)
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


if __name__ == "__main__":
    raise SystemExit(main())
