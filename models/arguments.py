"""Checks arguments for several modules. Every message begins with the name of the argument."""

import difflib
from collections.abc import Iterable
from numbers import Integral


def check_positive_integer(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer, and ValueError unless it is at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; {list_allowed(value, allowed)}")


def list_allowed(given: object, allowed: Iterable[str]) -> str:
    """Return the part of a message that lists what is allowed, and suggests the most similar name."""
    nearest = difflib.get_close_matches(str(given), allowed, n=1)
    return f"allowed: {', '.join(allowed)}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
