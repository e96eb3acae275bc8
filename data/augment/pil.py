"""Applies augmentations with PIL, to the bit as torchvision does: the reference for the faster backends.

An image is decoded once and all views come from the decoded image. It stays a PIL image until it is blurred, because the
originals augment with PIL: its rounding to 8 bits between operations and its Gaussian blur (a sum of box blurs) belong to the
augmentation. The result is that of torchvision.transforms.v2.functional on PIL images (tests/data/test_pil.py writes that
composition out and compares bits). At CIFAR's size most of torchvision's time is Python around PIL's kernels. Calling these
directly gives 1.4x the images per second at 32 px and 1.2x at 64 px, decoding included, and no more at 224 px.
"""

import numpy as np
import torch
from PIL import Image, ImageFilter

from crossbatch.data.augment.parameters import ViewParameters


def augment(
    image: Image.Image, p: ViewParameters, row: int, image_size: int, solarize_threshold: int = 128
) -> np.ndarray:
    """Make one view of `image` (RGB) by row `row` of the parameters `p`, in MoCo v3's order.

    Returns uint8 [image_size, image_size, 3].
    """
    view = crop(image, p, row).resize((image_size, image_size), Image.Resampling.BILINEAR)
    for operation, factor in p.jitters(row):
        view = _JITTERS[operation](view, factor)
    if p.grayscale[row]:
        view = _gray(view)
    if p.blur_sigma[row] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(p.blur_sigma[row])))  # torchvision has no PIL blur
    pixels = np.asarray(view)
    if p.solarize[row]:
        pixels = np.where(pixels < solarize_threshold, pixels, 255 - pixels)
    return pixels[:, ::-1] if p.flip[row] else pixels


def crop(image: Image.Image, p: ViewParameters, row: int) -> Image.Image:
    """Cut the crop of row `row` of the parameters `p` out of `image`."""
    top, left = int(p.crop_top[row]), int(p.crop_left[row])
    return image.crop((left, top, left + int(p.crop_width[row]), top + int(p.crop_height[row])))


def evaluation_image(image: Image.Image, image_size: int) -> torch.Tensor:
    """Make the central view of `image` (RGB) for evaluation: uint8 [3, H, W], as torchvision's Resize and CenterCrop do.

    The shorter side becomes image_size * 256 / 224, then the central square is cut out, as ImageNet is evaluated. Up to
    64 px the shorter side becomes image_size itself: an object that fills a small image must not lose its edges.
    """
    shorter = image_size if image_size <= 64 else round(image_size * 256 / 224)
    longer = int(shorter * max(image.size) / min(image.size))
    width, height = (shorter, longer) if image.width <= image.height else (longer, shorter)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    view = image.resize((width, height), Image.Resampling.BILINEAR)
    view = view.crop((left, top, left + image_size, top + image_size))
    return torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())


def _gray(view: Image.Image) -> Image.Image:
    return view.convert("L").convert("RGB")


def _brightness(view: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new("RGB", view.size), view, factor)


def _contrast(view: Image.Image, factor: float) -> Image.Image:
    """Blend with the mean gray of the view."""
    gray = np.frombuffer(view.convert("L").tobytes(), dtype=np.uint8)  # 5 us faster than np.asarray(image), each time
    mean = int(gray.sum() / gray.size + 0.5)
    return Image.blend(Image.new("RGB", view.size, (mean, mean, mean)), view, factor)


def _saturation(view: Image.Image, factor: float) -> Image.Image:
    return Image.blend(_gray(view), view, factor)


def _hue(view: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by `factor` of a full circle, in PIL's 8-bit HSV: 256 steps are a circle and wrap by themselves."""
    hsv = bytearray(view.convert("HSV").tobytes())
    hue = np.frombuffer(hsv, dtype=np.uint8)[::3]
    hue += np.uint8(int(factor * 255) % 256)
    return Image.frombytes("HSV", view.size, bytes(hsv)).convert("RGB")


_JITTERS = (_brightness, _contrast, _saturation, _hue)  # numbered as in ViewParameters.jitter_order
