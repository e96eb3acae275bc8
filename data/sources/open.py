"""What images there are. A path in the configuration (`crossbatch.data.path`, or `--data`) is one of

    /some/folder                                  a folder with train/ and, to evaluate on, val/ or test/. In these lie
                                                  <class>/<image> (image_folder.py), or tar shards (shards.py)
    cifar10://DIR, cifar100://DIR                 torchvision's files in DIR; `prepare` downloads them (cifar.py)
    flowers://DIR, pets://DIR                     Flowers-102 and Oxford-IIIT Pets as their authors pack them (flowers.py,
                                                  pets.py)
    synthetic://1000?size=64&classes=10           1000 images computed from their index (synthetic.py); no disk
    shapes://DIR?train=4000&val=800&size=64       DIR, after `prepare` wrote small labelled drawings there (shapes.py)

`open_source` turns it into a `Source`. A new kind of source is a class with the six members of the protocol in a file of
its own, and one more branch here and in location.py.
"""

import contextlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from crossbatch import InputError
from crossbatch.data.sources import cifar, flowers, pets, shapes
from crossbatch.data.sources.image_folder import ImageFolder, list_classes
from crossbatch.data.sources.location import Location, parse
from crossbatch.data.sources.shard_index import list_shards
from crossbatch.data.sources.shards import Shards
from crossbatch.data.sources.synthetic import Synthetic

SPLITS = {"train": ("train",), "eval": ("val", "test")}  # the folders a split may lie in, the first that exists
_WITH_BOTH_SPLITS = ("synthetic", "cifar10", "cifar100", "flowers", "pets")
_TELL_TALES = {  # what a folder holds that is opened by a scheme
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "setid.mat": "flowers",
    flowers.LAYOUT.folder: "flowers",
    "annotations/trainval.txt": "pets",
    pets.LAYOUT.folder: "pets",
}
_TREE = (
    "expected\n"
    "  {root}/train/<class>/<image>.jpg   (jpg, jpeg, png, webp, bmp)\n"
    "  {root}/val/<class>/<image>.jpg     (or test/; only to evaluate, with the same class names)\n"
    "or tar shards with members <key>.jpg and <key>.cls\n"
    "  {root}/train/<name>.tar\n"
    "  {root}/val/<name>.tar              (or test/)"
)


