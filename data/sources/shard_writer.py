"""Writes the images of any source as tar shards in webdataset's conventions, with their index.

The images are put in random order, once: a run whose `shuffle_window` reads neighbours together should not get one class
at a time. An image is copied as it is. Its extension comes from its content, because simple readers choose the decoder by it
(in ImageNet, one PNG is called .JPEG). An image in another format than JPEG, PNG and WebP is stored as a PNG of its pixels.
"""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from crossbatch.data import counter
from crossbatch.data.decode import BrokenImage, ImagesLost, decode
from crossbatch.data.sources import Source
from crossbatch.data.sources.shards import write_index
from crossbatch.data.sources.subset import read_ahead

_AHEAD = 64  # images
_SIGNATURES = {"jpg": (0, b"\xff\xd8\xff"), "png": (0, b"\x89PNG\r\n\x1a\n"), "webp": (8, b"WEBP")}  # at which byte


class UnreadableImage(OSError):
    """Raised when an image cannot be read though its file may be intact: no permission, or a disk that is gone."""


@dataclass
class Written:
    """Counts what `write_shards` has written."""

    shards: int = 0
    images: int = 0
    skipped: list[str] = field(default_factory=list)  # names of the images that are broken, with the reason


def write_shards(
    source: Source,
    folder: Path,
    images_per_shard: int,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> Written:
    """Write `source` to `folder` as NAME-000000.tar, ... (NAME is that of `folder`) and index.npz; completely or not at all.

    The same source and seed give the same bytes. `advance` is called with the number of images done since the last call.
    Files that are no image at all are left out; damage further inside shows only when they are decoded.

    Raises:
        OSError: if `folder` exists or cannot be written.
        UnreadableImage: if an image cannot be read: a disk that is gone must not make the data set smaller. It is an OSError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    draft = folder.with_name(f"{folder.name}.writing")
    draft.mkdir(parents=True)
    written = Written()
    try:
        order = np.argsort(counter.bits(counter.SHARD_ORDER, seed, np.arange(len(source))), kind="stable")
        numbered = enumerate(_readable(source, order, written, advance))
        for number, images in groupby(numbered, key=lambda image: image[0] // images_per_shard):
            with tarfile.open(draft / f"{folder.name}-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for image, (label, extension, encoded) in images:
                    if source.has_labels:  # first, as webdataset sorts them
                        _add(tar, f"{image:09d}.cls", str(label).encode())
                    _add(tar, f"{image:09d}.{extension}", encoded)
                    written.images = image + 1
            written.shards = number + 1
        if written.images:
            write_index(draft, source.class_names if source.has_labels else [])
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _readable(
    source: Source, order: np.ndarray, written: Written, advance: Callable[[int], object]
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (label, extension, encoded image) in `order`."""
    for number, index in enumerate(order.tolist()):
        if number % _AHEAD == 0:
            read_ahead(source, order[number : number + 2 * _AHEAD])
        try:
            encoded = source.read(index)
            storable = _storable(encoded)
        except BrokenImage as error:
            written.skipped.append(f"{source.name(index)}: {error}")
        except (OSError, ImagesLost) as error:
            raise UnreadableImage(f"{source.name(index)}: {getattr(error, 'strerror', None) or error}") from error
        else:
            yield int(source.labels[index]), *storable
        advance(1)


def _storable(encoded: bytes) -> tuple[str, bytes]:
    """Return an image's extension and the bytes to store. Raises BrokenImage."""
    for extension, (start, signature) in _SIGNATURES.items():
        if encoded[start : start + len(signature)] == signature:
            return extension, encoded
    file = io.BytesIO()
    decode(encoded).save(file, "PNG")
    return "png", file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))
