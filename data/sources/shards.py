"""Reads tar shards, a folder of `*.tar` files in webdataset's conventions, with random access.

A network disk that is slow with a million small files is quick with a hundred large ones. Members that follow each other and
share a key (the path up to the first dot of the file name) are one sample. Its image ends with `.jpg` or another of
`decode.readable_extensions`, its label, a whole number as text, with `.cls`. Where several members of a key do, those that are
equal up to the last dot belong together, so that a dot in a file's name does no harm. All other members are passed over, and
counted by kind:

    train/index.npz
    train/train-000000.tar    [0000.cls][0000.jpg] [0001.cls][0001.jpg] ... [blocks of zeros]

An index says where each image lies, so that any order can be read. `index.npz` is written by `shard_writer`, with the class
names. Other shards are scanned once, and the result is kept in the cache for as long as names, sizes and times of change of
the shards stay the same.

The folder may lie on a disk or be a `RemoteFolder`.

No image ever gets another one's label. A shard that is damaged when it is scanned, or whose size differs from the index, is an
error. Each read compares a checksum of the image's header and of the whole label member with the index, so that an image of a
shard that was rewritten or exchanged since is a broken image. An image takes 40 bytes of memory and its name.
"""

import functools
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from crossbatch.data.decode import BrokenImage, decode, readable_extensions
from crossbatch.data.sources.listing import (
    Arrays,
    Names,
    cached,
    counted,
    files_beside,
    kind_of,
    load,
    pack_counts,
    pack_names,
    save,
    unpack_counts,
)

INDEX = "index.npz"
_VERSION = 1  # of the index
_BLOCK = tarfile.BLOCKSIZE  # a member is a header of 512 bytes, then its data, padded to 512
_NO_LABEL = -1
_MEMBER = re.compile(r"(((?:.*/)?[^./]+)(?:\.[^/]+)?)\.([^/.]+)", re.DOTALL)  # stem, key, last extension
_HIDDEN = re.compile(r"(.*/)?\.[^/]*", re.DOTALL)
_LABEL = re.compile(rb"\s*\d{1,6}\s*")
_SCANNERS = 16  # threads: scanning waits for a disk
_OPEN_FILES = 64  # of one process; each is opened once as long as it is among the last read
# Places are bytes from the start of the shard; those of a label are 0 where there is none.
_IMAGE = np.dtype([("offsets", "i8"), ("lengths", "u4"), ("label_offsets", "i8"), ("labels", "i8"), ("checks", "u4")])
_COLUMNS = _IMAGE.names or ()


class ShardFolder(Protocol):
    """Gives access to a folder of shards, on a disk or elsewhere. `str` of it names it in messages."""

    def shards(self) -> dict[str, tuple[int, int]]:
        """Return {name: (size in bytes, a number that changes with the content)} of the tar files, sorted by name."""
        ...

    def index(self) -> Arrays | None:
        """Return the content of index.npz; None if there is none. Raises ValueError if it is damaged."""
        ...

    def beside(self) -> Counter[str]:
        """Count the files in the folder by kind, without hidden ones."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a shard to scan it."""
        ...

    def images(self, shards: Sequence[str], ends: np.ndarray, spans: np.ndarray) -> "ImageBytes":
        """Return a reader of n images: those before `ends[i]` lie in `shards[i]` (or earlier), at the bytes `spans` [n, 2]."""
        ...


