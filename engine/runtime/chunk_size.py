"""Finds how many images the backbone may see at once, for `train_micro_batch_size_per_gpu: "auto"`.

The chunk is the largest one with which a step, by `engine.memory_model`, fits into a share of the free memory of every rank.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.memory_model import GIB, StepMemory
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import broadcast_object
from crossbatch.engine.runtime.world import World

# Of what is free. The rest is for fragmentation and for cuDNN's workspaces, of which there is one at a time. Where it times its
# algorithms (`cudnn.benchmark`), torch offers them the largest free block, half of it where that is not to be had, and frees it
# afterwards; an algorithm whose workspace finds no room in a later step is chosen anew. So a lack of room costs speed, no step.
MARGIN = 0.85


def automatic_chunk(run: ResolvedConfig, world: World, device: torch.device, cache: Path) -> tuple[int, str]:
    """Return the chunk for this run and why, the same on all ranks; every rank must call it.

    `cache` is a file of the run directory: a run that is continued keeps its chunks, because they are part of what a ResNet's
    norms see.

    Raises:
        InputError: if not even one image fits.
    """
    known = broadcast_object(json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else None)
    if known is not None and known["local_batch"] == run.local_batch:
        return known["chunk"], f"chunk of {known['chunk']} images, as before"
    memory, free = StepMemory(run), free_bytes(device, world.local_size)
    fits = torch.tensor(memory.largest_chunk(MARGIN * free), device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    chunk, each = int(fits), memory.sketch.backbone.per_image / 2**20
    if chunk < 1:
        rest = memory.at(1).without_context - memory.sketch.backbone.per_image
        raise InputError(
            f"train_micro_batch_size_per_gpu: not even one image fits into {free / GIB:.1f} GiB: the backbone keeps "
            f"{each:.0f} MiB for it, and everything else on a rank with {run.local_batch} images takes {rest / GIB:.1f} GiB; "
            f"lower train_batch_size, use more ranks, or set a number here to try it anyway"
        )
    if world.is_main:
        remember(cache, run, chunk)
    chunks = -(-run.local_batch // chunk)
    return chunk, f"chunk of {chunk} images, {chunks} a step: {each:.1f} MiB an image, {free / GIB:.1f} GiB free"


def remember(cache: Path, run: ResolvedConfig, chunk: int) -> None:
    """Write the chunk to a file of the run directory, for when this run is continued."""
    write_atomically(cache, json.dumps({"chunk": chunk, "local_batch": run.local_batch}) + "\n")


def free_bytes(device: torch.device, local_size: int) -> float:
    """Return this rank's share of the free memory, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = 4 * 2.0**30
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            available = 1024 * float(line.split()[1])
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and limit[0] != "max" and used:
        available = min(available, float(limit[0]) - float(used[0]))
    return available / local_size


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
