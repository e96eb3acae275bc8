"""Runs a command in a process group of its own, under a time limit. This module needs nothing but Python."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple


class Ended(NamedTuple):
    """Says how a process ended: its exit code, None if it was stopped, and the same in words ("done in 12 s")."""

    code: int | None
    words: str


def run(
    command: Sequence[str], limit_s: float | None = None, output: IO[bytes] | None = None, folder: Path | None = None
) -> Ended:
    """Run `command` in `folder`, printing into `output` if it is given, and end everything that it started."""
    start, code = time.monotonic(), None
    stderr = output and subprocess.STDOUT
    process = subprocess.Popen(command, stdout=output, stderr=stderr, start_new_session=True, cwd=folder)
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    how = {None: "stopped at its limit after", 0: "done in"}.get(code, f"failed with exit code {code} after")
    return Ended(code, f"{how} {time.monotonic() - start:.0f} s")
