"""Measures how a batch of views gets into the network: as uint8, normalised on its device, beside fp32 from the workers.

On a GPU the baseline is the copy alone: workers normalise beforehand, and pin. Without one there is only the normalisation.
uint8 is a quarter of the bytes, which is why the loader hands it over.
"""

from collections.abc import Iterator

import torch
from torchvision.transforms.functional import normalize as torchvision_normalize

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.data import normalize
from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD
from crossbatch.engine.config import Device


def run(effort: Effort) -> Iterator[Row]:
    """Yield a row for fp32 and one for uint8."""
    device, count = Device.detect().type, effort.pick(16, 256, 256)
    views = torch.randint(0, 256, (2 * count, 224, 224, 3), dtype=torch.uint8, pin_memory=device == "cuda")
    views = views.permute(0, 3, 1, 2)  # channels last, as the loader stores them
    floats = (views / 255).contiguous()
    if device == "cuda":  # elsewhere there are no workers that would have done it before
        floats = _normalised(floats).pin_memory()
    cases = {
        "fp32, normalised before": lambda: (
            floats.to(device, non_blocking=True) if device == "cuda" else _normalised(floats)
        ),
        "uint8, normalised after": lambda: normalize(views.to(device, non_blocking=True)),
    }
    yield from compare(cases, {"images": count, "views": 2, "size": 224, "device": device}, effort)


def _normalised(images: torch.Tensor) -> torch.Tensor:
    return torchvision_normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))
