"""Measures augmentation, decoded images -> two views each on one core, beside torchvision's transforms on PIL images.

Both apply MoCo v3's augmentations. The baseline ends in normalised fp32, ours in uint8, which the training device normalises:
`python -m benchmarks transfer`. Where there is a GPU, our Triton kernels for colours and blur run there, without a ratio: they
neither crop nor resize.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import TwoViews, image_folder
from crossbatch.data import draw_parameters, moco_v3_augmentations, open_source
from crossbatch.data.augment import opencv as opencv_backend
from crossbatch.data.augment import pil as torchvision_backend
from crossbatch.data.augment.backends import make_views

SIZE = 224


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield a row for each implementation, of the images in `images` or of generated ones."""
    count, recipes = effort.pick(8, 64, 64), moco_v3_augmentations(SIZE)
    with image_folder(images, count) as root:
        source = open_source(root, "train")
        indices = np.arange(min(count, len(source)))
        pil = [source.open(int(index)) for index in indices]
    pixels = [np.array(image) for image in pil]
    plain = TwoViews(SIZE)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cases = {
        "torchvision's transforms": lambda: [plain(image) for image in pil],
        "ours on PIL": lambda: make_views(torchvision_backend.augment, pixels, recipes, 0, 0, indices),
        "ours on OpenCV": lambda: make_views(opencv_backend.augment, pixels, recipes, 0, 0, indices),
    }
    settings = {"images": len(indices), "size": SIZE, "folder": "given" if images else "generated"}
    yield from compare(cases, settings, effort)
    if torch.cuda.is_available():
        for row in compare({"colours and blur in Triton": _triton(pil, indices)}, settings, effort):
            row.baseline = row.ratio = None
            yield row


def _triton(images: list[Image.Image], indices: np.ndarray) -> Callable[[], None]:
    """Return a call of the Triton kernels on crops of noise, with the parameters that the images would get."""
    from crossbatch.data.augment.triton_colours import colour_view

    crops = torch.randint(0, 256, (len(images), SIZE, SIZE, 3), dtype=torch.uint8, device="cuda")
    widths, heights = np.array([image.size for image in images]).T
    recipes = moco_v3_augmentations(SIZE)
    parameters = [draw_parameters(recipe, 0, 0, indices, view, heights, widths) for view, recipe in enumerate(recipes)]
    out = torch.empty_like(crops)

    def call() -> None:
        for recipe, p in zip(recipes, parameters, strict=True):
            colour_view(crops, p, recipe, out)

    return call
