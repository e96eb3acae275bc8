"""Measures every stage beside what people would otherwise use, and reports what was measured.

python -m benchmarks STAGE... | all [--quick | --brief] [--out DIR]     measures
python -m benchmarks report [DIR] [--output DIR]                        makes tables, pictures and a page of the rows
python -m benchmarks compare BEFORE AFTER                               compares two results of one machine, case by case
python -m benchmarks scaling --ranks 1 2 4 | efficiency | backtest      measures and predicts how training scales
python -m benchmarks learning --images DIR                              k-NN accuracy over time beside the peers

Each stage runs in a process of its own, so it finds the machine as a user's process does, with nothing cached or initialised
by another stage; if one fails, the others go on. A row for each case is printed and, with --out, appended to DIR/<stage>.jsonl
as soon as it is there; rows.py says what a row holds.
"""

import difflib
import importlib
import sys
from pathlib import Path

from benchmarks import parser_of, processes
from benchmarks.rows import show, table
from benchmarks.stages import STAGES, WITH_IMAGES, Effort
from crossbatch import InputError

COMMANDS = {
    "report": "benchmarks.report",
    "compare": "benchmarks.comparison",
    "scaling": "benchmarks.scaling.command",
    "learning": "benchmarks.learning.command",
}


def main(arguments: list[str]) -> int:
    """Return the exit code: 0, 1 if a stage failed, 2 if the input was wrong."""
    try:
        if arguments and arguments[0] in COMMANDS:
            importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
            return 0
        return measure(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(arguments: list[str]) -> int:
    """Measure the stages of a command line and return the exit code."""
    parser = parser_of("python -m benchmarks", __doc__)
    add = parser.add_argument
    add("stages", nargs="+", metavar="STAGE", help=f"all, or some of {', '.join(STAGES)}")
    add("--quick", dest="effort", action="store_const", const="quick", help="small sizes, few repeats: does it run?")
    add("--brief", dest="effort", action="store_const", const="brief", help="the sizes that matter, seconds each")
    add("--out", metavar="DIR", type=Path, help="append the rows to DIR/<stage>.jsonl")
    add("--images", metavar="DIR", type=Path, help="decode, augment and load DIR/train/... (default: generated)")
    add("--limit", metavar="S", type=float, help="seconds after which a stage is stopped")
    add("--in-process", action="store_true", help="measure in this process (for debugger and profiler)")
    given = parser.parse_args(arguments)
    stages = chosen(given.stages)
    if given.images is not None and not given.images.is_dir():
        raise InputError(f"--images: no such folder: {given.images}; name one that holds train/...")
    if given.in_process:
        for stage in stages:
            measure_here(stage, Effort(given.effort or "full"), given.out, given.images)
        return 0
    command = [sys.executable, "-m", "benchmarks", "--in-process", *([f"--{given.effort}"] if given.effort else [])]
    for flag, folder in (("--out", given.out), ("--images", given.images)):
        command += [] if folder is None else [flag, str(folder)]
    ended = {stage: processes.run([*command, stage], given.limit) for stage in stages}
    for stage, (_, words) in ended.items():
        print(f"{stage}: {words}")
    if given.out is not None:
        print(f"next: python -m benchmarks report {given.out}")
    codes = {code for code, _ in ended.values()}
    return 2 if 2 in codes else int(codes != {0})


def chosen(names: list[str]) -> list[str]:
    """Return the stages of a command line, in its order. Raises InputError for a name that is none."""
    for name in names:
        if name not in (*STAGES, "all"):
            near = difflib.get_close_matches(name, [*STAGES, *COMMANDS], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"STAGE: given {name}; allowed: all, {', '.join(STAGES)}{hint}")
    return list(STAGES) if "all" in names else list(dict.fromkeys(names))


def measure_here(stage: str, effort: Effort, out: Path | None, images: Path | None = None) -> None:
    """Measure a stage in this process; print a table, also of the rows that came before a failure."""
    from benchmarks.measure import append, as_in_training, stored  # torch: only where something is measured

    as_in_training()
    options = {"images": images} if stage in WITH_IMAGES else {}
    rows = []
    try:
        for row in importlib.import_module(f"benchmarks.stages.{stage}").run(effort, **options):
            rows.append(stored(stage, row, effort))
            if out is not None:
                append(out / f"{stage}.jsonl", stage, [row], effort)
    finally:
        if rows:
            show(stage, *table(rows, without=("effort", "commit")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