class Source(Protocol):
    """Images by index. Must pickle: workers each get a copy. `read` and `open` may be called from several threads."""

    labels: np.ndarray  # int64 [len]; -1 of an image that cannot be read
    class_names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded file of image `index` as it is (JPEG, PNG, ...; a BMP where there is no file). Raises OSError."""
        ...

    def open(self, index: int) -> Image.Image:
        """Image `index`, fully decoded, mode RGB, as decode.py says; for files, `decode(read(index))`. Raises OSError."""
        ...

    def name(self, index: int) -> str:
        """What to call image `index` in a log."""
        ...


def prepare(path: str | Path, key: str = "crossbatch.data.path", cache: Path | None = None):
    """What one process does before all of them open `path`: generate it (shapes://), download it (cifar10://), or list it
    into the folder `cache`. Raises InputError, naming `key`.
    """
    location = parse(path, key)
    if location.scheme in ("cifar10", "cifar100"):
        cifar.download(location.scheme, location.target, key)
        return
    if location.scheme == "shapes":
        options = {name: value for name, value in location.options.items() if value is not None}
        try:
            shapes.write_shapes(location.target, **options, key=key)
        except OSError as error:
            raise InputError(
                f"{key}: cannot write {location.target} ({error}); name a folder that can be written"
            ) from error
    if cache is not None and location.scheme in ("", "shapes"):
        root = Path(location.target)
        _open_folder(_split_folder(root, "train", key), key, cache)
        with contextlib.suppress(InputError):  # who evaluates will hear of it
            _open_folder(_split_folder(root, "eval", key), key, cache)


def has_evaluation_split(path: str | Path, key: str = "crossbatch.data.path") -> bool:
    """Whether `open_source(path, "eval")` has something to open."""
    location = parse(path, key)
    return location.scheme in _WITH_BOTH_SPLITS or any(Path(location.target, name).is_dir() for name in SPLITS["eval"])


def open_source(path: str | Path, split: str, key: str = "crossbatch.data.path", cache: Path | None = None) -> Source:
    """The training images (`split` "train") or the evaluation images ("eval") of `path`.

    In the folder `cache`, what was found in a folder of images or shards is kept until that changes.

    Raises:
        InputError: `path` is not there, malformed or not laid out as expected; the message starts with `key`.
    """
    if split not in SPLITS:
        raise ValueError(f"split (={split!r}) must be one of {', '.join(SPLITS)}")
    location = parse(path, key)
    if location.scheme == "synthetic":
        return _open_synthetic(location, split)
    if location.scheme in ("cifar10", "cifar100"):
        return cifar.Cifar(location.scheme, location.target, split, key)
    if location.scheme == "flowers":
        return flowers.open_flowers(location.target, split, key)
    if location.scheme == "pets":
        return pets.open_pets(location.target, split, key)
    root = Path(location.target)
    folder = _split_folder(root, split, key)
    source = _open_folder(folder, key, cache)
    if split == "eval":
        _match_classes(_split_folder(root, "train", key), folder, source, key, cache)
    return source


def _open_synthetic(location: Location, split: str) -> Synthetic:
    count, size, classes = int(location.target), location.options["size"], location.options["classes"]
    assert size is not None and classes is not None
    if split == "train":
        return Synthetic(count, size, classes, split=0)
    return Synthetic(location.options["eval"] or max(count // 10, 1), size, classes, split=1)


def _split_folder(root: Path, split: str, key: str) -> Path:
    tree = _TREE.format(root=root)
    if not root.exists():
        raise InputError(f"{key}: {root} does not exist (looked from {Path.cwd()}); give a folder; {tree}")
    if not root.is_dir():
        raise InputError(f"{key}: {root} is a file; give a folder (unpack archives first); {tree}")
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    for part, scheme in _TELL_TALES.items():
        if (root / part).exists():
            raise InputError(f"{key}: {root} holds {part} but no folder 'train'; give {scheme}://{root}")
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    wanted = " or ".join(f"'{name}'" for name in SPLITS[split])
    raise InputError(f"{key}: {root} has no folder {wanted} (it holds: {found}); {tree}")


def _open_folder(folder: Path, key: str, cache: Path | None) -> ImageFolder | Shards:
    shards = list_shards(folder)
    if not shards:
        return ImageFolder(folder, key, cache)
    if list_classes(folder):
        raise InputError(
            f"{key}: {folder} holds tar files ({shards[0]}, ...) and folders ({list_classes(folder)[0]}, ...), so it is "
            f"either shards or class folders; move the others away"
        )
    return Shards(folder, key, cache)


def _match_classes(train: Path, folder: Path, source: ImageFolder | Shards, key: str, cache: Path | None):
    """Labels are positions in the class names, so they mean the same only if the names do. Shards without an index of ours
    have numbers only; they must lie in the range of the training labels. `source` gets the names of the training classes.
    """
    training = Shards(train, key, cache) if list_shards(train) else None
    names = training.class_names if training else list_classes(train)
    shards = [opened for opened in (training, source) if isinstance(opened, Shards)]
    for opened in shards:
        if not opened.has_labels:
            raise InputError(
                f"{key}: the shards in {opened.folder} have no labels (members <key>.cls), which evaluation needs; add "
                f"them, or move {folder} away"
            )
    if all(opened.has_class_names for opened in shards):
        _require_same_names(train, names, folder, source.class_names, key)
    elif len(source.class_names) > len(names):
        raise InputError(
            f"{key}: {folder} has labels up to {len(source.class_names) - 1}, {train} only up to {len(names) - 1}; the "
            f"two must number the same classes"
        )
    source.class_names = names


def _require_same_names(train: Path, trained: list[str], folder: Path, evaluated: list[str], key: str):
    if trained == evaluated:
        return
    differences = [
        f"only in {where}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for where, names in ((train, set(trained) - set(evaluated)), (folder, set(evaluated) - set(trained)))
        if names
    ] or ["the same names in another order"]
    raise InputError(
        f"{key}: {train} and {folder} have different classes ({'; '.join(differences)}); labels are numbered by the "
        f"names, so make the two lists equal"
    )
