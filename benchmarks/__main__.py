"""python -m benchmarks STAGE... | all [--quick | --brief] [--out DIR]     measures
python -m benchmarks report [DIR] [--output DIR]                        tables, pictures and a page of what was measured
python -m benchmarks compare BEFORE AFTER                               two results of one machine, case by case
python -m benchmarks scaling --ranks 1 2 4 | backtest | fit ...         how training scales: measured, predicted

Each stage runs in a process of its own; one that fails says why, and the others go on. A row for each case is printed and, with
--out, added to DIR/<stage>.jsonl as soon as it is there; harness.py says what a row holds.
"""

import argparse
import difflib
import importlib
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.harness import Effort
from benchmarks.stages import STAGES, measure_each
from crossbatch import InputError

COMMANDS = {
    "report": "benchmarks.report",
    "compare": "benchmarks.comparison",
    "scaling": "benchmarks.scaling.command",
}


def main(arguments: list[str]) -> int:
    """The exit code: 0, 1 if a stage failed, 2 if the input was wrong."""
    try:
        if arguments and arguments[0] in COMMANDS:
            importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
            return 0
        return measure(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", metavar="STAGE", help=f"all, or some of {', '.join(STAGES)}")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="small sizes, few repeats: does it run?")
    effort.add_argument("--brief", action="store_true", help="the sizes that matter, a second or two each")
    parser.add_argument("--out", metavar="DIR", type=Path, help="append the rows to DIR/<stage>.jsonl")
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="decode, augment and load DIR/train/... (default: generated)"
    )
    parser.add_argument("--limit", metavar="S", type=float, help="seconds after which a stage is stopped")
    given = parser.parse_args(arguments)
    stages = chosen(given.stages)
    outcomes = measure_each(
        stages,
        Effort.QUICK if given.quick else Effort.BRIEF if given.brief else Effort.FULL,
        given.out,
        given.images,
        given.limit,
    )
    console = Console(highlight=False)
    for stage, outcome in outcomes.items():
        console.print(f"{stage}: {outcome}", markup=False, soft_wrap=True)
    if given.out is not None:
        console.print(f"next: python -m benchmarks report {given.out}", markup=False, soft_wrap=True)
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


def chosen(names: list[str]) -> list[str]:
    """The stages of a command line, in its order. Raises InputError for a name that is none."""
    for name in names:
        if name not in (*STAGES, "all"):
            near = difflib.get_close_matches(name, [*STAGES, *COMMANDS], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"STAGE: given {name}; allowed: all, {', '.join(STAGES)}{hint}")
    return list(STAGES) if "all" in names else list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
