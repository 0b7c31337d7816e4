"""What every study is: settings, a function that measures, and a result that is written and shown."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

LONGEST_CELL = 40
"""Characters in a cell of a printed table."""


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        rows: one dict per row of its table, all with the same keys.
        figure: its picture.
        finding: what the numbers say, in a sentence or two made from them.
        trainings: device, versions and date of each kind of training that it is made of, where other calls made them;
            None where this one did.
    """

    rows: list[dict[str, Any]]
    figure: Figure
    finding: str
    trainings: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Study:
    """A study that `oscqat study NAME` runs.

    Attributes:
        name: its name on the command line.
        question: what it asks, in one line.
        source: where the paper asks it.
        settings: dataclass of its options; has `output_dir`.
        run: measures.
        example: options to try it with.
    """

    name: str
    question: str
    source: str
    settings: type[Any]
    run: Callable[[Any], StudyResult]
    example: str = "--output_dir runs/studies"


def write(study: Study, settings: Any, result: StudyResult) -> list[Path]:
    """Write table, picture and everything needed to run the study again.

    Args:
        study: the study.
        settings: what it was run with.
        result: what it found.

    Returns:
        The files: `<name>.csv`, `<name>.png` and `<name>.json` in `settings.output_dir`.
    """
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture, record = (folder / f"{study.name}.{ending}" for ending in ("csv", "png", "json"))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    result.figure.savefig(picture)
    # A study without the option uses no accelerator.
    uses_cuda = torch.cuda.is_available() and not getattr(settings, "use_cpu", True)
    conditions = {
        "versions": {name: version(name) for name in ("hf_oscqat", "torch", "timm", "transformers")},
        "device": torch.cuda.get_device_name() if uses_cuda else "CPU",
        "date": date.today().isoformat(),
    }
    content = {
        "study": study.name,
        "question": study.question,
        "source": study.source,
        "finding": result.finding,
        "settings": asdict(settings),
        "rows": result.rows,
        **(conditions if result.trainings is None else {"trainings": result.trainings}),
    }
    record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [table, picture, record]


def show(study: Study, result: StudyResult, files: list[Path], console: Console | None = None) -> None:
    """Print the table, the finding and where the files are; what is too long for a cell comes below the table."""
    console = console or Console()
    table = Table(title=study.question, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    below = [column for column in result.rows[0] if any(len(_text(row[column])) > LONGEST_CELL for row in result.rows)]
    for column in result.rows[0]:
        if column not in below:
            justify: JustifyMethod = "right" if isinstance(result.rows[0][column], int | float) else "left"
            heading = column.replace("_", " ")
            cells = [_text(row[column]) for row in result.rows]
            whole = [*heading.split(), *(part for cell in cells for part in _unbroken(cell))]
            table.add_column(heading, justify=justify, min_width=max(map(len, whole)))
    for row in result.rows:
        table.add_row(*(_text(value) for column, value in row.items() if column not in below))
    # Wider than the screen rather than with words in pieces.
    needed = table.__rich_measure__(console, console.options).minimum
    console.print(table, width=max(console.width, needed), crop=False)
    for row in result.rows:
        name = " ".join(takewhile(lambda value: isinstance(value, str), row.values()))
        for column in below:
            if row[column]:
                text = f"{name}: {column.replace('_', ' ')}: {row[column]}"
                console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(result.finding, markup=False)
    written = f"{study.source}. Written: {', '.join(map(str, files))}"
    console.print(written, style="dim", markup=False, soft_wrap=True)


def _unbroken(cell: str) -> list[str]:
    """What of a cell stays on a line: all of it, such as a mean and its deviation, or each word of a longer text."""
    return [cell] if len(cell) <= LONGEST_CELL // 2 else cell.split()


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
