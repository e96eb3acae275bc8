"""A folder of class folders, as ImageNet is usually unpacked:

    root/class_a/anything.jpg
    root/class_a/deeper/anything.png
    root/class_b/...

Labels are the positions of the class folders in sorted order, images are sorted by path within their class, so that
index i is the same image on every machine. Names that begin with a dot are ignored (`.ipynb_checkpoints`, macOS's
`._x.jpg`).

Storage is compact on purpose. ImageNet as 1.28 million Python strings is ~150 MB, and every worker process comes to
own a copy as soon as it touches the reference counts (fork's copy-on-write is per page). Here it is one bytes object
and two integer arrays, ~45 MB, that workers share and that pickles at once where workers are not forked.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from crossbatch import InputError
from crossbatch.data.decode import decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # compared in lower case


class ImageFolder:
    """The images under `root`, one class per folder; a `Source`. Raises InputError (naming `key`) if there are none."""

    def __init__(self, root: str | Path, key: str = "crossbatch.data.path"):
        self._root = str(root)
        self.class_names = list_classes(root)
        per_class = [_relative_names(os.path.join(self._root, name)) for name in self.class_names]  # noqa: PTH118
        _require_images(self._root, self.class_names, per_class, key)
        encoded = [os.fsencode(name) for names in per_class for name in names]
        self._names = b"".join(encoded)
        self._stops = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.labels = np.repeat(np.arange(len(per_class)), [len(names) for names in per_class]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of image `index` relative to the root, as `class/file`."""
        start = int(self._stops[index - 1]) if index else 0
        file = os.fsdecode(self._names[start : int(self._stops[index])])
        return f"{self.class_names[self.labels[index]]}/{file}"

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises OSError."""
        return Path(self._root, self.name(index)).read_bytes()

    def open(self, index: int) -> Image.Image:
        """The decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))


def list_classes(root: str | Path) -> list[str]:
    """The sorted names of the class folders in `root`."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _relative_names(folder: str) -> list[str]:
    """Sorted paths of the images below `folder`, relative to it. scandir spares a stat per file (on NFS)."""
    names, folders = [], [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(f"{folder}/{prefix}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    names.append(prefix + entry.name)
                elif entry.is_dir():
                    folders.append(f"{prefix}{entry.name}/")
    return sorted(names)


def _require_images(root: str, class_names: list[str], per_class: list[list[str]], key: str):
    if not class_names:
        raise InputError(
            f"{key}: {root} has no class folders; the images belong in {root}/<class>/<file>, with one "
            f"folder (any name) if there are no classes"
        )
    empty = [name for name, names in zip(class_names, per_class, strict=True) if not names]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise InputError(
            f"{key}: {len(empty)} of {len(class_names)} class folders in {root} hold no images "
            f"({', '.join(EXTENSIONS)}): {shown}; fill or remove them"
        )
