"""Measures forward and backward of a recipe's online backbone on n images beside the same network of torchvision or timm.

It is the part of a step that the chunk size decides. Ours runs as in training: both views in one tensor, channels last, in the
precision that `precision: auto` gives. The baseline is called once a view in the same precision, images contiguous as a loader
yields them. A CPU gets small images. FLOPs are counted on ours; `mfu` is their rate in units of the card's peak.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import flops
from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import plain_backbone
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
    """Yield two rows, ours and the library's, for each recipe and number of images."""
    gpu = torch.cuda.is_available()
    full = [8, 16, 32, 64, 128, 256] if gpu else [4, 16, 64]
    for name in LIBRARY:
        overrides = SMALL[name] if effort is Effort.QUICK else [] if gpu else ON_A_CPU
        cfg = recipe.load(name, overrides)
        for images in effort.pick([4, 8], [32, 128, 256] if gpu else [4, 16], full):
            yield from _sizes(name, overrides, cfg, images, effort.pick(0.3, 1, 5))


def _sizes(name: str, overrides: list[str], cfg: ResolvedConfig, images: int, seconds: float) -> list[Row]:
    model, size = cfg.config.crossbatch.model, cfg.config.crossbatch.data.image_size
    torch.manual_seed(0)
    with torch.device(cfg.device.type):
        ours, plain = build_model(cfg).online.backbone, plain_backbone(cfg.config)
        views = torch.randn(2 * images, 3, size, size)
    in_training, halves = views.to(memory_format=torch.channels_last), views.chunk(2)
    case, baseline = (f"{whose} {model.arch}, {images} images" for whose in ("our", LIBRARY[name]))
    cases: dict[str, Callable[[], object]] = {
        case: lambda: _backward(ours, cfg, lambda: ours(in_training)),
        baseline: lambda: _backward(plain, cfg, lambda: torch.cat([plain(view) for view in halves])),
    }
    settings = recipe.settings(name, overrides, cfg, images=images, chunk=images, precision=cfg.precision)
    counted = flops.count(cases[case])
    return flops.with_rates(compare(cases, baseline, settings, seconds, 2, 3), counted, cfg.precision)


def _backward(model: nn.Module, cfg: ResolvedConfig, forward: Callable[[], torch.Tensor]) -> None:
    model.zero_grad()
    with autocast(cfg.device.type, autocast_dtype(cfg.precision)):
        features = forward()
    features.float().sum().backward()
