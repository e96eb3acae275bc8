"""Predict whether a recipe fits on given GPUs, how long it takes, what limits it, and what would help.

python launch/plan.py --deepspeed_config ds_configs/bs4096.json --gpus 16 --gpu v100-32g --nodes 2 --interconnect 4xedr

Nothing runs: memory is computed from the network's shapes, collectives are counted, and times are predicted by a model that
is checked against published runs (python -m benchmarks scaling backtest). Every number says where it is from.
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("plan")  # before the imports below, which take seconds

import argparse
import json
from pathlib import Path

from rich.table import Table

from crossbatch import InputError
from crossbatch.engine.gradient_noise import describe_batch
from crossbatch.engine.planning.catalogue import GPU_BY_HAND, GPUS, LINKS, NETWORKS
from crossbatch.engine.planning.plan import IMAGENET, Plan, Question, as_dict, notes, plan
from crossbatch.engine.runtime.output import check_printed, console
from crossbatch.engine.schedules import too_short
from crossbatch.launch.arguments import ArgumentParser, add_config_flags, overrides

WIDTH = 100


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_config_flags(parser)
    add = parser.add_argument_group("machines").add_argument
    add("--gpus", metavar="N", type=int, required=True, help="GPUs of all nodes together")
    numbers = f"or its numbers, {GPU_BY_HAND}: GB/s and dense TFLOP/s of its data sheet, without bf16 if it has none"
    add("--gpu", metavar="NAME", required=True, help=f"{', '.join(GPUS)}; {numbers}")
    add("--nodes", metavar="N", type=int, default=1, help="number of nodes (default %(default)s)")
    networks = f"{', '.join(NETWORKS)}; 4xedr: four adapters in each node"
    add("--interconnect", metavar="NAME", help=f"between nodes: {networks} (default: usual for the GPU)")
    add("--link", metavar="NAME", help=f"inside a node: {', '.join(LINKS)} (default: usual for the GPU)")
    add = parser.add_argument
    add("--images", metavar="N", type=int, default=IMAGENET, help="images in an epoch (default %(default)s)")
    add("--feed", metavar="N", type=float, help="images/s that all loaders deliver together (default: enough)")
    add("--run", metavar="DIR", type=Path, help="a run of this recipe, to say which batch size still pays")
    add("--rows", metavar="PATH", type=Path, help="rows measured by `python -m benchmarks step` or `scaling`")
    add("--json", action="store_true", help="print one JSON object, for scripts")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    for flag, value in (("--images", given.images), ("--feed", given.feed)):
        if value is not None and value <= 0:
            raise InputError(f"{flag}: given {value}; allowed: > 0")
    machines = given.gpu, given.gpus, given.nodes, given.interconnect, given.link
    asked = tuple(overrides(given)), *machines, given.images, given.feed, given.rows, given.run
    found = plan(Question(given.deepspeed_config, *asked))
    if given.json:
        print(json.dumps(as_dict(found), indent=2))
        check_printed()
        return
    printer = console()
    printer.width = printer.width if printer.is_terminal else WIDTH
    memory = [(part.name, f"{part.bytes / 2**30:.2f}", part.origin) for part in found.memory.parts]
    stages = [(stage.name, f"{stage.ms:.1f}", stage.origin) for stage in found.estimate.stages]
    at = found.at
    nodes = f", {at.nodes} nodes of {at.gpus_per_node}" if at.nodes > 1 else ""
    for title, columns, lines in (
        (f"{at.gpus} x {given.gpu}{nodes}", ("", ""), _summary(found)),
        ("memory of a GPU at the peak", ("part", "GiB"), memory),
        (f"a step of {found.estimate.step_ms:.0f} ms", ("stage", "ms"), stages),
    ):
        table = Table(*columns, "where from", title=title, title_justify="left")
        if columns[1]:
            table.columns[1].justify = "right"
        else:
            table.columns[2].max_width = 30  # the flags of what would help need the place
        for line in lines:
            table.add_row(*line)
        printer.print(table)
    for warning in too_short(found.cfg.config, found.asked.images):
        printer.print(f"warning: {warning}")
    for note in notes(found):
        printer.print(f"extrapolated: {note}")
    check_printed()


def _summary(found: Plan) -> list[tuple[str, str, str]]:
    """Return the lines of the first table: what, how much, where from."""
    cfg, at, memory = found.cfg, found.at, found.memory
    low, rate, high = found.images_per_s
    soonest, hours, latest = found.hours
    fits = f"{'yes' if found.fits else 'NO'}: {memory.total / 2**30:.1f} of {at.gpu.memory_gib:g} GiB"
    predicted = "predicted; range: the largest errors of the back-test"
    lines = [
        ("fits", fits, f"computed; {at.gpu.source}"),
        ("batch", f"{cfg.config.train_batch_size}, {cfg.local_batch} a rank", "recipe"),
        ("chunk", f"{cfg.chunk} images, {cfg.chunks} a step", found.chunk_origin),
        ("precision", cfg.precision, "recipe, and what the GPU has"),
        ("images/s", f"{rate:,.0f} ({low:,.0f} to {high:,.0f})", predicted),
        (
            f"{cfg.crossbatch.schedule.epochs:g} epochs",
            f"{hours:.1f} h ({soonest:.1f} to {latest:.1f})",
            f"{found.asked.images:,} images an epoch",
        ),
        ("limited by", ", then ".join(found.estimate.limits), "the stages below"),
    ]
    if found.noise is not None:
        batch, scale, step = found.cfg.train_batch_size, found.noise.scale, found.noise.step
        origin = f"measured: step {step} of {found.asked.run}, batch {found.noise.batch}"
        lines.append(("noise scale", f"{scale:,.0f} images: a larger batch pays up to about as many", origin))
        lines.append(("", describe_batch(batch, scale), "computed (docs/measuring.md)"))
    helps = [(f"{100 * gain:.0f} % more images/s: {change}", origin) for change, gain, origin in found.helps]
    helps = helps or [("none of the changes that were tried", "predicted with each")]
    return lines + [("would help", *tried) for tried in helps]
