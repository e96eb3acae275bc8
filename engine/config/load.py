"""Read a recipe and check it: duplicate, unknown and misspelt keys stop the run, each with the nearest valid key.

DeepSpeed ignores top-level keys that it does not know, so a typo there trains with a default and nobody notices.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

import crossbatch
from crossbatch import InputError
from crossbatch.data.sources.location import REMOTE, parse
from crossbatch.engine.config.aliases import ALIASES, Pairs, check_agreement, current_path, former_name, rename
from crossbatch.engine.config.deepspeed_keys import without_deepspeed_keys
from crossbatch.engine.config.keys import Section, describe_allowed, fields, inner_sections, join
from crossbatch.engine.config.schema import Config, DeepSpeedConfig
from crossbatch.engine.config.user_input import user_input

Schema = TypeVar("Schema", bound=Section)


def load_config(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    schema: type[Schema] = Config,  # pyright: ignore[reportArgumentType]
) -> Schema:
    """Read a recipe and apply `a.b.c=value` overrides (values are JSON, or plain text where they are not).

    Args:
        path: the recipe; None means all defaults.
        overrides: in order, later ones win.
        schema: the section that says which keys there are: `Config` of pretraining, or that of another command.

    Raises:
        InputError: for anything that is not a valid configuration.
    """
    raw = {} if path is None else rename(_read_json(Path(path)))
    _apply(overrides, raw, schema)
    return _checked(raw, schema)


def parse_config(raw: Mapping[str, Any], schema: type[Schema] = Config) -> Schema:  # pyright: ignore[reportArgumentType]
    """Return the configuration that a plain dict holds, as `to_dict` makes it. Raises InputError."""
    return _checked(rename(raw), schema)


def to_dict(config: Section) -> dict[str, Any]:
    """Return a configuration as a plain dict for JSON, without the keys that are None."""
    return config.model_dump(mode="json", exclude_none=True)


def _read_json(path: Path) -> Pairs:
    """Return the JSON object in a file; a bare name ("bs4096") that is not a file means a recipe of the package."""
    where, folder = f"--deepspeed_config {path}", Path(crossbatch.__file__).parent / "ds_configs"
    recipe = folder / f"{path.name.removesuffix('.json')}.json"
    if path.name == str(path) and not path.exists() and recipe.exists():
        path = recipe
    try:
        pairs = _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(map(str, path.parent.glob("*.json"))) or sorted(recipe.stem for recipe in folder.glob("*.json"))
        raise InputError(f"{where}: no such file; there are {', '.join(near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(pairs, Pairs):
        raise InputError(f"{where}: holds a {type(pairs).__name__}; allowed: one JSON object")
    return pairs


def _parsed(text: str) -> Any:
    """Return the JSON value in `text`; a number with an exponent that is whole, such as 5e8, is a whole number below 2^63."""

    def number(literal: str) -> float:
        value = float(literal)
        whole = "e" in literal.lower() and value.is_integer() and abs(value) < 2**63
        return int(value) if whole else value

    return json.loads(text, object_pairs_hook=Pairs, parse_float=number)


def _apply(overrides: Iterable[str], raw: dict[str, Any], schema: type[Section]) -> None:
    """Write the overrides into `raw`."""
    spelt: dict[str, str] = {}
    declared = fields(schema)
    for override in overrides:
        given, separator, text = override.partition("=")
        if not separator or not given:
            raise InputError(
                f"--set {override}: not path=value; allowed: for example --set crossbatch.schedule.epochs=300"
            )
        try:
            value = _parsed(text)
        except json.JSONDecodeError:
            value = text
        path = current_path(given)
        # A folder may be called 2012, true or 1e3.
        takes_text = path in declared and describe_allowed(declared[path]) == "text"
        value = text if takes_text and not isinstance(value, str | None) else rename(value, given)
        *parents, name = path.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise InputError(f"--set {override}: {parent} is a value, not a section, and has no keys inside it")
        if spelt.setdefault(path, given) != given:
            check_agreement(path, section.get(name, value), value)
        section[name] = value


def _checked(raw: dict[str, Any], schema: type[Schema]) -> Schema:
    _check_size_of_numbers(raw)
    if issubclass(schema, DeepSpeedConfig):
        raw = without_deepspeed_keys(raw, schema.model_fields)
    try:
        checked = schema.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0]["loc"], raw, schema)) from None
    data = getattr(getattr(checked, "crossbatch", None), "data", None)
    if (path := getattr(data, "path", None)) and path.partition("://")[0] in REMOTE:
        with user_input("crossbatch.data.path"):  # before anything is written: it may hold credentials
            parse(path)
    return checked


def _check_size_of_numbers(given: Any, path: str = "") -> None:
    """Raise InputError for a whole number that does not fit into 64 bits, which nothing behind the configuration could hold."""
    if isinstance(given, int) and not -(2**63) <= given < 2**63:
        raise InputError(f"{path}: given {given}; allowed: a whole number below 2^63")
    for name, value in given.items() if isinstance(given, dict) else ():
        _check_size_of_numbers(value, join(path, name))


def _explain(location: tuple[str | int, ...], raw: Any, schema: type[Section]) -> str:
    """Return the message for the key or value at `location`, where pydantic found the recipe at fault."""
    path, given, allowed, inner = "", raw, "a JSON object", [schema]
    section, siblings = raw, {}  # around `given`, and what is declared there
    for name in map(str, location):
        if not inner or not isinstance(given, dict):
            break  # the rest of `location` is inside a value, or tells alternatives of its type apart
        keys, at = inner[0].model_fields, join(path, name)
        if name not in keys:
            chosen = section.get("type", siblings["type"].default) if "type" in siblings else None
            return f"{at}: {_unknown(name, path, list(keys), schema, chosen)}{former_name(at)}"
        inner, allowed = inner_sections(keys[name]), describe_allowed(keys[name])
        if len(inner) > 1:
            inner = [option for option in inner if given.get("type", keys["type"].default) == option.KIND]
        path, section, siblings, given = at, given, keys, given[name]
    return f"{path or 'the recipe'}: given {given!r}; allowed: {allowed}{former_name(path)}"


def _unknown(name: str, section: str, valid: list[str], schema: type[Section], chosen: str | None) -> str:
    """Return what is wrong with the key `name` in `section`, which has the `valid` ones as those of the type `chosen`."""
    at, everywhere = join(section, name), list(fields(schema))
    if at in everywhere:
        type_key = f"{section.rpartition('.')[0]}.type"
        return f"no such key with {type_key} {chosen}; allowed here: {', '.join(valid)}; or change {type_key}"
    everywhere += [alias for alias in ALIASES if current_path(alias) in everywhere]
    near = [path for path in everywhere if path.rpartition(".")[2] == name]
    near = near or [join(section, match) for match in difflib.get_close_matches(name, valid, n=1)]
    near = near or difflib.get_close_matches(at, everywhere, n=1)
    return "no such key; " + (f"did you mean {current_path(near[0])}?" if near else f"allowed here: {', '.join(valid)}")
