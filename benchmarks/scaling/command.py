"""python -m benchmarks scaling --ranks 1 2 4 [--weak | --strong] [--recipe F] [--set k=v] [--out DIR]
                                                 runs a step on so many ranks of this machine
python -m benchmarks scaling efficiency PATH     what such runs, of any launcher, came to
python -m benchmarks scaling backtest [--json]   predicts published runs with constants fitted to the others

PATH is a file or a folder of rows. On many nodes: see benchmarks/scaling/rank.py.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rows import machine_of, read
from benchmarks.scaling import calibration, study
from benchmarks.scaling.calibration import Tested
from benchmarks.scaling.rank import add_flags

WIDTH = 120
LIMIT = 0.25  # beyond this error, a row is called missed


def main(arguments: list[str]) -> None:
    commands = {"backtest": backtest, "efficiency": efficiency}
    if arguments and arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        measure(arguments)


def _console() -> Console:
    shown = Console(highlight=False, markup=False)
    shown.width = shown.width if shown.is_terminal else WIDTH
    return shown


def measure(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", metavar="N", type=int, nargs="+", required=True, help="sizes, such as 1 2 4")
    given = add_flags(parser).parse_args(arguments)
    overrides = [*(study.ON_GPUS if torch.cuda.is_available() else study.SMALL), *given.set]
    shown = _console()
    shown.print(f"{given.recipe} with {' '.join(overrides)}")
    rows = study.run_study(given.ranks, overrides, given)
    shown.print(study.efficiency_table(read(given.out / "scaling.jsonl")))
    shown.print(f"{machine_of(rows[0])}; rows in {given.out / 'scaling.jsonl'}")


def efficiency(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks scaling efficiency")
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    given = parser.parse_args(arguments)
    results = read(given.path).of_machine(given.machine)
    shown = _console()
    shown.print(study.efficiency_table(results))
    for note in results.notes:
        shown.print(note)


def backtest(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks scaling backtest")
    parser.add_argument("--json", action="store_true", help="one JSON object for scripts")
    given = parser.parse_args(arguments)
    tested, single = calibration.leave_one_out(), calibration.leave_one_out_single()
    harder = calibration.leave_publication_out()
    if given.json:
        lists = {"scaling": tested, "scaling_by_publication": harder, "one_gpu": single}
        print(json.dumps({name: [vars(row) for row in rows] for name, rows in lists.items()}))
        return
    rows, sources = calibration.ROWS, list(dict.fromkeys(row.source for row in [*tested, *single]))
    linear = [row.known.images_per_s / row.known.gpus * row.wanted.gpus / row.images_per_s - 1 for row in rows]
    shown = _console()
    title = "Published runs on many GPUs, images/s, each predicted by constants fitted to all others"
    shown.print(_table(title, tested, {"by publ.": [row.error for row in harder], "linear": linear}, sources))
    several = [row for row, of in zip(tested, rows, strict=True) if of.wanted.nodes > 1]
    shown.print(_summary("this run left out of the fit", [row.error for row in tested]))
    shown.print(_summary("the same, runs on several nodes only", [row.error for row in several]))
    shown.print(_summary("all runs of its publication left out (by publ.)", [row.error for row in harder]))
    shown.print(_summary("linear scaling instead", linear))
    title = "Supervised training on one GPU, images/s, by the roofline, each predicted by factors fitted to all others"
    shown.print(_table(title, single, {}, sources))
    shown.print(_summary("this run left out of the fit", [row.error for row in single]))
    for row in [*tested, *single]:
        if abs(row.error) > LIMIT:
            shown.print(f"missed by more than {100 * LIMIT:.0f} %: {row.name}")
    shown.print(f"fitted to all: {calibration.fit()}, {calibration.fit_efficiency()}")
    for number, source in enumerate(sources, 1):
        shown.print(f"[{number}] {source}", soft_wrap=True)


def _table(
    title: str, tested: Sequence[Tested], beside: Mapping[str, Sequence[float]], sources: Sequence[str]
) -> Table:
    table = Table(
        "run", "published", "predicted", "error", "fitted", *beside, "source", title=title, title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for i, row in enumerate(tested):
        errors = [row.error, row.error_fitted, *(values[i] for values in beside.values())]
        rates = (f"{row.published:,.0f}", f"{row.predicted:,.0f}")
        table.add_row(row.name, *rates, *(f"{100 * e:+.1f} %" for e in errors), str(1 + sources.index(row.source)))
    return table


def _summary(name: str, errors: Sequence[float]) -> str:
    size = 100 * np.abs(errors)
    return f"{name}, {len(errors)}: median error {np.median(size):.1f} %, worst {size.max():.1f} %"
