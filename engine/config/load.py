"""JSON -> a checked dataclass: duplicate, unknown and misspelt keys stop the run, each with the nearest valid key.

DeepSpeed ignores top-level keys that it does not know, so a typo there trains with a default and nobody notices.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, overload

from crossbatch import InputError
from crossbatch.engine.config.schema import OPTIMIZERS, REFUSED_DEEPSPEED_KEYS, Config, OptimizerConfig

Schema = TypeVar("Schema")


@overload
def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config: ...
@overload
def load_config(path: str | Path | None, overrides: Iterable[str], schema: type[Schema]) -> Schema: ...
def load_config(path: str | Path | None, overrides: Iterable[str] = (), schema: type = Config) -> Any:
    """Reads a recipe and applies `a.b.c=value` overrides (values are JSON, or plain text where they are not).

    Args:
        path: the recipe; None means all defaults.
        overrides: in order, later ones win.
        schema: the dataclass that says which keys there are: of pretraining, or of an evaluation.

    Raises:
        InputError: for anything that is not a valid configuration.
    """
    raw = {} if path is None else _read_json(Path(path))
    for override in overrides:
        _override(raw, override)
    return parse_config(raw, schema)


@overload
def parse_config(raw: Mapping[str, Any]) -> Config: ...
@overload
def parse_config(raw: Mapping[str, Any], schema: type[Schema]) -> Schema: ...
def parse_config(raw: Mapping[str, Any], schema: type = Config) -> Any:
    """A plain dict (as `to_dict` makes it) -> `schema`."""
    return _section(schema, raw, "", schema)


def to_dict(config: Any) -> dict[str, Any]:
    """`Config` -> a plain JSON-able dict, without the DeepSpeed keys that were not given."""
    raw = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            raw[item.name] = to_dict(value)
        elif value is not None or item.name == "path":
            raw[item.name] = dict(value) if isinstance(value, Mapping) else value
    return raw


def key_paths(section: type = Config, prefix: str = "") -> list[str]:
    """Every valid key path, optimizer parameters of all types included."""
    paths = []
    for name, hint in typing.get_type_hints(section).items():
        for option in options_of(hint):
            if dataclasses.is_dataclass(option):
                paths += key_paths(typing.cast(type, option), f"{prefix}{name}.")
        if not any(dataclasses.is_dataclass(option) for option in options_of(hint)):
            paths.append(prefix + name)
    return list(dict.fromkeys(paths))


# --- reading -------------------------------------------------------------------------------------------------------


class _Pairs(list):
    """A JSON object as its (key, value) pairs, so that duplicates can still be seen."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise InputError(f"--deepspeed_config {path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--deepspeed_config {path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"--deepspeed_config {path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(pairs, _Pairs):
        raise InputError(f"--deepspeed_config {path}: holds a {type(pairs).__name__}; allowed: one JSON object")
    return _unique(pairs, "", path)


def _unique(pairs: _Pairs, prefix: str, path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise InputError(f"{prefix}{name}: given twice in {path}; allowed: once; remove one of the two")
        result[name] = _unique(value, f"{prefix}{name}.", path) if isinstance(value, _Pairs) else value
    return result


def _override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"--set {override}: allowed: path=value, as in --set crossbatch.schedule.epochs=300")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, name = path.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise InputError(f"--set {override}: {parent} is a value, not a section")
    raw[name] = value


# --- checking ------------------------------------------------------------------------------------------------------


def _section(section: type, raw: Any, prefix: str, schema: type) -> Any:
    if not isinstance(raw, Mapping):
        raise InputError(f"{prefix[:-1] or 'the recipe'}: given {raw!r}; allowed: a JSON object")
    hints = typing.get_type_hints(section)
    for name in raw:
        if name not in hints:
            raise InputError(_unknown(name, prefix, list(hints), schema))
    if section is OptimizerConfig:
        hints["params"] = _optimizer_params(raw, prefix)
    values = {
        item.name: _value(raw[item.name], hints[item.name], prefix + item.name, item.metadata, schema)
        for item in dataclasses.fields(section)
        if item.name in raw
    }
    if section is OptimizerConfig and "params" not in values:
        values["params"] = hints["params"]()
    return section(**values)


def _optimizer_params(raw: Mapping[str, Any], prefix: str) -> type:
    name = raw.get("type", "LARS")
    if name not in OPTIMIZERS:
        raise InputError(f"{prefix}type: given {name!r}; allowed: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _unknown(name: str, prefix: str, valid: list[str], schema: type) -> str:
    if not prefix and name in REFUSED_DEEPSPEED_KEYS:
        return f"{name}: a DeepSpeed key that crossbatch does not take; {REFUSED_DEEPSPEED_KEYS[name]}"
    everywhere = key_paths(schema)
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] == name or path.endswith(f".{name}")]
    near = elsewhere[:1] or [prefix + match for match in difflib.get_close_matches(name, valid, n=1)]
    near = near or difflib.get_close_matches(prefix + name, everywhere, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(valid)}"
    return f"{prefix}{name}: no such key; {hint}"


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: `int | Literal["auto"]` -> (int, Literal["auto"])."""
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _value(value: Any, hint: Any, path: str, bounds: Mapping[str, Any], schema: type) -> Any:
    options = options_of(hint)
    if len(options) == 1 and dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, f"{path}.", schema)
    for option in options:
        fits, converted = _fits(value, option)
        if fits:
            if isinstance(converted, tuple):
                return tuple(_in_bounds(item, path, bounds) for item in converted)
            return _in_bounds(converted, path, bounds)
    raise InputError(f"{path}: given {value!r}; allowed: {describe_allowed(options, bounds)}")


def _fits(value: Any, option: Any) -> tuple[bool, Any]:
    if get_origin(option) is Literal:
        return (not isinstance(value, bool) and value in get_args(option)), value
    if get_origin(option) is tuple:
        kind, *rest = get_args(option)
        if rest == [...]:
            some = isinstance(value, (list, tuple)) and len(value) > 0 and all(_fits(v, kind)[0] for v in value)
            return some, tuple(value) if some else value
        length = len(get_args(option))
        numbers = isinstance(value, (list, tuple)) and len(value) == length and all(_fits(v, float)[0] for v in value)
        return numbers, tuple(float(v) for v in value) if numbers else value
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is type(None):
        return value is None, value
    kind = get_origin(option) or option
    return isinstance(value, kind), value


def _in_bounds(value: Any, path: str, bounds: Mapping[str, Any]) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, above = bounds["low"], bounds["high"], bounds["above"]
        inside = value == value and abs(value) != float("inf")
        inside = inside and (low is None or value >= low) and (high is None or value <= high)
        if not inside or (above is not None and value <= above):
            raise InputError(f"{path}: given {value!r}; allowed: {_range(bounds)}")
    return value


def _range(bounds: Mapping[str, Any]) -> str:
    signs = {"low": ">=", "above": ">", "high": "<="}
    return (
        " and ".join(f"{sign} {bounds[name]:g}" for name, sign in signs.items() if bounds[name] is not None) or "finite"
    )


def describe_allowed(options: tuple[Any, ...], bounds: Mapping[str, Any]) -> str:
    """The allowed values in words."""
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words += [json.dumps(choice) for choice in get_args(option)]
        elif get_origin(option) is tuple:
            length = "" if get_args(option)[-1] is ... else f"{len(get_args(option))} "
            words.append(f"a list of {length}numbers")
        elif option is not type(None):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(names.get(option, "a JSON object"))
    text = " or ".join(words)
    return text if _range(bounds) == "finite" else f"{text} ({_range(bounds)})"
