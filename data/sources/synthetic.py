"""Computes images from their index, without a disk: for tests, and for benchmarks that should not measure one.

A class is a colour, and an image is its class colour plus smooth noise, so a network can tell classes apart at once. This
is no data set to judge a method by (`shapes` writes one for that).
"""

import numpy as np
from PIL import Image

from crossbatch.data import counter
from crossbatch.data.decode import encode_bmp

_GRID = 6  # the noise is a grid of this side, enlarged: cheap at any image size


class Synthetic:
    """Computes `count` square images of side `size` in `classes` classes; a `Source`. `split` is 0 to train, 1 to evaluate."""

    has_labels = True

    def __init__(self, count: int, size: int = 64, classes: int = 10, split: int = 0):
        self.labels = np.arange(count, dtype=np.int64) % classes
        self.class_names = [f"class_{label:04d}" for label in range(classes)]
        self._size, self._split = size, split

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.class_names[self.labels[index]]}/{index:08d}"

    def read(self, index: int) -> bytes:
        """Return image `index` as a BMP."""
        return encode_bmp(self.open(index))

    def open(self, index: int) -> Image.Image:
        channels = np.arange(3)
        colour = counter.uniform(counter.SYNTHETIC_DRAWS + channels, int(self.labels[index]))
        cells = counter.SYNTHETIC_DRAWS + 3 + np.arange(_GRID * _GRID * 3)
        noise = counter.uniform(cells, self._split, index).reshape(_GRID, _GRID, 3)
        grid = (255 * (0.5 * colour + 0.5 * noise)).astype(np.uint8)
        return Image.fromarray(grid).resize((self._size, self._size), Image.Resampling.BILINEAR)
