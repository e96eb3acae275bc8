"""The index of a folder of tar shards: where in which shard each image lies, what its label is, and how to tell.

`index.npz` beside the shards is written by `launch/convert.py shards` and holds the class names, too. Shards of other make
have none: they are scanned once, and the result is kept in the run's cache for as long as names, sizes and times of change
of the shards stay as they were.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from crossbatch import InputError
from crossbatch.data.sources.listing import Arrays, Names, cache_file, cached, load, pack_names, save, unpack_names
from crossbatch.data.sources.shard_scan import BLOCK, LARGEST_LABEL, NO_LABEL, ShardFile, scan

INDEX = "index.npz"
_VERSION = 1  # of the index
_SCANNERS = 16  # threads: scanning waits for a disk
_COLUMNS = ("offsets", "lengths", "label_offsets", "labels", "checks", "defects")  # an array each, beside the names


def read_index(folder: Path, key: str, cache: Path | None) -> Arrays:
    """From beside the shards, or from `cache`, or by a scan. Raises InputError, naming `key`, and OSError."""
    file = folder / INDEX
    try:
        arrays = load(file)
        _require_consistent(arrays)
    except FileNotFoundError:
        return cached(
            cache_file(cache, folder) if cache else None,
            lambda arrays: _is_current(folder, arrays),
            lambda: _scanned(folder, key),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {file} is damaged ({error}); remove it, and the shards are scanned") from error
    _require_same_shards(folder, arrays, key)
    return arrays


def make_index(folder: Path, class_names: list[str] | None = None) -> Arrays:
    """What `index.npz` holds: scans the headers of all shards in `folder`. `class_names`: [] or None if only numbered."""
    names = list_shards(folder)
    sizes = [status.st_size for status in _statuses(folder, names)]
    with ThreadPoolExecutor(_SCANNERS) as threads:
        scans = list(threads.map(scan, (folder / name for name in names)))
    shard_names = [unpack_names(one, "names") for one in scans]
    starts = np.cumsum([0, *(len(packed.text) for packed in shard_names)], dtype=np.int64)
    stops = [packed.stops + start for packed, start in zip(shard_names, starts, strict=False)]
    return {
        "version": np.array(_VERSION),
        **pack_names("shards", names),
        "sizes": np.array(sizes, dtype=np.int64),
        "counts": np.array([len(one["labels"]) for one in scans], dtype=np.int64),
        "names": np.concatenate([packed.text for packed in shard_names]),
        "names_stops": np.concatenate(stops),
        **{column: np.concatenate([one[column] for one in scans]) for column in _COLUMNS},
        **pack_names("classes", class_names or []),
    }


def write_index(folder: Path, class_names: list[str]):
    """Scans the shards in `folder` and writes `index.npz` beside them."""
    save(folder / INDEX, make_index(folder, class_names))


def list_shards(folder: Path) -> list[str]:
    """The sorted names of the tar files in `folder`."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(".tar") and not entry.name.startswith(".") and not entry.is_dir()
        )


def _scanned(folder: Path, key: str) -> tuple[Arrays, int]:
    statuses = _statuses(folder, list_shards(folder))
    arrays = make_index(folder)
    if not len(arrays["labels"]):
        raise InputError(
            f"{key}: the {len(statuses)} tar files in {folder} hold no images; expected are members such as 0000.jpg "
            f"(or jpeg, png, webp) and 0000.cls, its label as a number"
        )
    arrays["changes_ns"] = np.array([status.st_mtime_ns for status in statuses], dtype=np.int64)
    return arrays, int(arrays["changes_ns"].max())


def _statuses(folder: Path, names: list[str]) -> list[os.stat_result]:
    return [(folder / name).stat() for name in names]


def _is_current(folder: Path, arrays: Arrays) -> bool:
    _require_consistent(arrays)
    names = list_shards(folder)
    if unpack_names(arrays, "shards").unpack() != names:
        return False
    now = [(status.st_size, status.st_mtime_ns) for status in _statuses(folder, names)]
    return now == list(zip(arrays["sizes"].tolist(), arrays["changes_ns"].tolist(), strict=True))


def _require_consistent(arrays: Arrays):
    """ValueError or KeyError unless the index is one of ours and points into the shards as they were."""
    if int(arrays["version"]) != _VERSION:
        raise ValueError(f"its version is {arrays['version']}, this program reads {_VERSION}")
    counts, sizes, names = arrays["counts"], arrays["sizes"], unpack_names(arrays, "names")
    per_image = [arrays[column] for column in _COLUMNS]
    if {len(column) for column in per_image} != {len(names)} or counts.sum() != len(names) or not len(names):
        raise ValueError("its columns differ in length")
    if len(counts) != len(sizes) or len(counts) != len(unpack_names(arrays, "shards")):
        raise ValueError("its shards differ in number")
    classes: Names | range = unpack_names(arrays, "classes") or range(LARGEST_LABEL + 1)
    labels, ends = arrays["labels"], arrays["offsets"] + arrays["lengths"]
    if labels.min() < NO_LABEL or labels.max() >= len(classes) or (ends > np.repeat(sizes, counts)).any():
        raise ValueError("a label or a place is out of range")


def _require_same_shards(folder: Path, arrays: Arrays, key: str):
    """An index beside other shards than its own is an error; a damaged shard of its own is not."""
    indexed, found = unpack_names(arrays, "shards").unpack(), list_shards(folder)
    remedy = f"remove {folder / INDEX}, and the shards are scanned, or bring back the shards it was written for"
    if indexed != found:
        differing = sorted(set(indexed) ^ set(found))
        where = "in the folder" if differing[0] in found else "in the index"
        raise InputError(
            f"{key}: {folder / INDEX} is not the index of these shards: {differing[0]} is only {where} "
            f"({len(indexed)} shards in the index, {len(found)} in the folder); {remedy}"
        )
    ends = np.cumsum(arrays["counts"])
    for number, (name, status) in enumerate(zip(found, _statuses(folder, found), strict=True)):
        size = int(arrays["sizes"][number])
        images = slice(int(ends[number] - arrays["counts"][number]), int(ends[number]))
        if status.st_size != size and not _is_what_is_left(folder / name, status.st_size, size, arrays, images):
            raise InputError(
                f"{key}: {folder / INDEX} is not the index of {name}: that has {status.st_size} bytes, the indexed one had "
                f"{size}; {remedy}"
            )


def _is_what_is_left(shard: Path, size: int, whole_size: int, arrays: Arrays, images: slice) -> bool:
    """Whether `shard` is what damage has left of the indexed one: it is shorter, and of the images that fit into it the
    first or the last is still the indexed one.
    """
    if size > whole_size:
        return False
    image_ends = arrays["offsets"][images] + arrays["lengths"][images]
    sample_ends = np.maximum(image_ends, arrays["label_offsets"][images] + BLOCK)
    fitting = images.start + np.flatnonzero((sample_ends <= size) & (arrays["defects"][images] == 0))
    file = ShardFile(shard)

    def is_indexed(image: int) -> bool:
        header = file.read(int(arrays["offsets"][image]) - BLOCK, BLOCK)
        return file.checksum(header, int(arrays["label_offsets"][image])) == arrays["checks"][image]

    return not len(fitting) or is_indexed(fitting[0]) or is_indexed(fitting[-1])
