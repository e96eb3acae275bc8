"""Does a recipe fit on these GPUs, how long will it take, what limits it, and what would help?

python launch/plan.py --deepspeed_config ds_configs/bs4096.json --gpus 16 --gpu v100-32g --nodes 2 --interconnect 4xedr

Nothing runs: memory is computed from the network's shapes, collectives are counted, and times are predicted by a model that
is checked against published runs (python -m benchmarks scaling backtest). Every number says where it is from.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from crossbatch import InputError
from crossbatch.engine.planning.plan import IMAGENET, Plan, Question, as_dict, plan
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch.arguments import ArgumentParser, add_config_flags, overrides

WIDTH = 100


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser)
    add = parser.add_argument_group("machines").add_argument
    add("--gpus", metavar="N", type=int, required=True, help="of all nodes together")
    by_hand = '"memory_gib=24,bandwidth=936,fp32=35.6,fp16=71"'
    add("--gpu", metavar="NAME", required=True, help=f"such as v100-32g, or {by_hand}")
    add("--nodes", metavar="N", type=int, default=1, help="default %(default)s")
    add("--interconnect", metavar="NAME", help="between nodes: edr, 4xhdr, ... (default: usual for the GPU)")
    add("--link", metavar="NAME", help="inside a node: nvlink2, pcie4, ... (default: usual for the GPU)")
    parser.add_argument("--images", metavar="N", type=int, default=IMAGENET, help="of an epoch (default %(default)s)")
    parser.add_argument("--feed", metavar="N", type=float, help="images/s that the loaders deliver (default: enough)")
    parser.add_argument(
        "--rows", metavar="PATH", type=Path, help="measured by `python -m benchmarks step` or `scaling`"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for scripts")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    for flag, value in (("--images", given.images), ("--feed", given.feed)):
        if value is not None and value <= 0:
            raise InputError(f"{flag}: given {value}; allowed: > 0")
    machines = given.gpu, given.gpus, given.nodes, given.interconnect, given.link
    asked = tuple(overrides(given)), *machines, given.images, given.feed, given.rows
    found = plan(Question(given.deepspeed_config, *asked))
    if given.json:
        print(json.dumps(as_dict(found), indent=2))
        return
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else WIDTH
    for table in (_summary(found), _memory(found), _stages(found)):
        console.print(table)
    for note in found.notes:
        console.print(f"extrapolated: {note}", markup=False)


def _summary(found: Plan) -> Table:
    cfg, at, memory = found.setting.cfg, found.setting.at, found.setting.memory
    low, rate, high = found.images_per_s
    soonest, hours, latest = found.hours
    fits = f"{'yes' if found.setting.fits else 'NO'}: {memory.total / 2**30:.1f} of {at.gpu.memory_gib:g} GiB"
    images = f"{found.question.images:,} images an epoch"
    nodes = f", {at.nodes} nodes of {at.gpus_per_node}" if at.nodes > 1 else ""
    table = _table(f"{at.gpus} x {found.question.gpu}{nodes}", "", "", "where from")
    table.add_row("fits", fits, f"computed; {at.gpu.source}")
    table.add_row("batch", f"{cfg.config.train_batch_size}, {cfg.local_batch} a rank", "recipe")
    table.add_row("chunk", f"{cfg.chunk}, {cfg.chunks} a step", found.setting.chunk_origin)
    table.add_row("precision", cfg.precision, "recipe, and what the GPU has")
    origin = "predicted; range: the largest errors of the back-test"
    table.add_row("images/s", f"{rate:,.0f} ({low:,.0f} to {high:,.0f})", origin)
    table.add_row(f"{found.epochs:g} epochs", f"{hours:.1f} h ({soonest:.1f} to {latest:.1f})", images)
    table.add_row("limited by", ", then ".join(found.estimate.limits), "the stages below")
    for text, gain, origin in found.helps:
        table.add_row("would help", f"{100 * gain:+.0f} %: {text}", origin)
    if not found.helps:
        table.add_row("would help", "nothing that is a setting", "")
    return table


def _memory(found: Plan) -> Table:
    table = _table("memory of a GPU at the peak", "part", "GiB", "where from")
    for part in found.setting.memory.parts:
        table.add_row(part.name, f"{part.bytes / 2**30:.2f}", part.origin)
    return table


def _stages(found: Plan) -> Table:
    table = _table(f"a step of {found.estimate.step_ms:.0f} ms", "stage", "ms", "where from")
    for stage in found.estimate.stages:
        table.add_row(stage.name, f"{stage.ms:.1f}", stage.origin)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    table.columns[1].justify = "right" if columns[1] else "left"
    return table


if __name__ == "__main__":
    run_main(main)
