"""Predicts one training step on N GPUs, stage by stage, in ms: the sum of what is not hidden behind something else.

backbone     crops x roofline, or a measured step of one rank
heads        products of BatchFormer, heads and loss at the same share of the peak
fixed        what a step takes however few its images; once a chunk
contention   what every further GPU of a node costs each view: cores, memory and power of a host, shared
norms        latency of their collectives among the ranks that share statistics, one by one: nothing can be done meanwhile
stragglers   waiting for each other at all of these (communication.py)
keys         keys, features of BatchFormer groups that span ranks, and running statistics where not all ranks share them
gradients    what does not fit beside the backward pass, if the backend overlaps at all: FSDP2 does, ZeRO 3 does, and the
             other stages with `overlap_comm`; all in one bucket, nothing can overlap
parameters   gathered for the forward pass (stage 3), or after the update (ZeRO 1 and 2)
data         what a step waits for images, if it is known how many come

The roofline (Williams et al. 2009) is the larger of two times, with two factors that are fitted to published runs on one GPU:

    arithmetic   counted floating-point operations / (peak x share of it that training reaches)
    memory       bytes that autograd keeps x how often each is read and written / bandwidth; for our ResNets times the share
                 that their operators move, counted, of what torchvision's do, which the published runs trained

A ResNet-50 in 16 bits is bound by memory on every GPU since Volta, which is why its images/s follow the bandwidth and not the
tensor cores. A backward pass costs two forward passes, so training an image once is three units; MoCo v3 takes eight for an
image: two views, three units each, and one each for the momentum encoder. With k chunks the online backbone runs forward
2 - 1/k times.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossbatch.data.augment.parameters import ImageSize, height_width
from crossbatch.engine.bytes_moved import of_backbone
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.planning.catalogue import GPUS, Gpu, Machines
from crossbatch.engine.planning.communication import collective_ms, wait_ms
from crossbatch.engine.planning.traffic import Traffic, of_parts, step_traffic
from crossbatch.engine.sketch import kept_by_backbone, shapes_only, sketch, without_memory
from crossbatch.models import NUM_VIEWS
from crossbatch.models.backbones import RESNETS, build_backbone

TRAINING_UNITS = 3  # forward passes that a forward and a backward pass take
BACKWARD = 2 / 3  # of the computation
# Forward passes that `checkpoint_activations` repeats; of norms 33 of the 246 MB that a forward pass of an image moves.
REPEATED = {"none": 0.0, "norms": 0.13, "blocks": 1.0}


@dataclass(frozen=True)
class Constants:
    """Holds what was fitted to published runs, for PyTorch driven step by step."""

    fixed_ms: float  # of a step on a V100
    contention_ms: float  # of an image, for every further GPU of a node
    share: float  # of a rank's time that it is interrupted
    of_peak: float  # share of the peak FLOP/s that training reaches
    moves: float  # times that each byte kept for the backward pass is moved


# What `python -m benchmarks scaling backtest` finds (tests/benchmarks/test_scaling_model.py holds them together), and the
# largest errors that it makes on runs left out of the fit: on one GPU, and on many with synchronised norms.
FITTED = Constants(fixed_ms=7.99, contention_ms=0.00861, share=0.0386, of_peak=0.572, moves=17.94)
ERROR_ONE_GPU, ERROR_MANY_GPUS = 0.108, 0.214
_FITTED = "published runs, fitted (benchmarks scaling backtest)"
_LATENCY = "latency: NCCL's tuning.cc, launch assumed"

LIMITS = {
    "backbone": "the backbone",
    "heads": "BatchFormer, heads and loss",
    "fixed": "what a step takes however few its images",
    "contention": "the ranks of a node, which share its host",
    "norms": "the latency of the norms' collectives",
    "stragglers": "waiting for the slowest rank at every norm",
    "keys": "gathered keys",
    "gradients": "gradients on the network",
    "parameters": "parameters on the network",
    "data": "images from the loader",
}


@dataclass(frozen=True)
class Stage:
    """Holds the milliseconds of a part of a step, and where the number is from."""

    name: str
    ms: float
    origin: str


@dataclass(frozen=True)
class Estimate:
    """Holds a predicted step."""

    images: int
    stages: tuple[Stage, ...]
    traffic: Traffic

    @property
    def step_ms(self) -> float:
        return sum(stage.ms for stage in self.stages)

    @property
    def images_per_s(self) -> float:
        return 1000 * self.images / self.step_ms

    @property
    def limits(self) -> tuple[str, ...]:
        """Name the two stages that take most, in words."""
        most = sorted(self.stages, key=lambda stage: -stage.ms)[:2]
        return tuple(LIMITS[stage.name] for stage in most if stage.ms > 0.05 * self.step_ms)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Work:
    """Counts what training on one crop takes: operations of forward and backward, and bytes kept for the backward pass."""

    flops: float
    kept: float

    def seconds(self, gpu: Gpu, precision: str, of_peak: float, moves: float) -> tuple[float, str]:
        """Return the time at a share of the peak and so many moves of each byte kept, and which of the two limits it."""
        arithmetic = self.flops / (gpu.peak(precision) * of_peak)
        memory = self.kept * moves / (1e9 * gpu.bandwidth)
        return (arithmetic, "arithmetic") if arithmetic > memory else (memory, "memory bandwidth")


@functools.cache
def work_of(
    precision: str, arch: str, image_size: ImageSize, *options: Any, backbone_args: tuple = (), in_channels: int = 3
) -> Work:
    """Count what one crop through a backbone takes; arguments as of `build_backbone`, with the items of `backbone_args`."""
    more: dict[str, Any] = {"backbone_args": dict(backbone_args), "in_channels": in_channels}
    backbone = without_memory(lambda: build_backbone(arch, image_size, *options, **more))
    kept = kept_by_backbone(backbone, image_size, precision).per_image / NUM_VIEWS
    counter = FlopCounterMode(display=False)
    # The plain kernel of attention is the one whose products are counted on every device.
    with shapes_only(precision), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        backbone(torch.empty(2 * NUM_VIEWS, in_channels, *height_width(image_size)))
    return Work(float(TRAINING_UNITS * counter.get_total_flops() // (2 * NUM_VIEWS)), kept)


def crop_of(cfg: ResolvedConfig) -> Work:
    """Count what one crop through the backbone of a configuration takes."""
    model, data, args = cfg.crossbatch.model, cfg.crossbatch.data, tuple(cfg.crossbatch.model.backbone_args.items())
    options = model.arch, data.image_size, model.stem, model.stop_grad_conv1
    return work_of(cfg.precision, *options, backbone_args=args, in_channels=data.channels)


@functools.cache
def moved_share(precision: str, arch: str) -> float:
    """Return the bytes that our network moves over those of torchvision's; width and image size hardly change the ratio."""
    if arch not in RESNETS:
        return 1.0
    networks = (functools.partial(build_backbone, arch), functools.partial(torchvision.models.get_model, arch))
    ours, plain = (of_backbone(network, 224, precision).total for network in networks)
    return ours / plain


