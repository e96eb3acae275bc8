"""Reads the images that a file lists, as text, CSV or parquet, with or without labels.

    list.txt       one image a line: its path, then, if there are labels, a tab and the label (a space will do before a number)
    list.csv       a first line with the names of the columns, of them `path` and, if there are labels, `label` (also list.tsv)
    list.parquet   the same columns; needs pyarrow

Paths are relative to the folder of the list, or absolute. Labels that are all whole numbers are numbers of classes; any others
are names. The order of the images is that of the list.
"""

import csv
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from crossbatch.data.decode import decode, missing_plugins
from crossbatch.data.sources.classes import number_classes
from crossbatch.data.sources.listing import Names, pack_names

_Row = tuple[str, str, str | None]  # what to call it in a message, path, label
_TRIED = 16  # images that are looked for before anything is trained on, of which one must be there
_NUMBERED = re.compile(r"(.*\.\w+) +(\d+)")  # of a text file: a path with an extension, and the number of a class


class FileList:
    """Reads the images that `file` lists; a `Source`.

    `image` and `label` name the columns of a CSV or parquet file; "" stands for `path`, and for `label` if there is such a
    column. `checksum` is that of the list's bytes.

    Raises ValueError if the list cannot be read, has no such column, names an image twice, labels some of its images only, or
    if none of the images is there.
    """

    has_files = True

    def __init__(self, file: Path, image: str = "", label: str = ""):
        if not file.is_file():
            what = "is a folder" if file.is_dir() else f"does not exist (looked from {Path.cwd()})"
            raise ValueError(f"{file} {what}; give a text file, .csv, .tsv or .parquet that lists images")
        self.folder = file
        names, labels = _checked(file, _rows(file, image, label))
        self._base, self._names = file.parent, Names(pack_names("names", names), "names")
        self.has_labels = labels is not None
        self.labels, self.class_names, self.has_class_names = number_classes(labels, len(names), str(file))
        unreadable = [
            package for ending, package in missing_plugins().items() for name in names if name.lower().endswith(ending)
        ]
        if unreadable:
            raise ValueError(
                f"{file} lists images that need a plugin ({len(unreadable)}): pip install '{unreadable[0]}'"
            )
        self.checksum = zlib.crc32(file.read_bytes())
        tried = np.unique(np.linspace(0, len(names) - 1, _TRIED).astype(int)).tolist()
        if not any(Path(self._base, names[index]).exists() for index in tried):
            raise ValueError(
                f"{file}: no such file: {Path(self._base, names[0])} (paths looked for: {len(tried)}, found: none); "
                f"paths must be absolute or relative to {self._base}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of image `index` as it is in the list."""
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Return the file of image `index`. Raises OSError."""
        return Path(self._base, self._names[index]).read_bytes()

    def open(self, index: int) -> Image.Image:
        """Return the decoded image in RGB. Raises OSError; BrokenImage is one."""
        return decode(self.read(index))


def _checked(file: Path, rows: Iterator[_Row]) -> tuple[list[str], list[str] | None]:
    """Return the paths and labels of `rows`, None if there are no labels. Raises ValueError if a row cannot be used."""
    first: dict[str, str] = {}
    labels: list[str] = []
    for where, path, label in rows:
        if not path or "\0" in path:
            raise ValueError(
                f"{file}, {where}: {'a zero byte in the path' if path else 'no path'}; correct or remove it"
            )
        if path in first:
            raise ValueError(f"{file}, {where}: {path} is in {first[path]} already; remove one of them")
        if bool(label) != (len(labels) > 0) and first:
            has, others = ("a", "no") if label else ("no", "a")
            raise ValueError(
                f"{file}, {where}: {path} has {has} label, those before it have {others} label; label all or none"
            )
        first[path] = where
        if label:
            labels.append(label)
    if not first:
        raise ValueError(f"{file} lists no images; allowed: one image a line, see docs/data.md")
    return list(first), labels or None


def _rows(file: Path, image: str, label: str) -> Iterator[_Row]:
    """Yield the rows of a list, which its extension says how to read. Raises ValueError if it cannot be read."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet_rows(file, image, label)
    elif kind in (".csv", ".tsv"):
        yield from _csv_rows(file, "," if kind == ".csv" else "\t", image, label)
    elif image or label:
        raise ValueError(
            f"{file} is a text file without columns; leave out image= and label=, or give a .csv or .parquet"
        )
    else:
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                path, _, found = (part.strip() for part in line.partition("\t"))
                if numbered := None if found else _NUMBERED.fullmatch(path):
                    path, found = numbered.groups()
                if line.strip():
                    yield f"line {number}", path, found


def _csv_rows(file: Path, delimiter: str, image: str, label: str) -> Iterator[_Row]:
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 1
        try:
            header = next(reader, [])
            image, label = _columns(file, header, image, label)
            while True:
                number = reader.line_num + 1
                row = next(reader, None)
                if row is None:
                    return
                if len(row) not in (0, len(header)):
                    raise csv.Error(f"{len(row)} columns, but the first line has {len(header)}")
                if row:
                    yield f"line {number}", row[header.index(image)], row[header.index(label)] if label else None
        except csv.Error as error:
            raise ValueError(f"{file}, line {number}: {error}; correct the line") from error


def _parquet_rows(file: Path, image: str, label: str) -> Iterator[_Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{file} needs pyarrow to be read ({error}); install it: pip install 'crossbatch[hf]'"
        ) from error
    try:
        schema = parquet.read_schema(file)
        wanted = [name for name in _columns(file, schema.names, image, label) if name]
        for name in wanted:
            if pyarrow.types.is_nested(schema.field(name).type) or pyarrow.types.is_binary(schema.field(name).type):
                raise ValueError(
                    f"column {name!r} holds {schema.field(name).type}, but a list has paths and labels; for images inside the "
                    f"file give hf://{file.parent}"
                )
        columns = [column.cast("string").to_pylist() for column in parquet.read_table(file, columns=wanted).columns]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for number, (path, *labels) in enumerate(zip(*columns, strict=True)):
        yield f"row {number}", path or "", labels[0] if labels else None


def _columns(file: Path, found: list[str], image: str, label: str) -> tuple[str, str]:
    """Return the names of the columns of paths and of labels, "" if there are no labels. Raises ValueError."""
    for name in (image or "path", label):
        if name and name not in found:
            raise ValueError(
                f"{file} has no column {name!r}; it has: {', '.join(found) or 'none'}; name the right ones, "
                f"as in list://{file}?image=file,label=class"
            )
    return image or "path", label or ("label" if "label" in found else "")
