"""Runs a command in a process group of its own, under a time limit. This module needs nothing but Python."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended: its exit code, None if it was stopped, and the same in words ("done in 12 s")."""

    code: int | None
    words: str


def run(command: Sequence[str], limit_s: float | None = None, printed: Path | None = None) -> Ended:
    """Run `command` and return how it ended. Everything that it started ends with it.

    What it prints goes to the file `printed` if there is one.
    """
    output = printed.open("wb") if printed is not None else None
    start, code = time.monotonic(), None
    process = subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if output is not None:
            output.close()
    how = {None: "stopped at its limit after", 0: "done in"}.get(code, f"failed with exit code {code} after")
    return Ended(code, f"{how} {time.monotonic() - start:.0f} s")