class ImageBytes(Protocol):
    """Reads parts of shards. Several threads may use it, and processes get copies."""

    def reader(self, index: int) -> Callable[[int, int], bytes]:
        """Return a function that reads (offset, length) around image `index`, fewer bytes where the shard ends."""
        ...

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read images that will be asked for next."""
        ...


class Shards:
    """Reads the images in the shards of `folder`; a `Source`.

    If no image has a label, all are of one class, and `has_labels` is False. Otherwise an image without one has the label
    -1 and counts as broken. `cache` is the folder where a scan is kept. Raises ValueError if there is nothing to read, a
    shard is damaged, or the index is not that of the shards; OSError if one cannot be read. `passed_over` counts members,
    and files beside the shards, that are no part of a sample, by kind.
    """

    has_files = True

    def __init__(self, folder: str | Path | ShardFolder, cache: Path | None = None):
        files = LocalFolder(Path(folder)) if isinstance(folder, str | Path) else folder
        self.folder = Path(folder) if isinstance(folder, str | Path) else str(folder)
        index = _read_index(files, cache)
        self._shards = Names(index, "shards").unpack()
        self._ends = np.cumsum(index["counts"])  # of each shard's images
        self._names = Names(index, "names")
        self._index = [index[column] for column in _COLUMNS]
        self.checksum = zlib.crc32(self._names.text.tobytes(), zlib.crc32(index["checks"].tobytes()))
        self._images = files.images(self._shards, self._ends, _spans(index))
        beside = files.beside()
        self.passed_over = Counter({kind: count for kind, count in beside.items() if kind not in (".tar", ".npz")})
        self.passed_over += unpack_counts(index, "passed_over") if "passed_over" in index else Counter()
        self.labels = index["labels"]
        self.class_names = Names(index, "classes").unpack()
        self.has_class_names = bool(self.class_names)  # else the labels are numbers, as webdataset has them
        self.has_labels = bool((self.labels != _NO_LABEL).any())
        if not self.has_labels:
            self.labels, self.class_names = np.zeros_like(self.labels), ["unlabelled"]
        if not self.class_names:
            self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the name of image `index` as `shard/member`."""
        return f"{self._shard(index)}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        """Return the member of image `index`. Raises OSError, and BrokenImage if it is not what the index says."""
        if self.labels[index] == _NO_LABEL:
            raise BrokenImage("no label: no .cls member of the same key beside it")
        offset, length, label_offset, _, check = (int(column[index]) for column in self._index)
        read = self._images.reader(index)
        member = read(offset - _BLOCK, _BLOCK + length)
        if len(member) < _BLOCK + length:
            raise BrokenImage(f"the shard is cut off: this image should end at byte {offset + length}")
        if _checksum(read, member[:_BLOCK], label_offset) != check:
            raise BrokenImage(
                f"the shard does not match its index; if it was rewritten, remove {INDEX} to have the shards scanned again"
            )
        return member[_BLOCK:]

    def open(self, index: int) -> Image.Image:
        """Return the decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read images that will be asked for next, where that takes time."""
        self._images.read_ahead([index for index in indices if self.labels[index] != _NO_LABEL])

    def _shard(self, index: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]


def list_shards(folder: Path) -> list[str]:
    """Return the sorted names of the tar files in `folder`."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_shard(entry.name) and not entry.is_dir())


def is_shard(name: str) -> bool:
    """Return whether a file of that name is a shard."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def write_index(folder: Path, class_names: list[str]) -> None:
    """Scan the shards in `folder` and write `index.npz` beside them; no `class_names` means that labels are just numbers."""
    index, _ = _scan_all(LocalFolder(folder), class_names)
    del index["changes_ns"]  # of this copy of the shards
    save(folder / INDEX, index)


class LocalFolder:
    """Reads the shards in a folder on a disk; a `ShardFolder`."""

    def __init__(self, path: Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def shards(self) -> dict[str, tuple[int, int]]:
        """Return {name: (size, time of change in ns)}."""
        statuses = {name: (self._path / name).stat() for name in list_shards(self._path)}
        return {name: (status.st_size, status.st_mtime_ns) for name, status in statuses.items()}

    def index(self) -> Arrays | None:
        """Return the content of index.npz; None if there is none. Raises ValueError if it is damaged."""
        return load(self._path / INDEX) if (self._path / INDEX).exists() else None

    def beside(self) -> Counter[str]:
        """Count the files in the folder by kind."""
        return files_beside(self._path)

    def open(self, name: str) -> BinaryIO:
        """Open a shard to scan it."""
        return (self._path / name).open("rb")

    def images(self, shards: Sequence[str], ends: np.ndarray, spans: np.ndarray) -> "ImageBytes":
        """Return a reader of the images that uses positioned reads (os.pread)."""
        return _LocalImages(self._path, shards, ends)


class _LocalImages:
    """Reads around images by positioned reads, which threads and forked processes may share."""

    def __init__(self, folder: Path, shards: Sequence[str], ends: np.ndarray):
        self._folder, self._shards, self._ends = folder, shards, ends

    def reader(self, index: int) -> Callable[[int, int], bytes]:
        """Return a function that reads (offset, length) in the shard of image `index`."""
        return self._open(self._shards[int(np.searchsorted(self._ends, index, side="right"))]).read

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Do nothing, because the operating system reads ahead."""

    @functools.cached_property
    def _open(self) -> Callable[[str], "_ShardFile"]:
        return functools.lru_cache(_OPEN_FILES)(lambda name: _ShardFile(self._folder / name))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_open"}


