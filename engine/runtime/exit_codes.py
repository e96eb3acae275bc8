"""Turn what a command raises into its exit code: 0 done, 2 wrong input, 3 the run stopped itself; any other is a bug."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import World, world_from_environment
from crossbatch.engine.runtime.launchers import check_whole_command, end_with_launcher
from crossbatch.engine.runtime.same_run import refuse

BUG, WRONG_INPUT, STOPPED = 1, 2, 3


def run_main(main: Callable[[], None]) -> None:
    """Call a command's `main` and turn what it raises into a message on stderr and an exit code.

    Rank 0 prints what is wrong with the input; a rank that stops prints its own reason.
    """
    end_with_launcher()
    try:
        check_whole_command()
        main()
    except InputError as error:
        refuse(_world(), str(error))
        sys.exit(WRONG_INPUT)
    except RunStopped as error:
        world = world_from_environment()
        # The line and its end in one write: launchers run `python -u`, and several ranks may stop at once.
        print(f"stopped (rank {world.rank}): {error}\n", end="", file=sys.stderr, flush=True)
        _exit(STOPPED, world)
    except Exception:
        world = world_from_environment()
        if world.size == 1:
            raise
        traceback.print_exc()
        _exit(BUG, world)


def _world() -> World:
    """Return this rank, or a world of one where the environment is what is wrong."""
    try:
        return world_from_environment()
    except InputError:
        return World(0, 1, 0, 1)


def _exit(code: int, world: World) -> NoReturn:
    """End this process; among several ranks without cleaning up, which could wait for ranks that are gone."""
    if world.size == 1:
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
