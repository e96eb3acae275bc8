"""Rows of results: what a row says, and how rows are read again from a .jsonl file or from all .jsonl files of a folder.

A line that is cut off is skipped and noted. Rows of a version that this code does not know, and files that hold something
else, raise InputError. Rows of several machines must not meet in one table, so `Results.of_machine` selects one.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossbatch import InputError

VERSION = 2  # of a row; rows without one are version 1, which had no time, effort, clocks and peak_mib

# A line of a file: a Row, and what `measure.append` adds to it (stage, effort, time, machine, versions, commit).
StoredRow = dict[str, Any]

_NEEDED = ("stage", "case", "machine", "p20", "p50", "p80", "n", "unit")
_DEFAULTS = {"baseline": None, "ratio": None, "settings": {}}
_DEFAULTS |= {"time": None, "effort": "full", "clocks": None, "peak_mib": None}  # what version 1 did not have


@dataclass
class Row:
    """One case of one stage. `ratio` is the baseline's p50 / this p50: above 1 this case is faster, or smaller."""

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

    @staticmethod
    def of_samples(case: str, samples: list[float], unit: str = "ms", **more: Any) -> "Row":
        """Return a row with the percentiles 20, 50 and 80 of `samples`."""
        p20, p50, p80 = (float(p) for p in np.percentile(samples, (20, 50, 80)))
        return Row(case, p20, p50, p80, len(samples), unit, **more)

    @staticmethod
    def of_one(case: str, value: float, unit: str, settings: dict[str, Any], **more: Any) -> "Row":
        """Return a row of something that is counted, or measured once."""
        return Row(case, value, value, value, 1, unit, settings=settings, **more)


@dataclass
class Results:
    """Rows in the order in which they were written, and notes on what could not be read."""

    rows: list[StoredRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of_machine(self, wanted: str | None) -> "Results":
        """Return the rows of one machine: of the only one, or of the one with `wanted` in its name.

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
    gpus = dict.fromkeys(machine["gpus"])
    cards = " + ".join(f"{machine['gpus'].count(gpu)} x {gpu}" for gpu in gpus) or "no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {cards}"


def read(path: Path) -> Results:
    """Read the rows of a file, or of all *.jsonl of a folder. Raises InputError if there are none."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; measure with `python -m benchmarks all --out {path}`")
    results = Results()
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        _read_file(file, results)
    if not results.rows:
        found = f"no row that can be read ({results.notes[0]})" if results.notes else "no rows"
        raise InputError(f"{path}: holds {found}; measure with `python -m benchmarks all --out DIR`")
    return results


def _read_file(path: Path, results: Results) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            results.notes.append(f"{path}:{number}: cut off or damaged, left out: {shown}...")
        else:
            results.rows.append(_checked(row, f"{path}:{number}"))


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
