"""Turn what a command raises into its exit code: 0 done, 2 wrong input, 3 the run stopped itself; any other is a bug."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from crossbatch import InputError, RunStopped
from crossbatch.data.workers import is_stuck
from crossbatch.engine.runtime.launchers import check_whole_command
from crossbatch.engine.runtime.same_run import refuse
from crossbatch.engine.runtime.world import World, world_from_environment

BUG, WRONG_INPUT, STOPPED = 1, 2, 3

# What the machine refuses, whoever asks: the exit code and the remedy. Any other OSError is a bug.
REFUSED = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), (WRONG_INPUT, "allow it, or give another path")),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), (WRONG_INPUT, "give another path")),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), (STOPPED, "make room, and repeat the command")),
    **dict.fromkeys(
        (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV), (STOPPED, "check the disk, and repeat the command")
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), (STOPPED, "raise the limit of open files (ulimit -n), and repeat the command")
    ),
    errno.ENOMEM: (STOPPED, "give the job more memory, and repeat the command"),
}


def run_main(main: Callable[[], None]) -> None:
    """Call a command's `main` and turn what it raises into a message on stderr and an exit code.

    Rank 0 prints what is wrong with the input; a rank that stops prints its own reason.
    """
    try:
        check_whole_command()
        main()
    except InputError as error:
        _refuse(str(error))
    except RunStopped as error:
        _stop(str(error))
    except KeyboardInterrupt:
        _stop("interrupted; what was saved before is good: repeat the command")
    except MemoryError:
        _stop(f"out of memory; {REFUSED[errno.ENOMEM][1]}")
    except OSError as error:
        code, remedy = REFUSED.get(error.errno or 0, (BUG, ""))
        if code == BUG:
            _fail()
        where = f"{error.filename}: " if error.filename is not None else ""
        (_refuse if code == WRONG_INPUT else _stop)(f"{where}{error.strerror}; {remedy}")
    except Exception:
        _fail()
    if is_stuck():
        _leave(0)


def _refuse(message: str) -> NoReturn:
    refuse(_world(), message)
    if is_stuck():
        _leave(WRONG_INPUT)
    sys.exit(WRONG_INPUT)


def _stop(message: str) -> NoReturn:
    world = _world()
    # The line and its end in one write: launchers run `python -u`, and several ranks may stop at once.
    print(f"stopped (rank {world.rank}): {message}\n", end="", file=sys.stderr, flush=True)
    if world.size > 1 or is_stuck():
        _leave(STOPPED)
    sys.exit(STOPPED)


def _fail() -> None:
    """Show the traceback of a bug."""
    if _world().size == 1 and not is_stuck():
        raise
    traceback.print_exc()
    _leave(BUG)


def _world() -> World:
    """Return this rank, or a world of one where the environment is what is wrong."""
    try:
        return world_from_environment()
    except InputError:
        return World(0, 1, 0, 1)


def _leave(code: int) -> NoReturn:
    """End this process without cleaning up, which could wait for ranks that are gone, or for a disk that does not answer."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
