"""Rows as tables, on a terminal and in Markdown."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.rows import StoredRow

COLUMNS = (
    "case",
    "p20",
    "p50",
    "p80",
    "unit",
    "n",
    "ratio",
    "peak MiB",
    "images/s",
    "TFLOP/s",
    "MFU",
    "effort",
    "commit",
)
_FIGURE = re.compile(r"[-\d.,]*( [%x])?|baseline|unknown")
_STAGES_OF_IMAGES = ("decode", "augment", "data", "transfer", "backbone", "step")


def of_rows(rows: Sequence[StoredRow], without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Return those of COLUMNS that hold something and are not in `without`, and a line for each row."""
    lines = [cells(row) for row in rows]
    used = [i for i, name in enumerate(COLUMNS) if name not in without and any(line[i] for line in lines)]
    return [COLUMNS[i] for i in used], [[line[i] for i in used] for line in lines]


def cells(row: StoredRow) -> list[str]:
    """Return a row in COLUMNS. A part of a step has its share in place of a ratio."""
    share, flops, mfu = (row["settings"].get(name) for name in ("share", "tflop_per_s", "mfu"))
    ratio = "" if row["ratio"] is None else "baseline" if row["case"] == row["baseline"] else f"{row['ratio']:.2f} x"
    ratio = ratio if share is None else f"{100 * share:.1f} %"
    line = [row["case"], *(short(row[name]) for name in ("p20", "p50", "p80")), row["unit"], str(row["n"]), ratio]
    line += ["" if value is None else short(value) for value in (row["peak_mib"], images_per_s(row), flops)]
    line.append(f"{100 * mfu:.1f} %" if isinstance(mfu, float) else mfu or "")
    return [*line, "" if row["effort"] == "full" else row["effort"], row["commit"] or ""]


def images_per_s(row: StoredRow) -> float | None:
    """Return the images per second of a call that works through images, None for any other row."""
    images = row["settings"].get("images") or row["settings"].get("batch")
    if images is None or row["unit"] != "ms" or row["stage"] not in _STAGES_OF_IMAGES or "part" in row["settings"]:
        return None
    return 1000 * images / row["p50"]


def short(value: float) -> str:
    """Format a figure with four digits and without a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def show(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table; in a pipe or a file, as wide as it needs to be."""
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*line)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 200
    console.print(table)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; columns of figures are aligned to the right."""
    lines = list(lines)
    is_figures = [all(_FIGURE.fullmatch(line[i]) for line in lines) for i in range(len(columns))]
    marks = ["---:" if figures else "---" for figures in is_figures]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (columns, marks, *(map(escaped, line) for line in lines))
    )


def escaped(text: str) -> str:
    """Escape what has a meaning in a Markdown table."""
    return re.sub(r"([|*<`])", r"\\\1", text)
