"""Defines a row of results, reads rows from .jsonl files, and shows them as tables.

A line that is cut off is skipped and noted. Rows of a version that this code does not know, and files that hold something
else, raise InputError. Rows of several machines must not meet in one table, so `Results.of_machine` selects one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from crossbatch import InputError

VERSION = 2  # of a row; rows without one are version 1, which had no time, effort, clocks and peak_mib

# A line of a file: a Row, and what `measure.append` adds to it (stage, effort, time, machine, versions, commit).
StoredRow = dict[str, Any]

_NEEDED = ("stage", "case", "machine", "p20", "p50", "p80", "n", "unit")
_DEFAULTS = {"baseline": None, "ratio": None, "settings": {}}
_DEFAULTS |= {"time": None, "effort": "full", "clocks": None, "peak_mib": None, "commit": None}
_DEFAULTS |= {"cpu_ms": None, "cpu_ratio": None}
COLUMNS = ("case", "p20", "p50", "p80", "unit", "n", "ratio", "CPU ms", "CPU ratio", "peak MiB", "images/s")
COLUMNS += ("TFLOP/s", "MFU", "bandwidth", "convolutions", "effort", "commit")
_STAGES_OF_IMAGES = ("decode", "augment", "data", "transfer", "backbone", "step", "trainer")


@dataclass
class Row:
    """Holds one case of one stage. `ratio` is the baseline's p50 / this p50: above 1 this case is faster, or smaller."""

    case: str
    p20: float
    p50: float
    p80: float
    n: int
    unit: str = "ms"
    baseline: str | None = None
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    peak_mib: float | None = None  # in use at most during a call: of the GPU's allocator, or resident in this process
    clocks: dict[str, Any] | None = None  # right after the measurement
    cpu_ms: float | None = None  # median of the CPU time, user and system, of all processes of the case
    cpu_ratio: float | None = None  # likewise the baseline's cpu_ms / this one

    @staticmethod
    def of_samples(case: str, samples: Sequence[float], unit: str = "ms", **more: Any) -> "Row":
        """Return a row with the percentiles 20, 50 and 80 of `samples`, and of their CPU time if all of them have it."""
        p20, p50, p80 = (float(p) for p in np.percentile(samples, (20, 50, 80)))
        cpu_ms = [getattr(sample, "cpu_ms", np.nan) for sample in samples]
        row = Row(case, p20, p50, p80, len(samples), unit, **more)
        row.cpu_ms = None if np.isnan(cpu_ms).any() else float(np.median(cpu_ms))
        return row

    @staticmethod
    def of_one(case: str, value: float, unit: str, settings: dict[str, Any]) -> "Row":
        """Return a row of something that is counted, or measured once."""
        return Row(case, value, value, value, 1, unit, settings=settings)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Holds rows in the order in which they were written, and notes on what could not be read."""

    rows: list[StoredRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of_machine(self, wanted: str | None) -> "Results":
        """Return the rows of the only machine, or of the one with `wanted` in its name.

        Raises InputError where that selects more or less than one machine.
        """
        counts = Counter(machine_of(row) for row in self.rows)
        chosen = [name for name in counts if (wanted or "").lower() in name.lower()]
        if len(chosen) != 1:
            listed = "".join(f"\n  {name} ({n} rows)" for name, n in counts.items())
            raise InputError(
                f"--machine: {'not given' if wanted is None else f'given {wanted}'}, which selects {len(chosen)} machines; "
                f"figures of several do not compare; allowed: a part of one of these names{listed}"
            )
        return Results([row for row in self.rows if machine_of(row) == chosen[0]], self.notes)

    def latest(self) -> dict[tuple[str, str, str], StoredRow]:
        """Return the last row of every (stage, case, effort), in the order in which these were first seen."""
        return {(row["stage"], row["case"], row["effort"]): row for row in self.rows}


def machine_of(row: StoredRow) -> str:
    """Name what the figures depend on: "Intel(R) Xeon(R) Processor, 2 cores, no GPU"."""
    machine = row["machine"]
    cards = " + ".join(f"{count} x {gpu}" for gpu, count in Counter(machine["gpus"]).items()) or "no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {cards}"


def read(path: Path) -> Results:
    """Read the rows of a file, or of all *.jsonl of a folder. Raises InputError if there are none."""
    results = Results()
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read: {error.strerror}; name files of results that you may read"
            ) from None
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                results.rows.append(_checked(json.loads(line), f"{file}:{number}"))
            except json.JSONDecodeError:
                results.notes.append(f"{file}:{number}: cut off or damaged, left out: {line[:40]}...")
    if not results.rows:
        found = "no row that can be read" if path.exists() else "no such file or folder"
        notes = "".join(f"\n  {note}" for note in results.notes)
        raise InputError(f"{path}: {found}; measure with `python -m benchmarks all --out {path}`{notes}")
    return results


def _checked(row: Any, where: str) -> StoredRow:
    """Return the row as today's version would have written it."""
    missing = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
    if missing:
        raise InputError(f"{where}: not a row of a benchmark, it has no {missing[0]!r}; name files of results only")
    if row.get("version", 1) > VERSION:
        raise InputError(
            f"{where}: a row of version {row['version']}; this code reads 1 to {VERSION}; read it with the crossbatch that "
            f"wrote it (commit {row.get('commit')}), or measure again"
        )
    return {**_DEFAULTS, **row}


# --- tables ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[StoredRow], without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Return those of COLUMNS that hold something and are not in `without`, and a line for each row."""
    lines = [cells(row) for row in rows]
    used = [name for name in COLUMNS if name not in without and any(line[name] for line in lines)]
    return used, [[line[name] for name in used] for line in lines]


def cells(row: StoredRow) -> dict[str, str]:
    """Return the text of a row by column. A part of a step has its share in place of a ratio."""
    settings = row["settings"]
    share, flops, mfu = (settings.get(name) for name in ("share", "tflop_per_s", "mfu"))
    ratio, cpu_ratio = (
        "" if row.get(name) is None else "baseline" if row["case"] == row["baseline"] else f"{row[name]:.2f} x"
        for name in ("ratio", "cpu_ratio")
    )
    figures = {name: row[name] for name in ("p20", "p50", "p80")}
    figures |= {
        "CPU ms": row.get("cpu_ms"),
        "peak MiB": row["peak_mib"],
        "images/s": images_per_s(row),
        "TFLOP/s": flops,
    }
    return {
        "case": row["case"],
        "unit": row["unit"],
        "n": str(row["n"]),
        "ratio": ratio if share is None else _percent(share),
        "CPU ratio": cpu_ratio,
        **{name: "" if value is None else short(value) for name, value in figures.items()},
        "MFU": f"{100 * mfu:.1f} %" if isinstance(mfu, float) else mfu or "",
        **{name: _percent(settings.get(f"of_{name}")) for name in ("bandwidth", "convolutions")},
        "effort": "" if row["effort"] == "full" else row["effort"],
        "commit": row["commit"] or "",
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


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
    shown = Table(*columns, title=title)
    for line in lines:
        shown.add_row(*line)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 200
    console.print(shown)
