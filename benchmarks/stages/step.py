"""Measures a training step of bs4096.json, in one piece and in chunks, beside a plain one (plain_step.py).

Time: the same images in 1 and in 8 chunks, and with checkpointed activations. A step of more than one chunk runs the online
backbone forward twice: 9.75 units of compute for 8 chunks (a backward pass counts two) where one chunk has 8. On a GPU the
recipe with the 256 images that a rank has of 16, or as many as fit; on a CPU its ResNet-50 with 64 images (half an hour, 16 GB)
and a small ViT.

Parts: the spans of the real step (crossbatch.engine.runtime.timing), in steps of their own after the others; "other" is what
the spans leave out.

Memory, which chunks save: a process of its own for each case. On a CPU what the first step adds to resident memory, at B, 2B
and 4B images; on a GPU the peak of the allocator with model and optimizer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import flops
from benchmarks.measure import clocks, compare, compare_peaks, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import PlainStep
from crossbatch.engine.config import Device, ResolvedConfig
from crossbatch.engine.runtime.timing import WHOLE, StepTimer
from crossbatch.engine.step import TrainStep

SMALL = "ResNet-18 of width 16, 32 px"
NETWORKS = {
    "ResNet-50, 224 px": [],
    "ViT-S, 224 px": ["crossbatch.model.arch=vit_small"],
    "ResNet-50, 96 px": ["crossbatch.data.image_size=96"],
    "ViT-S of 4 blocks, 32 px": [
        "crossbatch.model.arch=vit_small",
        'crossbatch.model.backbone_args={"patch_size": 8, "depth": 4}',
        "crossbatch.data.image_size=32",
    ],
    "ResNet-18, 64 px": ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=64"],
    SMALL: [
        "crossbatch.model.arch=resnet18",
        "crossbatch.model.stem=small",
        'crossbatch.model.backbone_args={"width": 16}',
        "crossbatch.data.image_size=32",
    ],
}


class Setup(NamedTuple):
    """Names what one measured step is of; `network` is one of NETWORKS."""

    network: str
    images: int
    chunk: int
    checkpointed: bool = False

    def config(self) -> ResolvedConfig:
        """Return bs4096.json with this network and these sizes."""
        overrides = [
            *NETWORKS[self.network],
            f"train_batch_size={self.images}",
            f"train_micro_batch_size_per_gpu={self.chunk}",
            f"crossbatch.batchformer.group_size={min(self.images, 256)}",
            f"crossbatch.model.checkpoint_activations={str(self.checkpointed).lower()}",
        ]
        return recipe.load("bs4096", overrides)

    def settings(self) -> dict[str, Any]:
        """Return the settings of its row."""
        cfg = self.config()
        sizes = {"backbone": self.network, "images": self.images, "chunk": self.chunk, "precision": cfg.precision}
        return recipe.settings("bs4096", NETWORKS[self.network], cfg, **sizes)


def run(effort: Effort) -> Iterator[Row]:
    """Yield the memory of steps, their times, and the times of their parts."""
    timed, weighed = _sizes(effort)
    for network, images, chunk in weighed:  # first, because this process keeps what it has freed
        yield from _memory(network, images, chunk)
    with recipe.one_rank() as device:  # once for all: DeepSpeed remembers the groups of the first
        for network, images in timed.items():
            yield from _time(network, images, effort, device)


def _sizes(effort: Effort) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """Return the images of timed steps by network, and (network, images, images of a chunk) of weighed ones."""
    quick = {"ResNet-18, 64 px": 16}
    if Device.detect().type == "cuda":
        # One chunk of a ResNet-50 keeps 83.5 MiB of an image, and four models lie beside it.
        fitting = [images for images in (256, 128, 64) if images * 2**27 <= torch.cuda.mem_get_info()[0]]
        images = max(fitting, default=32)
        timed = {"ResNet-50, 224 px": images, "ViT-S, 224 px": images}
        return effort.pick(quick, timed, timed), [("ResNet-50, 224 px", images, 32)]
    brief = {"ResNet-50, 96 px": 64, "ViT-S of 4 blocks, 32 px": 256}
    timed = effort.pick(quick, brief, {"ResNet-50, 224 px": 64, "ViT-S of 4 blocks, 32 px": 256})
    weighed = [(SMALL, images, 64) for images in effort.pick([256], [256, 1024], [256, 512, 1024])]
    return timed, weighed + [("ResNet-50, 224 px", images, 8) for images in effort.pick([], [], [16, 32, 64])]


def _time(network: str, images: int, effort: Effort, device: torch.device) -> Iterator[Row]:
    whole, chunked = f"{network}, 1 chunk", f"{network}, 8 chunks"
    setups = {
        f"{network}, plain torch": Setup(network, images, images),
        whole: Setup(network, images, images),
        chunked: Setup(network, images, images // 8),
        f"{whole}, activations checkpointed": Setup(network, images, images, checkpointed=True),
    }
    baseline, cfg = next(iter(setups)), setups[whole].config()
    views = _views(cfg)
    steps = {case: _step(setup.config(), device) for case, setup in setups.items() if case != baseline}
    cases = {baseline: partial(PlainStep(cfg, device), views)} | {case: partial(steps[case], views) for case in steps}
    counted = flops.count(cases[whole])
    for row in flops.with_rates(compare(cases, {}, effort), counted, cfg.precision):
        row.settings |= setups[row.case].settings()
        yield row
    cases.clear()  # the parts need the memory of the plain step
    timers = {case: StepTimer(device) for case in (whole, chunked)}
    for case, timer in timers.items():
        steps[case].use_timer(timer)
    for _ in range(1 + effort.pick(3, 5, 20 if device.type == "cuda" else 5)):
        for case in timers:  # in turns, as above
            steps[case](views)
    for case, timer in timers.items():
        yield from _parts(case, timer.read()[1:], setups[case].settings())


def _parts(case: str, steps: list[dict[str, float]], settings: dict) -> Iterator[Row]:
    """Yield a row for each part; `share` is its part of the sum over the same steps, so all shares add up to one."""
    total, now = sum(taken[WHOLE] for taken in steps), clocks()
    for part in steps[0]:
        values = [taken[part] for taken in steps]
        facts = {**settings, "part": part, "of": case, "share": sum(values) / total}
        yield Row.of_samples(f"{case}: {part}", values, settings=facts, clocks=now)


def _memory(network: str, images: int, chunk: int) -> Iterator[Row]:
    setups = {
        f"{network}, memory, {images} images, 1 chunk": Setup(network, images, images),
        f"{network}, memory, {images} images, chunks of {chunk}": Setup(network, images, chunk),
    }
    for row in compare_peaks({case: partial(_peak, setup) for case, setup in setups.items()}, {}):
        row.settings = setups[row.case].settings()
        yield row


def _peak(setup: Setup) -> float:
    cfg = setup.config()
    with recipe.one_rank() as device:
        step, views = _step(cfg, device), _views(cfg)
        if device.type == "cpu":
            return peak_mib(lambda: step(views))
        for _ in range(2):
            step(views)
        return torch.cuda.max_memory_allocated() / 2**20


def _views(cfg: ResolvedConfig) -> torch.Tensor:
    """Return uint8 views [2, n, 3, H, W] as the loader hands them over."""
    size = cfg.config.crossbatch.data.image_size
    views = torch.randint(0, 256, (2, cfg.local_batch, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    return views.pin_memory() if cfg.device.type == "cuda" else views


def _step(cfg: ResolvedConfig, device: torch.device) -> TrainStep:
    return TrainStep(recipe.build(cfg, device), cfg, device, steps_per_epoch=1000, chunk=cfg.chunk)
