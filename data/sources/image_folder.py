"""Reads a folder of class folders, as ImageNet is usually unpacked:

    root/class_a/anything.jpg
    root/class_a/deeper/anything.png
    root/class_b/...

Labels are the positions of the class folders in sorted order, images are sorted by path within their class, so that
index i is the same image on every machine. A folder without classes has its images directly in it or in folders of any depth.

Names that begin with a dot are ignored (`.ipynb_checkpoints`, macOS's `._x.jpg`); other files that are no images are counted,
by kind. So are links to the folder of another class, or to one around the root: their images would get a second label.

The listing takes 16 bytes an image plus its name: 47 MB for ImageNet's 1.28 million. It is current as long as the time of
change of every folder below the root is the same; a file system sets it when an entry comes, goes or is renamed. So the check
costs one stat per folder and none per file, which is most of the time that listing takes on a network disk.
"""

import os
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from crossbatch.data.decode import decode, readable_extensions
from crossbatch.data.sources.listing import (
    Arrays,
    Names,
    cached,
    counted,
    files_beside,
    kind_of,
    pack_counts,
    pack_names,
    unpack_counts,
)

_VERSION = 1  # of the listing
_NO_CLASS = "."  # stands for the one folder of images without classes


class ImageFolder:
    """Reads the images under `root`, one class per folder; a `Source`.

    With `classless`, the folders are no classes and the images have no labels. `cache` is the folder where the listing is
    kept. Raises ValueError if there are no images, or a class has none, and OSError if a folder cannot be read. `passed_over`
    counts the files that are not among the images, by kind.
    """

    has_files = True

    def __init__(self, root: str | Path, cache: Path | None = None, classless: bool = False):
        self.folder, self._root, self.has_labels = Path(root), str(root), not classless
        listing = cached(
            root,
            cache,
            lambda arrays: _is_current(self._root, arrays, classless),
            lambda: _list(self._root, classless),
        )
        self._folders = Names(listing, "classes").unpack()
        self.class_names = ["unlabelled"] if classless else self._folders
        self._folder_of = self.labels = listing["labels"]  # two names: evaluation images get the labels of training
        self._names = Names(listing, "names")
        self.passed_over = unpack_counts(listing, "passed_over")
        names = zlib.crc32(self._names.text.tobytes(), zlib.crc32(self._names.stops.tobytes()))
        self.checksum = zlib.crc32("\n".join(self._folders).encode(errors="surrogateescape"), names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of image `index` relative to the root, as `class/file`."""
        return f"{self._folders[self._folder_of[index]]}/{self._names[index]}".removeprefix(f"{_NO_CLASS}/")

    def read(self, index: int) -> bytes:
        """Return the file of image `index`. Raises OSError."""
        return Path(self._root, self.name(index)).read_bytes()

    def open(self, index: int) -> Image.Image:
        """Return the decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))


def list_classes(root: str | Path) -> list[str]:
    """Return the sorted names of the class folders in `root`."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list(root: str, classless: bool) -> tuple[Arrays, int]:
    """Return the listing, and the latest change of any folder in it (ns)."""
    changes = {"": os.stat(root).st_mtime_ns}  # noqa: PTH116
    readable = readable_extensions()
    beside = {} if classless else files_beside(root)
    passed_over = Counter(
        {f"{kind} outside class folders" if kind in readable else kind: n for kind, n in beside.items()}
    )
    folders = [_NO_CLASS] if classless else list_classes(root)
    images = {name: _relative_names(root, name, changes, passed_over) for name in folders}
    if not any(images.values()) and (classless or not images):
        held = f" (it holds {counted(passed_over)})" if passed_over else ""
        raise ValueError(
            f"{root} has no class folders{' and no images' if classless else ''}{held}; allowed: images as "
            f"{root}/<class>/<file>, or, to train without labels, in folders of any depth; read are {', '.join(readable)}"
        )
    empty = [name for name, names in images.items() if not names]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{root}: {len(empty)} of {len(images)} class folders hold no images ({', '.join(readable)}): {shown}; "
            f"fill or remove them{f' (passed over: {counted(passed_over)})' if passed_over else ''}"
        )
    arrays = {
        "version": np.array(_VERSION),
        "labels": np.repeat(np.arange(len(images), dtype=np.int64), [len(names) for names in images.values()]),
        **pack_names("names", chain.from_iterable(images.values())),
        **pack_names("classes", images),
        **pack_counts("passed_over", passed_over),
        **pack_names("extensions", readable),
        **pack_names("folders", changes),
        "changes_ns": np.array(list(changes.values()), dtype=np.int64),
    }
    return arrays, max(changes.values())


def _relative_names(root: str, class_name: str, changes: dict[str, int], passed_over: Counter[str]) -> list[str]:
    """Return the sorted paths of the images of a class, relative to its folder.

    `changes` gets the time of the last change of each folder (ns), `passed_over` the other files by kind. scandir saves a
    stat per file. A folder that is reached twice (by a link to one above it) counts once.
    """
    names, folders, seen, readable = [], [""], set(), readable_extensions()
    while folders:
        prefix = folders.pop()
        folder = f"{class_name}/{prefix}"
        status = os.stat(f"{root}/{folder}")  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        changes[folder] = status.st_mtime_ns  # as of before the listing: a change during it is noticed next time
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(readable):
                    names.append(prefix + entry.name)
                elif not entry.is_dir():
                    passed_over[kind_of(entry.name)] += 1
                elif entry.is_symlink() and _is_foreign(root, class_name, entry.path):
                    passed_over["links out of a class folder"] += 1
                else:
                    folders.append(f"{prefix}{entry.name}/")
    return sorted(names)


def _is_foreign(root: str, class_name: str, link: str) -> bool:
    """Return whether a link leads to a folder that holds images of other classes: in `root` but not in the class, or above."""
    top, own, target = (f"{os.path.realpath(path)}/" for path in (root, f"{root}/{class_name}", link))
    return top.startswith(target) or (target.startswith(top) and not target.startswith(own))


def _is_current(root: str, arrays: Arrays, classless: bool) -> bool:
    if (Names(arrays, "classes").unpack() == [_NO_CLASS]) != classless:
        return False
    if (*Names(arrays, "extensions").unpack(),) != readable_extensions():  # KeyError: of an earlier version
        return False
    folders = Names(arrays, "folders").unpack()
    changes_ns = [os.stat(f"{root}/{folder}").st_mtime_ns for folder in folders]  # noqa: PTH116
    unpack_counts(arrays, "passed_over")  # KeyError: an earlier version did not count
    return int(arrays["version"]) == _VERSION and changes_ns == arrays["changes_ns"].tolist()
