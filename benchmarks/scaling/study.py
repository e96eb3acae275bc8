"""Really runs a step on 1, 2, 4, ... ranks of this machine, and says how well it scales.

Each size is a run of its own under torchrun (rank.py; there, too, how to run it on many nodes). Weak scaling gives every rank
the same images, strong scaling shares them out. Efficiency is the rate over that of the smallest size times the ranks; on CPU
ranks, which share the cores of a machine, it is at most 1 / ranks in weak scaling when one rank uses all cores.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.rows import Results, read
from benchmarks.rows import StoredRow as Read
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
Study = dict[int, Read]  # ranks -> row


def run_study(ranks: Sequence[int], overrides: Sequence[str], given: argparse.Namespace) -> list[Read]:
    """Run every size, and return the rows that they added to OUT/scaling.jsonl; `given` as in rank.py.

    Raises InputError for sizes that are none, and where a run fails because of its input.
    """
    if min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise InputError(f"--ranks: given {' '.join(map(str, ranks))}; allowed: >= 1, each size once")
    if not Path(given.recipe).exists():
        raise InputError(f"--recipe: no such file: {given.recipe}")
    path = given.out / "scaling.jsonl"
    before = len(read(path).rows) if path.exists() else 0
    for size in sorted(ranks):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["-m", "benchmarks.scaling.rank", "--recipe", str(Path(given.recipe).resolve())]
        command += ["--steps", str(given.steps), "--out", str(given.out.resolve()), *["--strong"] * given.strong]
        command += [part for override in overrides for part in ("--set", override)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise failure(size, done.stderr)
    return read(path).rows[before:]


def failure(size: int, stderr: str) -> Exception:
    """Return what the first rank that failed said of its input, or a bug with the end of what all said."""
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if said:
        return InputError(f"{size} ranks: {said[0].removeprefix('error: ')}")
    return RuntimeError(f"{size} ranks failed:\n{stderr[-4000:]}")


def studies(rows: Sequence[Read]) -> dict[str, Study]:
    """Group measured rows by recipe, mode, overrides and card; later rows of a size count."""
    found: dict[tuple, Study] = {}
    for row in rows:
        facts = row["settings"]
        if row["stage"] == "scaling" and row["unit"] == "images/s" and not facts.get("predicted"):
            name = f"{Path(facts['recipe']).stem}, {facts['mode']}"
            key = name, tuple(facts["overrides"]), tuple(row["machine"]["gpus"][:1])
            found.setdefault(key, {})[facts["ranks"]] = row
    names = [key[0] for key in found]
    unique = [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]
    return {name: dict(sorted(study.items())) for name, study in zip(unique, found.values(), strict=True)}


def efficiency_table(results: Results) -> Table:
    """Show the rates of each size, how far they are from linear, and the collectives beside those that were predicted."""
    found = studies(results.rows)
    if not found:
        raise InputError(
            "no rows of a scaling study; measure with `python -m benchmarks scaling --ranks 1 2 4 --out DIR`"
        )
    predicted = {row["case"]: row["p50"] for row in results.rows if row["settings"].get("predicted")}
    columns = ("study", "ranks", "images/s", "p20 - p80", "efficiency", "predicted", "collectives", "predicted")
    shown = Table(*columns)
    for name, study in found.items():
        smallest = next(iter(study))
        for ranks, row in study.items():
            linear, guess = study[smallest]["p50"] * ranks / smallest, predicted.get(f"{row['case']}, predicted")
            shown.add_row(
                name,
                str(ranks),
                f"{row['p50']:.1f}",
                f"{row['p20']:.1f} - {row['p80']:.1f}",
                f"{100 * row['p50'] / linear:.0f} %",
                "" if guess is None else f"{guess:.1f}, {100 * (guess / row['p50'] - 1):+.0f} %",
                *(_calls(row["settings"].get(key)) for key in ("collectives", "collectives_predicted")),
            )
    return shown


def _calls(kinds: dict[str, dict[str, float]] | None) -> str:
    if kinds is None:  # an older row
        return ""
    calls, size = (sum(kind[what] for kind in kinds.values()) for what in ("calls", "bytes"))
    return f"{calls:.0f}, {size / 2**20:.2f} MiB"
