"""Forward and backward of a recipe's online backbone on both views of n images: the part of a step that the chunk size decides.

Ours as in training: the views in one tensor, channels last, in the precision that `precision: auto` gives. The baseline is the
same network of torchvision or timm, called once a view in the same precision, images contiguous as a loader yields them.
On a CPU with small images. FLOPs are counted on ours; `mfu` is their rate in units of the card's peak.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import flops, recipe
from benchmarks.harness import Effort, Row, compare
from benchmarks.plain import plain_backbone
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
    gpu = torch.cuda.is_available()
    full = [8, 16, 32, 64, 128, 256] if gpu else [4, 16, 64]
    for name in LIBRARY:
        overrides = SMALL[name] if effort is Effort.QUICK else [] if gpu else ON_A_CPU
        run = recipe.load(name, overrides)
        for images in effort.pick([4, 8], [32, 128, 256] if gpu else [4, 16], full):
            yield from _sizes(name, overrides, run, images, effort.pick(0.3, 1, 5))


def _sizes(name: str, overrides: list[str], run: ResolvedConfig, images: int, seconds: float) -> list[Row]:
    model, size = run.config.crossbatch.model, run.config.crossbatch.data.image_size
    torch.manual_seed(0)
    with torch.device(run.device.type):
        ours, plain = build_model(run).online.backbone, plain_backbone(run.config)
        views = torch.randn(2 * images, 3, size, size)
    in_training, halves = views.to(memory_format=torch.channels_last), views.chunk(2)
    case, baseline = (f"{whose} {model.arch}, {images} images" for whose in ("our", LIBRARY[name]))
    cases: dict[str, Callable[[], object]] = {
        case: lambda: _backward(ours, run, lambda: ours(in_training)),
        baseline: lambda: _backward(plain, run, lambda: torch.cat([plain(view) for view in halves])),
    }
    settings = recipe.settings(name, overrides, run, images=images, chunk=images, precision=run.precision)
    counted = flops.count(cases[case])
    return flops.with_rates(compare(cases, baseline, settings, seconds, 2, 3), counted, run.precision)


def _backward(model: nn.Module, run: ResolvedConfig, forward: Callable[[], torch.Tensor]) -> None:
    model.zero_grad()
    with autocast(run.device.type, autocast_dtype(run.precision)):
        features = forward()
    features.float().sum().backward()
