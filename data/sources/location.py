"""Parses a data path strictly: a folder, or scheme://target?option=number,option=number.

`&` separates options, too, as in URLs. But a shell ends the command there, and `deepspeed --hostfile` hands the command to one
without quotes.
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qsl

_OPTIONS: dict[str, dict[str, int]] = {  # of each scheme, with their defaults
    "synthetic": {"size": 64, "classes": 10, "eval": 0},  # eval: number of evaluation images; 0: a tenth of train
    "shapes": {"train": 4000, "val": 800, "size": 64, "seed": 0},
    "cifar10": {},
    "cifar100": {},
    "flowers": {},
    "pets": {},
}


def parse(path: str | Path) -> tuple[str, str, dict[str, int]]:
    """Split a data path into its scheme ("" for a folder), its folder or (synthetic) number of images, and its options.

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
        return "", str(Path(text).expanduser()), {}
    if scheme not in _OPTIONS:
        allowed = "a folder, " + ", ".join(f"{name}://..." for name in _OPTIONS)
        raise ValueError(f"unknown scheme in {text!r}{_nearest(scheme, _OPTIONS)}; allowed: {allowed}")
    target, _, query = rest.partition("?")
    options = {**_OPTIONS[scheme], **_parse_query(query, list(_OPTIONS[scheme]), text)}
    if scheme == "synthetic":
        if not (target.isdecimal() and int(target) > 0):
            raise ValueError(f"{text!r} needs a number of images, as in synthetic://1000?size=64,classes=10")
        return scheme, target, options
    if not target:
        raise ValueError(f"{text!r} needs a folder, as in {scheme}://datasets")
    return scheme, str(Path(target).expanduser()), options


def _parse_query(query: str, allowed: list[str], text: str) -> dict[str, int]:
    """Return the options in `query`; `text` is the whole path, for the messages."""
    given: dict[str, int] = {}
    for name, value in parse_qsl(query.replace(",", "&"), keep_blank_values=True):
        if name not in allowed:
            names = ", ".join(allowed) or "none"
            raise ValueError(f"unknown option {name!r} in {text!r}{_nearest(name, allowed)}; allowed: {names}")
        if name in given:
            raise ValueError(f"option {name!r} is given twice in {text!r}; give it once")
        least = 0 if name == "seed" else 1
        if not value.isdecimal() or int(value) < least:
            raise ValueError(f"option {name!r} in {text!r} is {value!r}; it must be an integer >= {least}")
        given[name] = int(value)
    return given


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
