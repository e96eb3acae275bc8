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

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import flops
from benchmarks.measure import clocks, compare, in_new_process, over, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import PlainStep
from crossbatch.engine.config import Device, ResolvedConfig
from crossbatch.engine.runtime.distributed import process_group, world_from_environment
from crossbatch.engine.runtime.timing import WHOLE, StepTimer
from crossbatch.engine.step import TrainStep

BACKBONES = {
    "ResNet-50, 224 px": [],
    "ViT-S, 224 px": ["crossbatch.model.arch=vit_small"],
    "ResNet-50, 96 px": ["crossbatch.data.image_size=96"],
    "ViT-S of 4 blocks, 32 px": [
        "crossbatch.model.arch=vit_small",
        'crossbatch.model.backbone_args={"patch_size": 8, "depth": 4}',
        "crossbatch.data.image_size=32",
    ],
    "ResNet-18, 64 px": ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=64"],
    "ResNet-18 of width 16, 32 px": [
        "crossbatch.model.arch=resnet18",
        "crossbatch.model.stem=small",
        'crossbatch.model.backbone_args={"width": 16}',
        "crossbatch.data.image_size=32",
    ],
}
TIMED_ON_GPU = ("ResNet-50, 224 px", "ViT-S, 224 px")
WEIGHED_ON_GPU = ("ResNet-50, 224 px",)
# Images of a step.
TIMED_ON_CPU = {"ResNet-50, 224 px": 64, "ViT-S of 4 blocks, 32 px": 256}
TIMED_BRIEFLY = {"ResNet-50, 96 px": 64, "ViT-S of 4 blocks, 32 px": 256}  # on a CPU
TIMED_QUICKLY = {"ResNet-18, 64 px": 16}
# Images of steps, and of a chunk.
WEIGHED_ON_CPU = {"ResNet-50, 224 px": ([16, 32, 64], 8), "ResNet-18 of width 16, 32 px": ([256, 512, 1024], 64)}
WEIGHED_BRIEFLY = {"ResNet-18 of width 16, 32 px": ([256, 1024], 64)}  # on a CPU
WEIGHED_QUICKLY = {"ResNet-18 of width 16, 32 px": ([256], 32)}


def run(effort: Effort) -> Iterator[Row]:
    """Yield the memory of steps, their times, and the times of their parts."""
    device_type = Device.detect().type
    if device_type == "cuda":
        images = _images_that_fit()
        on_gpu = dict.fromkeys(TIMED_ON_GPU, images)
        timed = effort.pick(TIMED_QUICKLY, on_gpu, on_gpu)
        weighed = dict.fromkeys(WEIGHED_ON_GPU, ([images], 32))
    else:
        timed = effort.pick(TIMED_QUICKLY, TIMED_BRIEFLY, TIMED_ON_CPU)
        weighed = effort.pick(WEIGHED_QUICKLY, WEIGHED_BRIEFLY, WEIGHED_ON_CPU)
    # First, because this process keeps what it has freed.
    for backbone, (sizes, chunk) in weighed.items():
        for images in sizes:
            yield from _memory(backbone, images, chunk)
    # Once for all: DeepSpeed remembers the groups of the first.
    with process_group(world_from_environment(), device_type, threads=torch.get_num_threads()) as device:
        for backbone, batch in timed.items():
            yield from _time(backbone, batch, effort, device)


def _images_that_fit() -> int:
    """Return 256, or less on a small GPU.

    One chunk of a ResNet-50 keeps 83.5 MiB of an image, and four models lie beside it.
    """
    images = 256
    while images > 32 and images * 2**27 > torch.cuda.mem_get_info()[0]:
        images //= 2
    return images


