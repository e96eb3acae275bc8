"""Measures the start before the first image: listing a million files, or reading the cached listing, beside torchvision's.

The files are empty and lie in a temporary folder (an inode each), as 1000 classes with names like ImageNet's; a shard's
images are one pixel. "a position" is what a resumed run asks for next: the order of an epoch, and a batch in its middle.
All this runs on what the operating system has in memory: the first listing of a cold or a network disk takes longer.
Memory is what Python and numpy keep allocated for the source, and what they had at most while it was made.
"""

import os
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder as TorchvisionFolder

from benchmarks.measure import Cases, compare, over
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.data.sampler import GlobalBatchSampler
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.data.sources.shards import Shards
from crossbatch.data.sources.synthetic import Synthetic

CLASSES = 1000


def run(effort: Effort) -> Iterator[Row]:
    """Yield the times and the memory of class folders, then of shards."""
    images, in_shards, rounds = effort.pick((20_000, 1_000, 2), (100_000, 5_000, 3), (1_000_000, 50_000, 3))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield from _class_folders(folder / "folders", images, rounds)
        yield from _shards(folder / "shards", in_shards, rounds)


def _class_folders(folder: Path, images: int, rounds: int) -> Iterator[Row]:
    root, cache, settings = folder / "train", folder / "cache", {"images": images, "classes": CLASSES}
    for label in range(CLASSES):
        (root / f"n{label:08d}").mkdir(parents=True)
        for number in range(images // CLASSES):
            os.mknod(root / f"n{label:08d}" / f"n{label:08d}_{number:05d}.JPEG")
    _age(root, *root.iterdir())
    ImageFolder(root, cache=cache)  # fills the cache

    def resume() -> None:
        GlobalBatchSampler(0, len(ImageFolder(root, cache=cache)), 4096).batch(3, images // 4096 // 2)

    sources: Cases = {
        "folders: torchvision's ImageFolder": lambda: TorchvisionFolder(root),
        "folders: listed": lambda: ImageFolder(root),
        "folders: from the cache": lambda: ImageFolder(root, cache=cache),
    }
    cases = {**sources, "folders: from the cache, and a position": resume}
    yield from compare(cases, next(iter(cases)), settings, 0, 1, rounds, resident=True)
    yield from _memory(sources, images, settings)


def _shards(folder: Path, images: int, rounds: int) -> Iterator[Row]:
    root, cache, settings = folder / "train", folder / "cache", {"images": images}
    write_shards(Synthetic(images, size=1, classes=CLASSES), root, images_per_shard=5000)
    index = (root / "index.npz").rename(folder / "index.npz")
    _age(*root.glob("*.tar"))
    Shards(root, cache=cache)  # fills the cache

    def from_index() -> Shards:
        index.rename(root / "index.npz")
        try:
            return Shards(root)
        finally:
            (root / "index.npz").rename(index)

    sources: Cases = {
        "shards: scanned": lambda: Shards(root),
        "shards: from the cache": lambda: Shards(root, cache=cache),
        "shards: from their index": from_index,
    }
    yield from compare(sources, "shards: scanned", settings, 0, 1, rounds, resident=True)
    yield from _memory({"shards: from their index": from_index}, images, settings)


def _memory(sources: Cases, images: int, settings: dict) -> Iterator[Row]:
    """Yield the bytes per image that each source keeps; the first is the baseline of the others."""
    kept, most = {}, {}
    for name, make in sources.items():
        case = f"{name}: memory"
        tracemalloc.start()
        source = make()
        kept[case], most[case] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del source
    for row in over({case: size / images for case, size in kept.items()}, next(iter(kept)), "bytes/image", settings):
        row.settings = {**settings, "peak_mib": most[row.case] / 2**20}
        if len(kept) == 1:
            row.baseline = row.ratio = None
        yield row


def _age(*paths: Path) -> None:
    """Make them look an hour old: the listing of a folder that has just changed is not cached."""
    then = time.time() - 3600
    for path in paths:
        os.utime(path, (then, then))
