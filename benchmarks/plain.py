"""What people use otherwise: torchvision's ImageFolder, transforms on PIL images, and DataLoader, with MoCo v3's recipe;
torchvision's and timm's backbones. The whole step is in plain_step.py; the optimizer's loop and the like stand in their stages.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD
from crossbatch.engine.config import Config
from crossbatch.models.backbones import LAYOUTS

SIZES = (468, 401)  # of a generated picture: the mean of ImageNet's


class Blur:
    """Of a random strength, as PIL does it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def two_transforms(size: int) -> tuple[T.Compose, T.Compose]:
    """PIL image -> normalised fp32 [3, size, size], for view 1 and for view 2."""

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
    """Both views of an image."""

    def __init__(self, size: int):
        self.views = two_transforms(size)

    def __call__(self, image: Any) -> list[Any]:
        return [view(image) for view in self.views]


def plain_loader(root: Path, size: int, batch: int, workers: int) -> DataLoader:
    """Batches [view 1, view 2], each fp32 [batch, 3, size, size]; an epoch is 100 of the folder's, so that its end is far."""
    return DataLoader(
        ConcatDataset([ImageFolder(str(root / "train"), TwoViews(size))] * 100),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def write_jpegs(root: Path, count: int) -> None:
    """`count` pictures of ImageNet's mean size and file size (about 110 kB) into root/train/pictures."""
    folder = root / "train" / "pictures"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(SIZES, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = pixels + random.normal(0, 12, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)


def plain_backbone(config: Config) -> Any:
    """torchvision's or timm's network of the sizes of `config`, [n, 3, H, W] -> [n, num_features], an attribute of it.

    torchvision's ResNets have one width (and one stem), so `backbone_args` and `stem` must be left alone there.
    """
    model, size = config.crossbatch.model, config.crossbatch.data.image_size
    if model.arch in LAYOUTS:
        layout = replace(LAYOUTS[model.arch], **model.backbone_args)
        sizes = {name: value for name, value in vars(layout).items() if name != "conv_stem"}
        transformer: Any = timm.models.VisionTransformer(img_size=size, num_classes=0, global_pool="token", **sizes)
        transformer.pos_embed.requires_grad_(False)
        transformer.patch_embed.requires_grad_(not model.stop_grad_conv1)
        return transformer
    assert not model.backbone_args and model.stem == "imagenet", model
    network: Any = torchvision.models.get_model(model.arch)
    network.num_features, network.fc = network.fc.in_features, nn.Identity()
    return network
