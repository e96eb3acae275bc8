"""Builds the baseline of the data stages: torchvision's ImageFolder, transforms and DataLoader.

The transforms are MoCo v3's augmentations, on PIL images. `write_jpegs` makes the pictures where no folder is given.
"""

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


class Blur:
    """Blurs a PIL image with a random strength."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def two_transforms(size: int) -> tuple[T.Compose, T.Compose]:
    """Return the transforms of view 1 and of view 2, PIL image -> normalised fp32 [3, size, size]."""

    def view(blur: float, solarize: float) -> T.Compose:
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.08, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([Blur()], p=blur),
                T.RandomSolarize(128, p=solarize),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return view(1.0, 0.0), view(0.1, 0.2)


class TwoViews:
    """Turns an image into its two views."""

    def __init__(self, size: int):
        self.views = two_transforms(size)

    def __call__(self, image: Any) -> list[Any]:
        return [view(image) for view in self.views]


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


def write_jpegs(root: Path, count: int) -> None:
    """Write `count` pictures of ImageNet's mean size and file size (about 110 kB) into root/train/pictures."""
    folder = root / "train" / "pictures"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(SIZES, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = pixels + random.normal(0, 12, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)
