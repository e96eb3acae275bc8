"""What each rank of a scaling study does, under any launcher: some steps for the clock, one more whose collectives are counted.

torchrun --nnodes 2 --nproc_per_node 8 ... -m benchmarks.scaling.rank --recipe ds_configs/bs4096.json --out runs/scaling
deepspeed --hostfile F --module benchmarks.scaling.rank --recipe ds_configs/bs4096.json --out runs/scaling
srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint $HEAD:29500 \\
    -m benchmarks.scaling.rank --recipe ds_configs/bs4096.json --out runs/scaling

Rank 0 adds a row to OUT/scaling.jsonl; `python -m benchmarks scaling efficiency OUT` reads the rows of several sizes. The
images are made up on the spot, so nothing waits for data.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Row, append, clocks
from benchmarks.scaling.counting import Counting
from benchmarks.scaling.traffic import step_traffic
from crossbatch import InputError
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve, to_dict
from crossbatch.engine.runtime.distributed import GroupCollective, World, process_group, world_from_environment
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.engine.step import TrainStep
from crossbatch.engine.tasks.build import build_backend, build_model

WARM_UP = 3  # steps; DeepSpeed's stage 3 learns in the first two


def main() -> None:
    given = arguments().parse_args()
    if given.steps < 1:
        raise InputError(f"--steps: given {given.steps}; allowed: >= 1")
    world, device = world_from_environment(), Device.detect()
    config = load_config(given.recipe, given.set)
    batch = config.train_batch_size * (world.size if given.mode == "weak" else 1)
    config = load_config(given.recipe, [*given.set, f"train_batch_size={batch}"])
    run = resolve(config, world.size, device, world.local_size)
    with process_group(world, device.type, threads=run.threads) as torch_device:
        times, calls = measure(run, torch_device, given.steps)
        if world.is_main:
            row = row_of(run, world, given, times, calls)
            append(given.out / "scaling.jsonl", "scaling", [row])
            print(f"{row.case}: {row.p50:.1f} images/s, {sum(calls.values())} collectives a step", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", metavar="F", default="ds_configs/bs4096.json", help="default %(default)s")
    parser.add_argument("--set", metavar="path=value", action="append", default=[], help="override a key; repeatable")
    parser.add_argument(
        "--mode", choices=("weak", "strong"), default="weak", help="weak: train_batch_size is that of one rank"
    )
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="for the clock (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="adds a row to DIR/scaling.jsonl")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser


def measure(run: ResolvedConfig, device: torch.device, steps: int) -> tuple[list[float], Counter[tuple[str, int]]]:
    """Seconds of `steps` steps, and the collectives of one."""
    torch.manual_seed(0)
    model = build_model(run).to(device)
    model.set_collective(GroupCollective())
    step = TrainStep(build_backend(model, run), run, device, steps_per_epoch=1000, chunk=run.chunk)
    size = run.config.crossbatch.data.image_size
    views = torch.randint(0, 256, (2, run.local_batch, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    views = views.pin_memory() if device.type == "cuda" else views  # as the loader hands them over
    for _ in range(WARM_UP):
        step(views)
    times = []
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        step(views)
        _wait(device)
        times.append(time.perf_counter() - start)
    with Counting() as counting:
        step(views)
    return times, counting.calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.get_world_size() > 1:
        dist.barrier()


def row_of(
    run: ResolvedConfig, world: World, given: argparse.Namespace, times: list[float], calls: Counter[tuple[str, int]]
) -> Row:
    with torch.device("meta"):
        traffic = step_traffic(build_model(run), run)
    rates = [run.config.train_batch_size / seconds for seconds in times]
    p20, p50, p80 = (float(p) for p in np.percentile(rates, (20, 50, 80)))
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, size), number in calls.items():
        kind_of = by_kind.setdefault(kind, {"calls": 0, "bytes": 0})
        kind_of["calls"] += number
        kind_of["bytes"] += number * size
    settings: dict[str, Any] = {
        "recipe": Path(given.recipe).name,  # the configuration is below; where the file lay is nobody's business
        "overrides": given.set,
        "mode": given.mode,
        "ranks": world.size,
        "nodes": world.size // world.local_size,
        "threads": torch.get_num_threads(),
        "predicted": False,
        "step_ms": 1000 * run.config.train_batch_size / p50,
        "collectives": by_kind,
        "collectives_as_predicted": traffic.by_kind() == calls,
        "config": to_dict(run.config),
    }
    case = f"{Path(given.recipe).stem}, {given.mode}, {world.size} rank{'s' if world.size > 1 else ''}"
    return Row(case, p20, p50, p80, len(rates), "images/s", settings=settings, clocks=clocks())


if __name__ == "__main__":
    run_main(main)
