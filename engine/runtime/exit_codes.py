"""Exit codes: 0 done, 2 the input was wrong, 3 the run stopped itself; anything else is a bug and shows its traceback."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import World, world_from_environment


def run_main(main: Callable[[], None]) -> None:
    """Calls a launcher's main. All ranks see wrong input alike, so rank 0 speaks; a rank that stops speaks for itself.

    Among several ranks a process that failed ends without tidying up, which could wait for those that are gone.
    """
    try:
        main()
    except InputError as error:
        if world_from_environment().is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RunStopped as error:
        world = world_from_environment()
        # The line and its end in one write: launchers run `python -u`, and several ranks may stop at once.
        print(f"stopped (rank {world.rank}): {error}\n", end="", file=sys.stderr, flush=True)
        _exit(3, world)
    except Exception:
        world = world_from_environment()
        if world.size == 1:
            raise
        traceback.print_exc()
        _exit(1, world)


def _exit(code: int, world: World) -> None:
    if world.size == 1:
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
