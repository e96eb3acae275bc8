"""CIFAR-10 and CIFAR-100 as torchvision stores them: its own files, checked by their checksums, read into memory whole.

    DIR/cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch, batches.meta
    DIR/cifar-100-python/train, test, meta

A source of 50,000 images is an array of 154 MB, of which every worker process that was not forked has a copy.
"""

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from crossbatch import InputError
from crossbatch.data.decode import encode_bmp

_CLASSES: dict[str, type[datasets.CIFAR10]] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
_TIMEOUT_S = 30  # for a server that does not answer; torchvision sets none


class Cifar:
    """The images of `scheme` ("cifar10" or "cifar100") in `directory`; a `Source`. `split`: "train" or "eval".

    Raises InputError, naming `key`, if the files are not there or damaged.
    """

    def __init__(self, scheme: str, directory: str | Path, split: str, key: str = "crossbatch.data.path"):
        try:
            stored = _open(scheme, directory, train=split == "train")
        except (OSError, RuntimeError) as error:  # torchvision's "not found or corrupted" is a RuntimeError
            raise InputError(_missing(scheme, directory, f"{error}".split(". You can")[0], key)) from error
        self.labels = np.array(stored.targets, dtype=np.int64)
        self.class_names: list[str] = stored.classes
        self._pixels: np.ndarray = stored.data  # uint8 [len, 32, 32, 3]
        self._folder = "train" if split == "train" else "test"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self._folder}/{self.class_names[self.labels[index]]}/{index:05d}"

    def read(self, index: int) -> bytes:
        """Image `index` as a BMP."""
        return encode_bmp(self.open(index))

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])


def download(scheme: str, directory: str | Path, key: str = "crossbatch.data.path"):
    """Fetch the files into `directory` unless they are there. Raises InputError, naming `key`, if that fails."""
    try:
        with _socket_timeout(_TIMEOUT_S):
            _open(scheme, directory, download=True)
    except Exception as error:  # of the network, the disk, the archive
        reason = f"the download failed: {type(error).__name__}: {error}"
        raise InputError(_missing(scheme, directory, reason, key)) from error


def _open(scheme: str, directory: str | Path, train: bool = True, download: bool = False) -> datasets.CIFAR10:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, over how old these pickles are
        return _CLASSES[scheme](directory, train, download=download)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing(scheme: str, directory: str | Path, reason: str, key: str) -> str:
    kind = _CLASSES[scheme]
    files = [name for name, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    tree = "\n".join(f"  {Path(directory, kind.base_folder, name)}" for name in files)
    return (
        f"{key}: {scheme}://{directory} cannot be opened ({reason}); on a machine with network access download {kind.url}, "
        f"unpack it in {directory}, and see that it holds\n{tree}"
    )
