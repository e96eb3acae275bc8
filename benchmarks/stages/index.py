"""Measures the start before the first image: listing a million files, or reading the cached listing, beside torchvision's.

The files are empty and lie in a temporary folder (an inode each), as 1000 classes with names like ImageNet's; a shard's
images are one pixel. "a position" is what a resumed run asks for next: the order of an epoch, and a batch in its middle.
All this runs on what the operating system has in memory: the first listing of a cold or a network disk takes longer.
Memory is what Python and numpy keep allocated for the source.
"""

import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder as TorchvisionFolder

from benchmarks.measure import Cases, compare, summarise
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
    in_folders, in_shards = effort.pick((20_000, 1_000), (100_000, 5_000), (1_000_000, 50_000))
    with tempfile.TemporaryDirectory() as temporary:
        for make, images in ((_class_folders, in_folders), (_shards, in_shards)):
            cases, settings = make(Path(temporary), images), {"images": images, "classes": CLASSES}
            yield from compare(cases, settings, effort, resident=True)
            kept = {f"{case}: memory": [_kept_bytes(call) / images] for case, call in cases.items()}
            yield from summarise(kept, settings, "bytes/image")


def _class_folders(folder: Path, images: int) -> Cases:
    root, cache = folder / "train", folder / "cache"
    for label in range(CLASSES):
        (root / f"n{label:08d}").mkdir(parents=True)
        for number in range(images // CLASSES):
            os.mknod(root / f"n{label:08d}" / f"n{label:08d}_{number:05d}.JPEG")
    _age(root, *root.iterdir())
    ImageFolder(root, cache=cache)  # fills the cache

    def resume() -> ImageFolder:
        source = ImageFolder(root, cache=cache)
        GlobalBatchSampler(0, len(source), 4096).batch(3, images // 4096 // 2)
        return source

    return {
        "folders: torchvision's ImageFolder": lambda: TorchvisionFolder(root),
        "folders: listed": lambda: ImageFolder(root),
        "folders: from the cache": lambda: ImageFolder(root, cache=cache),
        "folders: from the cache, and a position": resume,
    }


def _shards(folder: Path, images: int) -> Cases:
    indexed, bare, cache = folder / "indexed", folder / "bare", folder / "cache of shards"
    write_shards(Synthetic(images, size=1, classes=CLASSES), indexed, images_per_shard=5000)
    shutil.copytree(indexed, bare, copy_function=os.link, ignore=shutil.ignore_patterns("index.npz"))
    _age(*bare.glob("*.tar"))
    Shards(bare, cache=cache)  # fills the cache
    return {
        "shards: scanned": lambda: Shards(bare),
        "shards: from the cache": lambda: Shards(bare, cache=cache),
        "shards: from their index": lambda: Shards(indexed),
    }


def _kept_bytes(make: Callable[[], object]) -> int:
    """Return the bytes that are allocated for what `make` returns."""
    tracemalloc.start()
    source = make()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del source
    return kept


def _age(*paths: Path) -> None:
    """Make them look an hour old: the listing of a folder that has just changed is not cached."""
    then = time.time() - 3600
    for path in paths:
        os.utime(path, (then, then))