class _ShardFile:
    """Keeps a shard open. Closes when nobody holds it."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer where the file ends."""
        data = os.pread(self._file.fileno(), length, offset)
        while len(data) < length and (more := os.pread(self._file.fileno(), length - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _checksum(read: Callable[[int, int], bytes], image_header: bytes, label_offset: int) -> int:
    """Return the checksum of all that ties a label to an image: the image's header and the label's whole member."""
    label_member = read(label_offset - _BLOCK, 2 * _BLOCK) if label_offset else b""
    return zlib.crc32(image_header, zlib.crc32(label_member))


def _spans(index: Arrays) -> np.ndarray:
    """Return where the bytes begin and end that reading an image takes: its member, and that of its label (int64 [n, 2])."""
    first, last = index["offsets"] - _BLOCK, index["offsets"] + index["lengths"]
    labels = index["label_offsets"]
    begin = np.where(labels > 0, np.minimum(first, labels - _BLOCK), first)
    return np.stack([begin, np.where(labels > 0, np.maximum(last, labels + _BLOCK), last)], axis=1)


def _read_index(folder: ShardFolder, cache: Path | None) -> Arrays:
    """Load the index from beside the shards or from `cache`, or scan the shards."""
    file = f"{folder}/{INDEX}"
    try:
        index = folder.index()
        if index is not None:
            _require_consistent(index)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it to have the shards scanned again") from error
    if index is None:
        return cached(str(folder), cache, lambda kept: _is_current(folder, kept), lambda: _scan_all(folder, []))
    indexed = dict(zip(Names(index, "shards").unpack(), index["sizes"].tolist(), strict=True))
    found = {name: size for name, (size, _) in folder.shards().items()}
    for name in sorted({*indexed, *found}):
        if indexed.get(name) != found.get(name):
            raise ValueError(
                f"{file} is not the index of these shards: {name} has {found.get(name, 'no')} bytes in the folder and "
                f"{indexed.get(name, 'no')} in the index; remove {file} to have the shards scanned again, or restore "
                f"the shards that it was written for"
            )
    return index


def _is_current(folder: ShardFolder, index: Arrays) -> bool:
    _require_consistent(index)
    unpack_counts(index, "passed_over")  # KeyError: an earlier version did not count
    if (*Names(index, "extensions").unpack(),) != readable_extensions():
        return False
    return all(np.array_equal(index[field], values) for field, values in _facts(folder.shards()).items())


def _facts(shards: dict[str, tuple[int, int]]) -> Arrays:
    """Return the names, sizes and times of change (ns) of shards: while these are the same, so is what a scan found."""
    return {
        **pack_names("shards", shards),
        "sizes": np.array([size for size, _ in shards.values()], dtype=np.int64),
        "changes_ns": np.array([changed for _, changed in shards.values()], dtype=np.int64),
    }


def _require_consistent(index: Arrays) -> None:
    """Raise ValueError or KeyError unless the index is one of ours and whole."""
    if int(index["version"]) != _VERSION:
        raise ValueError(f"its version is {index['version']}, but only {_VERSION} can be read")
    num_images, num_classes = len(Names(index, "names")), len(Names(index, "classes")) or 10**6
    if {len(index[column]) for column in _COLUMNS} | {int(index["counts"].sum())} != {num_images}:
        raise ValueError("its columns differ in length")
    if index["labels"].min() < _NO_LABEL or index["labels"].max() >= num_classes:
        raise ValueError("a label is out of range")


def _scan_all(folder: ShardFolder, class_names: list[str]) -> tuple[Arrays, int]:
    """Return what an index holds, by the headers of all shards, and the latest time of change of a shard (ns)."""
    shards = folder.shards()
    facts = _facts(shards)
    with ThreadPoolExecutor(_SCANNERS) as threads:
        scans = list(threads.map(functools.partial(_scan, folder), shards))
    images = np.concatenate([found for _, found, _ in scans])
    passed_over = sum((kinds for _, _, kinds in scans), Counter())
    if not len(images):
        held = f" (they hold {counted(passed_over)})" if passed_over else ""
        raise ValueError(
            f"the tar files in {folder} ({len(shards)}) hold no images{held}; allowed: members such as 0000.jpg (or "
            f"{', '.join(readable_extensions()[1:])}) and 0000.cls, its label as a number"
        )
    index = {
        "version": np.array(_VERSION),
        **facts,
        "counts": np.array([len(names) for names, _, _ in scans], dtype=np.int64),
        **pack_names("names", chain.from_iterable(names for names, _, _ in scans)),
        **{column: images[column].copy() for column in _COLUMNS},
        **pack_names("classes", class_names),
        **pack_counts("passed_over", passed_over),
        **pack_names("extensions", readable_extensions()),
    }
    return index, int(facts["changes_ns"].max())


def _scan(folder: ShardFolder, shard: str) -> tuple[list[str], np.ndarray, Counter[str]]:
    """Return the names of a shard's images, where they lie (`_IMAGE` [n]), and the kinds of the members that are neither image
    nor label. Raises ValueError if the shard is damaged."""
    names, images, passed_over, where = [], [], Counter(), f"{folder}/{shard}"
    with folder.open(shard) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        for _, group in groupby(_members(file, where, passed_over), key=lambda member: member[0]):
            for image, label in _samples(list(group), passed_over):
                label_offset, number = 0, _NO_LABEL
                if label is not None:
                    label_offset = label.offset_data
                    text = read(label_offset, min(label.size, _BLOCK + 1))
                    if len(text) > _BLOCK or not _LABEL.fullmatch(text):
                        raise ValueError(
                            f"{where}: the label of {image.name} is {text[:20]!r}; allowed: a whole number below 10^6"
                        )
                    number = int(text)
                check = _checksum(read, read(image.offset_data - _BLOCK, _BLOCK), label_offset)
                names.append(image.name)
                images.append((image.offset_data, image.size, label_offset, number, check))
    return names, np.array(images, dtype=_IMAGE), passed_over


def _samples(
    members: list[tuple[str, str, str, tarfile.TarInfo]], passed_over: Counter[str]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Yield (image, label or None) of the members (key, stem, extension, member) of one key.

    An image takes the label of its own stem, which is its name up to the last dot. One image may take that of the key instead
    (`k.image.jpg` and `k.cls`), if possible the one that is called like it (`k.jpg`).
    """
    images, labels = [], {}
    for key, stem, extension, member in members:
        if extension == "cls" and stem not in labels:
            labels[stem] = member
        elif f".{extension}" in readable_extensions():
            images.append((key, stem, member))
        else:
            passed_over["second .cls of a key" if extension == "cls" else kind_of(f"x.{extension}")] += 1
    taken, used = set(), set()
    for key, stem, image in sorted(images, key=lambda image: image[1] != image[0]):
        if stem in taken or (taken and stem not in labels):
            passed_over["second image of a key"] += 1
            continue
        taken.add(stem)
        used |= {stem if stem in labels else key}
        yield image, labels.get(stem, labels.get(key))
    if unused := len(labels.keys() - used):
        passed_over[".cls without an image"] += unused


def _members(file: BinaryIO, where: str, passed_over: Counter[str]) -> Iterator[tuple[str, str, str, tarfile.TarInfo]]:
    """Yield (key, stem, extension, member) of the files in a shard, and count the others.

    Raises ValueError if it does not end as a tar file does.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end, parts = tar.offset, _MEMBER.fullmatch(member.name)
                if parts is not None and member.isreg() and not member.issparse():
                    yield parts[2], parts[1], parts[3].lower(), member
                elif not (member.isdir() or _HIDDEN.fullmatch(member.name)):
                    kind = "hard link" if member.islnk() else "link" if member.issym() else None
                    passed_over[kind or kind_of(member.name)] += 1
            # tarfile takes a damaged header for the end of the archive.
            file.seek(end)
            rest = file.read()
            if len(rest) < _BLOCK or rest.strip(b"\0"):
                raise ValueError("the zeros at the end of the archive are missing")
    except OSError:
        raise
    except Exception as error:  # tarfile parses in plain Python: damage may raise anything
        raise ValueError(
            f"{where} is cut off or damaged after byte {end} ({error}); write it again, or move it away"
        ) from error
