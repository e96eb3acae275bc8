"""Who decodes and augments. All backends apply the same parameters (recipe.py), and replace the same broken images."""

import importlib.util

from crossbatch import InputError

BACKENDS = {
    "dali": "DALI decodes, crops and resizes, on the GPU if there is one",
    "opencv": "worker processes with torchvision's decoder and OpenCV's kernels",
    "torchvision": "worker processes with PIL, to the bit as torchvision",
}


def choose_backend(asked: str, device_type: str) -> tuple[str, str]:
    """The backend for `crossbatch.data.backend` on "cpu" or "cuda", and why.

    Raises InputError if DALI is asked for and not installed.
    """
    installed = has_dali()
    if asked == "dali" and not installed:
        raise InputError(
            "crossbatch.data.backend: dali is not installed; pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), "
            "or choose auto or opencv"
        )
    if asked != "auto":
        return asked, "as configured"
    if device_type != "cuda":
        return "opencv", "on a CPU it is faster than DALI"
    return ("dali", "installed, and there is a GPU") if installed else ("opencv", "DALI is not installed")


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
