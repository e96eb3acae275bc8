"""What is asked of a plan: a recipe, and machines. And how the recipe would be cut into chunks there."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.scaling import catalogue
from benchmarks.scaling.memory import CONTEXT, GIB, backbone_kept
from crossbatch import InputError
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve, to_dict
from crossbatch.engine.runtime.chunk_size import MARGIN, batch_wide_bytes, even_chunk
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import MoCo

IMAGENET = 1_281_167


@dataclass(frozen=True)
class Question:
    recipe: str | None
    overrides: tuple[str, ...]
    gpu: str
    gpus: int
    nodes: int = 1
    interconnect: str | None = None
    link: str | None = None
    images: int = IMAGENET
    feed_per_s: float | None = None
    rows: Path | None = None  # measured

    def machines(self) -> catalogue.Machines:
        return catalogue.machines(self.gpu, self.gpus, self.nodes, self.interconnect, self.link)

    def resolved(self, at: catalogue.Machines) -> tuple[ResolvedConfig, MoCo, str]:
        """For these machines, with the chunk that a run would choose and why; the model is on the "meta" device."""
        config, device = load_config(self.recipe, self.overrides), Device("cuda", at.gpu.bf16 > 0, self.gpu)
        run = resolve(config, at.gpus, device, at.gpus_per_node)
        if at.gpu.peak(run.precision) == 0:
            raise InputError(
                f"crossbatch.precision: given {run.precision}; {self.gpu} has none; allowed: auto, fp16, fp32"
            )
        model = _without_memory(run)
        if not run.auto_chunk:
            return run, model, "given"
        free = at.gpu.memory_gib * GIB - CONTEXT
        per_image = backbone_kept(model, run).per_image
        fitting = int((MARGIN * free - batch_wide_bytes(model, run)) / per_image)
        if fitting < 1:
            raise InputError(
                f"--gpu: {self.gpu} has {at.gpu.memory_gib:g} GiB; not even one image fits beside the batch-wide part of "
                f"{run.local_batch} images a rank; take more or larger GPUs, or lower train_batch_size"
            )
        chunk = even_chunk(run.local_batch, fitting)
        config = config.model_copy(update={"train_micro_batch_size_per_gpu": chunk})
        run = resolve(config, at.gpus, device, at.gpus_per_node)
        return run, model, f"as crossbatch.engine.runtime.chunk_size would choose: {MARGIN:g} of the memory"


_built: dict[str, MoCo] = {}


def _without_memory(run: ResolvedConfig) -> MoCo:
    """The model of `run` on the "meta" device; the same one for runs that differ in sharding only."""
    ours = to_dict(run.config.crossbatch)
    key = json.dumps([ours["model"], ours["batchformer"], ours["data"]["image_size"], run.group_size])
    if key not in _built:
        with torch.device("meta"):
            _built[key] = build_model(run)
    return _built[key]
