"""Draws the augmentation parameters of views, and holds the distributions of MoCo v3's two views.

The parameters of a view are a pure function of (seed, epoch, index, view), by counter-based random numbers; nothing may draw
outside of `draw_parameters`. Three promises follow:

- any world size, number of workers and size of worker batches gives the same pixels;
- a run that resumes in mid-epoch sees what it would have seen, without any random state in the checkpoint;
- backends only *apply* parameters, so that they can be compared image by image in a test.

Everything is vectorised over the batch (n images): for 64 images the parameters of a view take about 0.3 ms, 1 % of applying
them at 32 px.

The distributions are torchvision's (RandomResizedCrop, RandomApply([ColorJitter]), RandomGrayscale, ...) with MoCo v3's
values; order of application: crop, jitter, grayscale, blur, solarize, flip, normalise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from crossbatch.data import counter

ImageSize: TypeAlias = int | tuple[int, int]  # of views, in pixels: their side, or (height, width)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Channels(NamedTuple):
    """Says which channels images have, by the mean and standard deviation of each, for values from 0 to 1."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


RGB = Channels()


def channels_of(
    channels: int = 3, mean: Sequence[float] | str = "auto", std: Sequence[float] | str = "auto"
) -> Channels:
    """Return `channels` channels with this mean and std; "auto" is ImageNet's, or for other than 3 channels its average.

    Raises ValueError if there are not as many means and deviations as channels.
    """
    found = []
    for name, given, colours in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        values = (colours if channels == 3 else (sum(colours) / 3,) * channels) if isinstance(given, str) else (*given,)
        if len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} numbers, but images have {channels} channels; give one for each"
            )
        found.append(values)
    return Channels(*found)


# Rows of the table of uniforms, one row per decision. Append; renumbering changes every run.
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(12)
_JITTER_ORDER = slice(12, 16)
_TRIES = 10  # RandomResizedCrop gives up after ten
_CROP_AREA = slice(16, 16 + _TRIES)
_CROP_RATIO = slice(26, 26 + _TRIES)
_DRAWS = counter.AUGMENTATION_DRAWS + np.arange(36)[:, None]


def height_width(image_size: ImageSize) -> tuple[int, int]:
    """Return the height and width of views in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


@dataclass(frozen=True)
class ViewAugmentation:
    """Defines the distribution of one view's augmentation. The defaults are what MoCo v3's two views share."""

    image_size: ImageSize
    crop_scale: tuple[float, float]  # (min, max) area of the crop / area of the image
    blur_probability: float
    solarize_probability: float
    # (min, max) width / height of the crop, log-uniform, as a multiple of that of the view: a wide view gets wide crops
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view, at any image_size
    solarize_threshold: int = 128  # pixel values from here on are inverted
    flip_probability: float = 0.5
    interpolation: str = "bilinear"  # of the resized crop; or "bicubic"
    channels: int = 3  # of images; with another number than 3, hue, saturation and grayscale change nothing
    auto_augment: str | None = None  # timm's automatic augmentation after the flip, such as "rand-m9-mstd0.5-inc1"

    @property
    def needs_pil(self) -> bool:
        """Return whether DALI cannot apply this augmentation: bicubic resizing, auto_augment, or other than 3 channels."""
        return self.interpolation != "bilinear" or self.auto_augment is not None or self.channels != 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return height, width and channels of a view."""
        return *height_width(self.image_size), self.channels


def check_auto_augment(policy: str) -> None:
    """Raise ValueError unless timm can read `policy`, the name of an automatic augmentation."""
    from crossbatch.data.augment.pil import auto_augmentation  # late: timm takes a second

    try:
        auto_augmentation(policy, 224, "bilinear")
    except Exception as error:  # timm asserts, or fails to convert text
        raise ValueError(
            f"`auto_augment` (={policy!r}) is no name that timm knows; give RandAugment as rand-m9-mstd0.5-inc1, AutoAugment "
            f"as original or v0, or AugMix as augmix-m3-w3"
        ) from error


