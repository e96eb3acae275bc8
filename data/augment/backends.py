"""Chooses the backend that decodes and augments. All backends apply the same parameters and replace the same broken images."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from crossbatch.data import counter
from crossbatch.data.augment.parameters import (
    ImageSize,
    ViewAugmentation,
    ViewParameters,
    draw_parameters,
    reduced,
    reductions,
)
from crossbatch.data.decode import Encoded, decode_jpeg

BACKENDS = {
    "dali": "DALI decodes, crops and resizes, on the GPU if there is one",
    "opencv": "worker processes with OpenCV's decoder, torch's resize, and colours in one compiled pass",
    "torchvision": "worker processes with PIL, to the bit as torchvision",
}

# (image in RGB, parameters, row, image_size, solarize_threshold, interpolation) -> uint8 [H, W, 3]
Augment: TypeAlias = Callable[[np.ndarray, ViewParameters, int, ImageSize, int, str], np.ndarray]


def choose_backend(asked: str, device_type: str, channels: int = 3) -> tuple[str, str]:
    """Return the backend for `asked` ("auto" or one of BACKENDS) on "cpu" or "cuda", and why.

    Raises ValueError if `asked` is none of them, or if it is "dali" and DALI is absent or images do not have 3 channels.
    """
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"`backend` (={asked!r}) must be one of auto, {', '.join(BACKENDS)}")
    installed = has_dali()
    if asked == "dali" and not installed:
        raise ValueError(
            "dali is not installed; pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or choose auto or opencv"
        )
    if channels != 3:
        if asked == "dali":
            raise ValueError(f"dali reads three channels, but images have {channels}; choose auto or opencv")
        return "torchvision", f"{channels} channels: PIL, one at a time, without hue, saturation and grayscale"
    if asked != "auto":
        return asked, "as configured"
    if device_type != "cuda":
        return "opencv", "on a CPU it is faster than DALI"
    return ("dali", "installed, and there is a GPU") if installed else ("opencv", "DALI is not installed")


def has_dali() -> bool:
    """Return whether NVIDIA DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def augment_function(backend: str, channels: int = 3) -> Augment:
    """Return the function of "opencv" or "torchvision" that makes one view; this imports only what the backend needs.

    Both have the same one, on PIL, for another number of channels than 3.

    Unpickled in a worker process, the function imports its module before work begins.
    """
    if channels != 3:
        from crossbatch.data.augment.pil import augment_channels as augment
    elif backend == "opencv":
        from crossbatch.data.augment.opencv import augment
    else:
        from crossbatch.data.augment.pil import augment
    return augment


def make_views(
    augment: Augment,
    images: Sequence[np.ndarray | Encoded],
    augmentations: Sequence[ViewAugmentation],
    seed: int,
    epoch: int,
    indices: np.ndarray,
    decode: Callable[[bytes, int], np.ndarray] = decode_jpeg,
    scaled_decode: bool = True,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the views of n images: uint8 [v, n, C, H, W] (stored channels last), view v by `augmentations[v]`.

    Images are uint8 [h, w, C] (RGB, if C is 3), or JPEGs, each of which `decode` decodes right before its views are made: so
    its pixels are in the cache, and one image at a time is in memory. With `scaled_decode`, a large one is decoded at a reduced
    resolution.
    `indices` [n] are the keys of the random numbers. Where a broken image was replaced, that is the index of the broken one.
    The views are made in `memory`, uint8 [v * n * H * W * C], if it is given.
    """
    sizes = [image[1:] if isinstance(image, Encoded) else image.shape[:2] for image in images]
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    size = augmentations[0].image_size
    parameters = [
        draw_parameters(a, seed, epoch, indices, view, heights, widths) for view, a in enumerate(augmentations)
    ]
    reduction = np.ones(len(images), dtype=np.int64)
    if scaled_decode:
        encoded = np.array([isinstance(image, Encoded) for image in images], dtype=bool)
        reduction = np.where(encoded, reductions(parameters, heights, widths, size), 1)
        parameters = [reduced(p, reduction) for p in parameters]
    shape = len(augmentations), len(images), *augmentations[0].shape
    views = torch.empty(shape, dtype=torch.uint8) if memory is None else memory.view(shape)
    filled = views.numpy()
    for row, image in enumerate(images):
        pixels = decode(image.data, int(reduction[row])) if isinstance(image, Encoded) else image
        for view, (p, a) in enumerate(zip(parameters, augmentations, strict=True)):
            filled[view, row] = augment(pixels, p, row, size, a.solarize_threshold, a.interpolation)
    for view, augmentation in enumerate(augmentations):
        if augmentation.auto_augment is not None:
            from crossbatch.data.augment.pil import automatically_augmented

            for row, bits in enumerate(counter.bits(counter.AUTO_AUGMENT, seed, epoch, view, indices).tolist()):
                filled[view, row] = automatically_augmented(filled[view, row], augmentation, bits)
    return views.permute(0, 1, 4, 2, 3)
