"""Lets a command print any text to stdout and stderr, whatever they are connected to, without ever failing because of it.

A reader that goes away (`| head -5`), a full disk and a closed terminal raise OSError where something is printed, deep in a
step or in rich; a file name that is not UTF-8 raises UnicodeEncodeError there. Text is text: no markup, no emoji codes.
"""

import io
import os
import sys
from typing import Any

from crossbatch import RunStopped
from crossbatch.engine.runtime.world import has_false_terminal


class _Muted(io.FileIO):
    """Writes to a descriptor for as long as that works; what cannot be written is dropped."""

    error: OSError | None = None  # the last one that was not a reader's leaving

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except BrokenPipeError:
            written = None
        except OSError as error:
            self.error, written = error, None
        return len(data) if written is None else written


def protect_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that take any text and never raise; call it before any file is opened.

    Where the process was started with a closed standard stream (`>&-`), the next file it opens would get that number, and what
    any library prints. So /dev/null takes its place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue  # somebody has put another one there, as tests do
        how: dict[str, Any] = {"encoding": "utf-8", "line_buffering": True}
        if before is not None:
            before.flush()
            how = {"encoding": before.encoding, "line_buffering": before.line_buffering}
            how["write_through"] = before.write_through  # python -u
        buffer = io.BufferedWriter(_Muted(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, errors="backslashreplace", **how))


def check_printed() -> None:
    """Raise RunStopped if part of the result that a command prints is lost, as on a full disk."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Muted) and raw.error is not None:
        raise RunStopped(f"standard output cannot be written: {raw.error.strerror}; what was printed is incomplete")


def console(stderr: bool = False) -> Any:
    """Return a rich Console that prints text as it is."""
    from rich.console import Console  # late: the streams are protected before anything large is imported

    is_terminal = False if has_false_terminal() else None  # None: rich finds out
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, force_terminal=is_terminal)
