"""Does a recipe fit on these GPUs, how long will it take, what limits it, and what would help?

python launch/plan.py --deepspeed_config ds_configs/bs4096.json --gpus 16 --gpu v100-32g --nodes 2 --interconnect 4xedr

Nothing runs: memory is computed from the network's shapes, collectives are counted, and times are predicted by a model that
is checked against published runs (python -m benchmarks scaling backtest). Every number says where it is from.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from crossbatch import InputError
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch.arguments import ArgumentParser, add_config_flags, overrides

if TYPE_CHECKING:
    from benchmarks.scaling.planning import Answer

WIDTH = 100
_CHECKOUT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser)
    machines = parser.add_argument_group("machines")
    machines.add_argument("--gpus", metavar="N", type=int, required=True, help="of all nodes together")
    machines.add_argument(
        "--gpu",
        metavar="NAME",
        required=True,
        help='such as v100-32g, or "memory_gib=24,bandwidth=936,fp32=35.6,fp16=71"',
    )
    machines.add_argument("--nodes", metavar="N", type=int, default=1, help="default %(default)s")
    machines.add_argument(
        "--interconnect", metavar="NAME", help="between nodes: edr, 4xhdr, ... (default: usual for the GPU)"
    )
    machines.add_argument(
        "--link", metavar="NAME", help="inside of a node: nvlink2, pcie4, ... (default: usual for the GPU)"
    )
    parser.add_argument("--images", metavar="N", type=int, default=1_281_167, help="of an epoch (default %(default)s)")
    parser.add_argument("--feed", metavar="N", type=float, help="images/s that the loaders deliver (default: enough)")
    parser.add_argument(
        "--rows", metavar="PATH", type=Path, help="measured rows of `python -m benchmarks step` or `scaling`"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for scripts")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    for flag, value in (("--images", given.images), ("--feed", given.feed)):
        if value is not None and value <= 0:
            raise InputError(f"{flag}: given {value}; allowed: > 0")
    if not (_CHECKOUT / "benchmarks" / "scaling").is_dir():
        raise InputError(
            "launch/plan.py: needs benchmarks/, which is not installed with the package; run it from a checkout"
        )
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))
    from benchmarks.scaling.planning import answer, as_dict
    from benchmarks.scaling.question import Question

    found = answer(
        Question(
            given.deepspeed_config,
            tuple(overrides(given)),
            given.gpu,
            given.gpus,
            given.nodes,
            given.interconnect,
            given.link,
            given.images,
            given.feed,
            given.rows,
        )
    )
    if given.json:
        print(json.dumps(as_dict(found), indent=2))
        return
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else WIDTH
    for table in tables(found):
        console.print(table)
    for note in found.notes:
        console.print(f"extrapolated: {note}", markup=False)


def tables(found: "Answer") -> list[Table]:
    return [_summary(found), _memory(found), _stages(found)]


def _summary(found: "Answer") -> Table:
    at, run = found.machines, found.run
    low, rate, high = found.images_per_s
    hours, soonest, latest = found.hours
    used, there = found.memory.total / 2**30, at.gpu.memory_gib
    nodes = f", {at.nodes} nodes of {at.gpus_per_node}" if at.nodes > 1 else ""
    table = _table(f"{at.gpus} x {found.question.gpu}{nodes}", "", "", "where from")
    rows: list[tuple[Any, ...]] = [
        ("fits", f"{'yes' if found.fits else 'NO'}: {used:.1f} of {there:g} GiB", f"computed; {at.gpu.source}"),
        ("batch", f"{run.config.train_batch_size}, {run.local_batch} a rank", "recipe"),
        ("chunk", f"{run.chunk}, {run.chunks} a step", found.chunk_origin),
        ("precision", run.precision, "recipe, and what the GPU has"),
        (
            "images/s",
            f"{rate:,.0f} ({low:,.0f} to {high:,.0f})",
            "predicted; range: the largest errors of the back-test",
        ),
        ("100 epochs", f"{hours:.1f} h ({soonest:.1f} to {latest:.1f})", f"{found.question.images:,} images an epoch"),
        ("limited by", ", then ".join(found.limits), "the stages below"),
    ]
    for text, gain, origin in found.helps:
        rows.append(("would help", f"{100 * gain:+.0f} %: {text}", origin))
    if not found.helps:
        rows.append(("would help", "nothing that is a setting", ""))
    for row in rows:
        table.add_row(*row)
    return table


def _memory(found: "Answer") -> Table:
    table = _table("memory of a GPU at the peak", "part", "GiB", "where from")
    table.columns[1].justify = "right"
    for part in found.memory.parts:
        table.add_row(part.name, f"{part.bytes / 2**30:.2f}", part.origin)
    return table


def _stages(found: "Answer") -> Table:
    table = _table(f"a step of {found.estimate.step_ms:.0f} ms", "stage", "ms", "where from")
    table.columns[1].justify = "right"
    for stage in found.estimate.stages:
        table.add_row(stage.name, f"{stage.ms:.1f}", stage.origin)
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


if __name__ == "__main__":
    run_main(main)
