"""Tar shards: a folder of `*.tar` files in webdataset's conventions (shard_scan.py), with random access.

A network disk that is slow with a million small files is quick with a hundred large ones. An index (shard_index.py) says
where each image lies, so that any order can be read, and a run resumed, without passing over what comes before:

    train/index.npz
    train/train-000000.tar
    train/train-000001.tar

An index may be copied beside the wrong shards, and a shard may be rewritten or break off. Each read therefore compares a
checksum of the image's header and of the whole member that holds its label with the index. What does not fit is a broken
image, never an image with another one's label. An image takes 41 bytes of memory and its name.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from crossbatch import InputError
from crossbatch.data.decode import BrokenImage, decode
from crossbatch.data.sources.listing import unpack_names
from crossbatch.data.sources.shard_index import INDEX, read_index
from crossbatch.data.sources.shard_scan import (
    BAD_LABEL,
    BLOCK,
    CUT_OFF,
    LARGEST_LABEL,
    NO_LABEL,
    WITHOUT_LABEL,
    ShardFile,
)

_OPEN_FILES = 64  # of one process; each is opened once as long as it is among the last read
_REASONS = {
    CUT_OFF: "the shard is cut off or damaged here",
    WITHOUT_LABEL: "no label: no .cls member of the same key beside it",
    BAD_LABEL: f"its .cls member is no whole number from 0 to {LARGEST_LABEL}",
}


class Shards:
    """The images in the shards of `folder`; a `Source`. `label` -1 is an image that cannot be read.

    If the shards hold no labels at all, all images are of one class. `cache` is the folder where a scan is kept. Raises
    InputError, naming `key`, if there is nothing to read or the index is not that of the shards.
    """

    def __init__(self, folder: str | Path, key: str = "crossbatch.data.path", cache: Path | None = None):
        self.folder = Path(folder)
        try:
            arrays = read_index(self.folder, key, cache)
        except OSError as error:
            raise InputError(f"{key}: cannot read {error.filename}: {error.strerror}; make it readable") from error
        self._shards = unpack_names(arrays, "shards").unpack()
        self._ends = np.cumsum(arrays["counts"])  # of each shard's images
        self._names = unpack_names(arrays, "names")
        self.labels = arrays["labels"]
        self.class_names = unpack_names(arrays, "classes").unpack()
        self.has_class_names = bool(self.class_names)  # else the labels are numbers, as webdataset has them
        self._offsets, self._lengths = arrays["offsets"], arrays["lengths"]
        self._label_offsets, self._checks, self._defects = arrays["label_offsets"], arrays["checks"], arrays["defects"]
        self.has_labels = bool((self.labels != NO_LABEL).any())
        if not self.has_labels:
            self._be_unlabelled(key)
        if not self.class_names:
            self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)]
        self._open = functools.lru_cache(_OPEN_FILES)(ShardFile)

    def _be_unlabelled(self, key: str):
        without = self._defects == WITHOUT_LABEL
        if not without.any():
            raise InputError(
                f"{key}: the shards in {self.folder} hold no image that can be used (of {len(self)}, the first: "
                f"{self.name(0)}: {_REASONS[int(self._defects[0])]}); repair or write them again"
            )
        self._defects = np.where(without, 0, self._defects)
        self.labels = np.where(without, 0, NO_LABEL)
        self.class_names = ["unlabelled"]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """As `shard/member`."""
        return f"{self._shard(index)}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        """The member of image `index`. Raises OSError, and BrokenImage if it is not what the index says."""
        if self._defects[index]:
            raise BrokenImage(_REASONS[int(self._defects[index])])
        file = self._open(self.folder / self._shard(index))
        offset, length = int(self._offsets[index]), int(self._lengths[index])
        member = file.read(offset - BLOCK, BLOCK + length)
        if len(member) < BLOCK + length:
            raise BrokenImage(f"the shard is cut off: this image should end at byte {offset + length}")
        if file.checksum(member[:BLOCK], int(self._label_offsets[index])) != self._checks[index]:
            raise BrokenImage(f"the shard is not what its index describes; if it was rewritten, remove {INDEX}")
        return member[BLOCK:]

    def open(self, index: int) -> Image.Image:
        """The decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))

    def _shard(self, index: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict):
        vars(self).update(state)
        self._open = functools.lru_cache(_OPEN_FILES)(ShardFile)
