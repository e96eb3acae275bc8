"""Measures forward and backward of a recipe's online backbone on n images beside the same network of torchvision or timm.

It is the part of a step that the chunk size decides. Ours runs as in training: both views in one tensor, channels last, in the
precision that `precision: auto` gives. The baseline is called once a view in the same precision, images contiguous as a loader
yields them. A CPU gets small images. FLOPs are counted on ours; `mfu` is their rate in units of the card's peak.
"""

from collections.abc import Callable, Iterator

import torch

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
    """Yield two rows, the library's and ours, for each recipe and number of images."""
    gpu = torch.cuda.is_available()
    for name, library in LIBRARY.items():
        overrides = SMALL[name] if effort is Effort.QUICK else [] if gpu else ON_A_CPU
        cfg = recipe.load(name, overrides)
        full = [8, 16, 32, 64, 128, 256] if gpu else [4, 16, 64]
        for images in effort.pick([4, 8], [32, 128, 256] if gpu else [4, 16], full):
            plain, ours = _cases(cfg, images)
            arch = f"{cfg.config.crossbatch.model.arch}, {images} images"
            facts = {"images": images, "chunk": images, "precision": cfg.precision}
            settings = recipe.settings(name, overrides, cfg, **facts)
            rows = compare({f"{library} {arch}": plain, f"our {arch}": ours}, settings, effort)
            yield from flops.with_rates(rows, flops.count(ours), cfg.precision)


def _cases(cfg: ResolvedConfig, images: int) -> list[Callable[[], None]]:
    """Return forward and backward of the library's network, then of ours."""
    torch.manual_seed(0)
    size = cfg.config.crossbatch.data.image_size
    with torch.device(cfg.device.type):
        ours, plain = build_model(cfg).online.backbone, plain_backbone(cfg.config)
        views = torch.randn(2 * images, 3, size, size)
    in_training = views.to(memory_format=torch.channels_last)

    def backward(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        network.zero_grad()
        with autocast(cfg.device.type, autocast_dtype(cfg.precision)):
            features = torch.cat([network(x) for x in inputs])
        features.float().sum().backward()

    return [lambda: backward(plain, views.chunk(2)), lambda: backward(ours, (in_training,))]
