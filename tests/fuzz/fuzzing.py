"""The command line that the fuzzers share."""

import argparse
import collections
import logging
import sys
from collections.abc import Callable

logger = logging.getLogger("fuzz")

Outcomes = tuple[collections.Counter[str], list[str]]
"""How often each outcome came, and a line for each unexpected one."""


def run(description: str | None, fuzz: Callable[[int, int], Outcomes], count: int) -> None:
    """Run a fuzzer and report.

    Args:
        description: for the help.
        fuzz: takes how many to try, and the first seed.
        count: how many by default.

    Raises:
        SystemExit: with code 1, if anything unexpected happened.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    outcomes, unexpected = fuzz(options.count, options.seed)
    for line in unexpected:
        logger.info("%s", line)
    for outcome, times in outcomes.most_common():
        logger.info("%6d  %s", times, outcome)
    raise SystemExit(bool(unexpected))
