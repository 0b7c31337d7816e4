"""Read thousands of damaged recipes: each gives settings, or ends in a ValueError that says what is wrong.

    python tests/fuzz/fuzz_recipes.py [--count 1000] [--seed 0]

Anything else is printed with the seed that makes it again, and the exit code is 1.
"""

import collections
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from fuzzing import Outcomes, run

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "training"))

from arguments import parse  # noqa: E402 - beside run_qat.py, which is no package

SECONDS = 2.0
DATA = ["--dataset_name", "digits"]  # the recipes leave that to their users
VALUES: list[Any] = [
    None, True, -1, 0, 3, 1e308, float("nan"), float("inf"), "", "x", "1e-3", "-5", "~", [], [1, "a"], {}, {"a": 1},
    "2026-01-01", 10**30, "\u00e9\u0000"[:1],
]  # fmt: skip


def damage(text: str, chance: random.Random) -> tuple[str, str]:
    """Return a damaged recipe and what was done to it."""
    how = chance.choice(["bytes", "value", "key", "drop", "cut", "duplicate", "nest", "tag"])
    if how == "bytes":
        place = chance.randrange(len(text))
        return text[:place] + chr(chance.randrange(1, 0x250)) + text[place + 1 :], f"character {place}"
    if how == "cut":
        place = chance.randrange(len(text))
        return text[:place], f"cut at {place}"
    if how == "tag":
        tag = chance.choice(["!!python/object/apply:os.system ['true']", "!!binary x", "&a [*a]", "!new 1", "2: 3"])
        return f"{text}\nseed: {tag}\n", f"tag {tag}"
    content = yaml.safe_load(text)
    place = content
    if isinstance(content.get("quantization"), dict) and chance.random() < 0.5:
        place = content["quantization"]
    key = chance.choice(sorted(place, key=str))
    if how == "value":
        place[key] = chance.choice(VALUES)
    elif how == "key":
        place[chance.choice([f"{key}x", 5, None, "", "include", f"--{key}", True])] = place.pop(key)
    elif how == "drop":
        del place[key]
    elif how == "duplicate":
        return f"{text}\n{key}: {chance.choice(VALUES)!r}\n", f"{key} twice"
    else:
        place[key] = {key: place[key]}
    return yaml.safe_dump(content), f"{how} of {key}: {place.get(key)!r}"


def fuzz(count: int, seed: int) -> Outcomes:
    """Try so many.

    Returns:
        How often each outcome came, and a line for each unexpected one.
    """
    recipes = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "training/recipes").glob("*.yaml"))]
    outcomes: collections.Counter[str] = collections.Counter()
    unexpected = []
    with tempfile.TemporaryDirectory() as root:
        path = shutil.copytree(REPOSITORY / "training/recipes", Path(root, "recipes")) / "recipe.yaml"
        for number in range(seed, seed + count):
            chance = random.Random(number)
            text, what = damage(chance.choice(recipes), chance)
            path.write_text(text, encoding="utf-8")
            began = time.monotonic()
            try:
                parse([str(path), "--output_dir", str(Path(root, "run")), "--report_to", "none", *DATA])
                outcome = "settings"
            except ValueError as error:
                outcome = "ValueError" if str(error).strip() else "unexpected: a ValueError without a word"
                what += f" -> {error}"
            except (Exception, SystemExit) as error:  # what this looks for
                outcome = f"unexpected: {type(error).__name__}"
                what += f" -> {error}"
            if time.monotonic() - began > SECONDS:
                outcome = f"unexpected: {time.monotonic() - began:.1f} s"
            outcomes[outcome] += 1
            if outcome.startswith("unexpected"):
                unexpected.append(f"seed {number}: {outcome}: {what}")
    return outcomes, unexpected


if __name__ == "__main__":
    run(__doc__, fuzz, count=1000)
