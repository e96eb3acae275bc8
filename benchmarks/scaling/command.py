"""python -m benchmarks scaling --ranks 1 2 4 [--weak | --strong] [--recipe F] [--set k=v] [--out DIR]
                                                 runs a step on so many ranks of this machine
python -m benchmarks scaling efficiency PATH     what such runs, of any launcher, came to
python -m benchmarks scaling backtest            predicts published runs with constants fitted to the others

PATH is a file or a folder of rows. On many nodes: see benchmarks/scaling/rank.py. Weak scaling gives every rank the same
images, strong scaling shares them out. Efficiency is the rate over that of the smallest size times the ranks; on CPU ranks,
which share the cores of a machine, it is at most 1 / ranks in weak scaling when one rank uses all cores.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import parser_of
from benchmarks.rows import Results, StoredRow, read, show
from benchmarks.scaling import calibration
from benchmarks.scaling.rank import parse, resolved
from crossbatch import InputError
from crossbatch.engine.config import Device

ROOT = Path(__file__).parents[2]
# On a machine without a GPU, where nothing else is asked for.
SMALL = [
    "crossbatch.model.arch=resnet18",
    "crossbatch.model.stem=small",
    'crossbatch.model.backbone_args={"width": 16}',
    "crossbatch.model.mlp_dim=256",
    "crossbatch.model.projection_dim=64",
    "crossbatch.data.image_size=32",
    "crossbatch.batchformer.group_size=16",
    "train_batch_size=16",
]
ON_GPUS = ["train_batch_size=256"]  # of a rank: what each of 16 has of 4096


def main(arguments: list[str]) -> None:
    commands = {"backtest": backtest, "efficiency": efficiency}
    if arguments and arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        measure(arguments)


def measure(arguments: list[str]) -> None:
    """Run every size under torchrun, which adds its row to OUT/scaling.jsonl, and show the file."""
    parser = parser_of("python -m benchmarks scaling", __doc__)
    parser.add_argument("--ranks", metavar="N", type=int, nargs="+", required=True, help="sizes, such as 1 2 4")
    given = parse(parser, arguments)
    given.set = [*(ON_GPUS if torch.cuda.is_available() else SMALL), *given.set]
    if min(given.ranks) < 1:
        raise InputError(f"--ranks: given {' '.join(map(str, given.ranks))}; allowed: a whole number >= 1")
    if not Path(given.recipe).exists():
        raise InputError(f"--recipe: no such file: {given.recipe}")
    for size in given.ranks:
        resolved(given, size, Device.detect(), size)  # or each rank would complain
    print(f"{given.recipe} with {' '.join(given.set)}")
    for size in given.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["-m", "benchmarks.scaling.rank", "--recipe", str(Path(given.recipe).resolve())]
        command += ["--steps", str(given.steps), "--out", str(given.out.resolve()), *["--strong"] * given.strong]
        command += [part for override in given.set for part in ("--set", override)]
        subprocess.run(command, cwd=ROOT, check=True)
    show_efficiency(read(given.out / "scaling.jsonl"))
    print(f"rows in {given.out / 'scaling.jsonl'}")


def efficiency(arguments: list[str]) -> None:
    parser = parser_of("python -m benchmarks scaling efficiency", None)
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--machine", metavar="NAME", help="of several: a part of the name of one")
    given = parser.parse_args(arguments)
    results = read(given.path).of_machine(given.machine)
    show_efficiency(results)
    print(*results.notes, sep="\n")


def studies(rows: Sequence[StoredRow]) -> dict[tuple, dict[int, StoredRow]]:
    """Group measured rows by name, overrides and card, and then by ranks; the last row of a size counts."""
    found: dict[tuple, dict[int, StoredRow]] = {}
    for row in rows:
        facts = row["settings"]
        if row["stage"] == "scaling" and not facts.get("predicted"):
            name = f"{Path(facts['recipe']).stem}, {facts['mode']}"
            key = name, tuple(facts["overrides"]), tuple(row["machine"]["gpus"][:1])
            found.setdefault(key, {})[facts["ranks"]] = row
    return found


def show_efficiency(results: Results) -> None:
    """Show the rates of each size, how far they are from linear, and the collectives beside those that were predicted."""
    lines = []
    for (name, *_), sizes in studies(results.rows).items():
        smallest = min(sizes)
        for ranks, row in sorted(sizes.items()):
            facts, rate = row["settings"], row["p50"]
            linear, guess = sizes[smallest]["p50"] * ranks / smallest, facts.get("images_per_s_predicted")
            shown = "" if guess is None else f"{guess:.1f}, {100 * (guess / rate - 1):+.0f} %"
            rates = f"{rate:.1f}", f"{row['p20']:.1f} - {row['p80']:.1f}", f"{100 * rate / linear:.0f} %", shown
            calls = [_calls(facts.get(key)) for key in ("collectives", "collectives_predicted")]
            lines.append((name, str(ranks), *rates, *calls))
    if not lines:
        command = "python -m benchmarks scaling --ranks 1 2 4 --out DIR"
        raise InputError(f"no rows of a scaling study; measure with `{command}`")
    columns = "study", "ranks", "images/s", "p20 - p80", "efficiency", "predicted", "collectives", "predicted"
    show("efficiency", columns, lines)


def _calls(kinds: dict[str, dict[str, float]] | None) -> str:
    if kinds is None:  # an older row
        return ""
    calls, size = (sum(kind[what] for kind in kinds.values()) for what in ("calls", "bytes"))
    return f"{calls:.0f}, {size / 2**20:.2f} MiB"


def backtest(arguments: list[str]) -> None:
    parser_of("python -m benchmarks scaling backtest", None).parse_args(arguments)
    rows, singles = calibration.ROWS, calibration.SINGLE
    errors, one_gpu = calibration.leave_out(*calibration.MANY_GPUS), calibration.leave_out(*calibration.ONE_GPU)
    by_publication = calibration.leave_out(*calibration.MANY_GPUS, by_publication=True)
    linear = calibration.linear_scaling(rows)
    columns = "run", "published", "predicted", "error", "by publication", "linear", "source"
    _show_errors("Published runs on many GPUs, images/s", columns, rows, (errors, by_publication, linear))
    _show_errors("Supervised training on one GPU, images/s", (*columns[:4], "source"), singles, (one_gpu,))
    several = errors[[row.wanted.nodes > 1 for row in rows]]
    for name, of in (
        ("error: constants fitted to all other runs", errors),
        ("error, runs on several nodes only", several),
        ("by publication: constants fitted to the runs of all other publications", by_publication),
        ("linear: each GPU stays as fast as in the smaller run", linear),
        ("one GPU: factors of the roofline fitted to all other runs", one_gpu),
    ):
        size = 100 * np.abs(of)
        print(f"{name}, {len(of)}: median error {np.median(size):.1f} %, worst {size.max():.1f} %")
    print(f"fitted to all: {calibration.fit(*calibration.MANY_GPUS)}, {calibration.fit(*calibration.ONE_GPU)}")


def _show_errors(title: str, columns: Sequence[str], rows: Sequence, errors: Sequence[np.ndarray]) -> None:
    lines = []
    for row, *of_row in zip(rows, *errors, strict=True):
        rates = f"{row.images_per_s:,.0f}", f"{row.images_per_s * (1 + of_row[0]):,.0f}"
        lines.append((row.name, *rates, *(f"{100 * error:+.1f} %" for error in of_row), row.source))
    show(title, columns, lines)
