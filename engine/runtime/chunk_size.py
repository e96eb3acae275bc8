"""How many images the backbone may see at once: `train_micro_batch_size_per_gpu: "auto"`.

A backbone of its own (unsharded, outside of the sharding backend) is run on 2 and on 4 images; the difference is what two
images keep for their backward pass. On a GPU that is the peak of the allocator, on a CPU the tensors that autograd saves.
What is free, less what the parameters, the optimizer, the batch-wide part and the loader will take and less a margin, divided
by it is the chunk.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from crossbatch import InputError
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import World, broadcast_object
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import NUM_VIEWS, MoCo, autocast

MARGIN = 0.75  # of what is free: fragmentation, workspaces, the loader
SMALL, LARGE = 2, 4  # images of the probe


def automatic_chunk(run: ResolvedConfig, world: World, device: torch.device, cache: Path) -> tuple[int, str]:
    """The chunk for this run and why, the same on all ranks; every rank must call it.

    Raises InputError if not even one image fits. `cache` is a file of the run directory: a run that is continued keeps
    its chunks, because they are part of what a ResNet's norms see.
    """
    known = broadcast_object(_read(cache, run))
    if known is not None:
        return known, f"chunk of {known} images, as before"
    with torch.device("meta"):
        model = build_model(run)
    dtype = autocast_dtype(run.precision)
    per_image = bytes_per_image(model.online.backbone, run.config.crossbatch.data.image_size, device, dtype)
    rest = batch_wide_bytes(model, run)
    free = free_bytes(device, world.local_size)
    fits = torch.tensor(int((MARGIN * free - rest) / per_image), device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    if fits < 1:
        raise InputError(
            f"train_micro_batch_size_per_gpu: not even one image fits into {free / 2**30:.1f} GiB: the backbone keeps "
            f"{per_image / 2**20:.0f} MiB of it, and {run.local_batch} images a rank take {rest / 2**30:.1f} GiB behind the "
            f"backbone; lower train_batch_size, use more ranks, or name a chunk to try it all the same"
        )
    chunk = even_chunk(run.local_batch, int(fits))
    if world.is_main:
        remember(cache, run, chunk)
    why = (
        f"chunk of {chunk} images, {-(-run.local_batch // chunk)} a step: {per_image / 2**20:.1f} MiB an image, "
        f"{free / 2**30:.1f} GiB free"
    )
    return chunk, why


def even_chunk(local_batch: int, fits: int) -> int:
    """As few chunks as fit, about equally large."""
    chunks = -(-local_batch // fits)
    return -(-local_batch // chunks)


def remember(cache: Path, run: ResolvedConfig, chunk: int) -> None:
    """For when this run is continued."""
    write_atomically(cache, json.dumps({"chunk": chunk, "local_batch": run.local_batch}) + "\n")


def bytes_per_image(
    backbone: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype | None = None
) -> float:
    """What `backbone`, given without memory, keeps for one more image (both views) until its backward pass.

    `dtype`: of autocast, None without.
    """
    backbone = backbone.to_empty(device=device)
    for parameter in backbone.parameters():
        nn.init.constant_(parameter, 0.01)
    kept = []
    for count in (SMALL, SMALL, LARGE):  # the first call also pays for workspaces and handles
        images = torch.zeros(NUM_VIEWS * count, 3, image_size, image_size, device=device)
        kept.append(_kept(backbone, images.to(memory_format=torch.channels_last), dtype))
    return max((kept[2] - kept[1]) / (LARGE - SMALL), 1.0)


def batch_wide_bytes(model: MoCo, run: ResolvedConfig) -> float:
    """An upper estimate of what is there once: fp32 parameters, gradients, optimizer state, heads, BatchFormer, keys, images.

    Per stream of a view: about six activations of the heads' hidden width for the local batch, and three copies of the
    keys of the global batch (normalised, gathered, in order). Scores and logits exist in small tiles only.
    """
    ours = run.config.crossbatch
    state = sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
    streams = NUM_VIEWS * (2 if model.batchformer is not None else 1)
    heads = streams * run.local_batch * 6 * max(ours.model.mlp_dim, model.online.backbone.num_features)
    keys = 3 * streams * run.config.train_batch_size * ours.model.dim
    return 4.0 * (state + heads + keys) + loader_bytes(run)


def loader_bytes(run: ResolvedConfig) -> float:
    """On a GPU that DALI decodes on: a batch in use, one ready, and one being filled. (Others hand over from host memory.)"""
    ours = run.config.crossbatch
    if run.device.type != "cuda" or ours.data.backend != "dali":
        return 0.0
    return 3.0 * NUM_VIEWS * run.local_batch * 3 * ours.data.image_size**2


def free_bytes(device: torch.device, local_size: int) -> float:
    """This rank's part of the memory that nobody uses, in bytes."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    available = next(
        (float(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")),
        4 * 2.0**30,
    )
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and limit[0].isdigit() and used:
        available = min(available, float(limit[0]) - float(used[0]))
    return available / local_size


def _kept(backbone: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> float:
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with autocast("cuda", dtype):
            output = backbone(images)
        output.float().sum().backward()
        backbone.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast("cpu", dtype):
        output = backbone(images)  # alive, or its storages would be counted once for several tensors
    del output
    return float(sum(saved.values()))


def _read(cache: Path, run: ResolvedConfig) -> int | None:
    if not cache.exists():
        return None
    known = json.loads(cache.read_text(encoding="utf-8"))
    return known["chunk"] if known["local_batch"] == run.local_batch else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
