"""Parses a data path strictly: a folder or scheme://target, with options behind it as in DIR?fraction=0.1,seed=3.

`&` separates options, too, as in URLs. But a shell ends the command there, and `deepspeed --hostfile` hands the command to one
without quotes. A comma in a value is written as %2C.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

REMOTE = ("s3", "gs", "https", "http")  # tar shards of a server

_OPTIONS: dict[str, dict[str, int | str]] = {  # of each scheme, with their defaults; "" means not given
    "": {},
    "synthetic": {"size": 64, "classes": 10, "eval": 0},  # eval: number of evaluation images; 0: a tenth of train
    "shapes": {"train": 4000, "val": 800, "size": 64, "seed": 0},
    "cifar10": {},
    "cifar100": {},
    "flowers": {},
    "pets": {},
    "list": {"image": "", "label": "", "eval": ""},  # two columns, and a second list to evaluate on
    "hf": {"split": "", "eval": "", "image": "", "label": "", "config": ""},
    **{scheme: {"eval": ""} for scheme in REMOTE},  # where the shards to evaluate on are
}
_SUBSET = {"fraction": 0.0, "per_class": 0, "seed": 0}  # of any scheme
_EXAMPLES = {
    "list": ("a file", "list://train.csv"),
    "hf": ("a folder or name", "hf://uoft-cs/cifar10"),
    "s3": ("a bucket", "s3://bucket/imagenet"),
    "gs": ("a bucket", "gs://bucket/imagenet"),
    "https": ("a host", "https://host/imagenet"),
    "http": ("a host", "http://host/imagenet"),
}  # others: a folder


@dataclass(frozen=True)
class RemoteOptions:
    """Says how remote shards are read.

    Attributes:
        cache_dir: a folder on a local disk where images are kept; None reads them anew in every epoch.
        cache_gib: largest size of that folder.
        retry_s: for how long a request that fails is repeated.
    """

    cache_dir: Path | None = None
    cache_gib: float = 32.0
    retry_s: float = 240.0


class Location(NamedTuple):
    """Holds the parts of a data path.

    Attributes:
        scheme: "" for a folder.
        target: a folder or file, the number of images (synthetic), or what follows the scheme of an address.
        options: those of the scheme, all of them.
        subset: arguments of `subset.Subset`; {} for all images.
    """

    scheme: str
    target: str
    options: dict[str, Any]
    subset: dict[str, Any]


def parse(path: str | Path) -> Location:
    """Split a data path into its parts.

    Raises TypeError if `path` is neither a str nor a Path, and ValueError with what is allowed if it is malformed.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` is a {type(path).__name__}; it must be a str or a Path; give a folder, or synthetic://1000"
        )
    text = str(path)
    scheme, separator, rest = text.partition("://")
    if not text:
        raise ValueError("the path is empty; give a folder, or synthetic://1000 to try without images")
    if not separator:
        scheme, rest = "", text
    elif not scheme or scheme not in _OPTIONS:
        allowed = "a folder, " + ", ".join(f"{name}://..." for name in _OPTIONS if name)
        raise ValueError(f"unknown scheme in {text!r}{_nearest(scheme, _OPTIONS)}; allowed: {allowed}")
    if scheme in REMOTE:
        target, _, query = rest.partition("?")
        if "@" in target.partition("/")[0]:
            raise ValueError(
                f"{scheme}://...: the path holds credentials, which would be written to config.json; give them another way "
                f"(docs/data.md, Remote shards)"
            )
        text = f"{scheme}://{target}"  # without the query, which may hold a token
        unknown = [name for name in re.findall(r"([^=,&]+)[^,&]*", query) if name not in ("eval", *_SUBSET)]
        if unknown:
            raise ValueError(
                f"unknown option in {text!r}; allowed: eval, {', '.join(_SUBSET)}; a token does not belong in a path, which "
                f"is written to config.json (docs/data.md, Remote shards)"
            )
    else:  # a folder may have a question mark in its name
        target, _, query = (rest, "", "") if expanded(rest).exists() else rest.partition("?")
    given = _parse_query(query, {**_OPTIONS[scheme], **_SUBSET}, text)
    options = {name: given.get(name, default) for name, default in _OPTIONS[scheme].items()}
    subset = {name: given[name] for name in _SUBSET if name in given}
    if "fraction" not in subset and "per_class" not in subset:
        if "seed" in given and "seed" not in options:
            raise ValueError(
                f"option 'seed' in {text!r} needs fraction or per_class beside it; add one, or leave it out"
            )
        subset = {}
    if "fraction" in subset and "per_class" in subset:
        raise ValueError(f"{text!r} has both fraction and per_class; give one of them")
    if scheme == "synthetic":
        if not (target.isdecimal() and int(target) > 0):
            raise ValueError(f"{text!r} needs a number of images, as in synthetic://1000?size=64,classes=10")
        return Location(scheme, target, options, subset)
    if not target:
        what, example = _EXAMPLES.get(scheme, ("a folder", f"{scheme}://datasets"))
        raise ValueError(f"{text!r} needs {what}, as in {example}")
    if scheme in REMOTE:
        return Location(scheme, target.rstrip("/"), options, subset)
    return Location(scheme, str(expanded(target)), options, subset)


def expanded(path: str) -> Path:
    """Return `path` with its home directory, or as it is where nobody has that name (Path.expanduser raises RuntimeError)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def _parse_query(query: str, defaults: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the options in `query`, each of the type of its default; `text` is the whole path, for the messages."""
    given: dict[str, Any] = {}
    for name, _, value in (option.partition("=") for option in re.split("[,&]", query) if option):
        value = unquote(value)
        if name not in defaults:
            names = ", ".join(defaults)
            raise ValueError(f"unknown option {name!r} in {text!r}{_nearest(name, defaults)}; allowed: {names}")
        if name in given:
            raise ValueError(f"option {name!r} is given twice in {text!r}; give it once")
        where = f"option {name!r} in {text!r} is {value!r}"
        if isinstance(defaults[name], str):
            if not value:
                raise ValueError(f"{where}; it must not be empty")
            given[name] = value
        elif isinstance(defaults[name], float):
            if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value) or not 0 < float(value) <= 1:
                raise ValueError(f"{where}; it must be a number above 0 and at most 1")
            given[name] = float(value)
        else:
            least = 0 if name == "seed" else 1
            if not value.isdecimal() or int(value) < least:
                raise ValueError(f"{where}; it must be an integer >= {least}")
            given[name] = int(value)
    return given


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
