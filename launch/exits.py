"""Exit codes: 0 done, 2 the input was wrong, 3 the run stopped itself; anything else is a bug and shows its traceback."""

import sys
from collections.abc import Callable

from crossbatch import InputError, RunStopped
from crossbatch.engine.distributed import world_from_environment


def run_main(main: Callable[[], None]) -> None:
    """Calls a launcher's main; rank 0 prints the one message."""
    try:
        main()
    except InputError as error:
        _fail("error", error, 2)
    except RunStopped as error:
        _fail("stopped", error, 3)


def _fail(word: str, error: Exception, code: int) -> None:
    if world_from_environment().is_main:
        print(f"{word}: {error}", file=sys.stderr, flush=True)
    sys.exit(code)
