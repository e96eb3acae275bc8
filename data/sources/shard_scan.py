"""Finds the samples of a tar shard by its headers: what an index holds.

The conventions are webdataset's. Members that follow each other and share a key (the path up to the first dot of the file
name) are one sample; the rest of the name says what a member is:

    [0000.cls][0000.jpg] [0001.cls][0001.jpg] ... [blocks of zeros]

Here `jpg`, `jpeg`, `png` and `webp` are the image and `cls` its label, a whole number as text; others are passed over. A
member is a header of 512 bytes, then its data, padded to 512.

A damaged shard gives what is whole in it. A sample that is not whole, and the place where a shard breaks off, become
entries with a `defect`, so that they count as broken images.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from crossbatch.data.sources.listing import Arrays, pack_names

BLOCK = tarfile.BLOCKSIZE
IMAGES = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1
CUT_OFF, WITHOUT_LABEL, BAD_LABEL = 1, 2, 3  # defects; 0 is none
LARGEST_LABEL = 10**6 - 1
_LONGEST_IMAGE = 2**32 - 1  # bytes, what uint32 holds
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_LABEL = re.compile(rb"\s*\d{1,6}\s*")


@dataclass
class Sample:
    """An image and its label in a shard. Places are bytes from the start of the shard."""

    name: str  # of the image's member, or what to call the place of a defect
    offset: int = 0  # of the image's data; its header is the block before
    length: int = 0
    label_offset: int = 0  # of the label's data, likewise; 0 if there is none
    label: int = NO_LABEL
    check: int = 0  # ShardFile.checksum
    defect: int = 0


class ShardFile:
    """A shard, open for positioned reads, which threads and forked processes may share. Closes when nobody holds it."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer where the file ends."""
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length and (more := os.pread(self._descriptor, length - len(data), offset + len(data))):
            data += more
        return data

    def checksum(self, image_header: bytes, label_offset: int) -> int:
        """Of all that ties a label to an image: the image's header (name, size, time) and the label's whole member."""
        label_member = self.read(label_offset - BLOCK, 2 * BLOCK) if label_offset else b""
        return zlib.crc32(image_header, zlib.crc32(label_member))

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def scan(shard: Path) -> Arrays:
    """The samples of `shard` in its order: an array per field of Sample. Raises OSError if it cannot be read at all."""
    with shard.open("rb") as file:
        members, breaks_off = _whole_members(file)
    file, samples = ShardFile(shard), []
    for _, group in groupby(_parsed(members), key=lambda parts: parts[0]):
        parts: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in group:
            parts.setdefault(extension, member)
        image = next((member for extension, member in parts.items() if extension in IMAGES), None)
        if image is not None and image.size <= _LONGEST_IMAGE:
            samples.append(_sample(file, image, parts.get("cls")))
    if breaks_off:
        if samples and samples[-1].defect == WITHOUT_LABEL:
            samples[-1].defect = CUT_OFF  # its label would have come next
        else:
            samples.append(Sample(breaks_off, defect=CUT_OFF))
    return _arrays(samples)


def _whole_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str]:
    """The members up to the end or to where the shard breaks off, and what to call that place ("" for the end)."""
    size = file.seek(0, 2)
    file.seek(0)
    members: list[tarfile.TarInfo] = []
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > size:
                    return members, member.name
                members.append(member)
                end = tar.offset
    except Exception:  # tarfile parses in plain Python: damage may raise anything
        return members, f"byte {end}"
    file.seek(end)
    rest = iter(lambda: file.read(1 << 20), b"")
    ends_in_zeros = size - end >= BLOCK and not any(chunk.strip(b"\0") for chunk in rest)
    return members, "" if ends_in_zeros else f"byte {end}"


def _parsed(members: list[tarfile.TarInfo]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of the files among `members`."""
    for member in members:
        parts = _MEMBER.fullmatch(member.name)
        if parts is not None and member.isreg() and not member.issparse():
            yield parts[1], parts[2].lower(), member


def _sample(file: ShardFile, image: tarfile.TarInfo, label: tarfile.TarInfo | None) -> Sample:
    sample = Sample(image.name, image.offset_data, image.size, defect=WITHOUT_LABEL)
    if label is not None:
        sample.label_offset = label.offset_data
        text = file.read(label.offset_data, min(label.size, BLOCK + 1))
        is_number = len(text) <= BLOCK and _LABEL.fullmatch(text)
        sample.label, sample.defect = (int(text), 0) if is_number else (NO_LABEL, BAD_LABEL)
    sample.check = file.checksum(file.read(image.offset_data - BLOCK, BLOCK), sample.label_offset)
    return sample


def _arrays(samples: list[Sample]) -> Arrays:
    def column(field: str, dtype: type) -> np.ndarray:
        return np.array([getattr(sample, field) for sample in samples], dtype=dtype)

    return {
        **pack_names("names", (sample.name for sample in samples)),
        "offsets": column("offset", np.int64),
        "lengths": column("length", np.uint32),
        "label_offsets": column("label_offset", np.int64),
        "labels": column("label", np.int64),
        "checks": column("check", np.uint32),
        "defects": column("defect", np.uint8),
    }
