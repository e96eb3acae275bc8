"""Keeps images of remote shards on a local disk, within a limit, for all processes and runs of a machine.

    DIR/shards/<digest of URL, size, ETag>     [sparse copy of the shard] [a checksum of each image, 0 while it is missing]
    DIR/shards/used                            number of bytes on the disk; locked by whoever writes

An image is written before its checksum and compared with it when it is read. So a process may be killed at any moment, and
readers need no lock. What somebody has used within the last hour is not removed for new images: every image is read once an
epoch, so any is as good as any other. (To drop the least recently read one for each that comes would keep few of those needed
next.) A cache on a disk that is full is no error; images are then read from the server.
"""

import fcntl
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_BLOCK = 4096  # of a disk
_IN_USE_S = 3600.0
_TOUCH_S = 600.0  # after so long, a file that is read is marked as in use
_FULL_S = 60.0  # until a full cache is looked at again
_log = logging.getLogger(__name__)


class ImageCache:
    """Counts and limits what is kept in `folder`. Raises ValueError if that cannot be written."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder / "shards", limit
        self._full_at: float | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise ValueError(
                f"the cache {folder} cannot be written ({error}); give a folder on a local disk"
            ) from error

    @property
    def has_room(self) -> bool:
        """Return whether there may be room for more images: none was found full or unwritable in the last minute."""
        return self._full_at is None or time.monotonic() - self._full_at > _FULL_S

    def open(self, digest: str, size: int) -> "CachedShard":
        """Return the kept part of a shard of `size` bytes."""
        return CachedShard(self._folder / digest, size)

    def write(self, shard: "CachedShard", first: int, data: bytes, begin: int, spans: np.ndarray) -> None:
        """Keep images from number `first` on, which lie at `spans` of the shard; `data` starts at byte `begin` of it."""
        if not self.has_room:
            return
        try:
            with self._locked() as books:
                if all(shard.has(first + number) for number in range(len(spans))):
                    return  # another process was faster
                used = int.from_bytes(os.pread(books, 8, 0), "little")
                needed = len(data) + 3 * _BLOCK  # parts of a block at both ends, and the checksums
                if used + needed > self._limit:
                    used = self._make_room(needed)
                fits = used + needed <= self._limit
                os.pwrite(books, (used + needed * fits).to_bytes(8, "little"), 0)
                if fits:
                    shard.put(first, data, begin, spans)
                else:
                    self._full_at = time.monotonic()
        except OSError as error:
            if self._full_at is None:
                _log.warning(
                    "the cache %s cannot be written (%s); images are read from the server", self._folder, error
                )
            self._full_at = time.monotonic()

    def _make_room(self, needed: int) -> int:
        """Empty files that nobody has used of late until `needed` bytes are free, and return how many are used."""
        found = [(one.stat().st_mtime, one.stat().st_blocks * 512, one.path) for one in os.scandir(self._folder)]
        used = sum(num_bytes for _, num_bytes, _ in found)
        for changed, num_bytes, path in sorted(found):
            if used + needed <= self._limit or time.time() - changed < _IN_USE_S:
                break
            if num_bytes and not path.endswith("used"):
                os.truncate(path, 0)  # processes that have it open find nothing in it
                used -= num_bytes
        return used

    @contextmanager
    def _locked(self) -> Iterator[int]:
        books = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(books, fcntl.LOCK_EX)
            yield books
        finally:
            os.close(books)


class CachedShard:
    """Reads and writes the images of one shard that are kept. Closes when nobody holds it."""

    def __init__(self, path: Path, size: int):
        self._checksums_at = -(-size // _BLOCK) * _BLOCK
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.utime(self._file)
        self._touched = time.monotonic()

    def has(self, number: int) -> bool:
        """Return whether image `number` of the shard is kept."""
        return self._checksum(number) > 0

    def read(self, number: int, begin: int, end: int) -> bytes | None:
        """Return bytes `begin` to `end` of the shard, which are image `number`; None if they are not kept whole."""
        expected = self._checksum(number)
        if not expected:
            return None
        if time.monotonic() - self._touched > _TOUCH_S:
            self._touched = time.monotonic()
            os.utime(self._file)
        data = os.pread(self._file, end - begin, begin)
        return data if len(data) == end - begin and _nonzero_checksum(data) == expected else None

    def put(self, first: int, data: bytes, begin: int, spans: np.ndarray) -> None:
        """Write images, and then their checksums, which make them count. Raises OSError if the disk is full."""
        checksums = [_nonzero_checksum(data[start - begin : end - begin]) for start, end in spans.tolist()]
        for what, where in (
            (data, begin),
            (np.array(checksums, dtype="<u4").tobytes(), self._checksums_at + 4 * first),
        ):
            if os.pwrite(self._file, what, where) < len(what):
                raise OSError("the disk is full")

    def _checksum(self, number: int) -> int:
        return int.from_bytes(os.pread(self._file, 4, self._checksums_at + 4 * number), "little")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _nonzero_checksum(data: bytes) -> int:
    return zlib.crc32(data) | 1
