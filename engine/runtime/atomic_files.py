"""Writes files so that a crash at any moment leaves the old or the new content, never a part of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on leaving, sync that file to the disk and rename it to `path`.

    If the block raises, the temporary file is deleted and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8; after a crash either the old or the new content is there."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
