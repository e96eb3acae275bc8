"""python -m benchmarks scaling --ranks 1 2 4 [--weak | --strong] [--recipe F] [--set k=v] [--out DIR]
                                                 runs a step on so many ranks of this machine
python -m benchmarks scaling efficiency PATH     what such runs, of any launcher, came to
python -m benchmarks scaling backtest [--json]   predicts published runs with constants fitted to the others
python -m benchmarks scaling fit [--rows PATH]   the constants, and their error on published and measured rows

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

from benchmarks.results import machine_of, read
from benchmarks.scaling import calibration, study
from benchmarks.scaling.calibration import Tested
from benchmarks.scaling.published import ROWS
from crossbatch import InputError

WIDTH = 120
LIMIT = 0.25  # beyond this error, a row is called missed


def main(arguments: list[str]) -> None:
    commands = {"backtest": backtest, "fit": fit, "efficiency": efficiency}
    if arguments and arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        measure(arguments)


def console() -> Console:
    shown = Console(highlight=False)
    shown.width = shown.width if shown.is_terminal else WIDTH
    return shown


def measure(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", metavar="N", type=int, nargs="+", required=True, help="sizes, such as 1 2 4")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--weak", dest="mode", action="store_const", const="weak", help="train_batch_size is that of a rank (default)"
    )
    mode.add_argument("--strong", dest="mode", action="store_const", const="strong", help="train_batch_size is shared")
    parser.add_argument("--recipe", metavar="F", default="ds_configs/bs4096.json", help="default %(default)s")
    parser.add_argument("--set", metavar="path=value", action="append", default=[], help="override a key; repeatable")
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="for the clock (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/scaling"), help="default %(default)s")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        raise InputError(f"--steps: given {given.steps}; allowed: >= 1")
    if not Path(given.recipe).exists():
        raise InputError(f"--recipe: no such file: {given.recipe}")
    overrides = [*(study.ON_GPUS if torch.cuda.is_available() else study.SMALL), *given.set]
    shown = console()
    shown.print(f"{given.recipe} with {' '.join(overrides)}", markup=False)
    rows = study.run_study(given.ranks, given.recipe, overrides, given.mode or "weak", given.steps, given.out)
    shown.print(study.efficiency_table(read(given.out / "scaling.jsonl")))
    shown.print(f"{machine_of(rows[0])}; rows in {given.out / 'scaling.jsonl'}", markup=False)


def efficiency(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks scaling efficiency")
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    given = parser.parse_args(arguments)
    results = read(given.path).of_machine(given.machine)
    console().print(study.efficiency_table(results))
    _print_notes(results.notes)


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
    linear = [row.known.images_per_s / row.known.gpus * row.wanted.gpus / row.wanted.images_per_s - 1 for row in ROWS]
    sources = list(dict.fromkeys(row.source for row in [*tested, *single]))
    shown = console()
    title = "Published runs on many GPUs, images/s, each predicted by constants fitted to all others"
    beside = {"by publ.": [row.error for row in harder], "linear": linear}
    shown.print(_tested_table(title, tested, beside, sources))
    several = [row for row, of in zip(tested, ROWS, strict=True) if of.wanted.nodes > 1]
    shown.print(_summary("this run left out of the fit", tested))
    shown.print(_summary("the same, runs on several nodes only", several))
    shown.print(_summary("all runs of its publication left out of the fit (by publ.)", harder))
    errors = np.abs(linear)
    shown.print(
        f"linear scaling instead: median error {100 * np.median(errors):.1f} %, worst {100 * errors.max():.1f} %"
    )
    _print_missed(shown, tested)
    shown.print()
    title = "Supervised training on one GPU, images/s, by the roofline, each predicted by factors fitted to all others"
    shown.print(_tested_table(title, single, {}, sources))
    shown.print(_summary("this run left out of the fit", single))
    _print_missed(shown, single)
    shown.print()
    for number, source in enumerate(sources, 1):
        shown.print(f"[{number}] {source}", markup=False, soft_wrap=True)


def fit(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks scaling fit")
    parser.add_argument("--rows", metavar="PATH", type=Path, help="measured rows, fitted beside the published ones")
    parser.add_argument("--machine", metavar="NAME", help="of several: the number or a part of the name of one")
    given = parser.parse_args(arguments)
    results = None if given.rows is None else read(given.rows).of_machine(given.machine)
    mine = [] if results is None else study.measured_rows(results.rows)
    if results is not None and not mine:
        raise InputError(
            f"--rows: {given.rows} holds no study of two sizes; measure with `python -m benchmarks scaling`"
        )
    constants, efficiency = calibration.fit([*ROWS, *mine]), calibration.fit_efficiency()
    shown = console()
    table = Table(
        "constant", "value", "meaning", title=f"Fitted to {len(ROWS)} published and {len(mine)} measured rows"
    )
    for line in constants.table():
        table.add_row(*line)
    table.add_row(
        "share of the peak", f"{100 * efficiency.of_peak:.0f} %", "that training reaches where arithmetic limits it"
    )
    table.add_row("moves", f"{efficiency.moves:.1f}", "of each byte kept for the backward pass, forward and backward")
    shown.print(table)
    rows = [*ROWS, *mine]
    errors = np.abs([calibration.predict(row, constants) / row.wanted.images_per_s - 1 for row in rows])
    shown.print(
        f"its own error on these rows: median {100 * np.median(errors):.1f} %, worst {100 * errors.max():.1f} %"
    )
    for row in mine:
        rate = calibration.predict(row, constants)
        error = rate / row.wanted.images_per_s - 1
        shown.print(
            f"{row.name}: {rate:.1f} of {row.wanted.images_per_s:.1f} images/s, {100 * error:+.1f} %", markup=False
        )
    if results is not None:
        _print_notes(results.notes)


def _tested_table(
    title: str, tested: Sequence[Tested], beside: Mapping[str, Sequence[float]], sources: Sequence[str]
) -> Table:
    columns = ("run", "published", "predicted", "error", "fitted", *beside, "source")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for i, row in enumerate(tested):
        errors = [row.error, row.error_fitted, *(values[i] for values in beside.values())]
        rates = (f"{row.published:,.0f}", f"{row.predicted:,.0f}")
        table.add_row(
            row.name, *rates, *(f"{100 * error:+.1f} %" for error in errors), str(1 + sources.index(row.source))
        )
    return table


def _summary(name: str, tested: Sequence[Tested]) -> str:
    median, worst = calibration.typical(tested)
    return f"{name}, {len(tested)}: median error {100 * median:.1f} %, worst {100 * worst:.1f} %"


def _print_missed(shown: Console, tested: Sequence[Tested]) -> None:
    for row in tested:
        if abs(row.error) > LIMIT:
            shown.print(f"missed by more than {100 * LIMIT:.0f} %: {row.name}", markup=False)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console().print(note, markup=False)
