"""What images there are. A path in the configuration (`crossbatch.data.path`, or `--data`) is one of

    /some/folder                                  a folder with train/<class>/<image> and, to evaluate on, val/ or test/
    synthetic://1000?size=64&classes=10           1000 images computed from their index (synthetic.py); no disk
    shapes://DIR?train=4000&val=800&size=64       DIR, after `prepare` wrote small labelled drawings there (shapes.py)

`open_source` turns it into a `Source`. A new kind of source (tar shards, CIFAR's own files) is a class with the six
members of the protocol in a file of its own, and one more branch here.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from crossbatch import InputError
from crossbatch.data import shapes
from crossbatch.data.image_folder import ImageFolder, list_classes
from crossbatch.data.synthetic import Synthetic

SPLITS = {"train": ("train",), "eval": ("val", "test")}  # the folders a split may lie in, the first that exists
_QUERY_DEFAULTS = {
    "synthetic": {"size": 64, "classes": 10, "eval": None},  # eval: number of evaluation images; None: a tenth of train
    "shapes": {"train": 4000, "val": 800, "size": 64, "seed": 0},
}
_TREE = (
    "expected\n"
    "  {root}/train/<class>/<image>.jpg   (jpg, jpeg, png, webp, bmp)\n"
    "  {root}/val/<class>/<image>.jpg     (or test/; only to evaluate, with the same class names)"
)


class Source(Protocol):
    """Images by index. Must pickle, and must not keep files open between calls: workers each get a copy."""

    labels: np.ndarray  # int64 [len]
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


@dataclass(frozen=True)
class _Location:
    """A parsed path. `scheme` is '' for a folder; `target` is the folder or, for synthetic, the number of images."""

    scheme: str
    target: str
    options: dict[str, int | None]


def prepare(path: str | Path, key: str = "crossbatch.data.path"):
    """Write what `path` asks to be generated (shapes://), else nothing; one process does it before the others open."""
    location = _parse(path, key)
    if location.scheme == "shapes":
        options = {name: value for name, value in location.options.items() if value is not None}
        try:
            shapes.write_shapes(location.target, **options, key=key)
        except OSError as error:
            raise InputError(
                f"{key}: cannot write {location.target} ({error}); name a folder that can be written"
            ) from error


def has_evaluation_split(path: str | Path, key: str = "crossbatch.data.path") -> bool:
    """Whether `open_source(path, "eval")` has something to open."""
    location = _parse(path, key)
    if location.scheme == "synthetic":
        return True
    return any(Path(location.target, name).is_dir() for name in SPLITS["eval"])


def open_source(path: str | Path, split: str, key: str = "crossbatch.data.path") -> Source:
    """The training images (`split` "train") or the evaluation images ("eval") of `path`.

    Raises:
        InputError: `path` is not there, malformed or not laid out as expected; the message starts with `key`.
    """
    if split not in SPLITS:
        raise ValueError(f"split (={split!r}) must be one of {', '.join(SPLITS)}")
    location = _parse(path, key)
    if location.scheme == "synthetic":
        return _open_synthetic(location, split)
    root = Path(location.target)
    folder = _split_folder(root, split, key)
    if split == "eval":
        _require_same_classes(_split_folder(root, "train", key), folder, key)
    return ImageFolder(folder, key)


def _open_synthetic(location: _Location, split: str) -> Synthetic:
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
    found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    wanted = " or ".join(f"'{name}'" for name in SPLITS[split])
    raise InputError(f"{key}: {root} has no folder {wanted} (it holds: {found}); {tree}")


def _require_same_classes(train: Path, evaluation: Path, key: str):
    """Labels are positions in the sorted class names, so they mean the same only if the names do."""
    trained, evaluated = set(list_classes(train)), set(list_classes(evaluation))
    if trained == evaluated:
        return
    differences = [
        f"only in {folder}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for folder, names in ((train, trained - evaluated), (evaluation, evaluated - trained))
        if names
    ]
    raise InputError(
        f"{key}: {train} and {evaluation} have different class folders ({'; '.join(differences)}); "
        f"labels are numbered by the sorted names, so make the two sets of names equal"
    )


def _parse(path: str | Path, key: str) -> _Location:
    text = str(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise InputError(f"{key} is empty; give a folder, or synthetic://1000 to try without images")
        return _Location("", str(Path(text).expanduser()), {})
    if scheme not in _QUERY_DEFAULTS:
        allowed = "a folder, " + ", ".join(f"{name}://..." for name in _QUERY_DEFAULTS)
        raise InputError(f"{key}: unknown scheme in {text!r}{_nearest(scheme, _QUERY_DEFAULTS)}; allowed: {allowed}")
    target, _, query = rest.partition("?")
    options = _parse_query(scheme, query, text, key)
    if scheme == "synthetic" and not (target.isdecimal() and int(target) > 0):
        raise InputError(f"{key}: {text!r} needs a number of images, as in synthetic://1000?size=64&classes=10")
    if scheme == "shapes" and not target:
        raise InputError(f"{key}: {text!r} needs a folder, as in shapes://runs/shapes?train=4000&val=800")
    return _Location(scheme, target if scheme == "synthetic" else str(Path(target).expanduser()), options)


def _parse_query(scheme: str, query: str, text: str, key: str) -> dict[str, int | None]:
    options: dict[str, int | None] = dict(_QUERY_DEFAULTS[scheme])
    given = set()
    for part in filter(None, query.split("&")):
        name, value = (parse_qsl(part, keep_blank_values=True) or [(part, "")])[0]
        if name not in options:
            allowed = ", ".join(options)
            raise InputError(f"{key}: unknown option {name!r} in {text!r}{_nearest(name, options)}; allowed: {allowed}")
        if name in given:
            raise InputError(f"{key}: option {name!r} is given twice in {text!r}; give it once")
        if not value.isdecimal() or (int(value) == 0 and name != "seed"):
            kind = "an integer >= 0" if name == "seed" else "an integer >= 1"
            raise InputError(f"{key}: option {name!r} in {text!r} is {value!r}; it must be {kind}")
        options[name] = int(value)
        given.add(name)
    return options


def _nearest(name: str, allowed) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
