"""Applies augmentations on a CPU with vectorised kernels: what a machine without a GPU should train with.

Crops, flips and colours are those of the backend on PIL, up to rounding: at most 1 % of the value range, averaged over a view
(tests/data/test_backends.py). PIL decodes here too, so the same images are broken. What replaces PIL, with its part of the time
that PIL takes:

    crop, resize  torch's antialiased uint8 kernel, which reads the crop in place: half
    hue           OpenCV's HSV conversion, in bytes as PIL's: a tenth
    blur          a Gaussian, which PIL approximates by a sum of three boxes: a fifth

(`python -m benchmarks augment`)
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters, draw_parameters
from crossbatch.data.sources import Source


def open_image(source: Source, index: int) -> np.ndarray:
    """Return image `index` in RGB: uint8 [H, W, 3]. Raises what `source.open` raises for a damaged one."""
    return np.array(source.open(index))  # a copy that torch may have


def make_views(
    images: Sequence[np.ndarray], augmentations: Sequence[ViewAugmentation], seed: int, epoch: int, indices: np.ndarray
) -> torch.Tensor:
    """Make the views of n decoded images: uint8 [v, n, 3, H, W] (stored channels last), view v by `augmentations[v]`.

    `indices` [n] are the keys of the random numbers, as in `pil.make_views`.
    """
    heights, widths = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2).T
    size = augmentations[0].image_size
    views = torch.empty((len(augmentations), len(images), size, size, 3), dtype=torch.uint8)
    for view, augmentation in enumerate(augmentations):
        parameters = draw_parameters(augmentation, seed, epoch, indices, view, heights, widths)
        for row, image in enumerate(images):
            pixels = _resized_crop(image, parameters, row, size)
            views[view, row] = torch.from_numpy(colour(pixels, parameters, row, augmentation.solarize_threshold))
    return views.permute(0, 1, 4, 2, 3)


def _resized_crop(image: np.ndarray, p: ViewParameters, row: int, size: int) -> np.ndarray:
    top, left = int(p.crop_top[row]), int(p.crop_left[row])
    crop = image[top : top + int(p.crop_height[row]), left : left + int(p.crop_width[row])]
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]  # [1, 3, h, w], channels last
    view = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return view[0].permute(1, 2, 0).contiguous().numpy()


def colour(pixels: np.ndarray, p: ViewParameters, row: int, solarize_threshold: int = 128) -> np.ndarray:
    """Apply all that follows crop and resize, in MoCo v3's order: uint8 [S, S, 3] -> [S, S, 3]."""
    if p.jitter[row]:
        for number in p.jitter_order[row]:
            name, adjust = _JITTERS[number]
            pixels = adjust(pixels, float(getattr(p, name)[row]))
    if p.grayscale[row]:
        pixels = _gray(pixels)
    if p.blur_sigma[row] > 0:
        pixels = cv2.GaussianBlur(pixels, (0, 0), float(p.blur_sigma[row]), borderType=cv2.BORDER_REPLICATE)
    if p.solarize[row]:
        values = np.arange(256, dtype=np.uint8)
        pixels = cv2.LUT(pixels, np.where(values < solarize_threshold, values, 255 - values))
    return cv2.flip(pixels, 1) if p.flip[row] else pixels


def _gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(pixels, alpha=factor)


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(pixels, factor, pixels, 0.0, (1 - factor) * mean)


def _saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(pixels, factor, _gray(pixels), 1 - factor, 0.0)


def _hue(pixels: np.ndarray, factor: float) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTERS = (  # numbered as in ViewParameters.jitter_order
    ("brightness", _brightness),
    ("contrast", _contrast),
    ("saturation", _saturation),
    ("hue", _hue),
)
