"""Applies augmentations on a CPU with vectorised kernels: what a machine without a GPU should train with.

Crops, flips and colours are those of the backend on PIL, up to rounding: at most 1 % of the value range, averaged over a view
(tests/data/test_backends.py). OpenCV decodes ordinary JPEGs, to PIL's pixels, and torch's antialiased uint8 kernel resizes, in
half of PIL's time. Colours and blur are those of `compiled_colours`, equal to PIL's; without numba, `opencv_colour` makes them,
with OpenCV's HSV conversion in bytes and its Gaussian, which PIL approximates by a sum of three boxes.

`python -m benchmarks augment` measures it.
"""

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from crossbatch.data.augment.parameters import ImageSize, ViewParameters, height_width
from crossbatch.data.augment.pil import crop


def augment(
    image: np.ndarray,
    p: ViewParameters,
    row: int,
    image_size: ImageSize,
    solarize_threshold: int = 128,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Make one view of `image`, uint8 [h, w, 3], by row `row` of the parameters `p`: uint8 [H, W, 3] of `image_size`."""
    return colour(resize(crop(image, p, row), image_size, interpolation), p, row, solarize_threshold)


def resize(pixels: np.ndarray, image_size: ImageSize, interpolation: str = "bilinear") -> np.ndarray:
    """Resize a crop, uint8 [h, w, 3], to [H, W, 3] of `image_size`, with antialiasing."""
    # [1, 3, h, w], which torch, too, takes for channels last: the fast way.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    view = F.interpolate(image, height_width(image_size), mode=interpolation, antialias=True)
    return view[0].permute(1, 2, 0).contiguous().numpy()


def opencv_colour(pixels: np.ndarray, p: ViewParameters, row: int, solarize_threshold: int = 128) -> np.ndarray:
    """Apply colours, blur, solarize and flip to a resized crop, in MoCo v3's order: uint8 [H, W, 3] -> [H, W, 3]."""
    for operation, factor in p.jitters(row):
        pixels = _JITTERS[operation](pixels, factor)
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


_JITTERS = (_brightness, _contrast, _saturation, _hue)  # numbered as in ViewParameters.jitter_order

try:
    from crossbatch.data.augment.compiled_colours import colour
except ImportError:  # numba is not installed, or not one for this Python or NumPy
    colour = opencv_colour
