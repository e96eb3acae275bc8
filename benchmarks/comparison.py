"""python -m benchmarks compare BEFORE AFTER [--machine NAME] [--output FILE.md]

Two results, files or folders, of the same machine, case by case: BEFORE / AFTER of the medians, above 1 where AFTER is faster
(or smaller), with the range that the two spreads allow, p20 of one over p80 of the other. A range that holds 1 is no
difference. Where a case was measured several times, its last row counts.
"""

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.results import Results, Row, machine_of, read, short
from crossbatch import InputError

COLUMNS = ("stage", "case", "before", "after", "unit", "before / after", "range", "")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="BEFORE", type=Path, help="a .jsonl file or a folder of them")
    parser.add_argument("after", metavar="AFTER", type=Path, help="the like")
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    parser.add_argument("--output", metavar="FILE.md", type=Path, help="write the table as Markdown, too")
    given = parser.parse_args(arguments)
    both = [read(path).of_machine(given.machine) for path in (given.before, given.after)]
    lines, notes = compare(*both)
    console = Console(highlight=False)
    shown = Table(*COLUMNS, title=f"{given.before} -> {given.after}: {machine_of(both[0].rows[0])}")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    for note in [*both[0].notes, *both[1].notes, *notes]:
        console.print(note, markup=False, soft_wrap=True)
    if given.output is not None:
        text = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *lines)]
        given.output.write_text("\n".join([*text, "", *notes]) + "\n", encoding="utf-8")


def compare(before: Results, after: Results) -> tuple[list[tuple[str, ...]], list[str]]:
    """Lines of COLUMNS, and notes on what could not be compared. Raises InputError for two machines, or no common case."""
    machines = [machine_of(results.rows[0]) for results in (before, after)]
    if machines[0] != machines[1]:
        raise InputError(
            f"BEFORE is of {machines[0]}, AFTER of {machines[1]}; figures of two machines do not compare: measure both on one"
        )
    old, new = ({(row["stage"], row["case"], row["effort"]): row for row in r.rows} for r in (before, after))
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


def _line(old: Row, new: Row) -> tuple[str, ...]:
    ratio, low, high = ratio_with_range(old, new)
    verdict = "faster" if low > 1 else "slower" if high < 1 else ""
    if old["unit"] != "ms" and verdict:
        verdict = "better" if verdict == "faster" else "worse"
    figures = (short(row["p50"]) for row in (old, new))
    return old["stage"], old["case"], *figures, old["unit"], f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", verdict


def ratio_with_range(old: Row, new: Row) -> tuple[float, float, float]:
    """old / new (new / old where more is better, of a rate) of the medians, and at least and at most by p20 and p80."""
    if old["unit"].endswith("/s"):
        old, new = new, old
    return _ratio(old["p50"], new["p50"]), _ratio(old["p20"], new["p80"]), _ratio(old["p80"], new["p20"])


def _ratio(old: float, new: float) -> float:
    """Nothing over nothing is no difference."""
    return old / new if new else math.inf if old else 1.0


def _settings(row: Row) -> dict:
    """Sizes, switches and the unit, without what was counted or follows from the time."""
    counted = ("config", "tflop", "tflop_per_s", "mfu", "share", "gigabytes", "peak_mib", "parameters", "bytes")
    return {"unit": row["unit"]} | {name: value for name, value in row["settings"].items() if name not in counted}
