"""Turns a data path into a `Source`: images by index, with their labels. `open_source` lists the paths.

A new kind of source is a class with the members of `Source` in a module of its own, with a branch here and in `location`.
"""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from crossbatch.data.sources import torchvision_sets
from crossbatch.data.sources.classes import Classes, training_labels
from crossbatch.data.sources.image_folder import ImageFolder, list_classes
from crossbatch.data.sources.listing import counted
from crossbatch.data.sources.location import parse
from crossbatch.data.sources.shapes import write_shapes
from crossbatch.data.sources.shards import Shards, list_shards
from crossbatch.data.sources.synthetic import Synthetic

SPLITS = {
    "train": ("train",),
    "eval": ("val", "validation", "test"),
}  # the folders a split may lie in, the first that exists
_TREE = (
    "expected\n"
    "  {root}/train/<class>/<image>.jpg   (jpg, jpeg, png, webp, bmp)\n"
    "  {root}/val/<class>/<image>.jpg     (or validation/, test/; only to evaluate, classes of train/)\n"
    "or tar shards with members <key>.jpg and <key>.cls\n"
    "  {root}/train/<name>.tar\n"
    "  {root}/val/<name>.tar              (or validation/, test/)"
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
        with contextlib.suppress(ValueError, OSError):  # raised again when somebody evaluates
            _open_folder(_split_folder(Path(target), "eval"), cache)


def has_evaluation_split(path: str | Path) -> bool:
    """Return whether `open_source(path, "eval")` has something to open. Raises ValueError if `path` is malformed."""
    scheme, target, _ = parse(path)
    both = scheme == "synthetic" or scheme in torchvision_sets.SCHEMES
    return both or any(Path(target, name).is_dir() for name in SPLITS["eval"])


def open_source(path: str | Path, split: str = "train", cache: Path | None = None, download: bool = False) -> Source:
    """Open the training images (`split` "train") or the evaluation images ("eval") of `path`.

        /data/imagenet                            a folder with train/ and, to evaluate, val/, validation/ or test/, with
                                                  <class>/<image> or tar shards in webdataset's conventions
        cifar10://DIR, cifar100://DIR,            the files of torchvision.datasets in the folder DIR
        flowers://DIR, pets://DIR
        synthetic://1000?size=64,classes=10       1000 images computed from their index, without a disk
        shapes://DIR?train=4000,val=800&size=64   small labelled drawings, generated into DIR

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
        _take_training_labels(source, folder, _split_folder(root, "train"), cache)
    return source


def describe_source(source: Source) -> str:
    """Return in words how many images and classes `source` has, and what lies beside them that was passed over, by kind."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
    classes, of_training = int((counts > 0).sum()), len(source.class_names)
    words = f"{len(source):,} images, "
    words += f"{classes:,} classes" if source.has_labels else "no labels"
    if source.has_labels and classes < of_training:
        lacking = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
        words += f" of {of_training:,} (none of {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})"
    if unlabelled := int((source.labels < 0).sum()):
        words += f", {unlabelled:,} of them without a label"
    passed_over = Counter(getattr(source, "passed_over", {}))
    if passed_over:
        words += f" ({passed_over.total():,} files passed over: {counted(passed_over)})"
    folder: Path | None = getattr(source, "folder", None)
    return f"{words} in {folder.name}/" if folder else words


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


def _take_training_labels(source: ImageFolder | Shards, folder: Path, train: Path, cache: Path | None) -> None:
    """Give `source`, the evaluation images in `folder`, the class names and labels of the images in `train`.

    Raises ValueError if their classes cannot be matched; see `classes`.
    """
    training = Shards(train, cache) if list_shards(train) else None
    for shards in (training, source):
        if isinstance(shards, Shards) and not shards.has_labels:
            raise ValueError(
                f"the shards in {shards.folder} have no labels (members <key>.cls), which evaluation needs; add them, or "
                f"move {folder} away"
            )
    trained = _classes(train, training) if training else _folder_classes(train)
    of_training = training_labels(trained, _classes(folder, source))
    if of_training.tolist() != list(range(len(of_training))):
        source.labels = np.where(source.labels < 0, source.labels, of_training[source.labels])
    source.class_names = trained.names


def _classes(folder: Path, source: ImageFolder | Shards) -> Classes:
    are_numbers = isinstance(source, Shards) and not source.has_class_names
    return Classes(folder, source.class_names, are_numbers, np.unique(source.labels[source.labels >= 0]))


def _folder_classes(folder: Path) -> Classes:
    """Return the classes of class folders without listing their files: each holds images, or training cannot open them."""
    names = list_classes(folder)
    return Classes(folder, names, False, np.arange(len(names)))
