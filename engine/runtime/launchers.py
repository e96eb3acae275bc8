"""Watches the launcher that has started a rank: notices when it is gone, or has cut the command line off."""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from crossbatch import InputError

LAUNCHER = "CROSSBATCH_LAUNCHER"  # the process id of the command of launch/legacy_launch.py that has started this rank
# Set by torchrun, `deepspeed`, Open MPI and MPICH in their ranks, but not where a shell has started a rank: that may end.
_OTHER_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


def end_with_launcher() -> None:
    """Send this process a SIGTERM, so that it saves and ends, when the launcher that has started it is gone.

    A launcher that dies leaves its ranks, which would train on with nobody to stop them.
    """
    if LAUNCHER not in os.environ and not any(name in os.environ for name in _OTHER_LAUNCHERS):
        return
    # Ours may be gone already.
    ours = [int(os.environ[LAUNCHER])] if LAUNCHER in os.environ else _launchers()

    def watch() -> None:
        while _launchers() == ours and not _has_lost_ssh():
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _launchers() -> list[int]:
    """Return the process that has started this one; under `deepspeed` also the one that has started that."""
    parents = [os.getppid()]
    if "CROSS_RANK" in os.environ:
        try:
            status = Path(f"/proc/{parents[0]}/stat").read_text()
            parents.append(int(status.rpartition(")")[2].split()[1]))
        except OSError:  # it is gone, or this is not Linux
            parents.append(0)
    return parents


def _has_lost_ssh() -> bool:
    """Return whether nobody reads this rank's output on the machine from which `deepspeed --hostfile` has started it by ssh."""
    if int(os.environ.get("CROSS_SIZE", "1")) == 1:
        return False
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def check_whole_command() -> None:
    """Raise InputError if `deepspeed --hostfile` has lost the end of the command line.

    It quotes only arguments with spaces for the shell of the other node. At an `&` that shell starts what it has read so far in
    the background, which shows: the input is /dev/null, and the shell is gone.
    """
    if int(os.environ.get("CROSS_SIZE", "1")) == 1:
        return
    try:
        in_background = os.readlink("/proc/self/fd/0") == os.devnull  # noqa: PTH115
        started_by = Path(f"/proc/{_launchers()[1]}/cmdline").read_bytes()
    except OSError:
        return
    if in_background and b"deepspeed" not in started_by:
        raise InputError(
            f"deepspeed --hostfile: a shell has cut the command line off after {sys.argv[-1]!r}; write , for & in data paths, "
            f"or put them into quotes twice: --data '\"...\"'"
        )
