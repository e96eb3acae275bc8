"""Chooses who decodes and augments. All backends apply the same parameters and replace the same broken images."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BACKENDS = {
    "dali": "DALI decodes, crops and resizes, on the GPU if there is one",
    "opencv": "worker processes with PIL's decoder, torch's resize and OpenCV's kernels",
    "torchvision": "worker processes with PIL, to the bit as torchvision",
}


class ImageOperations(NamedTuple):
    """Holds a backend's two functions for worker processes. Unpickled there, they import their module before work begins."""

    open_image: Callable[..., Any]  # (source, index) -> an image as `make_views` takes it
    make_views: Callable[..., torch.Tensor]  # (images, augmentations, seed, epoch, indices) -> uint8 [v, n, 3, H, W]


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


def image_operations(backend: str) -> ImageOperations:
    """Return the functions of `backend` ("opencv" or "torchvision"), importing only what it needs."""
    if backend == "opencv":
        from crossbatch.data.augment import opencv as module
    else:
        from crossbatch.data.augment import pil as module
    return ImageOperations(module.open_image, module.make_views)