def moco_v3_augmentations(
    image_size: ImageSize = 224,
    crop_min: float = 0.08,
    channels: int = 3,
    blur_probability: tuple[float, float] = (1.0, 0.1),
) -> tuple[ViewAugmentation, ViewAugmentation]:
    """Return the two augmentations of MoCo v3 and BYOL: view 1 always blurred, view 2 seldom blurred, sometimes solarized.

    Args:
        image_size: side of a view in pixels, or (height, width).
        crop_min: smallest area of a crop, as a fraction of the image's area.
        channels: number of channels of the images.
        blur_probability: of view 1 and of view 2; sigma is 0.1 to 2 pixels at any `image_size`.

    Raises ValueError if a fraction or a probability is out of range.
    """
    if not 0 < crop_min <= 1:
        raise ValueError(f"crop_min is {crop_min}; allowed: more than 0, at most 1")
    if not all(0 <= probability <= 1 for probability in blur_probability):
        raise ValueError(f"blur_probability is {tuple(blur_probability)}; allowed: two numbers from 0 to 1")
    first, second = (
        ViewAugmentation(image_size, (crop_min, 1.0), blur, solarize, channels=channels)
        for blur, solarize in zip(blur_probability, (0.0, 0.2), strict=True)
    )
    return first, second


def crop_and_flip(
    image_size: ImageSize,
    crop_min: float,
    interpolation: str = "bilinear",
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
) -> ViewAugmentation:
    """Return the augmentation of supervised training: RandomResizedCrop and a horizontal flip.

    Args:
        image_size: side of a view in pixels, or (height, width).
        crop_min: smallest crop, as a fraction of the image's area.
        interpolation: of the resized crop, "bilinear" or "bicubic".
        color_jitter: largest relative change of brightness, contrast and saturation, as in timm; 0 for none.
        auto_augment: timm's name of an automatic augmentation; None for none.

    Raises ValueError if timm cannot read `auto_augment`.
    """
    if auto_augment is not None:
        check_auto_augment(auto_augment)
    return ViewAugmentation(
        image_size,
        (crop_min, 1.0),
        blur_probability=0.0,
        solarize_probability=0.0,
        jitter_probability=float(color_jitter > 0),
        brightness=color_jitter,
        contrast=color_jitter,
        saturation=color_jitter,
        hue=0.0,
        grayscale_probability=0.0,
        interpolation=interpolation,
        auto_augment=auto_augment,
    )


@dataclass(frozen=True)
class ViewParameters:
    """Holds the parameters of n images in one view: a structure of arrays, each [n] unless noted.

    The colour factors are drawn for every image and count only where `jitter` is True.
    """

    crop_top: np.ndarray  # int64, pixels of the source image
    crop_left: np.ndarray
    crop_height: np.ndarray
    crop_width: np.ndarray
    flip: np.ndarray  # bool
    jitter: np.ndarray  # bool
    brightness: np.ndarray  # float64, factors as torchvision's adjust_* take them: 1 changes nothing
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # turn of the colour circle: 0 changes nothing
    jitter_order: np.ndarray  # int64 [n, 4], permutations of 0 brightness, 1 contrast, 2 saturation, 3 hue
    grayscale: np.ndarray  # bool
    blur_sigma: np.ndarray  # float64, pixels of the view; 0 is no blur
    solarize: np.ndarray  # bool

    def jitters(self, row: int) -> list[tuple[int, float]]:
        """Return what jitters image `row`, in order: the operation, numbered as in `jitter_order`, and its factor."""
        factors = self.brightness, self.contrast, self.saturation, self.hue
        return [(int(i), float(factors[i][row])) for i in self.jitter_order[row]] if self.jitter[row] else []


# Pixels of the shorter side from which on an image is decoded at a reduced resolution if its crops allow it.
LARGE = 900


def reductions(
    views: Sequence[ViewParameters], heights: np.ndarray, widths: np.ndarray, image_size: ImageSize
) -> np.ndarray:
    """Return by which factor the sides of each of n images can be reduced while decoding: int64 [n], 8, 4, 2 or 1.

    It is the largest reduction that leaves every crop at least twice as large as its view, so that resizing it still averages.
    """
    height, width = height_width(image_size)
    sides = [side for p in views for side in (p.crop_height / height, p.crop_width / width)]
    spare = np.min(sides, axis=0) / 2
    largest = np.select([spare >= 8, spare >= 4, spare >= 2], [8, 4, 2], 1)
    return np.where(np.minimum(heights, widths) >= LARGE, largest, 1)


