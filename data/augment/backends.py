"""Chooses the backend that decodes and augments. All backends apply the same parameters and replace the same broken images."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from crossbatch.data import counter
from crossbatch.data.augment.parameters import ViewAugmentation, ViewParameters, draw_parameters

BACKENDS = {
    "dali": "DALI decodes, crops and resizes, on the GPU if there is one",
    "opencv": "worker processes with PIL's decoder, torch's resize and OpenCV's kernels",
    "torchvision": "worker processes with PIL, to the bit as torchvision",
}

# (image in RGB, parameters, row, image_size, solarize_threshold, interpolation) -> uint8 [image_size, image_size, 3]
Augment: TypeAlias = Callable[[Image.Image, ViewParameters, int, int, int, str], np.ndarray]


def choose_backend(asked: str, device_type: str) -> tuple[str, str]:
    """Return the backend for `asked` ("auto" or one of BACKENDS) on "cpu" or "cuda", and why.

    Raises ValueError if `asked` is none of them, or DALI is asked for and not installed.
    """
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"`backend` (={asked!r}) must be one of auto, {', '.join(BACKENDS)}")
    installed = has_dali()
    if asked == "dali" and not installed:
        raise ValueError(
            "dali is not installed; pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or choose auto or opencv"
        )
    if asked != "auto":
        return asked, "as configured"
    if device_type != "cuda":
        return "opencv", "on a CPU it is faster than DALI"
    return ("dali", "installed, and there is a GPU") if installed else ("opencv", "DALI is not installed")


def has_dali() -> bool:
    """Return whether NVIDIA DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def augment_function(backend: str) -> Augment:
    """Return the function of "opencv" or "torchvision" that makes one view; this imports only what the backend needs.

    Unpickled in a worker process, the function imports its module before work begins.
    """
    if backend == "opencv":
        from crossbatch.data.augment.opencv import augment
    else:
        from crossbatch.data.augment.pil import augment
    return augment


def make_views(
    augment: Augment,
    images: Sequence[Image.Image],
    augmentations: Sequence[ViewAugmentation],
    seed: int,
    epoch: int,
    indices: np.ndarray,
) -> torch.Tensor:
    """Make the views of n decoded images (RGB): uint8 [v, n, 3, H, W] (stored channels last), view v by `augmentations[v]`.

    `indices` [n] are the keys of the random numbers. Where a broken image was replaced, that is the index of the broken one.
    """
    widths, heights = np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2).T
    size = augmentations[0].image_size
    views = np.empty((len(augmentations), len(images), size, size, 3), dtype=np.uint8)
    for view, augmentation in enumerate(augmentations):
        parameters = draw_parameters(augmentation, seed, epoch, indices, view, heights, widths)
        for row, image in enumerate(images):
            views[view, row] = augment(
                image, parameters, row, size, augmentation.solarize_threshold, augmentation.interpolation
            )
        if augmentation.auto_augment is not None:
            from crossbatch.data.augment.pil import automatically_augmented

            for row, bits in enumerate(counter.bits(counter.AUTO_AUGMENT, seed, epoch, view, indices).tolist()):
                views[view, row] = automatically_augmented(views[view, row], augmentation, bits)
    return torch.from_numpy(views).permute(0, 1, 4, 2, 3)
