"""Show measurements: tables on the terminal, with or without rich, and a picture."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, OURS_COMPILED, PEERS, FLOAT = "#1f6f8b", "#7fb3c4", "#9a9a9a", "#d9d9d9"
MEGABYTE = 1e6


def say(text: str = "") -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first and the last column to the left, the others to the right.

    Args:
        title: stands above it.
        columns: their heads.
        rows: as many cells each.
    """
    say(f"\n{title}")
    try:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        for row in (columns, *rows):
            middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
            say("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        left = i in (0, len(columns) - 1)
        table.add_column(column, justify="left" if left else "right", no_wrap=i < len(columns) - 1)
    for row in rows:
        table.add_row(*map(escape, row))  # a reason may have anything in brackets
    console = Console()
    # Not a terminal means a file, which has no width that a table would have to be cut to.
    Console(width=console.width if console.is_terminal else 160).print(table)


def show_comparison(record: Mapping[str, Any]) -> None:
    """Print what a comparison measured, and of each row that did not run, why."""
    settings, machine = record["settings"], record["machine"]
    cells = []
    for name, row in record["rows"].items():
        if "reason" in row:
            cells.append([name, *[""] * 7, f"not run: {row['reason']}"])
            continue
        low, high = row["step_quartiles_s"]
        cells.append(
            [
                name,
                f"{1e3 * row['step_median_s']:.1f}",
                f"{1e3 * low:.1f} - {1e3 * high:.1f}",
                _times(row.get("ratio_to_float")),
                _times(row.get("ratio_to_float_compiled")),
                _megabytes(row.get("bytes_kept_for_backward")),
                _megabytes(row.get("peak_bytes")),
                f"{row['startup_s']:.1f}",
                row["trains"],
            ]
        )
    show_table(
        f"{settings['model']}, batch {settings['batch_size']} at {settings['img_size']} pixels, "
        f"{settings['precision']}, {machine['device']}, {machine['threads']} threads, {settings['repeats']} repeats",
        ("", "step, ms", "quartiles", "x float", "x compiled", "kept, MB", "peak, MB", "start-up, s", ""),
        cells,
    )
    if record["overheads"]:
        show_table(
            "What a remedy adds to lsq, within the same repeat",
            ("", "ms", "quartiles", "% of lsq"),
            [
                [
                    name,
                    f"{1e3 * o['median_s']:.1f}",
                    f"{1e3 * o['quartiles_s'][0]:.1f} - {1e3 * o['quartiles_s'][1]:.1f}",
                    f"{100 * o['share']:.1f}",
                ]
                for name, o in record["overheads"].items()
            ],
        )
    show_bandwidth(record["bandwidth"])


def show_bandwidth(bandwidth: Mapping[str, Any]) -> None:
    """Print how fast one large activation is fake-quantized, next to how fast it is copied."""
    cells = []
    for name, entry in bandwidth["rows"].items():
        if "reason" in entry:
            cells.append([name, *[""] * 4, f"not run: {entry['reason']}"])
        else:
            values = [
                text
                for part in ("forward", "backward")
                for text in (f"{entry[part] / 1e9:.2f}", f"{100 * entry[part] / bandwidth['copy']:.0f}")
            ]
            cells.append([name, *values, ""])
    shape = "x".join(map(str, bandwidth["shape"]))
    show_table(
        f"Fake-quantize [{shape}] in {bandwidth['dtype']}; a copy moves {bandwidth['copy'] / 1e9:.2f} GB/s",
        ("", "forward, GB/s", "% of copy", "backward, GB/s", "% of copy", ""),
        cells,
    )


def show_sweep(name: str, record: Mapping[str, Any]) -> None:
    """Print how the cost grows along a sweep."""
    points = record["points"]
    names = list(next(iter(points.values())))
    cells = []
    for value, rows in points.items():
        row = [value]
        for row_name in names:
            entry = rows[row_name]
            row.append("" if "reason" in entry else f"{1e3 * entry['step_median_s']:.1f}")
            if not row_name.startswith("float"):
                row.append("" if "reason" in entry else _times(entry.get(base_key(row_name))))
        reasons = {entry["reason"] for entry in rows.values() if "reason" in entry}
        cells.append([*row, "; ".join(sorted(reasons))])
    heads = [
        head
        for row_name in names
        for head in (f"{row_name}, ms", *(() if row_name.startswith("float") else ("x float",)))
    ]
    show_table(
        f"{record['settings']['model']}, along {name}; x float: against float, eager or compiled alike",
        (name, *heads, ""),
        cells,
    )


def base_key(name: str) -> str:
    """Key of the ratio of a row to the float row that is run like it."""
    return "ratio_to_float_compiled" if name.endswith("-compiled") else "ratio_to_float"


def _times(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / MEGABYTE:.1f}"


def draw_comparison(record: Mapping[str, Any], path: Path) -> None:
    """Draw how many times as long as float a step takes; whiskers are quartiles.

    Args:
        record: of a comparison.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    rows = record["rows"]
    settings, machine = record["settings"], record["machine"]
    figure = Figure(figsize=(7.2, 0.8 + 0.3 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for position, (name, row) in enumerate(rows.items()):
        ratio = row.get("ratio_to_float")
        if ratio is None:
            reason = _shorten(row.get("reason", "float did not"))
            axes.text(0.03, position, f"not run: {reason}", va="center", fontsize=7, color="#555555")
            continue
        whiskers = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        axes.barh(position, ratio["median"], color=_colour(name, row), height=0.7)
        axes.errorbar(ratio["median"], position, xerr=whiskers, color="black", linewidth=0.8, capsize=2)
        # What others train is not always the same.
        trains = "" if row["ours"] or name.startswith("float") else f"  {row['trains']}"
        axes.text(ratio["high"], position, f"  {ratio['median']:.2f}{trains}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of a training step, times that of float training, eager", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(
        f"{settings['model']}, batch {settings['batch_size']} at {settings['img_size']}, {settings['precision']}, "
        f"{machine['device']}",
        fontsize=8,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(name: str, row: Mapping[str, Any]) -> str:
    if name.startswith("float"):
        return FLOAT
    if not row["ours"]:
        return PEERS
    return OURS_COMPILED if name.endswith("-compiled") else OURS


def _shorten(reason: str) -> str:
    return reason if len(reason) <= 70 else f"{reason[:68]} .."
