"""One training step of bs4096.json with a small backbone: what chunks cost, and what memory they save.

Time: the same images in 1 and in 8 chunks, and with checkpointed activations; the cases take turns. A step of more than one
chunk runs the online backbone forward twice: 10 units of compute (a backward pass counts two) where one chunk has 8.

Memory: the peak of a process of its own at B, 2B and 4B images, the chunk staying the same. On a CPU that is the resident
memory of the process less what it has before the first step; on a GPU the peak of the allocator.
"""

import sys
from collections.abc import Callable

import torch

from benchmarks.harness import Row, compare, peak_mib, peak_mib_alone
from crossbatch.engine.build import build_model
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve
from crossbatch.engine.distributed import GroupCollective, process_group, world_from_environment
from crossbatch.engine.sharding import build_backend
from crossbatch.engine.step import TrainStep

BACKBONES = {
    "ResNet-50, 96 px": ["crossbatch.data.image_size=96"],
    "ViT-S of 4 blocks, 32 px": [
        "crossbatch.model.arch=vit_small",
        'crossbatch.model.backbone_args={"patch_size": 8, "depth": 4}',
        "crossbatch.data.image_size=32",
    ],
    "ResNet-18 of width 16, 32 px": [
        "crossbatch.model.arch=resnet18",
        "crossbatch.model.stem=small",
        'crossbatch.model.backbone_args={"width": 16}',
        "crossbatch.data.image_size=32",
    ],
}
TIMED = {"ResNet-50, 96 px": 64, "ViT-S of 4 blocks, 32 px": 256}  # images of a step
WEIGHED = "ResNet-18 of width 16, 32 px"


def run(quick: bool) -> list[Row]:
    rows = []
    # Once for all: DeepSpeed remembers the groups of the first.
    with process_group(world_from_environment(), Device.detect().type, threads=torch.get_num_threads()) as device:
        for backbone, batch in TIMED.items():
            rows += _time(backbone, batch // 4 if quick else batch, quick, device)
    return rows + _memory(WEIGHED, 64 if quick else 256, 16 if quick else 64)


def _time(backbone: str, batch: int, quick: bool, device: torch.device) -> list[Row]:
    views = _views(_config(backbone, batch, batch, False))
    cases: dict[str, Callable[[], object]] = {}
    for name, chunks, checkpointed in (
        ("1 chunk", 1, False),
        ("8 chunks", 8, False),
        ("1 chunk, activations checkpointed", 1, True),
    ):
        step = _step(_config(backbone, batch, batch // chunks, checkpointed), device)
        cases[f"{backbone}, {name}"] = lambda step=step: step(views)
    settings = {"recipe": "bs4096", "overrides": BACKBONES[backbone], "batch": batch}
    return compare(cases, f"{backbone}, 1 chunk", settings, 1 if quick else 20, warmup=1, rounds=1 if quick else 3)


def _memory(backbone: str, batch: int, chunk: int) -> list[Row]:
    rows = []
    for factor, chunked in ((1, chunk), (2, chunk), (4, chunk), (4, None)):
        images = factor * batch
        mib = peak_mib_alone("benchmarks.step", backbone, str(images), str(chunked or images))
        case = f"{backbone}, memory, {images} images, " + (f"chunks of {chunked}" if chunked else "1 chunk")
        rows.append(Row(case, mib, mib, mib, 1, "MiB", settings={"overrides": BACKBONES[backbone], "batch": images}))
    return rows


def _peak(backbone: str, batch: int, chunk: int) -> float:
    """MiB that one step of this process adds."""
    with process_group(world_from_environment(), Device.detect().type) as device:
        step = _step(_config(backbone, batch, chunk, False), device)
        views = _views(step.run)
        return peak_mib(lambda: step(views))


def _config(backbone: str, batch: int, chunk: int, checkpointed: bool) -> ResolvedConfig:
    overrides = [
        *BACKBONES[backbone],
        f"train_batch_size={batch}",
        f"train_micro_batch_size_per_gpu={chunk}",
        f"crossbatch.batchformer.group_size={min(batch, 256)}",
        f"crossbatch.model.checkpoint_activations={str(checkpointed).lower()}",
    ]
    return resolve(load_config("ds_configs/bs4096.json", overrides), 1, Device.detect())


def _views(config: ResolvedConfig) -> torch.Tensor:
    size = config.config.crossbatch.data.image_size
    return torch.randint(0, 256, (2, config.local_batch, 3, size, size), dtype=torch.uint8)


def _step(config: ResolvedConfig, device: torch.device) -> TrainStep:
    torch.manual_seed(0)
    model = build_model(config).to(device)
    model.set_collective(GroupCollective())
    return TrainStep(build_backend(model, config), config, device, steps_per_epoch=1000, chunk=config.chunk)


if __name__ == "__main__":
    print(_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
