"""Turn what a command raises into its exit code: 0 done, 2 wrong input, 3 the run stopped itself; any other is a bug."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import World, world_from_environment

BUG, WRONG_INPUT, STOPPED = 1, 2, 3


def run_main(main: Callable[[], None]) -> None:
    """Call a command's `main` and turn what it raises into a message on stderr and an exit code.

    All ranks find the same fault with the input, so only rank 0 prints it; a rank that stops prints its own reason.
    """
    try:
        main()
    except InputError as error:
        if world_from_environment().is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
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


def _exit(code: int, world: World) -> NoReturn:
    """End this process; among several ranks without cleaning up, which could wait for ranks that are gone."""
    if world.size == 1:
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
