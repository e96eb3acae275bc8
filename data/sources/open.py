"""Turns a data path into a `Source`: images by index, with their labels. `open_source` lists the paths.

A new kind of source is a class with the members of `Source` in a module of its own, with a branch here and in `location`.
"""

import contextlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from crossbatch.data.sources import torchvision_sets
from crossbatch.data.sources.image_folder import ImageFolder, list_classes
from crossbatch.data.sources.location import parse
from crossbatch.data.sources.shapes import write_shapes
from crossbatch.data.sources.shards import Shards, list_shards
from crossbatch.data.sources.synthetic import Synthetic

SPLITS = {"train": ("train",), "eval": ("val", "test")}  # the folders a split may lie in, the first that exists
_TREE = (
    "expected\n"
    "  {root}/train/<class>/<image>.jpg   (jpg, jpeg, png, webp, bmp)\n"
    "  {root}/val/<class>/<image>.jpg     (or test/; only to evaluate, with the same class names)\n"
    "or tar shards with members <key>.jpg and <key>.cls\n"
    "  {root}/train/<name>.tar\n"
    "  {root}/val/<name>.tar              (or test/)"
)


@runtime_checkable
class Source(Protocol):
    """Gives images by index. It must be picklable, as workers get copies; several threads may call `read` and `open`.

    If it has an attribute `has_files` that is True, `open` does nothing but decode what `read` returns, so that a backend may
    decode the files in a faster way, to the same pixels.
    """

    labels: np.ndarray  # int64 [len]; -1 of an image that cannot be read
    class_names: list[str]
    has_labels: bool  # False: `labels` are all 0 and mean nothing

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the encoded file of image `index` as it is (a BMP where there is no file). Raises OSError."""
        ...

    def open(self, index: int) -> Image.Image:
        """Return image `index` in RGB, fully decoded as `decode` does. Raises OSError; BrokenImage is one."""
        ...

    def name(self, index: int) -> str:
        """Return what to call image `index` in a log."""
        ...


def prepare(path: str | Path, cache: Path | None = None) -> None:
    """Download (cifar10, cifar100, flowers, pets) or generate (shapes) the images of `path` if they are not there.

    One process calls it before all of them open `path`. If `cache` is given, the listing of a folder is kept there, so that
    the other processes need not list it again.

    Raises:
        ValueError: `path` is malformed, or its images cannot be downloaded or written.
        OSError: a folder cannot be read.
    """
    scheme, target, options = parse(path)
    if scheme in torchvision_sets.SCHEMES:
        torchvision_sets.download_set(scheme, target)
    if scheme == "shapes":
        try:
            write_shapes(target, **options)
        except OSError as error:
            raise ValueError(f"cannot write {target} ({error}); choose a writable folder") from error
    if cache is not None and scheme in ("", "shapes"):
        _open_folder(_split_folder(Path(target), "train"), cache)
        with contextlib.suppress(ValueError):  # raised again when somebody evaluates
            _open_folder(_split_folder(Path(target), "eval"), cache)


def has_evaluation_split(path: str | Path) -> bool:
    """Return whether `open_source(path, "eval")` has something to open. Raises ValueError if `path` is malformed."""
    scheme, target, _ = parse(path)
    both = scheme == "synthetic" or scheme in torchvision_sets.SCHEMES
    return both or any(Path(target, name).is_dir() for name in SPLITS["eval"])


def open_source(path: str | Path, split: str = "train", cache: Path | None = None, download: bool = False) -> Source:
    """Open the training images (`split` "train") or the evaluation images ("eval") of `path`.

        /data/imagenet                            a folder with train/ and, to evaluate, val/ or test/; these hold
                                                  <class>/<image> or tar shards in webdataset's conventions
        cifar10://DIR, cifar100://DIR,            the files of torchvision.datasets in the folder DIR
        flowers://DIR, pets://DIR
        synthetic://1000?size=64&classes=10       1000 images computed from their index, without a disk
        shapes://DIR?train=4000&val=800&size=64   small labelled drawings, generated into DIR

    Args:
        path: a folder, or one of the above.
        split: "train" or "eval".
        cache: a folder in which the listing of `path` is kept until its files change; None lists them each time.
        download: first download or generate the images if they are not there, as `prepare` does. Among several
            processes, let one of them do so before the others open `path`.

    Returns:
        a `Source`: its length, `labels` (int64 [len]), `class_names`, and images by index.

    Raises:
        TypeError: `path` is neither a str nor a Path.
        ValueError: `path` is not there, malformed, or not laid out as expected.
        OSError: a folder cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` (={split!r}) must be one of {', '.join(SPLITS)}")
    if download:
        prepare(path, cache)
    scheme, target, options = parse(path)
    if scheme == "synthetic":
        count = int(target) if split == "train" else options["eval"] or max(int(target) // 10, 1)
        return Synthetic(count, options["size"], options["classes"], split=int(split == "eval"))
    if scheme in torchvision_sets.SCHEMES:
        return torchvision_sets.open_set(scheme, target, split)
    root = Path(target)
    if scheme == "shapes" and not root.exists():
        raise ValueError(f"{root} does not exist; write it with open_source(path, download=True) or prepare(path)")
    folder = _split_folder(root, split)
    source = _open_folder(folder, cache)
    if split == "eval":
        _match_classes(_split_folder(root, "train"), folder, source, cache)
    return source


def _split_folder(root: Path, split: str) -> Path:
    tree = _TREE.format(root=root)
    if not root.exists():
        raise ValueError(f"{root} does not exist (looked from {Path.cwd()}); give a folder; {tree}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give a folder (unpack archives first); {tree}")
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    for marker, scheme in torchvision_sets.MARKERS.items():
        if (root / marker).exists():
            raise ValueError(f"{root} holds {marker} but no folder 'train'; give {scheme}://{root}")
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    wanted = " or ".join(f"'{name}'" for name in SPLITS[split])
    raise ValueError(f"{root} has no folder {wanted} (it holds: {found}); {tree}")


def _open_folder(folder: Path, cache: Path | None) -> ImageFolder | Shards:
    shards = list_shards(folder)
    if not shards:
        return ImageFolder(folder, cache)
    if list_classes(folder):
        raise ValueError(
            f"{folder} holds tar files ({shards[0]}, ...) and folders ({list_classes(folder)[0]}, ...), but must hold "
            f"only one kind; move the others away"
        )
    return Shards(folder, cache)


def _match_classes(train: Path, folder: Path, source: ImageFolder | Shards, cache: Path | None) -> None:
    """Raise ValueError unless the labels of `train` and of `source` mean the same; give `source` the names of `train`.

    Labels are positions in the class names, so the names must be equal. Shards without an index of ours have numbers only;
    these must lie in the range of the training labels.
    """
    training = Shards(train, cache) if list_shards(train) else None
    trained, evaluated = training.class_names if training else list_classes(train), source.class_names
    shards = [opened for opened in (training, source) if isinstance(opened, Shards)]
    for opened in shards:
        if not opened.has_labels:
            raise ValueError(
                f"the shards in {opened.folder} have no labels (members <key>.cls), which evaluation needs; add them, or "
                f"move {folder} away"
            )
    if not all(opened.has_class_names for opened in shards):
        if len(evaluated) > len(trained):
            raise ValueError(
                f"{folder} has labels up to {len(evaluated) - 1}, but {train} only up to {len(trained) - 1}; both must number "
                f"the same classes"
            )
    elif trained != evaluated:
        only = {train: sorted({*trained} - {*evaluated}), folder: sorted({*evaluated} - {*trained})}
        shown = [
            f"only in {where}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for where, names in only.items()
            if names
        ]
        raise ValueError(
            f"{train} and {folder} have different classes ({'; '.join(shown) or 'the same names in another order'}); labels "
            f"are numbered by the names, so both need the same names"
        )
    source.class_names = trained