def _time(backbone: str, batch: int, effort: Effort, device: torch.device) -> Iterator[Row]:
    configs = {
        f"{backbone}, 1 chunk": _config(backbone, batch, batch, False),
        f"{backbone}, 8 chunks": _config(backbone, batch, batch // 8, False),
        f"{backbone}, 1 chunk, activations checkpointed": _config(backbone, batch, batch, True),
    }
    whole, chunked, _ = configs
    views = _views(configs[whole])
    steps = {name: _step(config, device) for name, config in configs.items()}
    baseline = f"{backbone}, plain torch"
    cases: dict[str, Callable[[], object]] = {baseline: partial(PlainStep(configs[whole], device), views)}
    cases |= {name: partial(step, views) for name, step in steps.items()}
    counted = flops.count(cases[whole])
    rounds = effort.pick(2, 3, 5)
    rows = compare(cases, baseline, {}, effort.pick(1, 6, 20), 2, rounds)
    for row in flops.with_rates(rows, counted, configs[whole].precision):
        row.settings |= _settings(backbone, configs.get(row.case, configs[whole]))
        yield row
    cases.clear()  # the parts need the memory of the plain step
    timers = {name: StepTimer(device) for name in (whole, chunked)}
    for name, timer in timers.items():
        steps[name].use_timer(timer)
    for number in range(1 + effort.pick(3, 5, 20 if device.type == "cuda" else 5)):
        for name, timer in timers.items():  # in turns, as above
            steps[name](views)
            if number == 0:
                timer.read()
    for name, timer in timers.items():
        yield from _parts(name, timer.read(), _settings(backbone, configs[name]))


def _parts(name: str, steps: list[dict[str, float]], settings: dict) -> list[Row]:
    """Return a row for each part; `share` is its part of the sum over the same steps, so all shares add up to one."""
    total, now = sum(taken[WHOLE] for taken in steps), clocks()
    rows = []
    for part in steps[0]:
        values = [taken[part] for taken in steps]
        facts = {**settings, "part": part, "of": name, "share": sum(values) / total}
        rows.append(Row.of_samples(f"{name}: {part}", values, settings=facts, clocks=now))
    return rows


def _memory(backbone: str, images: int, chunk: int) -> Iterator[Row]:
    names = {f"{backbone}, memory, {images} images, chunks of {chunk}": chunk}
    names[f"{backbone}, memory, {images} images, 1 chunk"] = images
    peaks = {name: in_new_process(_peak, backbone, images, c) for name, c in names.items()}
    settings = _settings(backbone, _config(backbone, images, images, False))
    for row in over(peaks, list(names)[1], "MiB", settings):
        row.settings = _settings(backbone, _config(backbone, images, names[row.case], False))
        yield row


def _peak(backbone: str, batch: int, chunk: int) -> float:
    with process_group(world_from_environment(), Device.detect().type) as device:
        step = _step(_config(backbone, batch, chunk, False), device)
        views = _views(step.cfg)
        if device.type == "cpu":
            return peak_mib(lambda: step(views))
        for _ in range(2):
            step(views)
        return torch.cuda.max_memory_allocated() / 2**20


def _config(backbone: str, batch: int, chunk: int, checkpointed: bool) -> ResolvedConfig:
    overrides = [
        *BACKBONES[backbone],
        f"train_batch_size={batch}",
        f"train_micro_batch_size_per_gpu={chunk}",
        f"crossbatch.batchformer.group_size={min(batch, 256)}",
        f"crossbatch.model.checkpoint_activations={str(checkpointed).lower()}",
    ]
    return recipe.load("bs4096", overrides)


def _settings(backbone: str, cfg: ResolvedConfig) -> dict:
    sizes = {"images": cfg.local_batch, "chunk": cfg.chunk, "precision": cfg.precision}
    return recipe.settings("bs4096", BACKBONES[backbone], cfg, backbone=backbone, **sizes)


def _views(cfg: ResolvedConfig) -> torch.Tensor:
    """Return uint8 views [2, n, 3, H, W] as the loader hands them over."""
    size = cfg.config.crossbatch.data.image_size
    views = torch.randint(0, 256, (2, cfg.local_batch, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    return views.pin_memory() if cfg.device.type == "cuda" else views


def _step(cfg: ResolvedConfig, device: torch.device) -> TrainStep:
    return TrainStep(recipe.build(cfg, device), cfg, device, steps_per_epoch=1000, chunk=cfg.chunk)
