"""Reads image data sets with Hugging Face's `datasets`: those that `save_to_disk` wrote, folders of parquet, and the Hub's.

`datasets` keeps a data set in Arrow files that it maps into memory, so that an image is read when it is asked for, and all
processes share what the operating system has cached. An image is its encoded file, as it is in the Arrow file; it is not
decoded by `datasets`. The labels are read once.

`datasets` is an extra: pip install 'crossbatch[hf]'.
"""

import importlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossbatch.data.decode import BrokenImage, decode
from crossbatch.data.sources.classes import number_classes

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes: of several splits, of one


class HuggingFaceImages:
    """Reads the images of a split of `datasets`; a `Source`.

    Args:
        dataset: the `datasets.Dataset`.
        where: what to call it in messages.
        image: the column of images (encoded files, or their paths); "" takes `image`, or the only column of images.
        label: the column of labels; "" takes `label`, or the only column of classes, if there is one.

    An image without a label, where others have one, counts as broken. `checksum` is that of the images' lengths and paths.
    Raises ValueError if there is no such column, it holds something else, or a label is out of range.
    """

    has_files = True

    def __init__(self, dataset: Any, where: str, image: str, label: str):
        self.folder, features = where, dataset.features  # its rows are those of its table: nobody has shuffled it
        column = _column(where, features, image, "image", "Image")
        if column is None or not len(dataset):
            lacking = "has no images" if column else f"has no column 'image'; it has: {', '.join(features)}"
            raise ValueError(f"{where} {lacking}; name the right split and column, as in ?split=train,image=photo")
        self._rows = dataset.select_columns([column]).with_format("arrow")
        self.checksum = _checksum(dataset.data.column(column), f"{where}: column {column!r}")
        column = _column(where, features, label, "label", "ClassLabel")
        if column is None:
            found = (*number_classes(None, len(dataset), where), False)
        else:
            found = _labels(dataset.data.column(column), features[column], f"{where}: column {column!r}")
        self.labels, self.class_names, self.has_class_names, self.has_labels = found

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the number of image `index`, and its path where the data set has one."""
        path = self._file(index)[1]
        return f"{index:08d}" + (f" ({path})" if path else "")

    def read(self, index: int) -> bytes:
        """Return the encoded file of image `index`. Raises OSError, and BrokenImage if the row has no image or no label."""
        if self.labels[index] < 0:
            raise BrokenImage("no label")
        data, path = self._file(index)
        if data is None and path is None:
            raise BrokenImage("no image")
        return Path(str(path)).read_bytes() if data is None else data

    def open(self, index: int) -> Image.Image:
        """Return the decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))

    def _file(self, index: int) -> tuple[bytes | None, str | None]:
        row = self._rows[index].column(0)[0].as_py()
        if isinstance(row, Mapping):
            return row.get("bytes"), row.get("path")
        return (row, None) if isinstance(row, bytes) else (None, row)


def open_splits(target: str, config: str, download: bool = False) -> dict[str, Any]:
    """Return {name of a split: its `datasets.Dataset`} of a data set; one that was saved without splits is "train".

    Args:
        target: a folder that `save_to_disk` wrote, a folder of files that `load_dataset` reads (parquet), or a name on the Hub.
        config: the configuration of a data set on the Hub; "" for its only one.
        download: fetch a data set of the Hub that is not in the cache of `datasets`.

    Raises ValueError if `datasets` is not installed or cannot open it.
    """
    try:
        # By name: in a folder that holds a folder `datasets`, Python takes that for a package.
        from datasets import load_dataset, load_from_disk  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"hf:// needs `datasets` ({error}); install it: pip install 'crossbatch[hf]'") from error
    folder = Path(target)
    try:
        if any((folder / file).is_file() for file in _SAVED):
            found = load_from_disk(target)
        elif folder.exists() or download:
            found = load_dataset(target, config or None)
        else:
            module = importlib.import_module("datasets.packaged_modules.cache.cache")  # what load_dataset takes offline
            found = module.Cache(
                repo_id=target, dataset_name=Path(target).name, config_name=config or None, version="auto", hash="auto"
            ).as_dataset()
    except Exception as error:  # of the network, the disk, or any format that `datasets` reads
        said = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"hf://{target} cannot be opened ({type(error).__name__}: {said}); give a folder that save_to_disk wrote, a folder "
            f"of parquet files, or a name on the Hub; in Python, open_source(path, download=True) fetches that"
        ) from error
    return {**found} if isinstance(found, Mapping) else {"train": found}


def split_name(target: str, found: Sequence[str], given: str, names: Sequence[str]) -> str | None:
    """Return which of the splits `found` is meant: the `given` one, or without it the first of `names` that is there, or None.

    Raises ValueError if there is no split `given`.
    """
    if given and given not in found:
        raise ValueError(f"hf://{target} has no split {given!r}; it has: {', '.join(found)}")
    return given or next((name for name in names if name in found), None)


def _column(where: str, features: Mapping[str, Any], given: str, name: str, kind: str) -> str | None:
    """Return the column `given`, or else `name`, or else the only one of the feature class `kind`; None if there is none."""
    if given and given not in features:
        raise ValueError(f"{where} has no column {given!r}; it has: {', '.join(features)}")
    of_kind = [column for column, feature in features.items() if type(feature).__name__ == kind]
    return given or (name if name in features else of_kind[0] if len(of_kind) == 1 else None)


def _checksum(column: Any, where: str) -> int:
    """Return a checksum of the lengths and paths in a column of images; none is read for it. Raises ValueError."""
    from pyarrow import compute, types  # pyright: ignore[reportMissingImports]

    checksum = 0
    for part in column.flatten() if types.is_struct(column.type) else [column]:
        if types.is_string(part.type) or types.is_large_string(part.type):
            facts = ("".join(f"{path}\n" for path in chunk.to_pylist()).encode() for chunk in part.chunks)
        elif types.is_binary(part.type) or types.is_large_binary(part.type):
            lengths = compute.fill_null(compute.binary_length(part), -1)
            facts = [lengths.to_numpy().astype(np.int64).tobytes()]
        else:
            raise ValueError(f"{where} holds {column.type}, but must hold images: encoded files, or their paths")
        for fact in facts:
            checksum = zlib.crc32(fact, checksum)
    return checksum


def _labels(column: Any, feature: Any, where: str) -> tuple[np.ndarray, list[str], bool, bool]:
    """Return labels, class names, whether these are names, and whether there are labels, of a column. Raises ValueError."""
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    if types.is_nested(column.type) or types.is_floating(column.type) or types.is_binary(column.type):
        raise ValueError(f"{where} holds {column.type}, but must hold labels: names or whole numbers")
    values = column.to_pylist()
    known = np.array([value is not None and value != -1 for value in values])  # -1: in test splits of the Hub
    if not known.any():
        return *number_classes(None, len(values), where), False
    given = [str(value) for value, is_known in zip(values, known, strict=True) if is_known]
    found, names, are_names = number_classes(given, len(given), where)
    if of_feature := getattr(feature, "names", None):
        if len(of_feature) < len(names):
            raise ValueError(f"{where} holds the label {names[-1]}; allowed: 0 to {len(of_feature) - 1}, its classes")
        names, are_names = [*of_feature], True
    labels = np.full(len(values), -1, dtype=np.int64)
    labels[known] = found
    return labels, names, are_names, True
