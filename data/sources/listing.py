"""Keeps what a source found in a folder as a few integer arrays: small in memory, quick to load, shared by workers.

A list of a million Python strings is ~100 MB, and every worker process comes to own a copy as soon as it touches the
reference counts (fork's copy-on-write is per page). `Names` is one array of bytes and one of their ends.

A listing is kept in a file (.npz without pickles; zip's checksums notice damage) so that a million files are not listed
again at every start. `cached` returns what the file holds while it describes the folder as it is now; otherwise it lists the
folder and writes the file again.
"""

import contextlib
import errno
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import numpy as np

Arrays: TypeAlias = dict[str, np.ndarray]

_SETTLED_NS = 2 * 10**9  # the coarsest timestamps of common file systems
_log = logging.getLogger(__name__)


class Names:
    """Stores an immutable list of strings, which may be file names that are not valid UTF-8.

    `text` holds all names joined (uint8), `stops` where each ends (int64 [len]).
    """

    def __init__(self, text: np.ndarray, stops: np.ndarray):
        if text.dtype != np.uint8 or stops.dtype != np.int64 or text.ndim != 1 or stops.ndim != 1:
            raise ValueError("names must be bytes (uint8) and their ends (int64)")
        ends = int(stops[-1]) if len(stops) else 0
        if ends != len(text) or (np.diff(stops, prepend=0) < 0).any():
            raise ValueError("the ends of the names must rise to the length of the text")
        self.text, self.stops = text, stops

    @classmethod
    def pack(cls, names: Iterable[str]) -> "Names":
        """Join `names` into the two arrays."""
        encoded = [os.fsencode(name) for name in names]
        stops = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), stops)

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, index: int) -> str:
        start = int(self.stops[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.stops[index])].tobytes())

    def unpack(self) -> list[str]:
        """Return the names as Python strings."""
        return [self[index] for index in range(len(self))]


def pack_names(field: str, names: Iterable[str]) -> Arrays:
    """Return `names` as two entries of a listing, which `unpack_names` reads."""
    packed = Names.pack(names)
    return {field: packed.text, f"{field}_stops": packed.stops}


def unpack_names(arrays: Arrays, field: str) -> Names:
    """Return the names that `pack_names` stored under `field`."""
    return Names(arrays[field], arrays[f"{field}_stops"])


def save(file: Path, arrays: Arrays) -> None:
    """Write `arrays` to `file`, which is complete or absent at any moment. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]  (its last keyword is a bool)
        Path(draft).chmod(0o644)  # mkstemp's 600 would keep a shared data set from others
        Path(draft).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(draft).unlink()
        raise


def load(file: Path) -> Arrays:
    """Return what `save` wrote. Raises OSError if it cannot be read, ValueError if it is damaged or something else."""
    try:
        with zipfile.ZipFile(file) as archive:
            # All checksums first: numpy would allocate whatever a damaged header claims.
            if archive.testzip() is not None:
                raise ValueError("damaged")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile parses in plain Python: damage may raise anything
        damage = (None, errno.EINVAL)  # zipfile's own OSErrors, and a seek to nowhere
        if isinstance(error, OSError) and error.errno not in damage:
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def cache_file(cache: Path, root: str | Path) -> Path:
    """Return the file in the folder `cache` that keeps the listing of `root`."""
    absolute = os.path.abspath(root)  # noqa: PTH100  (unlike resolve, it asks no disk)
    return cache / f"{Path(absolute).name}-{sha256(os.fsencode(absolute)).hexdigest()[:16]}.npz"


def cached(file: Path | None, is_current: Callable[[Arrays], bool], make: Callable[[], tuple[Arrays, int]]) -> Arrays:
    """Return the listing in `file` if `is_current` says that nothing has changed since; otherwise make it and keep it.

    Args:
        file: where the listing is kept; None makes it each time.
        is_current: may raise KeyError, TypeError, ValueError or OSError for "no".
        make: returns the listing and the latest time of change (ns) of what it describes. A folder that has changed
            within the last two seconds may change again without a new timestamp, so its listing is not kept.
    """
    if file is None:
        return make()[0]
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
            _log.warning("cannot keep the listing of the data in %s (%s): the next start lists again", file, error)
    return arrays
