"""Writes files so that a crash at any moment leaves the old or the new content, never a part of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file (or a folder, where there is no `path`); then sync and rename it.

    If the block raises, it is deleted and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Let the content of a file, or renames in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8; after a crash either the old or the new content is there."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