def fixed_ms_on(gpu: Gpu, on_v100_ms: float) -> float:
    """Scale what a step takes on a V100 by the bandwidth, because weights, gradients and velocities go with it."""
    return on_v100_ms * GPUS["v100-32g"].bandwidth / gpu.bandwidth


def estimate(
    cfg: ResolvedConfig,
    at: Machines,
    constants: Constants = FITTED,
    feed_per_s: float | None = None,
    backbone: Stage | None = None,
) -> Estimate:
    """Predict a step of `cfg`, resolved for the GPUs of `at`, with its chunk.

    Args:
        feed_per_s: images/s that the loaders deliver; None means enough.
        backbone: a measured stage that replaces the predicted stage "backbone"; None predicts it.
    """
    traffic = step_traffic(sketch(cfg).model, cfg)
    computed = _computed(cfg, at, constants)
    computed[0] = backbone or computed[0]
    compute_ms = sum(stage.ms for stage in computed)
    of_all = of_parts(traffic, "stats", "keys", "groups").total() + 1  # and once for the gradients
    norms = of_parts(traffic, "norms")
    waits, share_norms = norms.total() + of_all, at.part_of(cfg.norm_ranks)
    waiting_ms = wait_ms(share_norms.gpus, waits, compute_ms, constants.share, at.gpus // share_norms.gpus, of_all)
    links = [at.link] + [at.network] * (at.nodes > 1)
    counted = "counted; " + "; ".join(link.source.split(";")[0] for link in links)

    def each_ms(*parts: str, at: Machines = at) -> list[float]:
        return [collective_ms(message.kind, message.size, at) for message in of_parts(traffic, *parts).elements()]

    zero, is_fsdp = cfg.config.zero_optimization, cfg.crossbatch.sharding == "fsdp"
    # Gradients can hide behind the last chunk's backward pass; parameters, gathered for it, behind the forward pass.
    behind_ms = BACKWARD * compute_ms / cfg.chunks if zero.overlaps or is_fsdp else 0.0
    ahead_ms = (1 - BACKWARD) * compute_ms if zero.stage == 3 or is_fsdp else 0.0
    gradients_ms = _exposed_ms(each_ms("gradients"), behind_ms) + sum(each_ms("LARS"))
    stages = [
        *computed,
        Stage("norms", sum(each_ms("norms", at=share_norms)), f"{norms.total()} collectives, counted; {_LATENCY}"),
        Stage("stragglers", waiting_ms, f"{waits} synchronisations; {_FITTED}"),
        Stage("keys", sum(each_ms("stats", "keys", "groups")), counted),
        Stage("gradients", gradients_ms, counted),
        Stage("parameters", _exposed_ms(each_ms("parameters"), ahead_ms), counted),
    ]
    if feed_per_s is not None:
        needed = sum(stage.ms for stage in stages)
        stages.append(Stage("data", max(0.0, 1000 * cfg.config.train_batch_size / feed_per_s - needed), "given"))
    return Estimate(cfg.config.train_batch_size, tuple(stages), traffic)


def _computed(cfg: ResolvedConfig, at: Machines, constants: Constants) -> list[Stage]:
    model, crop = cfg.crossbatch.model, crop_of(cfg)
    repeated = (1 - 1 / cfg.chunks) + REPEATED[model.checkpoint_activations]
    units = TRAINING_UNITS + repeated + 1  # the last: momentum encoder
    crops = NUM_VIEWS * cfg.local_batch * units / TRAINING_UNITS
    moves = constants.moves * moved_share(cfg.precision, model.arch)
    crop_s, limit = crop.seconds(at.gpu, cfg.precision, constants.of_peak, moves)
    # The queries' side costs three forward passes, the keys' side one: about twice what both cost forward.
    heads_flops = 2 * sketch(cfg).heads_flops
    heads_ms = 1000 * heads_flops / (at.gpu.peak(cfg.precision) * constants.of_peak)
    contention_ms = constants.contention_ms * NUM_VIEWS * cfg.local_batch * (at.gpus_per_node - 1)
    tflop, reached = crops * crop.flops / 1e12, "efficiency: published runs, fitted"
    return [
        Stage("backbone", 1000 * crops * crop_s, f"counted {tflop:.1f} TFLOP, limited by {limit}; {reached}"),
        Stage("heads", heads_ms, f"counted {heads_flops / 1e12:.2f} TFLOP; {reached}"),
        Stage("fixed", fixed_ms_on(at.gpu, constants.fixed_ms) * cfg.chunks, _FITTED),
        Stage("contention", contention_ms, _FITTED),
    ]


def _exposed_ms(each_ms: list[float], beside_ms: float) -> float:
    """Return what does not fit beside `beside_ms` of computation: at least one call, the first or the last of a pass."""
    return max(min(each_ms, default=0.0), sum(each_ms) - beside_ms)