def reduced(p: ViewParameters, reduction: np.ndarray) -> ViewParameters:
    """Return the parameters with crops in the pixels of images decoded at 1 / `reduction` [n], edges rounded to whole ones."""
    top, left = (np.rint(start / reduction).astype(np.int64) for start in (p.crop_top, p.crop_left))
    bottom = np.rint((p.crop_top + p.crop_height) / reduction).astype(np.int64)
    right = np.rint((p.crop_left + p.crop_width) / reduction).astype(np.int64)
    return replace(p, crop_top=top, crop_left=left, crop_height=bottom - top, crop_width=right - left)


def draw_parameters(
    augmentation: ViewAugmentation,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    view: int,
    heights: np.ndarray,
    widths: np.ndarray,
) -> ViewParameters:
    """Draw the parameters of view number `view` for the images `indices` [n] of `heights` x `widths` [n] pixels."""
    u = counter.uniform(_DRAWS, seed, epoch, view, np.asarray(indices))  # [36, n]
    top, left, height, width = _crop(augmentation, u, np.asarray(heights), np.asarray(widths))
    return ViewParameters(
        crop_top=top,
        crop_left=left,
        crop_height=height,
        crop_width=width,
        flip=u[_FLIP] < augmentation.flip_probability,
        jitter=u[_JITTER] < augmentation.jitter_probability,
        brightness=_around_one(u[_BRIGHTNESS], augmentation.brightness),
        contrast=_around_one(u[_CONTRAST], augmentation.contrast),
        saturation=_around_one(u[_SATURATION], augmentation.saturation),
        hue=_between(u[_HUE], -augmentation.hue, augmentation.hue),
        jitter_order=np.argsort(u[_JITTER_ORDER].T, axis=1, kind="stable"),
        grayscale=u[_GRAYSCALE] < augmentation.grayscale_probability,
        blur_sigma=np.where(
            u[_BLUR] < augmentation.blur_probability, _between(u[_SIGMA], *augmentation.blur_sigma), 0.0
        ),
        solarize=u[_SOLARIZE] < augmentation.solarize_probability,
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def _around_one(u: np.ndarray, reach: float) -> np.ndarray:
    return _between(u, max(0.0, 1 - reach), 1 + reach)


def _crop(
    augmentation: ViewAugmentation, u: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Draw crops as torchvision's RandomResizedCrop: the first of ten tries that fits into the image, else a central crop.

    All ten tries are computed for every image: cheaper than a loop, and the number of draws does not depend on the image.
    """
    area = _between(u[_CROP_AREA], *augmentation.crop_scale) * heights * widths  # [tries, n]
    view_height, view_width = height_width(augmentation.image_size)
    low, high = (limit * (view_width / view_height) for limit in augmentation.crop_ratio)
    ratio = np.exp(_between(u[_CROP_RATIO], *np.log((low, high))))
    tried_widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths) & (tried_heights > 0) & (tried_heights <= heights)
    any_fits, first, image = fits.any(axis=0), np.argmax(fits, axis=0), np.arange(len(widths))
    # The central crop is the largest that the limits allow.
    central_height = np.where(widths < low * heights, np.rint(widths / low), heights).astype(np.int64)
    central_width = np.where(widths > high * heights, np.rint(heights * high), widths).astype(np.int64)
    height = np.where(any_fits, tried_heights[first, image], central_height)
    width = np.where(any_fits, tried_widths[first, image], central_width)
    top = np.floor(u[_TOP] * (heights - height + 1)).astype(np.int64)
    left = np.floor(u[_LEFT] * (widths - width + 1)).astype(np.int64)
    top = np.where(any_fits, top, (heights - height) // 2)
    left = np.where(any_fits, left, (widths - width) // 2)
    return top, left, height, width


def normalize(views_uint8: torch.Tensor, dtype: torch.dtype = torch.float32, channels: Channels = RGB) -> torch.Tensor:
    """Normalise uint8 [..., C, H, W] as ToTensor and Normalize(mean, std) do, by one multiply-add per pixel.

    Call it on the training device: a uint8 view travels from worker to GPU in a quarter of the bytes of fp32. The
    arithmetic is fp32 whatever `dtype` is.
    """
    scale, bias = _scale_and_bias(views_uint8.device, channels)
    return torch.addcmul(bias, views_uint8, scale).to(dtype)


@lru_cache(maxsize=8)
def _scale_and_bias(device: torch.device, channels: Channels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and bias of (x / 255 - mean) / std = x * scale + bias. Cached: they cost a GPU two synchronous copies."""
    mean = torch.tensor(channels.mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(channels.std, dtype=torch.float64).view(-1, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)
