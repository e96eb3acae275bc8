"""Applies augmentations with PIL by torchvision's functions: the reference for the faster backends.

An image is decoded once and all views come from the decoded image. A crop is a PIL image until it is blurred, because the
originals augment with PIL: its rounding to 8 bits between operations and its Gaussian blur (a sum of box blurs) belong to the
augmentation. torchvision takes a second to import, so it is imported when the first view is made.
"""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from crossbatch.data.augment.parameters import IMAGENET_MEAN, ImageSize, ViewAugmentation, ViewParameters, height_width

# Functions of torchvision, numbered as in ViewParameters.jitter_order.
_JITTERS = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


def augment(
    image: np.ndarray,
    p: ViewParameters,
    row: int,
    image_size: ImageSize,
    solarize_threshold: int = 128,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Make one view of `image`, uint8 [h, w, 3], by row `row` of the parameters `p`: uint8 [H, W, 3] of `image_size`."""
    from torchvision.transforms import functional

    resample = Image.Resampling[interpolation.upper()]
    height, width = height_width(image_size)
    view = Image.fromarray(np.ascontiguousarray(crop(image, p, row))).resize((width, height), resample)
    for operation, factor in p.jitters(row):
        view = getattr(functional, _JITTERS[operation])(view, factor)
    if p.grayscale[row] and view.mode == "RGB":
        view = view.convert("L").convert("RGB")
    if p.blur_sigma[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[row])))  # torchvision has no PIL blur
    pixels = np.asarray(view)
    if p.solarize[row]:
        pixels = np.where(pixels < solarize_threshold, pixels, 255 - pixels)
    return pixels[:, ::-1] if p.flip[row] else pixels


def augment_channels(image: np.ndarray, *arguments: Any) -> np.ndarray:
    """Make one view of `image`, uint8 [h, w, C], a channel at a time, as of a gray image: uint8 [H, W, C]; see `augment`.

    Its contrast changes around the mean of each channel; hue, saturation and grayscale change nothing.
    """
    planes = (np.ascontiguousarray(image[..., channel]) for channel in range(image.shape[2]))
    return np.stack([augment(plane, *arguments) for plane in planes], axis=2)


def crop(image: np.ndarray, p: ViewParameters, row: int) -> np.ndarray:
    """Return the crop of row `row` of the parameters `p` out of `image`, [h, w, 3], as a view of its memory."""
    top, left = p.crop_top[row], p.crop_left[row]
    return image[top : top + p.crop_height[row], left : left + p.crop_width[row]]


@functools.cache
def auto_augmentation(policy: str, image_size: int, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """Return timm's automatic augmentation by its name, as timm sets it up for the shorter side of a view in pixels."""
    from timm.data import auto_augment as timm

    make = timm.auto_augment_transform
    if policy.startswith("rand"):
        make = timm.rand_augment_transform
    elif policy.startswith("augmix"):
        make = timm.augment_and_mix_transform
    gray = tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN)
    resample = Image.Resampling[interpolation.upper()]
    return make(policy, {"translate_const": int(image_size * 0.45), "img_mean": gray, "interpolation": resample})


def automatically_augmented(pixels: np.ndarray, augmentation: ViewAugmentation, seed: int) -> np.ndarray:
    """Apply `augmentation.auto_augment` to a view, uint8 [H, W, 3]; timm draws from generators that start at `seed`."""
    assert augmentation.auto_augment is not None
    python_state, numpy_state = random.getstate(), np.random.get_state()  # of the process, which others draw from
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        apply = auto_augmentation(augmentation.auto_augment, min(pixels.shape[:2]), augmentation.interpolation)
        return np.asarray(apply(Image.fromarray(pixels)))
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Cut an image to the middle of its longer side if that is more than 16 times the other.

    The central view needs no more, and 1 x 30000 pixels would become 256 x 7.7 million.
    """
    width, height = image.size
    longest = 16 * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def evaluation_image(image: Image.Image, image_size: ImageSize, interpolation: str = "bilinear") -> torch.Tensor:
    """Make the central view of `image` (RGB) for evaluation: uint8 [3, H, W], as torchvision's Resize and CenterCrop do.

    The shorter side becomes image_size * 256 / 224, then the central square is cut out, as ImageNet is evaluated. Up to
    64 px the shorter side becomes image_size itself: an object that fills a small image must not lose its edges. Of an
    `image_size` (height, width), the resized image just covers that much more than a view, and its middle is cut out.
    """
    from torchvision.transforms import functional

    sides = height_width(image_size)
    height, width = sides if min(sides) <= 64 else (round(side * 256 / 224) for side in sides)
    view: Any = _without_far_ends(image)  # torchvision's annotations know tensors only
    if view.width * height <= view.height * width:  # cut what is too high; rounded as torchvision does
        height = int(width * view.height / view.width)
    else:
        width = int(height * view.width / view.height)
    resized = functional.resize(view, [height, width], functional.InterpolationMode(interpolation))
    return functional.pil_to_tensor(functional.center_crop(resized, list(sides)))
