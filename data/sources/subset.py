"""Takes a reproducible part of the images of a source, as for semi-supervised training with 1 % or 10 % of the labels.

Each image has a random number that its index and the seed determine, and a class gives those with the smallest numbers. So
the subset is the same on every machine, and subsets of one seed are nested: the 1 % are part of the 10 %.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from crossbatch.data import counter

if TYPE_CHECKING:
    from crossbatch.data.sources.open import Source


class Subset:
    """Holds some images of each class of `source`, in their order; a `Source`. It has all class names of `source`.

    Args:
        source: where the images come from. An image without a label is in no subset.
        fraction: of the images of each class, rounded, at least one. Images without classes are taken as one class.
        per_class: number of images of each class, or all where it has fewer.
        seed: another seed chooses other images.

    Raises ValueError if `per_class` is given for images without labels.
    """

    def __init__(self, source: "Source", fraction: float = 0.0, per_class: int = 0, seed: int = 0):
        if per_class and not source.has_labels:
            raise ValueError("per_class needs labels, and these images have none; give fraction=... instead")
        labelled = np.flatnonzero(source.labels >= 0)
        numbers = counter.bits(counter.SUBSET, seed, labelled)
        order = labelled[np.lexsort((numbers, source.labels[labelled]))]  # by class, then by number
        counts = np.bincount(source.labels[labelled], minlength=len(source.class_names))
        wanted = np.minimum(per_class or np.maximum(np.rint(fraction * counts), 1).astype(np.int64), counts)
        starts = np.cumsum(counts) - counts
        places = np.arange(len(order)) - np.repeat(starts, counts)  # of each image within its class
        self.indices = np.sort(order[places < np.repeat(wanted, counts)])
        self.source, self.labels = source, source.labels[self.indices]
        self.class_names, self.has_labels = source.class_names, source.has_labels
        self.has_files: bool = getattr(source, "has_files", False)
        self.folder: Path | str | None = getattr(source, "folder", None)
        self.passed_over: Counter[str] = Counter(getattr(source, "passed_over", {}))
        self.checksum = zlib.crc32(self.indices.tobytes(), getattr(source, "checksum", 0))
        few = int(((counts > 0) & (counts < per_class)).sum())
        chosen = f"per_class={per_class}" if per_class else f"fraction={fraction:g}"
        self.chosen_by = f"{chosen}, seed={seed}" + (f"; {few:,} classes have fewer" if few else "")

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        """Return the encoded file of image `index`. Raises OSError."""
        return self.source.read(int(self.indices[index]))

    def open(self, index: int) -> Image.Image:
        """Return the decoded image in RGB. Raises OSError; BrokenImage is one."""
        return self.source.open(int(self.indices[index]))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read images that will be asked for next, if the source can."""
        read_ahead(self.source, self.indices[np.asarray(indices, dtype=np.int64)])


def read_ahead(source: "Source", indices: Sequence[int] | np.ndarray) -> None:
    """Tell `source` which images will be read next, if it has a method `read_ahead`."""
    begin = getattr(source, "read_ahead", None)
    if begin is not None:
        begin(indices)
