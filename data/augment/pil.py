"""Applies augmentations with PIL by torchvision's functions: the reference for the faster backends.

An image is decoded once and all views come from the decoded image. A crop is a PIL image until it is blurred, because the
originals augment with PIL: its rounding to 8 bits between operations and its Gaussian blur (a sum of box blurs) belong to the
augmentation. torchvision takes a second to import, so it is imported when the first view is made.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from crossbatch.data.augment.parameters import ViewParameters

_JITTERS = (
    "adjust_brightness",
    "adjust_contrast",
    "adjust_saturation",
    "adjust_hue",
)  # as in ViewParameters.jitter_order


def augment(
    image: np.ndarray, p: ViewParameters, row: int, image_size: int, solarize_threshold: int = 128
) -> np.ndarray:
    """Make one view of `image`, uint8 [h, w, 3], by row `row` of the parameters `p`: uint8 [image_size, image_size, 3]."""
    from torchvision.transforms import functional

    view = Image.fromarray(np.ascontiguousarray(crop(image, p, row))).resize(
        (image_size, image_size), Image.Resampling.BILINEAR
    )
    for operation, factor in p.jitters(row):
        view = getattr(functional, _JITTERS[operation])(view, factor)
    if p.grayscale[row]:
        view = view.convert("L").convert("RGB")
    if p.blur_sigma[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[row])))  # torchvision has no PIL blur
    pixels = np.asarray(view)
    if p.solarize[row]:
        pixels = np.where(pixels < solarize_threshold, pixels, 255 - pixels)
    return pixels[:, ::-1] if p.flip[row] else pixels


def crop(image: np.ndarray, p: ViewParameters, row: int) -> np.ndarray:
    """Return the crop of row `row` of the parameters `p` out of `image`, [h, w, 3], as a view of its memory."""
    top, left = p.crop_top[row], p.crop_left[row]
    return image[top : top + p.crop_height[row], left : left + p.crop_width[row]]


def evaluation_image(image: Image.Image, image_size: int) -> torch.Tensor:
    """Make the central view of `image` (RGB) for evaluation: uint8 [3, H, W], as torchvision's Resize and CenterCrop do.

    The shorter side becomes image_size * 256 / 224, then the central square is cut out, as ImageNet is evaluated. Up to
    64 px the shorter side becomes image_size itself: an object that fills a small image must not lose its edges.
    """
    from torchvision.transforms import functional

    shorter = image_size if image_size <= 64 else round(image_size * 256 / 224)
    view: Any = image  # torchvision's annotations know tensors only
    return functional.pil_to_tensor(functional.center_crop(functional.resize(view, [shorter]), [image_size]))
