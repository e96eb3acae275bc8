"""Turns a data path into a `Source`: images by index, with their labels. `open_source` lists the paths.

A new kind of source is a class with the members of `Source` in a module of its own, with a branch here and in `location`.
"""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image

from crossbatch.data.sources import hugging_face, torchvision_sets
from crossbatch.data.sources.classes import Classes, training_labels
from crossbatch.data.sources.file_list import FileList
from crossbatch.data.sources.image_folder import ImageFolder, list_classes
from crossbatch.data.sources.listing import counted
from crossbatch.data.sources.location import REMOTE, Location, RemoteOptions, parse
from crossbatch.data.sources.shapes import write_shapes
from crossbatch.data.sources.shards import Shards, list_shards
from crossbatch.data.sources.subset import Subset
from crossbatch.data.sources.synthetic import Synthetic

SPLITS = {
    "train": ("train",),
    "eval": ("val", "validation", "test"),
}  # the folders a split may lie in, the first that exists
_FOLDERS = ("", "shapes")  # schemes of a folder with its splits
_TREE = (
    "expected\n"
    "  {root}/train/<class>/<image>.jpg   (jpg, png, webp, bmp, tif, gif, jp2, avif, heic)\n"
    "  {root}/val/<class>/<image>.jpg     (or validation/, test/; only to evaluate, classes of train/)\n"
    "or tar shards with members <key>.jpg and <key>.cls\n"
    "  {root}/train/<name>.tar\n"
    "  {root}/val/<name>.tar              (or validation/, test/)\n"
    "or, to train without labels, images or shards in {root} itself, images in folders of any depth"
)


_Labelled: TypeAlias = "ImageFolder | Shards | FileList | hugging_face.HuggingFaceImages"


@runtime_checkable
class Source(Protocol):
    """Gives images by index. It must be picklable, as workers get copies; several threads may call `read` and `open`.

    If it has an attribute `has_files` that is True, `open` does nothing but decode what `read` returns, so that a backend may
    decode the files in a faster way, to the same pixels. If it has a method `read_ahead(indices)`, loaders call it with images
    that they will read next.
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


def prepare(path: str | Path, cache: Path | None = None, remote: RemoteOptions | None = None) -> None:
    """Download (cifar10, cifar100, flowers, pets, hf) or generate (shapes) the images of `path` if they are not there.

    One process calls it before all of them open `path`. If `cache` is given, the listing of a folder is kept there, so that
    the other processes need not list it again. `remote` says how remote shards are read.

    Raises:
        ValueError: `path` is malformed, or its images cannot be downloaded or written.
        OSError: a folder cannot be read.
    """
    where = parse(path)
    if where.scheme in torchvision_sets.SCHEMES:
        torchvision_sets.download_set(where.scheme, where.target)
    if where.scheme == "hf":
        hugging_face.open_splits(where.target, where.options["config"], download=True)
    if where.scheme == "shapes":
        try:
            write_shapes(where.target, **where.options)
        except OSError as error:
            raise ValueError(f"cannot write {where.target} ({error}); choose a writable folder") from error
    if cache is not None and where.scheme in (*_FOLDERS, *REMOTE):
        _open(where, "train", cache, remote)
    if cache is not None and where.scheme in _FOLDERS:
        with contextlib.suppress(ValueError, OSError):  # raised again when somebody evaluates
            _open_folder(_split_folder(Path(where.target), "eval"), cache)


def has_evaluation_split(path: str | Path) -> bool:
    """Return whether `open_source(path, "eval")` has something to open.

    Raises ValueError if `path` is malformed, or (hf, remote shards) cannot be opened.
    """
    scheme, target, options, _ = parse(path)
    if scheme == "hf":
        found = [*hugging_face.open_splits(target, options["config"])]
        return hugging_face.split_name(target, found, options["eval"], SPLITS["eval"]) is not None
    if scheme in _FOLDERS:
        return any(Path(target, name).is_dir() for name in SPLITS["eval"])
    if scheme in REMOTE:
        return _remote_shards(parse(path), "eval", None) is not None
    return scheme != "list" or bool(options["eval"])


def open_source(
    path: str | Path,
    split: str = "train",
    cache: Path | None = None,
    download: bool = False,
    remote: RemoteOptions | None = None,
) -> Source:
    """Open the training images (`split` "train") or the evaluation images ("eval") of `path`.

        /data/imagenet                            a folder with train/ and, to evaluate, val/, validation/ or test/, with
                                                  <class>/<image> or tar shards in webdataset's conventions; without
                                                  train/, all images below it, which then have no labels
        list://train.csv?eval=val.csv             the images that a text, CSV or parquet file lists, with or without labels
        hf://PATH?split=train,eval=test           a data set of Hugging Face's `datasets`: a folder, or a name on the Hub
        s3://BUCKET/DIR, gs://BUCKET/DIR,         tar shards of an object store or a web server, in a folder as above, or those
        https://HOST/train-{0000..0099}.tar       of a pattern; ?eval=val-{00..09}.tar names others to evaluate on
        cifar10://DIR, cifar100://DIR,            the files of torchvision.datasets in the folder DIR
        flowers://DIR, pets://DIR
        synthetic://1000?size=64,classes=10       1000 images computed from their index, without a disk
        shapes://DIR?train=4000,val=800&size=64   small labelled drawings, generated into DIR
        ...?fraction=0.1,seed=0                   of any of these, a tenth of the training images of each class
        ...?per_class=13,seed=0                   of any of these, 13 training images of each class

    Args:
        path: a folder, or one of the above.
        split: "train" or "eval".
        cache: a folder in which the listing of `path` is kept until its files change; None lists them each time.
        download: first download or generate the images if they are not there, as `prepare` does. Among several
            processes, let one of them do so before the others open `path`.
        remote: how remote shards are read; None: without a cache on this machine.

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
        prepare(path, cache, remote)
    where = parse(path)
    source = _open(where, split, cache, remote)
    return Subset(source, **where.subset) if where.subset and split == "train" else source


