"""Measures forward and backward of a recipe's online backbone on n images beside the same network of torchvision or timm.

It is the part of a step that the chunk size decides. Ours runs as in training: both views in one tensor, channels last, in the
precision that `precision: auto` gives. The baseline is called once a view in the same precision, images contiguous as a loader
yields them; then the same in channels last. A CPU gets small images. The last row is the time of our network's convolutions and
linear layers alone, one by one (benchmarks/limits.py). FLOPs are counted on ours; `mfu` is their rate in units of the card's
peak.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks import flops, limits
from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import plain_backbone
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import autocast

LIBRARY = {"bs4096": "torchvision's", "vits_bs4096": "timm's"}  # by recipe
ON_A_CPU = ["crossbatch.data.image_size=96"]
SMALL = {
    "bs4096": ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=64"],
    "vits_bs4096": ['crossbatch.model.backbone_args={"depth": 2}', "crossbatch.data.image_size=64"],
}


def run(effort: Effort) -> Iterator[Row]:
    """Yield the library's rows, ours and that of the layers alone for each recipe and number of images."""
    gpu = torch.cuda.is_available()
    for name, library in LIBRARY.items():
        overrides = SMALL[name] if effort is Effort.QUICK else [] if gpu else ON_A_CPU
        cfg = recipe.load(name, overrides)
        full = [8, 16, 32, 64, 128, 256] if gpu else [4, 16, 64]
        for images in effort.pick([4, 8], [64, 256] if gpu else [4, 16], full):
            calls = _cases(cfg, images)
            arch = f"{cfg.config.crossbatch.model.arch}, {images} images"
            facts = {"images": images, "chunk": images, "precision": cfg.precision}
            settings = recipe.settings(name, overrides, cfg, **facts)
            names = f"{library} {arch}", f"{library} {arch}, channels last", f"our {arch}"
            rows = compare(dict(zip(names, calls, strict=True)), settings, effort)
            alone_ms = limits.products(cfg, images).of_step(chunks=1, passes=1)
            baseline = rows[0]
            for row in rows:
                row.settings = row.settings | {"of_convolutions": alone_ms / row.p50}
            rows.append(Row.of_one(f"convolutions and linear layers of our {arch}", alone_ms, "ms", settings))
            rows[-1].baseline, rows[-1].ratio = baseline.case, baseline.p50 / alone_ms
            yield from flops.with_rates(rows, flops.count(calls[-1]), cfg.precision)


def _cases(cfg: ResolvedConfig, images: int) -> list[Callable[[], None]]:
    """Return forward and backward of the library's network, of the same in channels last, and of ours."""
    torch.manual_seed(0)
    size = height_width(cfg.config.crossbatch.data.image_size)
    with torch.device(cfg.device.type):
        ours, plain, tuned = build_model(cfg).online.backbone, plain_backbone(cfg.config), plain_backbone(cfg.config)
        views = torch.randn(2 * images, 3, *size)
    in_training = views.to(memory_format=torch.channels_last)
    tuned.to(memory_format=torch.channels_last)

    def backward(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        network.zero_grad()
        with autocast(cfg.device.type, autocast_dtype(cfg.precision)):
            features = torch.cat([network(x) for x in inputs])
        features.float().sum().backward()

    return [
        lambda: backward(plain, views.chunk(2)),
        lambda: backward(tuned, in_training.chunk(2)),
        lambda: backward(ours, (in_training,)),
    ]
