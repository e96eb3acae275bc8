"""Declare keys (`Section`, `key`), and answer what is known about them: paths, allowed values, which are resumable."""

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Auto = Literal["auto"]

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Section(BaseModel):
    """Holds a section of a recipe. It is immutable, converts no values ("8" is not 8), and refuses undeclared keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def key(default: Any, meaning: str = "", *, resumable: bool = False, **more: Any) -> Any:
    """Declare one key of a section.

    Args:
        default: the value of the key if a recipe leaves it out.
        meaning: what the key does, as a phrase for users, with its unit; a section has none.
        resumable: whether a run may change the key, or the whole section, when it is resumed. Such a key says only how the
            same numbers are computed, watched or kept.
        more: further arguments of `pydantic.Field`.
    """
    return Field(default, description=meaning, json_schema_extra={"resumable": resumable}, **more)


def sections(schema: type[Section], path: str = "", kind: str = "") -> Iterator[tuple[str, str, type[Section]]]:
    """Yield (path, kind, class) of `schema` and of every section inside it.

    `kind` is the type that chooses a section among several in one place, such as "LARS", and otherwise empty.
    """
    yield path, kind, schema
    for name, field in schema.model_fields.items():
        inner = inner_sections(field)
        for option in inner:
            yield from sections(option, join(path, name), option.KIND if len(inner) > 1 else "")


def fields(schema: type[Section]) -> dict[str, FieldInfo]:
    """Return {path: declaration} of every key and section inside `schema`, with those of all optimizers."""
    return {join(path, name): field for path, _, at in sections(schema) for name, field in at.model_fields.items()}


def key_paths(schema: type[Section]) -> list[str]:
    """Return the path of every key of `schema`, such as "crossbatch.data.path", without those of sections."""
    return [path for path, field in fields(schema).items() if not inner_sections(field)]


def resumable_keys(schema: type[Section]) -> tuple[str, ...]:
    """Return the paths of the keys and sections of `schema` that a resumed run may change."""
    return tuple(path for path, field in fields(schema).items() if field.json_schema_extra == {"resumable": True})


def covers(key: str, path: str) -> bool:
    """Tell whether `key` is `path` or a section around it."""
    return path == key or path.startswith(f"{key}.")


def join(path: str, name: str) -> str:
    """Return the path of `name` in the section at `path`."""
    return f"{path}.{name}" if path else name


def inner_sections(field: FieldInfo) -> list[Any]:
    """Return the section that a key holds, or those that it may hold; none if it holds values."""
    return [option for option in _options(field.annotation) if isinstance(option, type) and issubclass(option, Section)]


def describe_allowed(field: FieldInfo) -> str:
    """Return the allowed values of a key in words, such as `a whole number (>= 1) or "auto"`."""
    words = [_describe(option, field.metadata) for option in _options(field.annotation) if option is not type(None)]
    return " or ".join(dict.fromkeys(words))


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type: `int | Literal["auto"]` -> (int, Literal["auto"])."""
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _describe(hint: Any, bounds: typing.Sequence[Any]) -> str:
    """Return the values of a type without alternatives in words, with the limits that pydantic checks."""
    if get_origin(hint) is Annotated:
        return _describe(get_args(hint)[0], hint.__metadata__)
    if get_origin(hint) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    words = _WORDS.get(hint, "a JSON object")
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        if get_origin(item) is Literal:
            return f"a list of {_describe(item, ())}"
        words = "a list of numbers" if rest == [...] else f"a list of {1 + len(rest)} numbers"
        bounds = getattr(item, "__metadata__", ())
    found = [
        f"{sign} {getattr(bound, name):g}" for bound in bounds for name, sign in _BOUNDS.items() if hasattr(bound, name)
    ]
    return f"{words} ({' and '.join(found)})" if found else words
