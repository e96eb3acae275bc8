"""Run one rank of a scaling study, under any launcher: time some steps, and count the collectives of one more.

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

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import parser_of
from benchmarks.measure import append, clocks
from benchmarks.rows import Row
from benchmarks.stages import recipe
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve, to_dict
from crossbatch.engine.planning.catalogue import CARDS, machines
from crossbatch.engine.planning.prediction import estimate
from crossbatch.engine.planning.traffic import Message, Traffic, step_traffic, totals
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.engine.sketch import sketch
from crossbatch.engine.step import TrainStep

WARM_UP = 3  # steps; DeepSpeed's stage 3 learns in the first two
KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}


class Counting(TorchDispatchMode):
    """Counts in `traffic` the collectives that really happen within it: our own, DeepSpeed's and FSDP2's, whoever calls them.

    All pass torch's dispatcher as operators `c10d::...`, where the tensors can be weighed. A group of one rank sends nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Traffic = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it will call operators on its local tensors
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d" and dist.get_world_size() > 1:
            name = name.split(".")[0].strip("_")
            kind = next((kind for part, kind in KINDS.items() if part in name), name)
            self.traffic[Message("counted", kind, whole_bytes(args))] += 1
        return func(*args, **(kwargs or {}))


def whole_bytes(args: tuple) -> int:
    """Return the bytes of the larger side, output or input; of a list of tensors, all of them."""
    sides = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)] for arg in args]
    return max((sum(t.nbytes for t in side) for side in sides), default=0)


def main() -> None:
    given = parse(parser_of(None, __doc__))
    world = world_from_environment()
    cfg = resolved(given, world.size, Device.detect(), world.local_size)
    with process_group(world, cfg.device.type, threads=cfg.threads) as torch_device:
        times, traffic = measure(cfg, torch_device, given.steps)
        if world.is_main:
            row = row_of(cfg, world, given, times, traffic)
            append(given.out / "scaling.jsonl", "scaling", [row])
            print(f"{row.case}: {row.p50:.1f} images/s, {traffic.total()} collectives a step", flush=True)


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read what a rank and `python -m benchmarks scaling` both take, and what `parser` takes besides."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--weak", action="store_true", help="train_batch_size is the batch of each rank (default)")
    mode.add_argument("--strong", action="store_true", help="train_batch_size is the batch of all ranks together")
    parser.add_argument("--recipe", metavar="F", default="ds_configs/bs4096.json", help="default %(default)s")
    parser.add_argument("--set", metavar="path=value", action="append", default=[], help="override a key; repeatable")
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="steps that are timed (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/scaling"), help="default %(default)s")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"argument --steps: given {given.steps}; allowed: a whole number >= 1")
    return given


def resolved(given: argparse.Namespace, ranks: int, device: Device, local_ranks: int) -> ResolvedConfig:
    """Return the configuration of a study with so many ranks. Raises InputError for one that cannot run."""
    config = load_config(given.recipe, given.set)
    batch = config.train_batch_size * (1 if given.strong else ranks)
    return resolve(config.model_copy(update={"train_batch_size": batch}), ranks, device, local_ranks)


def measure(cfg: ResolvedConfig, device: torch.device, steps: int) -> tuple[list[float], Traffic]:
    """Time `steps` steps, in seconds, and count the collectives of one."""
    step = TrainStep(recipe.build(cfg, device), cfg, device, steps_per_epoch=1000, chunk=cfg.chunk)
    size = height_width(cfg.config.crossbatch.data.image_size)
    views = torch.randint(0, 256, (2, cfg.local_batch, *size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
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
    return times, counting.traffic


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.get_world_size() > 1:
        dist.barrier()


def row_of(cfg: ResolvedConfig, world: World, given: argparse.Namespace, times: list[float], traffic: Traffic) -> Row:
    """Make a row of what was measured, with what the model says beside it: collectives, and the rate on a known GPU."""
    nodes, batch = world.size // world.local_size, cfg.config.train_batch_size
    mode, rates = "strong" if given.strong else "weak", [batch / seconds for seconds in times]
    case = f"{Path(given.recipe).stem}, {mode}, {world.size} rank{'s' if world.size > 1 else ''}"
    row = Row.of_samples(case, rates, "images/s", clocks=clocks())
    row.settings = {
        "recipe": Path(given.recipe).name,  # the configuration is below; where the file lay is nobody's business
        "overrides": given.set,
        "mode": mode,
        "ranks": world.size,
        "nodes": nodes,
        "threads": torch.get_num_threads(),
        "predicted": False,
        "step_ms": 1000 * batch / row.p50,
        "collectives": totals(traffic, by="kind"),
        "collectives_predicted": totals(step_traffic(sketch(cfg).model, cfg), by="kind"),
        "config": to_dict(cfg.config),
    }
    if cfg.device.name in CARDS:  # the model says nothing about CPUs
        at = machines(CARDS[cfg.device.name], world.size, nodes)
        row.settings["images_per_s_predicted"] = estimate(cfg, at).images_per_s
    return row


if __name__ == "__main__":
    run_main(main)
