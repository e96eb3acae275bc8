"""Opens CIFAR-10, CIFAR-100, Flowers-102 and Oxford-IIIT Pets as torchvision.datasets downloads, checks and lists them.

The files of Flowers and Pets may also lie in the folder itself, as their authors pack them. Published transfer results train
Flowers on train and val. Pets always has 37 classes, also where a folder holds fewer, so that a classifier of a part fits the
whole.
"""

import socket
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossbatch.data.decode import decode, encode_bmp

# scheme: torchvision's class, its folder in DIR, and the parts of a set of files, the last of them to evaluate
_SETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", ()),
    "cifar100": ("CIFAR100", "cifar-100-python", ()),
    "flowers": ("Flowers102", "flowers-102", ("train", "val", "test")),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet", ("trainval", "test")),
}
SCHEMES = tuple(_SETS)
_AS_PACKED = {
    "flowers": "setid.mat",
    "pets": "annotations/trainval.txt",
}  # a file in DIR where the authors' archive lies
MARKERS = {  # what a folder holds that should be opened by a scheme
    **{folder: scheme for scheme, (_, folder, _) in _SETS.items()},
    **{file: scheme for scheme, file in _AS_PACKED.items()},
}
_NUM_PETS = 37
_TIMEOUT_S = 30  # for a server that does not answer; torchvision sets none


class TorchvisionImages:
    """Holds the images of a data set as files, or decoded in one array `pixels` (CIFAR, 154 MB for 50,000); a `Source`."""

    has_labels = True

    def __init__(self, folder: Path, names: list[str], labels: list[int], class_names: list[str], pixels: Any = None):
        self.labels, self.class_names = np.array(labels, dtype=np.int64), class_names
        self._folder, self._names, self._pixels = folder, names, pixels
        self.has_files = pixels is None
        self.checksum = zlib.crc32("\n".join(names).encode())

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        if self._pixels is not None:
            return encode_bmp(self.open(index))
        return Path(self._folder, self._names[index]).read_bytes()

    def open(self, index: int) -> Image.Image:
        return decode(self.read(index)) if self._pixels is None else Image.fromarray(self._pixels[index])


def open_set(scheme: str, directory: str, split: str) -> TorchvisionImages:
    """Open the `split` ("train" or "eval") of a data set. Raises ValueError if torchvision does not find or read it."""
    kind, folder, _ = _SETS[scheme]
    try:
        if scheme in _AS_PACKED:
            return _open_files(scheme, Path(directory), split)
        cifar, part = _dataset(kind, directory, train=split == "train"), "train" if split == "train" else "test"
        names = [f"{part}/{cifar.classes[label]}/{number:05d}" for number, label in enumerate(cifar.targets)]
        return TorchvisionImages(Path(directory), names, cifar.targets, cifar.classes, cifar.data)
    except (OSError, RuntimeError, ValueError) as error:  # torchvision's "not found or corrupted" is a RuntimeError
        raise ValueError(
            f"{scheme}://{directory} cannot be opened ({str(error).split('. You can')[0]}); it needs the files of "
            f"torchvision.datasets.{kind} in {Path(directory, folder)}; open_source(path, download=True) fetches them"
        ) from error


def download_set(scheme: str, directory: str) -> None:
    """Download a data set into `directory` unless its files are there. Raises ValueError if that fails."""
    kind, folder, _ = _SETS[scheme]
    if scheme in _AS_PACKED and Path(directory, _AS_PACKED[scheme]).exists():
        return
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


def _open_files(scheme: str, directory: Path, split: str) -> TorchvisionImages:
    """Let torchvision list the files, in its folder or in `directory` itself, which it then sees through a link."""
    kind, folder, parts = _SETS[scheme]
    base = directory / folder if (directory / folder).is_dir() else directory
    with tempfile.TemporaryDirectory() as root:
        Path(root, folder).symlink_to(base.absolute())
        opened = [_dataset(kind, root, part) for part in parts]
    chosen = opened[:-1] if split == "train" else opened[-1:]
    labels = [label for part in chosen for label in part._labels]
    if scheme == "flowers":
        images, class_names = "jpg", list(opened[0].classes)
        files = [file.name for part in chosen for file in part._image_files]
    else:
        breeds = {
            label: name for part in opened for label, name in zip(sorted({*part._labels}), part.classes, strict=True)
        }
        images, class_names = "images", [breeds.get(label, f"Breed {label + 1}") for label in range(_NUM_PETS)]
        files = [file.name for part in chosen for file in part._images]
    absent = sorted({*files} - {entry.name for entry in (base / images).iterdir()})
    if absent:
        raise ValueError(f"{len(absent)} of {len(files)} images are not in {base / images}, the first: {absent[0]}")
    if not files or not 0 <= min(labels) <= max(labels) < len(class_names):
        raise ValueError(f"it lists no image, or a label that is not from 1 to {len(class_names)}")
    return TorchvisionImages(base, [f"{images}/{file}" for file in files], labels, class_names)
