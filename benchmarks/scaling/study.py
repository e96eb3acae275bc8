"""Really runs a step on 1, 2, 4, ... ranks of this machine, and says how well it scales.

Each size is a run of its own under torchrun (rank.py; there, too, how to run it on many nodes). Weak scaling gives every rank
the same images, strong scaling shares them out. Efficiency is the rate over that of the smallest size times the ranks; on CPU
ranks, which share the cores of a machine, it is at most 1 / ranks in weak scaling when one rank uses all cores.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.flops import CARDS
from benchmarks.harness import Row, append
from benchmarks.results import Results, read
from benchmarks.results import Row as Read
from benchmarks.scaling.calibration import calibrated, fit, predict
from benchmarks.scaling.published import ROWS, Run
from benchmarks.scaling.published import Row as Published
from crossbatch import InputError

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


def run_study(
    ranks: Sequence[int], recipe: str, overrides: Sequence[str], mode: str, steps: int, out: Path
) -> list[Read]:
    """Runs every size, adds measured and predicted rows to OUT/scaling.jsonl, and returns the measured ones.

    Raises InputError for sizes that are none, and where a run fails because of its input.
    """
    if any(size < 1 for size in ranks):
        raise InputError(f"--ranks: given {min(ranks)}; allowed: >= 1")
    if len(set(ranks)) < len(ranks):
        raise InputError(f"--ranks: given {' '.join(map(str, ranks))}; allowed: each size once")
    before = len(read(out / "scaling.jsonl").rows) if (out / "scaling.jsonl").exists() else 0
    for size in sorted(ranks):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["-m", "benchmarks.scaling.rank", "--recipe", str(Path(recipe).resolve()), "--mode", mode]
        command += ["--steps", str(steps), "--out", str(out.resolve())]
        command += [part for override in overrides for part in ("--set", override)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise _failure(size, done.stderr)
    measured = read(out / "scaling.jsonl").rows[before:]
    predicted = [_as_row(row, rate, why) for row, rate, why in predictions(measured)]
    if predicted:
        append(out / "scaling.jsonl", "scaling", predicted)
    return measured


def _failure(size: int, stderr: str) -> Exception:
    """What the first rank that failed said of its input; or a bug, with the end of what all said."""
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if said:
        return InputError(f"{size} ranks: {said[0].removeprefix('error: ')}")
    return RuntimeError(f"{size} ranks failed:\n{stderr[-4000:]}")


def studies(rows: Sequence[Read]) -> dict[str, dict[int, Read]]:
    """Name -> ranks -> row: measured rows of one recipe, overrides, mode and card belong together; later ones count."""
    found: dict[tuple[Any, ...], dict[int, Read]] = {}
    for row in rows:
        facts = row["settings"]
        if row["stage"] == "scaling" and row["unit"] == "images/s" and not facts.get("predicted"):
            key = (
                Path(facts["recipe"]).stem,
                facts["mode"],
                tuple(facts["overrides"]),
                tuple(row["machine"]["gpus"][:1]),
            )
            found.setdefault(key, {})[facts["ranks"]] = row
    names = [f"{key[0]}, {key[1]}" for key in found]
    names = [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]
    return {name: dict(sorted(sizes.items())) for name, sizes in zip(names, found.values(), strict=True)}


def measured_rows(rows: Sequence[Read]) -> list[Published]:
    """What a fit takes: from the smallest size of each study to each other."""
    found = []
    for name, sizes in studies(rows).items():
        smallest, *others = sizes
        small = sizes[smallest]
        gpus = small["machine"]["gpus"]
        gpu = CARDS.get(gpus[0], "") if gpus else "cpu"
        if not gpu:
            raise InputError(f"rows of a {gpus[0]}, which the catalogue lacks; name it in benchmarks/flops.py, CARDS")
        for size in others:
            kinds = sizes[size]["settings"]["collectives"]
            calls = sum(kind["calls"] for kind in kinds.values())
            gradients = sum(kinds[kind]["bytes"] for kind in ("all-reduce", "reduce-scatter") if kind in kinds)
            runs = _run(small), _run(sizes[size])
            title = f"{name}, {smallest} -> {size} ranks"
            found.append(
                Published(title, "measured", "measured", gpu, None, *runs, "measured", gradients, calls, calls)
            )
    return found


def _run(row: Read) -> Run:
    facts = row["settings"]
    ranks, batch = facts["ranks"], facts["config"]["train_batch_size"]
    return Run(ranks, facts["nodes"], batch // ranks, row["p50"], norms_over=ranks)


def predictions(rows: Sequence[Read]) -> list[tuple[Published, float, str]]:
    """(row, images/s, by what) of every size but the smallest, by constants fitted to the others (and to published runs).

    Where there are no others, by those of published runs; they say nothing about CPUs.
    """
    mine = measured_rows(rows)
    predicted = []
    for i, row in enumerate(mine):
        others = [*mine[:i], *mine[i + 1 :]]
        if others:
            constants, why = fit([*ROWS, *others]), f"fitted to {len(others)} other sizes"
        elif row.gpu != "cpu":
            constants, why = calibrated()[0].with_stack("measured", "pytorch", "eager"), "published runs"
        else:
            continue
        predicted.append((row, predict(row, constants), why))
    return predicted


def _as_row(row: Published, rate: float, why: str) -> Row:
    mode = row.name.split(", ")[1].split()[0]
    settings = {"mode": mode, "ranks": row.wanted.gpus, "predicted": True, "by": why}
    return Row.of_one(f"{row.name}, predicted", rate, "images/s", settings)


def efficiency_table(results: Results) -> Table:
    """Measured and predicted rates of each size, and how far they are from linear."""
    shown = Table("study", "ranks", "images/s", "p20 - p80", "efficiency", "predicted", "error", "collectives")
    found = studies(results.rows)
    if not found:
        raise InputError(
            "no rows of a scaling study; measure with `python -m benchmarks scaling --ranks 1 2 4 --out DIR`"
        )
    guesses = {(row.name.rsplit(", ", 1)[0], row.wanted.gpus): rate for row, rate, _ in predictions(results.rows)}
    for name, sizes in found.items():
        smallest = next(iter(sizes))
        for ranks, row in sizes.items():
            facts = row["settings"]
            linear = sizes[smallest]["p50"] * ranks / smallest
            guess = guesses.get((name, ranks))
            calls = sum(kind["calls"] for kind in facts["collectives"].values())
            size = sum(kind["bytes"] for kind in facts["collectives"].values())
            as_predicted = "as predicted" if facts["collectives_as_predicted"] else "NOT as predicted"
            shown.add_row(
                name,
                str(ranks),
                f"{row['p50']:.1f}",
                f"{row['p20']:.1f} - {row['p80']:.1f}",
                f"{100 * row['p50'] / linear:.0f} %",
                "" if guess is None else f"{guess:.1f}",
                "" if guess is None else f"{100 * (guess / row['p50'] - 1):+.0f} %",
                f"{calls}, {size / 2**20:.2f} MiB, {as_predicted}",
            )
    return shown
