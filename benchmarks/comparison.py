"""Compares two results of one machine, files or folders of rows, case by case: `python -m benchmarks compare BEFORE AFTER`

"before / after" is the ratio of the medians, above 1 where AFTER is faster (or smaller). The range is what the two spreads
allow, p20 of one over p80 of the other; a range that holds 1 is no difference. If a case was measured several times, its last
row counts.
"""

import math
from pathlib import Path

from benchmarks import learning, parser_of
from benchmarks.rows import Results, StoredRow, machine_of, read, short, show
from crossbatch import InputError

COLUMNS = ("stage", "case", "before", "after", "unit", "before / after", "range", "")
# What was counted, or follows from the time, does not make another case.
_NOT_SETTINGS = ("config", "tflop", "tflop_per_s", "mfu", "share", "gigabytes", "peak_mib", "parameters", "bytes")
_NOT_SETTINGS += ("bytes_moved", "of_bandwidth", "of_convolutions", "gb_per_s", "left_out", "with_products")
_NOT_SETTINGS += ("data_wait_ms", "standard_error_ms", "step_ms")


def main(arguments: list[str]) -> None:
    """Print the comparison of a command line."""
    parser = parser_of("python -m benchmarks compare", __doc__)
    parser.add_argument("before", metavar="BEFORE", type=Path, help="a .jsonl file or a folder of them")
    parser.add_argument("after", metavar="AFTER", type=Path, help="the same")
    parser.add_argument("--machine", metavar="NAME", help="a part of the name of one, if there are several")
    given = parser.parse_args(arguments)
    before, after = (read(path).of_machine(given.machine) for path in (given.before, given.after))
    lines, notes = compare(before, after)
    show(f"{given.before} -> {given.after}: {machine_of(before.rows[0])}", COLUMNS, lines)
    for note in [*before.notes, *after.notes, *notes]:
        print(note)


def compare(before: Results, after: Results) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return lines of COLUMNS, and notes on what could not be compared.

    Raises InputError for results of two machines, and for results without a common case.
    """
    machines = [machine_of(results.rows[0]) for results in (before, after)]
    if machines[0] != machines[1]:
        raise InputError(
            f"BEFORE is of {machines[0]}, AFTER of {machines[1]}; figures of two machines do not compare: measure both on one"
        )
    old, new = before.latest(), after.latest()
    common = [key for key in old if key in new]
    if not common:
        raise InputError("BEFORE and AFTER have no case in common; measure the same stages with the same effort")
    same = [key for key in common if _settings(old[key]) == _settings(new[key])]
    left_out = {
        "only in BEFORE": [key for key in old if key not in new],
        "only in AFTER": [key for key in new if key not in old],
        "not compared, measured with other settings": [key for key in common if key not in same],
    }
    notes = [f"{why}: {len(keys)} cases, such as {keys[0][0]}: {keys[0][1]}" for why, keys in left_out.items() if keys]
    return [_line(old[key], new[key]) for key in same], notes


def _line(old: StoredRow, new: StoredRow) -> tuple[str, ...]:
    ratio, low, high = ratio_with_range(old, new)
    better, worse = ("faster", "slower") if old["unit"] == "ms" else ("better", "worse")
    figures = short(old["p50"]), short(new["p50"]), old["unit"], f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"
    return old["stage"], old["case"], *figures, better if low > 1 else worse if high < 1 else ""


def ratio_with_range(old: StoredRow, new: StoredRow) -> tuple[float, float, float]:
    """Return old / new of the medians, and its limits by p20 and p80; new / old of what is better if it is more."""
    if old["unit"].endswith("/s") or old["unit"].startswith("%"):
        old, new = new, old
    pairs = ("p50", "p50"), ("p20", "p80"), ("p80", "p20")
    # Nothing over nothing is no difference.
    ratio, low, high = (old[a] / new[b] if new[b] else math.inf if old[a] else 1.0 for a, b in pairs)
    return ratio, low, high


def _settings(row: StoredRow) -> dict:
    """Return the unit, and the sizes and switches that make a case what it is."""
    found = ("curve", *learning.FIGURES) if row["stage"] == "learning" else _NOT_SETTINGS
    return {"unit": row["unit"]} | {name: value for name, value in row["settings"].items() if name not in found}