def _open(where: Location, split: str, cache: Path | None, remote: RemoteOptions | None) -> Source:
    scheme, target, options, _ = where
    if scheme == "synthetic":
        count = int(target) if split == "train" else options["eval"] or max(int(target) // 10, 1)
        return Synthetic(count, options["size"], options["classes"], split=int(split == "eval"))
    if scheme in torchvision_sets.SCHEMES:
        return torchvision_sets.open_set(scheme, target, split)
    if scheme == "list":
        training = FileList(Path(target), options["image"], options["label"])
        if split == "train":
            return training
        if not options["eval"]:
            raise ValueError(f"{target} lists images to train on; name those to evaluate on: list://{target}?eval=FILE")
        source = FileList(Path(target).parent / options["eval"], options["image"], options["label"])
        return _with_labels_of(source, _classes(training))
    if scheme == "hf":
        return _open_hugging_face(target, options, split)
    if scheme in REMOTE:
        found = [_remote_shards(where, each, remote) for each in ("train", "eval")[: 1 if split == "train" else 2]]
        if found[-1] is None:
            raise ValueError(
                f"{scheme}://{target} has none of {', '.join(SPLITS['eval'])} to evaluate on; name a place: ?eval=FOLDER"
            )
        sources = [Shards(folder, folder.index_cache or cache) for folder in found]
        return sources[0] if split == "train" else _with_labels_of(sources[1], _classes(sources[0]))
    root = Path(target)
    if scheme == "shapes" and not root.exists():
        raise ValueError(f"{root} does not exist; write it with open_source(path, download=True) or prepare(path)")
    train = _split_folder(root, "train")
    if split == "train":
        return _open_folder(train, cache, classless=train == root or not list_classes(train))
    source = _open_folder(_split_folder(root, "eval"), cache)
    return _with_labels_of(source, _classes(Shards(train, cache)) if list_shards(train) else _folder_classes(train))


def _remote_shards(where: Location, split: str, options: RemoteOptions | None) -> Any:
    """Return the `RemoteFolder` of a split, or None if there is no place to evaluate on. Raises ValueError."""
    from crossbatch.data.sources import remote  # late: fsspec

    return remote.open_remote(where, split, SPLITS[split], options or RemoteOptions())


def _open_hugging_face(target: str, options: dict[str, str], split: str) -> Source:
    found = hugging_face.open_splits(target, options["config"])
    sources = []
    for kind, option in (("train", "split"), ("eval", "eval"))[: 1 if split == "train" else 2]:
        only = [*found] if len(found) == 1 and kind == "train" else []
        name = hugging_face.split_name(target, [*found], options[option], [*SPLITS[kind], *only])
        if name is None:
            raise ValueError(
                f"hf://{target} has no split {' or '.join(SPLITS[kind])}; it has: {', '.join(found)}; name one: ?{option}=NAME"
            )
        where = f"hf://{target}, split {name}"
        sources.append(hugging_face.HuggingFaceImages(found[name], where, options["image"], options["label"]))
    return sources[0] if split == "train" else _with_labels_of(sources[1], _classes(sources[0]))


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
    folder: Path | str | None = getattr(source, "folder", None)
    if isinstance(source, Subset):
        words += f", chosen of {len(source.source):,} by {source.chosen_by}"
    if isinstance(folder, Path):
        folder = f"{folder.name}/" if folder.is_dir() else folder.name
    return f"{words} in {folder}" if folder else words


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
    if split == "train" and not any((root / name).is_dir() for name in SPLITS["eval"]):
        for name in list_classes(root):
            if (root / name / "train").is_dir():
                raise ValueError(f"{root} has no folder 'train', but {root / name} has; give {root / name}")
        return root
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    wanted = " or ".join(f"'{name}'" for name in SPLITS[split])
    raise ValueError(f"{root} has no folder {wanted} (it holds: {found}); {tree}")


def _open_folder(folder: Path, cache: Path | None, classless: bool = False) -> ImageFolder | Shards:
    shards = list_shards(folder)
    if not shards:
        return ImageFolder(folder, cache, classless)
    if list_classes(folder):
        raise ValueError(
            f"{folder} holds tar files ({shards[0]}, ...) and folders ({list_classes(folder)[0]}, ...), but must hold "
            f"only one kind; move the others away"
        )
    return Shards(folder, cache)


def _with_labels_of(source: _Labelled, training: Classes) -> Source:
    """Return `source`, evaluation images, with the class names and labels of the training images.

    Raises ValueError if their classes cannot be matched; see `classes`.
    """
    evaluation = _classes(source)
    labels = training_labels(training, evaluation)
    if labels.tolist() != list(range(len(labels))):
        source.labels = np.where(source.labels < 0, source.labels, labels[source.labels])
    source.class_names = training.names
    return source


def _classes(source: _Labelled) -> Classes:
    if not source.has_labels:
        raise ValueError(
            f"the images in {source.folder} have no labels (of shards: members <key>.cls), which evaluation needs; add them, "
            f"or move the evaluation images away"
        )
    are_numbers = not getattr(source, "has_class_names", True)
    return Classes(source.folder, source.class_names, are_numbers, np.unique(source.labels[source.labels >= 0]))


def _folder_classes(folder: Path) -> Classes:
    """Return the classes of class folders without listing their files: each holds images, or training cannot open them."""
    names = list_classes(folder)
    if not names:
        raise ValueError(f"{folder} has no class folders, which evaluation needs; move the evaluation images away")
    return Classes(folder, names, False, np.arange(len(names)))
