"""How long a GPU computes: the larger of what its arithmetic and what its memory need (the roofline, Williams et al. 2009).

    arithmetic   counted floating-point operations / (peak x share of it that training reaches)
    memory       bytes that autograd keeps x how often each is read and written / bandwidth

A ResNet-50 in 16 bits is bound by memory on every GPU since Volta, which is why its img/s follow the bandwidth and not the
tensor cores. The two factors are fitted to published runs on one GPU (benchmarks/scaling/calibration.py).

A backward pass costs two forward passes, so training an image once is three units; MoCo v3 takes eight for an image: two
views, three units each, and one each for the momentum encoder. With k chunks the online backbone runs forward 2 - 1/k times.
"""

import functools
import json
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.planning.catalogue import Gpu
from crossbatch.engine.sketch import kept_by_backbone, shapes_only, without_memory
from crossbatch.models import NUM_VIEWS
from crossbatch.models.backbones import build_backbone

TRAINING_UNITS = 3  # a forward and a backward pass


@dataclass(frozen=True)
class Efficiency:
    """The share of the peak that training reaches, and how often it moves each byte that it keeps."""

    of_peak: float
    moves: float


@dataclass(frozen=True)
class Work:
    """Training on one crop: operations of forward and backward, and bytes kept for the backward pass."""

    flops: float
    kept: float

    def seconds(self, gpu: Gpu, precision: str, efficiency: Efficiency) -> tuple[float, str]:
        """Return the time, and which of the two limits it."""
        arithmetic = self.flops / (gpu.peak(precision) * efficiency.of_peak)
        memory = self.kept * efficiency.moves / (1e9 * gpu.bandwidth)
        return (arithmetic, "arithmetic") if arithmetic > memory else (memory, "memory bandwidth")


@functools.cache
def work_of(
    arch: str, image_size: int, precision: str, stem: str = "imagenet", frozen_patches: bool = False, args: str = "{}"
) -> Work:
    """Count what one crop through a backbone takes; arguments as of `build_backbone`, `args` being `backbone_args` as JSON."""
    backbone = without_memory(lambda: build_backbone(arch, image_size, stem, frozen_patches, json.loads(args)))
    kept = kept_by_backbone(backbone, image_size, precision).per_image / NUM_VIEWS
    # The plain kernel of attention is the one whose products are counted on every device.
    with (
        shapes_only(precision),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        backbone(torch.empty(1, 3, image_size, image_size))
    return Work(float(TRAINING_UNITS * counter.get_total_flops()), kept)


@dataclass(frozen=True)
class StepWork:
    """What the backbones of one rank compute in one step, in crops trained."""

    crops: float
    per_crop: Work


def step_work(cfg: ResolvedConfig) -> StepWork:
    """Count the passes of a step in crops trained, which are three forward passes each."""
    ours = cfg.config.crossbatch
    units = TRAINING_UNITS + (1 - 1 / cfg.chunks) + ours.model.checkpoint_activations + 1  # the last: momentum encoder
    asked, args = ours.model, json.dumps(dict(ours.model.backbone_args))
    work = work_of(asked.arch, ours.data.image_size, cfg.precision, asked.stem, asked.stop_grad_conv1, args)
    return StepWork(NUM_VIEWS * cfg.local_batch * units / TRAINING_UNITS, work)
