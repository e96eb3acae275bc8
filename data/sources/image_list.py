"""Images that a data set lists with their labels, in one folder: what flowers.py and pets.py have in common.

Whether the files exist is asked once, by listing the folder when it is opened: a list that names images which are not there
belongs to another folder or to half of one, which is no matter of a few broken images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from crossbatch import InputError
from crossbatch.data.decode import decode

_NAMED = 5  # missing images named


@dataclass(frozen=True)
class Layout:
    """The files of a data set as its authors pack them."""

    scheme: str  # of its path
    folder: str  # that torchvision unpacks it into
    parts: Mapping[str, str]  # a file, or a folder if it ends in "/" -> what it holds
    url: str

    def root(self, directory: str | Path, key: str) -> Path:
        """Where in `directory` the files lie: there, or in torchvision's folder. Raises InputError unless all are there."""
        nested = Path(directory, self.folder)
        root = nested if nested.is_dir() else Path(directory)
        missing = [
            part for part in self.parts if not ((root / part).is_dir() if part[-1] == "/" else (root / part).is_file())
        ]
        if missing:
            raise self.error(key, directory, f"{', '.join(missing)} missing in {root}")
        return root

    def error(self, key: str, directory: str | Path, reason: str) -> InputError:
        width = max(map(len, self.parts)) + 3
        tree = "\n".join(f"  {directory}/{part:{width}}{content}" for part, content in self.parts.items())
        return InputError(
            f"{key}: {self.scheme}://{directory} cannot be opened ({reason}); unpack the files of {self.url} so that there "
            f"is (in {directory}, or in its folder {self.folder}, as torchvision does)\n{tree}"
        )


class ImageList:
    """`files` in `folder`, of the classes `labels` (int64 [len]); a `Source`. Raises FileNotFoundError unless all are there."""

    def __init__(self, folder: Path, files: list[str], labels: np.ndarray, class_names: list[str]):
        there = {entry.name for entry in folder.iterdir()}
        absent = [file for file in files if file not in there]
        if absent:
            shown = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
            raise FileNotFoundError(f"{len(absent)} of {len(files)} images are not in {folder}: {shown}")
        self.labels, self.class_names = labels, class_names
        self._folder, self._files = folder, files

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """As `folder/file`."""
        return f"{self._folder.name}/{self._files[index]}"

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises OSError."""
        return (self._folder / self._files[index]).read_bytes()

    def open(self, index: int) -> Image.Image:
        """The decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))
