"""Nested dicts and their flat form, in which a key is the path to a value: {"a": {"b": 1}} and {"a.b": 1}."""

from collections.abc import Collection, Mapping
from typing import Any


def flatten(nested: Mapping[str, Any], separator: str = ".", leaves: Collection[str] = ()) -> dict[str, Any]:
    """Return {path: value} for every value of `nested`; a dict under one of the names in `leaves` counts as a value."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and name not in leaves:
            flat |= {f"{name}{separator}{path}": inner for path, inner in flatten(value, separator, leaves).items()}
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the nested dict that `flat` is the flat form of."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(separator)
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return nested
