"""Rebuild one step of a pretraining run, and say which layer and which image went wrong in it first.

python launch/replay.py --run runs/quickstart --step 120
python launch/replay.py --run runs/quickstart --step 120 --rank 0 --image 1234
python launch/replay.py --run runs/one --compare runs/other
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("replay")  # before the imports below, which take seconds

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from crossbatch import InputError
from crossbatch.engine.config import Device, usable_cores
from crossbatch.engine.replay.compare import changed_keys, differences, first_step_apart
from crossbatch.engine.replay.rebuild import RecordedRun, check_step, rebuild
from crossbatch.engine.replay.report import describe, loss_terms, write_report, write_views
from crossbatch.engine.replay.verdict import judge, of_state
from crossbatch.engine.runtime import distributed
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import on_main, process_group
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.launch.arguments import ArgumentParser, number, positive

WINDOW, JUMP, TOLERANCE = 20, 10, 1e-4  # defaults of flags


def parse_arguments() -> argparse.Namespace:
    """Return the command line; flags that contradict each other exit with code 2."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--run", metavar="RUN", type=Path, required=True, help="run directory of launch/pretrain.py")
    add("--step", metavar="N", type=positive, help="step to make again, counted from 1 as in metrics.jsonl")
    add("--rank", metavar="R", type=int, help="write the views of all images that this rank of the run had")
    add("--image", metavar="I", type=int, help="write the views of image I of the data set, and what the network saw")
    add("--out", metavar="DIR", type=Path, help="folder to write into; default RUN/replay/step-N")
    add("--data", metavar="DIR", help="where the images are now; default: where they were")
    what = f"steps before N to watch, if a checkpoint or the start of the run is that near; default {WINDOW}"
    add("--window", metavar="K", type=int, help=what)
    what = f"a value is wrong if it exceeds X times its largest one in the steps before; default {JUMP}"
    add("--jump", metavar="X", type=number, help=what)
    what = "another run directory: find step, layer and tensor where they part"
    add("--compare", metavar="OTHER", type=Path, help=what)
    what = f"with --compare: relative difference above which values count as different; default {TOLERANCE:g}"
    add("--tolerance", metavar="X", type=float, help=what)
    arguments = parser.parse_args()
    if arguments.step is None and arguments.compare is None:
        parser.error("--step: not given; allowed: a step of the run, from 1; or give --compare OTHER")
    unused = ("rank", "image", "window", "jump") if arguments.compare is not None else ("tolerance",)
    for name in unused:
        if getattr(arguments, name) is not None:
            when = "without --compare" if arguments.compare is not None else "with --compare OTHER"
            parser.error(f"--{name}: given {getattr(arguments, name)}; allowed: only {when}; leave it out")
    for name, default in (("window", WINDOW), ("jump", JUMP), ("tolerance", TOLERANCE)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    if arguments.window < 0:
        parser.error(f"--window: given {arguments.window}; allowed: a whole number >= 0")
    for name, least in (("jump", 1), ("tolerance", 0)):
        if not getattr(arguments, name) > least:
            parser.error(f"--{name}: given {getattr(arguments, name)}; allowed: a number > {least}")
    return arguments


def main() -> None:
    """Rebuild a step, write what was seen, and print the verdict. Raises InputError or RunStopped."""
    arguments = parse_arguments()
    world, detected = world_from_environment(), Device.detect()
    run = RecordedRun.open(arguments.run, "--run")
    if run.config["crossbatch"].get("deterministic"):
        distributed.make_deterministic()
    timeout_s = run.config["crossbatch"]["watch"]["timeout_s"]
    threads = max(1, usable_cores() // world.local_size)
    with process_group(world, detected.type, threads, timeout_s) as device:
        if arguments.compare is None:
            replay(run, arguments, world, device)
        else:
            compare(run, RecordedRun.open(arguments.compare, "--compare"), arguments, world, device)


def replay(run: RecordedRun, arguments: argparse.Namespace, world: World, device: torch.device) -> None:
    """Recompute a step, write what was seen of it, and print the verdict. Raises InputError."""
    step, ranks = arguments.step, check_step(run, arguments.step)
    if arguments.rank is not None and not 0 <= arguments.rank < ranks:
        raise InputError(f"--rank: given {arguments.rank}; allowed: 0 to {ranks - 1}, the ranks of {run.path}")
    out = create_folder(arguments.out or run.path / "replay" / f"step-{step}")
    rebuilt = rebuild(
        run, step, arguments.window, arguments.data, world, device, out, arguments.image, say=said_by(world)
    )
    positions = rebuilt.positions(arguments.rank, arguments.image)
    verdict, terms = judge(rebuilt, arguments.jump), loss_terms(rebuilt)
    normalised = {*verdict.positions, *(positions if arguments.image is not None else ())}
    write_views(rebuilt, {*positions, *verdict.positions}, normalised, out)
    if world.is_main:
        write_report(rebuilt, verdict, terms, out)
        print("\n".join([*describe(rebuilt), *verdict.lines, f"written to {out}"]))


def compare(
    run: RecordedRun, other: RecordedRun, arguments: argparse.Namespace, world: World, device: torch.device
) -> None:
    """Print where two runs part, and write it to compare.json. Raises InputError."""
    tolerance = arguments.tolerance
    out = create_folder(arguments.out or run.path / "replay" / f"compare-{other.path.resolve().name}")
    found = on_main(lambda: first_step_apart(run, other, tolerance))
    step = arguments.step or (None if found is None else found.step)
    lines, apart = [f"{run.path} and {other.path}"], []
    if found is not None:
        lines.append(f"the records part at step {found.step}: {found.text}")
    if step is None:
        lines.append(f"the same within {tolerance:g}, in all steps that both have recorded")
    else:
        check_step(run, step)
        check_step(other, step)
        lines += [f"other configuration: {key}" for key in changed_keys(run, other, step)]
        one, two = (
            rebuild(each, step, 0, arguments.data, world, device, out, keep_state=True, say=said_by(world))
            for each in (run, other)
        )
        apart = list(differences(one, two, tolerance))
        if apart:
            first = apart[0]
            lines.append(
                f"first difference in step {step}, in the order of computation: {first.where}: {first.tensor}: {first.text}"
            )
            lines.append(f"{len(apart)} values differ by more than {tolerance:g} of their largest")
        else:
            lines.append(f"replay gives both the same step {step} within {tolerance:g}: only the records differ")
            apart = found.in_checkpoints if found is not None and found.step == step else []
            for rebuilt in (one, two):
                for fault in rebuilt.state_faults:
                    lines += [f"{rebuilt.run.path}:", *of_state(fault, rebuilt).lines]
    if world.is_main:
        found_at = None if found is None else found.step
        content = {
            "step": step,
            "recorded_apart_at": found_at,
            "differences": [vars(one) for one in apart],
            "lines": lines,
        }
        write_atomically(out / "compare.json", json.dumps(content, indent=2) + "\n")
        print("\n".join([*lines, f"written to {out}"]))


def said_by(world: World) -> Callable[[str], object]:
    """Return a function that prints a line on rank 0 and does nothing on the other ranks."""
    return print if world.is_main else lambda text: None


def create_folder(path: Path) -> Path:
    """Create the folder to write into. Raises InputError on all ranks if it cannot be written."""

    def create() -> Path:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written: {error.strerror}; choose another with --out") from None
        if not os.access(path, os.W_OK):
            raise InputError(f"--out {path}: is not a writable folder; choose another with --out")
        return path

    return on_main(create)
