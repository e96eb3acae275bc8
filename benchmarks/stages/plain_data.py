"""Builds the baseline of the data stages: torchvision's ImageFolder, transforms and DataLoader.

The transforms are MoCo v3's augmentations, on PIL images.
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD

SIZES = (468, 401)  # of a generated picture: the mean of ImageNet's


class TwoViews:
    """Turns a PIL image into its two views, each normalised fp32 [3, size, size]."""

    def __init__(self, size: int, crop_min: float = 0.08, blur: tuple[float, float] = (1.0, 0.1)):
        self.views = _transform(size, crop_min, blur[0], 0.0), _transform(size, crop_min, blur[1], 0.2)

    def __call__(self, image: Any) -> list[Any]:
        return [view(image) for view in self.views]


def _transform(size: int, crop_min: float, blur: float, solarize: float) -> T.Compose:
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(crop_min, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([_blur], p=blur),
            T.RandomSolarize(128, p=solarize),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def plain_loader(root: Path, size: int, batch: int, workers: int) -> DataLoader:
    """Load batches [view 1, view 2], each fp32 [batch, 3, size, size]; an epoch repeats the folder 100 times."""
    return DataLoader(
        ConcatDataset([ImageFolder(str(root / "train"), TwoViews(size))] * 100),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def spdl_loader(root: Path, size: int, batch: int, workers: int) -> Iterator[list[torch.Tensor]]:
    """Yield batches as `plain_loader` does, endlessly, from threads of SPDL. Raises ModuleNotFoundError without SPDL."""
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]

    images = ImageFolder(str(root / "train"), TwoViews(size))

    def collated(items: list[tuple[list[torch.Tensor], int]]) -> list[torch.Tensor]:
        return [torch.stack(view) for view in zip(*(views for views, _ in items), strict=True)]

    order = (int(index) for _ in itertools.count() for index in torch.randperm(len(images)))
    builder = PipelineBuilder().add_source(order).pipe(images.__getitem__, concurrency=workers)
    pipeline = builder.aggregate(batch).pipe(collated).add_sink(2).build(num_threads=workers)
    with pipeline.auto_stop():
        yield from pipeline


@contextmanager
def image_folder(given: Path | None, count: int, size: tuple[int, int] = SIZES) -> Iterator[Path]:
    """Yield the folder `given` or, if it is None, a temporary folder with `count` generated pictures in train/.

    These have the mean size of ImageNet's, unless `size` (width, height) is given, and their mean file size (about 110 kB).
    """
    if given is not None:
        yield given
        return
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "train" / "pictures"
        folder.mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (12, 14, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = (pixels + random.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{number:04}.jpg", quality=90)
        yield Path(root)
