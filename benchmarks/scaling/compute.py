"""How long a GPU computes: the larger of what its arithmetic and what its memory need (the roofline, Williams et al. 2009).

    arithmetic   counted floating-point operations / (peak x share of it that training reaches)
    memory       bytes that autograd keeps (activations.py) x how often each is read and written / bandwidth

A ResNet-50 in 16 bits is bound by memory on every GPU since Volta, which is why its img/s follow the bandwidth and not the
tensor cores. The two factors are fitted to published runs of one GPU (published.py, `SINGLE`), printed with their error.

A backward pass costs two forward passes, so training an image once is three units; MoCo v3 takes eight for an image: two
views, three units each, and one each for the momentum encoder. With k chunks the online backbone runs forward 2 - 1/k times.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling.activations import kept_by_backbone, shapes_only
from benchmarks.scaling.catalogue import Gpu
from crossbatch.engine.config import ResolvedConfig
from crossbatch.models import NUM_VIEWS, MoCo
from crossbatch.models.backbones import Backbone, build_backbone
from crossbatch.models.loss import NUM_TERMS

TRAINING_UNITS = 3  # a forward and a backward pass


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that training reaches, and how often it moves each byte that it keeps."""

    of_peak: float
    moves: float


@dataclass(frozen=True)
class Work:
    """Of training on one crop: operations of forward and backward, and bytes kept for the backward pass."""

    flops: float
    kept: float

    def seconds(self, gpu: Gpu, precision: str, efficiency: Efficiency) -> tuple[float, str]:
        """And which of the two limits it."""
        arithmetic = self.flops / (gpu.peak(precision) * efficiency.of_peak)
        memory = self.kept * efficiency.moves / (1e9 * gpu.bandwidth)
        return (arithmetic, "arithmetic") if arithmetic > memory else (memory, "memory bandwidth")


def work_of(backbone: Backbone, image_size: int, precision: str) -> Work:
    """One crop through a backbone on the "meta" device."""
    kept = kept_by_backbone(backbone, image_size, precision).per_image / NUM_VIEWS
    with FlopCounterMode(display=False) as counter, shapes_only(backbone):
        backbone(torch.empty(1, 3, image_size, image_size, device="meta"))
    return Work(float(TRAINING_UNITS * counter.get_total_flops()), kept)


@functools.cache
def work_of_arch(arch: str, image_size: int, precision: str) -> Work:
    with torch.device("meta"):
        return work_of(build_backbone(arch, image_size), image_size, precision)


@dataclass(frozen=True)
class StepWork:
    """What one rank computes in one step, in crops trained, and operations behind the backbone."""

    crops: float
    per_crop: Work
    heads_flops: float

    @property
    def flops(self) -> float:
        return self.crops * self.per_crop.flops + self.heads_flops


def step_work(model: MoCo, run: ResolvedConfig) -> StepWork:
    """`model` on the "meta" device."""
    backbone = model.online.backbone
    chunks, views = run.chunks, NUM_VIEWS * run.local_batch
    units = TRAINING_UNITS + (1 - 1 / chunks) + 1  # the momentum encoder's is the last
    if run.config.crossbatch.model.checkpoint_activations:
        units += 1
    crops = views * units / TRAINING_UNITS
    work = work_of(backbone, run.config.crossbatch.data.image_size, run.precision)
    return StepWork(crops, work, _heads_flops(model, run))


def _heads_flops(model: MoCo, run: ResolvedConfig) -> float:
    """Products of BatchFormer and heads, forward and backward for the queries, forward for the keys; and of the loss."""
    streams = 1 if model.batchformer is None else 2
    rows = NUM_VIEWS * run.local_batch
    queries, keys = _weights(model.online.projector) + _weights(model.predictor), _weights(model.momentum.projector)
    heads = 2 * rows * streams * (TRAINING_UNITS * queries + keys)
    dim = run.config.crossbatch.model.projection_dim
    loss = 2 * 2 * NUM_TERMS[model.batchformer_loss] * run.local_batch * run.config.train_batch_size * dim
    if model.batchformer is None or run.group_size is None:
        return float(heads + loss)
    width = model.online.backbone.num_features
    # Two products forward, five back with the scores once more (batchformer/tiles.py); six matrices of width x width.
    mixing = 2 * rows * ((3 + 1) * 6 * width * width + (2 + 5 + 2) * run.group_size * width)
    return float(heads + loss + mixing)


def _weights(mlp: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in mlp.modules() if isinstance(layer, nn.Linear))
