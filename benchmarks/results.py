"""Rows that were measured before, read again: from a .jsonl file, or from all that lie in a folder.

A line that is cut off is left out, and said; rows of a version that this code does not know, and files that hold something
else, stop with a message. Rows of several machines must not meet in one table, so whoever reads says which one is meant.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import VERSION
from crossbatch import InputError

Row = dict[
    str, Any
]  # a line: a harness.Row with stage, machine, versions, commit and, from version 2 on, time and effort

_NEEDED = ("stage", "case", "machine", "p20", "p50", "p80", "n", "unit")
_SINCE_2 = {"time": None, "effort": "full", "clocks": None, "peak_mib": None}


@dataclass
class Results:
    """Rows in the order in which they were written, and what there is to say about the files."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of_machine(self, wanted: str | None) -> "Results":
        """Those of one machine: of the only one, or of that whose number or part of a name is given.

        Raises InputError where that leaves more or less than one.
        """
        names = list(dict.fromkeys(machine_of(row) for row in self.rows))
        if wanted is not None:
            chosen = [name for number, name in enumerate(names, 1) if wanted == str(number)]
            chosen = chosen or [name for name in names if wanted.lower() in name.lower()]
        else:
            chosen = names
        if len(chosen) != 1:
            given = "not given" if wanted is None else f"given {wanted}, which is {len(chosen)} of them"
            raise InputError(f"--machine: {given}; allowed: a number or a part of one name; {self._listed(names)}")
        return Results([row for row in self.rows if machine_of(row) == chosen[0]], self.notes)

    def _listed(self, names: list[str]) -> str:
        counts = [sum(machine_of(row) == name for row in self.rows) for name in names]
        lines = [
            f"\n  {n}: {name} ({count} rows)" for n, (name, count) in enumerate(zip(names, counts, strict=True), 1)
        ]
        return f"the rows are of {len(names)} machines, whose figures do not compare:{''.join(lines)}"

    def latest(self) -> list[Row]:
        """The last row of every stage, case and effort, where it was first seen."""
        return list({(row["stage"], row["case"], row["effort"]): row for row in self.rows}.values())


def machine_of(row: Row) -> str:
    """A name for what figures depend on: "Intel(R) Xeon(R) Processor, 2 cores, no GPU"."""
    machine = row["machine"]
    gpus = list(dict.fromkeys(machine["gpus"]))
    cards = " + ".join(f"{machine['gpus'].count(gpu)} x {gpu}" for gpu in gpus) or "no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {cards}"


def read(path: Path) -> Results:
    """Of a file, or of all *.jsonl of a folder. Raises InputError if there are no rows."""
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
    elif path.exists():
        files = [path]
    else:
        raise InputError(f"{path}: no such file or folder; measure with `python -m benchmarks all --out {path}`")
    results = Results()
    for file in files:
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
            results.notes.append(
                f"{path}:{number}: cut off or damaged, left out: {line[:40].decode(errors='replace')}..."
            )
            continue
        results.rows.append(_checked(row, f"{path}:{number}"))


def _checked(row: Any, where: str) -> Row:
    """The row as of today's version."""
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: holds a {type(row).__name__}; allowed: one JSON object a line, a row of a benchmark"
        )
    version = row.get("version", 1)
    if version not in range(1, VERSION + 1):
        raise InputError(
            f"{where}: a row of version {version}; this code reads 1 to {VERSION}; read it with the crossbatch that wrote it "
            f"(commit {row.get('commit')}), or measure again"
        )
    missing = [name for name in _NEEDED if name not in row]
    if missing:
        raise InputError(f"{where}: not a row of a benchmark, it has no {missing[0]!r}; name the files of results only")
    return {**_SINCE_2, "baseline": None, "ratio": None, "settings": {}, **row}


def images_per_s(row: Row) -> float | None:
    """Where a call works through images, and its time was measured."""
    images = row["settings"].get("images") or row["settings"].get("batch")
    if images is None or row["unit"] != "ms" or row["stage"] not in _OF_IMAGES or "part" in row["settings"]:
        return None
    return images / row["p50"] * 1000


_OF_IMAGES = ("decode", "augment", "data", "transfer", "backbone", "step")


def short(value: float) -> str:
    """Four digits, and no power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def by_stage(rows: Iterable[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    return stages
