"""Keeps what a source found in a folder as a few integer arrays: small in memory, quick to load, shared by workers.

A list of a million Python strings is ~100 MB, and every worker process comes to own a copy as soon as it touches the
reference counts (fork's copy-on-write is per page). `Names` is one array of bytes and one of their ends.

A listing is kept in a file (.npz without pickles; zip's checksums notice damage) so that a million files are not listed
again at every start. `cached` returns what the file holds while it describes the folder as it is now; otherwise it lists the
folder and writes the file again.
"""

import contextlib
import io
import logging
import os
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np

from crossbatch.data.decode import missing_plugins

Arrays: TypeAlias = dict[str, np.ndarray]

_SETTLED_NS = 2 * 10**9  # the coarsest timestamps of common file systems
_log = logging.getLogger(__name__)


class Names:
    """Reads the list of strings that `pack_names` stored in a listing under `field`."""

    def __init__(self, arrays: Arrays, field: str):
        self.text, self.stops = arrays[field], arrays[f"{field}_stops"]

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, index: int) -> str:
        start = int(self.stops[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.stops[index])].tobytes())

    def unpack(self) -> list[str]:
        """Return the names as Python strings."""
        return [self[index] for index in range(len(self))]


def pack_names(field: str, names: Iterable[str]) -> Arrays:
    """Return `names`, which need not be valid UTF-8, as two entries of a listing: their bytes joined, and where each ends."""
    encoded = [os.fsencode(name) for name in names]
    stops = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {field: np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{field}_stops": stops}


def kind_of(name: str) -> str:
    """Return the extension of a file, the kind under which it is counted: ".txt", ".tar.gz", "no extension".

    That of an image for which a plugin is missing says what to install.
    """
    suffixes = PurePosixPath(name.lower()).suffixes
    kind = "".join(suffixes[-2:] if ".tar" in suffixes[-2:] else suffixes[-1:]) or "no extension"
    return f"{kind} (pip install '{missing_plugins()[kind]}')" if kind in missing_plugins() else kind


def files_beside(folder: str | Path) -> Counter[str]:
    """Count the files in `folder` itself by kind, without hidden ones."""
    with os.scandir(folder) as entries:
        return Counter(kind_of(one.name) for one in entries if not one.is_dir() and not one.name.startswith("."))


def counted(kinds: Mapping[str, int]) -> str:
    """Return counts in words, the largest first: "12 .tif, 3 .json"."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def pack_counts(field: str, counts: Counter[str]) -> Arrays:
    """Return counts by name as entries of a listing; `unpack_counts` reads them."""
    return {f"{field}_counts": np.array(list(counts.values()), dtype=np.int64), **pack_names(field, counts)}


def unpack_counts(arrays: Arrays, field: str) -> Counter[str]:
    """Return the counts that `pack_counts` stored. Raises KeyError if there are none, as in listings of earlier versions."""
    return Counter(dict(zip(Names(arrays, field).unpack(), arrays[f"{field}_counts"].tolist(), strict=True)))


def save(file: Path, arrays: Arrays) -> None:
    """Write `arrays` to `file`, which is complete or absent at any moment. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{uuid.uuid4().hex}.npz")
    try:
        np.savez(draft, **arrays)  # pyright: ignore[reportArgumentType]  (its last keyword is a bool)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def load(file: Path) -> Arrays:
    """Return what `save` wrote. Raises OSError if it cannot be read, ValueError if it is damaged or something else."""
    return unpack(file.read_bytes())


def unpack(data: bytes) -> Arrays:
    """Return the arrays in the bytes of a file that `save` wrote. Raises ValueError if they are damaged or something else."""
    content = io.BytesIO(data)
    try:
        # All checksums first: numpy would allocate whatever a damaged header claims.
        if zipfile.ZipFile(content).testzip() is not None:
            raise ValueError("a checksum is wrong")
        content.seek(0)
        with np.load(content, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile parses in plain Python: damage may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def cached(
    root: str | Path,
    cache: Path | None,
    is_current: Callable[[Arrays], bool],
    make: Callable[[], tuple[Arrays, int]],
) -> Arrays:
    """Return the listing of `root` kept in the folder `cache` while it is current; otherwise make it and keep it.

    Args:
        root: the folder that is listed, or its address.
        cache: where the listing is kept; None makes it each time.
        is_current: returns whether nothing has changed since; KeyError, TypeError, ValueError and OSError mean no.
        make: returns the listing and the latest time of change (ns) of what it describes. A folder that has changed
            within the last two seconds may change again without a new timestamp, so its listing is not kept.
    """
    if cache is None:
        return make()[0]
    absolute = str(root) if "://" in str(root) else os.path.abspath(root)  # noqa: PTH100  (unlike resolve, it asks no disk)
    file = cache / f"{Path(absolute).name}-{sha256(os.fsencode(absolute)).hexdigest()[:16]}.npz"
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        arrays = load(file)
        if is_current(arrays):
            return arrays
    started_ns = time.time_ns()
    arrays, changed_ns = make()
    if changed_ns < started_ns - _SETTLED_NS:
        try:
            save(file, arrays)
        except OSError as error:
            _log.warning(
                "cannot keep the listing of the data in %s (%s); the next start will list it again", file, error
            )
    return arrays
