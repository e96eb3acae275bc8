"""CIFAR-10, CIFAR-100, Flowers-102 and Oxford-IIIT Pets, as torchvision.datasets downloads, checks and lists them.

    scheme     train                 eval           files in DIR
    cifar10    50,000 images         10,000         cifar-10-batches-py/
    cifar100   50,000                10,000         cifar-100-python/
    flowers    train + val (2040)    test (6149)    flowers-102/ with setid.mat, imagelabels.mat, jpg/
    pets       trainval (3680)       test (3669)    oxford-iiit-pet/ with annotations/, images/

The files of Flowers and Pets may also lie in DIR itself, as their authors pack them. Published transfer results train Flowers
on train and val. Pets always has 37 classes, also where a folder holds fewer, so that a classifier of a part fits the whole.
torchvision is imported when the first of these data sets is opened.
"""

import socket
import tempfile
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossbatch.data.decode import decode, encode_bmp

# scheme: torchvision's class, its folder in DIR, and the parts of a listed set, of which the last one is to evaluate
_SETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", ()),
    "cifar100": ("CIFAR100", "cifar-100-python", ()),
    "flowers": ("Flowers102", "flowers-102", ("train", "val", "test")),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet", ("trainval", "test")),
}
SCHEMES = tuple(_SETS)
MARKERS = {  # what a folder holds that should be opened by a scheme
    **{folder: scheme for scheme, (_, folder, _) in _SETS.items()},
    "setid.mat": "flowers",
    "annotations/trainval.txt": "pets",
}
_NUM_PETS = 37
_TIMEOUT_S = 30  # for a server that does not answer; torchvision sets none


class CifarImages:
    """Holds CIFAR's images, which lie decoded in one array (154 MB for 50,000); a `Source`."""

    has_labels = True

    def __init__(self, dataset: Any, folder: str):
        self.labels = np.array(dataset.targets, dtype=np.int64)
        self.class_names: list[str] = dataset.classes
        self._pixels: np.ndarray = dataset.data  # uint8 [len, 32, 32, 3]
        self._folder = folder

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self._folder}/{self.class_names[self.labels[index]]}/{index:05d}"

    def read(self, index: int) -> bytes:
        return encode_bmp(self.open(index))

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])


class ListedImages:
    """Reads the image files of a list; a `Source`.

    Raises ValueError if there are none, a label has no class, or a file is missing: a list that names missing files belongs
    to another folder, or to half of one, which is no matter of a few broken images.
    """

    has_labels = True

    def __init__(self, folder: Path, names: list[str], labels: list[int], class_names: list[str]):
        self.labels, self.class_names = np.array(labels, dtype=np.int64), class_names
        self._folder, self._names = folder, names
        absent = sorted(set(names) - {entry.name for entry in folder.iterdir()})
        if absent:
            raise ValueError(f"{len(absent)} of {len(names)} images are not in {folder}, the first: {absent[0]}")
        if not names or not 0 <= min(labels) <= max(labels) < len(class_names):
            raise ValueError(f"lists no image, or a label that is not from 1 to {len(class_names)}")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self._folder.name}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        return (self._folder / self._names[index]).read_bytes()

    def open(self, index: int) -> Image.Image:
        return decode(self.read(index))


def open_set(scheme: str, directory: str, split: str) -> CifarImages | ListedImages:
    """Open the `split` ("train" or "eval") of a data set. Raises ValueError if torchvision does not find or read it."""
    kind, folder, parts = _SETS[scheme]
    try:
        if parts:
            return _open_listed(scheme, Path(directory), split)
        return CifarImages(_dataset(kind, directory, split == "train"), "train" if split == "train" else "test")
    except (OSError, RuntimeError, ValueError) as error:  # torchvision's "not found or corrupted" is a RuntimeError
        raise ValueError(
            f"{scheme}://{directory} cannot be opened ({str(error).split('. You can')[0]}); expected are the files of "
            f"torchvision.datasets.{kind} in {Path(directory, folder)}; open_source(path, download=True) fetches them"
        ) from error


def download_set(scheme: str, directory: str) -> None:
    """Download a data set into `directory` unless its files are there. Raises ValueError if that fails."""
    kind, folder, _ = _SETS[scheme]
    if any(Path(directory, marker).exists() for marker, of in MARKERS.items() if of == scheme and marker != folder):
        return  # as the authors pack it
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        _dataset(kind, directory, download=True)
    except Exception as error:  # of the network, the disk, the archive
        raise ValueError(
            f"{scheme}://{directory} cannot be downloaded ({type(error).__name__}: {error}); on a machine with network access "
            f"run torchvision.datasets.{kind}({directory!r}, download=True), and copy {Path(directory, folder)} from there"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _dataset(kind: str, *arguments: Any, **options: Any) -> Any:
    from torchvision import datasets  # takes a second, and is not needed for other sources

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, over how old CIFAR's pickles are
        return getattr(datasets, kind)(*arguments, **options)


def _open_listed(scheme: str, directory: Path, split: str) -> ListedImages:
    """Let torchvision list the files, in its folder or in `directory` itself, which it then sees through a link."""
    kind, folder, parts = _SETS[scheme]
    base = directory / folder if (directory / folder).is_dir() else directory
    with tempfile.TemporaryDirectory() as root:
        Path(root, folder).symlink_to(base.absolute())
        opened = [_dataset(kind, root, part) for part in parts]
    files = [part._image_files if scheme == "flowers" else part._images for part in opened]
    names = [[file.name for file in part] for part in files]
    labels = [part._labels for part in opened]
    if scheme == "flowers":
        images, class_names = base / "jpg", list(opened[0].classes)
    else:
        pairs = zip(chain(*names), chain(*labels), strict=True)
        breeds = {label: name.rpartition("_")[0].replace("_", " ").title() for name, label in pairs}
        images, class_names = base / "images", [breeds.get(n, f"Breed {n + 1}") for n in range(_NUM_PETS)]
    chosen = slice(-1) if split == "train" else slice(-1, None)
    return ListedImages(images, [*chain(*names[chosen])], [*chain(*labels[chosen])], class_names)
