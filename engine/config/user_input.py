"""Turn errors about arguments and files into errors about the configuration keys and flags that they come from."""

import contextlib
import re
from collections.abc import Iterator

from crossbatch import InputError


@contextlib.contextmanager
def user_input(key: str, **keys: str) -> Iterator[None]:
    """Raise a ValueError or an OSError from inside the block as an InputError that names `key`.

    `models`, `data` and the optimizers know no configuration keys: their errors are about arguments, and begin with the name of
    the argument where they have several.

    Args:
        key: path of a key, or a flag; or a section with a dot at its end, such as "crossbatch.model.", where the arguments have
            the names of its keys.
        keys: {name of an argument: path of the key that it comes from}, for arguments that do not fit `key`.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError) as error:
        text = f"{error}; make it readable" if isinstance(error, OSError) else str(error)
        for argument, path in keys.items():
            if re.match(rf"{argument}\b", text):
                raise InputError(path + text.removeprefix(argument)) from error
        raise InputError(key + text if key.endswith(".") else f"{key}: {text}") from error
