"""The one place where errors about arguments become errors about configuration keys."""

import contextlib
import re
from collections.abc import Iterator

from crossbatch import InputError


@contextlib.contextmanager
def user_input(key: str, **keys: str) -> Iterator[None]:
    """Raise a ValueError from inside the block as an InputError that names `key`.

    `models`, `data` and the optimizers know no configuration keys: their ValueErrors are about arguments.

    Args:
        key: path of the key, or the flag, that the arguments come from.
        keys: where single arguments come from another key, {argument: its key}; it is taken for messages that begin with the
            name of the argument.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        first = re.match(r"\w*", str(error))
        raise InputError(f"{keys.get(first[0], key) if first else key}: {error}") from error
